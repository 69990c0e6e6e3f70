//! The chooser on a device that lies: of five kernels for a product one is right and fast.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use tallow_core::backend::{ArenaRules, Bindings, Buffer, DeviceInfo, Recording};
use tallow_core::kernel::{Body, Format, KernelId, Operand};
use tallow_core::plan::{Place, Plan, Span};
use tallow_core::session::Session;
use tallow_core::types::TensorType;
use tallow_core::{Error, Result};

/// Name, what it takes, what it costs by estimate.
const KERNELS: [(&str, u64, f64); 5] = [
    ("wrong_f32", 1, 1e-6),
    ("idle_f32", 1, 2e-6),
    ("slow_f32", 200, 3e-6),
    ("broken_f32", 1, 4e-6),
    ("fast_f32", 60, 5e-6),
];

type Memory = Arc<Mutex<Vec<Vec<u8>>>>;

/// Memory is a list; a buffer's address an index of it.
struct Liar {
    info: DeviceInfo,
    identity: &'static str,
    memory: Memory,
    recorded: AtomicUsize,
}

impl Liar {
    fn new(identity: &'static str) -> Arc<Self> {
        let arena = ArenaRules { align: 4 };
        let name = "liar".into();
        Arc::new(Liar {
            info: DeviceInfo { name, arena },
            identity,
            memory: Arc::default(),
            recorded: AtomicUsize::new(0),
        })
    }
    fn recorded(&self) -> usize {
        self.recorded.load(Ordering::SeqCst)
    }
}

impl Backend for Liar {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn identity(&self) -> String {
        self.identity.into()
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let mut all = self.memory.lock().unwrap();
        all.push(vec![0; bytes]);
        let raw = all.len() as u64 - 1;
        let keep = Arc::new(());
        Ok(Buffer { raw, bytes, keep })
    }
    fn upload(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        self.memory.lock().unwrap()[dst.raw as usize][at..at + src.len()].copy_from_slice(src);
        Ok(())
    }
    fn download(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        dst.copy_from_slice(&self.memory.lock().unwrap()[src.raw as usize][at..at + dst.len()]);
        Ok(())
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        let product = matches!(spec.body, Body::MatMul { .. });
        let one = |(i, (name, _, cost)): (usize, &(&'static str, u64, f64))| Candidate {
            kernel: KernelId(i as u32),
            name,
            workspace: 0,
            cost: *cost,
            prepare: vec![],
        };
        let all = KERNELS.iter().enumerate().map(one);
        Ok(if product { all.collect() } else { vec![] })
    }
    fn prepare(&self, _: Format, _: &Buffer, _: usize, _: &Operand, _: &Buffer) -> Result<()> {
        Ok(())
    }
    fn record(&self, plan: Arc<Plan>, bind: Bindings) -> Result<Box<dyn Recording>> {
        self.recorded.fetch_add(1, Ordering::SeqCst);
        let memory = self.memory.clone();
        Ok(Box::new(Tape { plan, bind, memory }))
    }
}

struct Tape {
    plan: Arc<Plan>,
    bind: Bindings,
    memory: Memory,
}

impl Tape {
    fn at(&self, s: &Span) -> usize {
        let b = match s.place {
            Place::Input(i) => &self.bind.inputs[i as usize],
            Place::Output(i) => &self.bind.outputs[i as usize],
            Place::Prepared(_) | Place::Arena => unreachable!("nothing asked for it"),
        };
        b.raw as usize
    }
}

impl Recording for Tape {
    fn replay(&mut self) -> Result<()> {
        let mut memory = self.memory.lock().unwrap();
        for s in &self.plan.steps {
            let (name, us, _) = KERNELS[s.kernel.0 as usize];
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(us) {}
            if name == "broken_f32" {
                return Err(Error::Device {
                    device: "liar".into(),
                    what: "it burns".into(),
                });
            }
            let floats = |b: &[u8]| -> Vec<f32> {
                let one = |c: &[u8]| f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
                b.chunks_exact(4).map(one).collect()
            };
            let shape = &s.spec.inputs[1].layout.shape.0;
            let (k, n) = (shape[0], shape[1]);
            let x = floats(&memory[self.at(&s.reads[0])]);
            let w = floats(&memory[self.at(&s.reads[1])]);
            let off = if name == "wrong_f32" { 0.01 } else { 0.0 };
            let y = x.chunks(k).flat_map(|row| {
                let dot = |j: usize| (0..k).map(|i| row[i] * w[i * n + j]).sum::<f32>();
                (0..n).map(|j| dot(j) + off).collect::<Vec<_>>()
            });
            let bytes: Vec<u8> = y.flat_map(f32::to_le_bytes).collect();
            if let Some(w) = s.writes[0].as_ref().filter(|_| name != "idle_f32") {
                memory[self.at(w)] = bytes;
            }
        }
        Ok(())
    }
    fn replay_timed(&mut self) -> Result<Vec<f64>> {
        self.replay().map(|()| vec![])
    }
}

fn spec(n: usize) -> KernelSpec {
    let dense = |shape: [usize; 2]| Operand::dense(&TensorType::f32(shape));
    KernelSpec {
        body: Body::MatMul {
            ta: false,
            tb: false,
            alpha: 1.0.into(),
        },
        inputs: vec![dense([3, 5]), dense([5, n])],
        outputs: vec![Some(dense([3, n]))],
    }
}

fn options(folder: &std::path::Path) -> Options {
    Options {
        folder: Some(folder.into()),
        budget: BUDGET,
        tell: |_| {},
    }
}

fn choose(tuner: &Tuner, device: &Liar, n: usize) -> (&'static str, String) {
    let spec = spec(n);
    let c = device.candidates(&spec).unwrap();
    let (i, why) = tuner.choose(&spec, &c).unwrap();
    tuner.planned();
    (c[i].name, why)
}

#[test]
fn the_fastest_that_is_right_wins_and_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let device = Liar::new("liar, 1 thread");
    let tuner = Tuner::new(device.clone(), options(dir.path()));
    let (name, why) = choose(&tuner, &device, 7);
    assert_eq!(name, "fast_f32", "{why}");
    assert!(
        why.starts_with("measured: ") && why.contains(", next "),
        "{why}"
    );
    for out in [
        "wrong_f32 is out: failed",
        "idle_f32 is out: failed",
        "broken_f32 is out: ",
    ] {
        assert!(why.contains(out), "{why}");
    }
    let runs = device.recorded();
    assert!(runs > 0);
    // Again, and in another process: from the table, with the same words.
    assert_eq!(choose(&tuner, &device, 7), (name, why.clone()));
    let later = Tuner::new(device.clone(), options(dir.path()));
    assert_eq!(choose(&later, &device, 7), (name, why));
    assert_eq!(device.recorded(), runs);
    // Another shape is another question; so is another device.
    choose(&later, &device, 8);
    assert!(device.recorded() > runs);
    let other = Liar::new("liar, 2 threads");
    choose(&Tuner::new(other.clone(), options(dir.path())), &other, 7);
    assert!(other.recorded() > 0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn where_all_are_wrong_none_is_taken_and_it_is_not_tried_again() {
    let device = Liar::new("liar");
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(7);
    let all = device.candidates(&spec).unwrap();
    let only = |names: &[&str]| -> Vec<Candidate> {
        let some = all.iter().filter(|c| names.contains(&c.name));
        some.cloned().collect()
    };
    let tuner = Tuner::new(device.clone(), options(dir.path()));
    let wrong = only(&["wrong_f32", "idle_f32"]);
    let said = tuner.choose(&spec, &wrong).unwrap_err().to_string();
    for part in ["matmul", "wrong_f32 failed its check", "idle_f32", "doctor"] {
        assert!(said.contains(part), "{said}");
    }
    // What cannot be run says nothing of what it would compute: the estimate decides.
    let unknown = only(&["broken_f32", "wrong_f32"]);
    let (i, why) = tuner.choose(&spec, &unknown).unwrap();
    assert_eq!(unknown[i].name, "wrong_f32");
    assert!(why.starts_with("estimate: measuring failed: "), "{why}");
    let runs = device.recorded();
    assert!(tuner.choose(&spec, &wrong).is_err());
    assert_eq!(tuner.choose(&spec, &unknown), Ok((i, why)));
    assert_eq!(device.recorded(), runs);
}

#[test]
fn without_time_the_estimate_decides_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let device = Liar::new("liar");
    let none = Options {
        budget: Duration::ZERO,
        ..options(dir.path())
    };
    let (name, why) = choose(&Tuner::new(device.clone(), none), &device, 7);
    assert_eq!(name, "wrong_f32");
    assert!(why.starts_with("estimate: "), "{why}");
    assert_eq!(device.recorded(), 0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_table_that_is_broken_or_foreign_is_told_and_replaced() {
    static TOLD: Mutex<Vec<String>> = Mutex::new(vec![]);
    let dir = tempfile::tempdir().unwrap();
    let device = Liar::new("liar");
    let open = || {
        let listen = Options {
            tell: |line| TOLD.lock().unwrap().push(line.to_owned()),
            ..options(dir.path())
        };
        Tuner::new(device.clone(), listen)
    };
    choose(&open(), &device, 7);
    assert!(
        TOLD.lock()
            .unwrap()
            .remove(0)
            .starts_with("measured 1 choice ")
    );
    let entry = std::fs::read_dir(dir.path()).unwrap().next().unwrap();
    let path = entry.unwrap().path();
    let good = std::fs::read_to_string(&path).unwrap();
    for (bad, says) in [
        ("{\"format\": 1,\n".to_owned(), "EOF"),
        (good.replace("\"format\": 1", "\"format\": 9"), "got 9"),
        (good.replace("\"liar\"", "\"cpu x\""), "another device"),
        (
            good.replacen("\"seconds\": ", "\"seconds\": -", 1),
            "could not have happened",
        ),
        ("\u{0}".repeat(100), "expected"),
    ] {
        std::fs::write(&path, bad).unwrap();
        let before = device.recorded();
        choose(&open(), &device, 7);
        let told: Vec<String> = std::mem::take(&mut *TOLD.lock().unwrap());
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].contains(says) && !told[0].contains('\n'),
            "{told:?}"
        );
        assert!(device.recorded() > before);
        // Whole again.
        choose(&open(), &device, 7);
        assert_eq!(TOLD.lock().unwrap().len(), 0);
    }
}

#[test]
fn writers_at_the_same_time_leave_a_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let device = Liar::new("liar");
    std::thread::scope(|s| {
        for n in 1..5 {
            let device = device.clone();
            let options = options(dir.path());
            s.spawn(move || choose(&Tuner::new(device.clone(), options), &device, n));
        }
    });
    let (table, trouble) = Table::open(Some(dir.path()), "liar");
    assert_eq!(trouble, None);
    // What a writer overwrote, it had not seen: at least the last one's own is there.
    let there = |n: &usize| {
        let spec = spec(*n);
        let c = device.candidates(&spec).unwrap();
        table.get(&table::key(&spec, &c)).is_some()
    };
    assert!((1..5).any(|n| there(&n)));
    // One at a time, nothing is lost.
    for n in 1..5 {
        choose(&Tuner::new(device.clone(), options(dir.path())), &device, n);
    }
    let (table, _) = Table::open(Some(dir.path()), "liar");
    let spec = spec(1);
    assert!(
        table
            .get(&table::key(&spec, &device.candidates(&spec).unwrap()))
            .is_some()
    );
}

#[test]
fn a_session_takes_the_kernels_it_is_told_to() {
    let device = Liar::new("liar");
    let session = Session::new(device);
    let kernel = || {
        let x = session.zeros(TensorType::f32([3, 5]), tallow_core::op::Role::Data)?;
        let w = session.zeros(TensorType::f32([5, 7]), tallow_core::op::Role::Data)?;
        let plan = session.explain(&[&x.matmul(&w)?], &[])?.plan;
        Ok::<_, Error>((
            plan.steps[0].kernel_name,
            plan.choices().collect::<Vec<_>>(),
        ))
    };
    let (first, choices) = kernel().unwrap();
    assert_eq!((first, choices.len()), ("wrong_f32", 1));
    session.pin([(choices[0].0.clone(), "slow_f32".to_owned())]);
    assert_eq!(kernel().unwrap().0, "slow_f32");
    // A kernel that is no more: chosen anew.
    session.pin([(choices[0].0.clone(), "gone_f32".to_owned())]);
    assert_eq!(kernel().unwrap().0, "wrong_f32");
}

#[test]
fn the_cpu_measures_what_it_has_a_choice_for() {
    use tallow_cpu::{Cpu, CpuOptions};
    let options = CpuOptions {
        threads: Some(2),
        weights: tallow_core::types::DType::F32,
        isa: None,
    };
    let cpu = Arc::new(Cpu::open(&options).unwrap());
    let dense = |shape: [usize; 2]| Operand::dense(&TensorType::f32(shape));
    // One that the oracle judges, one that the candidates judge for themselves.
    for (m, n) in [(37, 65), (512, 1376)] {
        let spec = KernelSpec {
            body: Body::MatMul {
                ta: true,
                tb: false,
                alpha: 2.0.into(),
            },
            inputs: vec![dense([m, 8]), dense([m, n])],
            outputs: vec![Some(dense([8, n]))],
        };
        let c = cpu.candidates(&spec).unwrap();
        assert_eq!(c.len(), 2);
        let nowhere = Options {
            folder: None,
            budget: BUDGET,
            tell: |_| {},
        };
        let (_, why) = Tuner::new(cpu.clone(), nowhere).choose(&spec, &c).unwrap();
        assert!(
            why.starts_with("measured: ") && !why.contains("out:"),
            "{why}"
        );
    }
}
