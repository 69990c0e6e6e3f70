//! Planner tests on a device without arithmetic: it offers one kernel for everything it is told to.
use super::*;
use crate::{
    backend::{ArenaRules, Bindings, Buffer, ByCost, DeviceInfo, Recording},
    graph::{Builder, Graph, NodeId, Update},
    kernel::Candidate,
    op::{AdamW, Op, RmsNorm, Role},
    pass::fuse::fuse,
    scalar::ScalarOp,
    types::TensorType,
};

/// Wears another device's placement rules; takes strided operands or not.
struct Null {
    info: DeviceInfo,
    strided: bool,
    /// Does it do two equal steps in one launch?
    joins: bool,
}

impl Null {
    fn like(align: usize, strided: bool) -> Self {
        let arena = ArenaRules { align };
        let name = "null".into();
        Null {
            info: DeviceInfo { name, arena },
            strided,
            joins: false,
        }
    }
    fn refuse<T>(&self) -> Result<T> {
        Err(Error::Device {
            device: "null".into(),
            what: "has no memory".into(),
        })
    }
}

impl Backend for Null {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn alloc(&self, _: usize) -> Result<Buffer> {
        self.refuse()
    }
    fn upload(&self, _: &Buffer, _: usize, _: &[u8]) -> Result<()> {
        self.refuse()
    }
    fn download(&self, _: &Buffer, _: usize, _: &mut [u8]) -> Result<()> {
        self.refuse()
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        let mut all = spec.inputs.iter().chain(spec.outputs.iter().flatten());
        let fits = self.strided || matches!(spec.body, Body::Copy) || all.all(Operand::is_dense);
        let one = Candidate {
            kernel: KernelId(0),
            name: "null",
            workspace: 100,
            cost: 1.0,
            prepare: vec![],
        };
        Ok(if fits { vec![one] } else { vec![] })
    }
    fn joins(&self, first: &KernelSpec, second: &KernelSpec) -> bool {
        self.joins && first.name() == second.name()
    }
    fn prepare(&self, _: Format, _: &Buffer, _: usize, _: &Operand, _: &Buffer) -> Result<()> {
        self.refuse()
    }
    fn record(&self, _: std::sync::Arc<Plan>, _: Bindings) -> Result<Box<dyn Recording>> {
        self.refuse()
    }
}

fn planned(g: &Graph, strided: bool) -> Plan {
    plan(fuse(g).unwrap(), &Null::like(256, strided), &ByCost).unwrap()
}

fn names(p: &Plan) -> Vec<String> {
    p.steps.iter().map(|s| s.spec.name()).collect()
}

fn f32s(b: &mut Builder, shape: &[usize]) -> NodeId {
    b.input(Role::Data, TensorType::f32(shape))
}

/// A chain of norms and residual sums, long enough for memory to be used again.
fn chain(layers: usize) -> Graph {
    let mut b = Builder::default();
    let mut x = f32s(&mut b, &[16, 32]);
    let w = f32s(&mut b, &[32]);
    for _ in 0..layers {
        let norm = RmsNorm { eps: 1e-5.into() };
        let y = b.composite(norm, &[x, w]).unwrap()[0];
        let t = b.map(ScalarOp::Tanh, &[y]).unwrap();
        x = b.map(ScalarOp::Add, &[t, x]).unwrap();
    }
    b.finish(vec![x], vec![])
}

#[test]
fn maps_fuse_and_memory_is_used_again() {
    let p = planned(&chain(10), true);
    assert_eq!(p.steps.len(), 20, "{:?}", names(&p));
    assert_eq!(p.steps[1].spec.name(), "tanh_add");
    assert!(p.arena_bytes <= 4 * 16 * 32 * 4, "{}", p.arena_bytes);
    assert!(p.naive_bytes >= 19 * 16 * 32 * 4);
    assert!(
        p.steps
            .iter()
            .flat_map(|s| &s.reads)
            .all(|r| r.offset % 256 == 0)
    );
}

#[test]
fn what_a_joined_step_reads_outlives_the_one_it_is_joined_with() {
    let mut b = Builder::default();
    let mut x = f32s(&mut b, &[16, 32]);
    let w = f32s(&mut b, &[32]);
    for _ in 0..6 {
        x = b.composite(RmsNorm { eps: 1e-5.into() }, &[x, w]).unwrap()[0];
    }
    let graph = b.finish(vec![x], vec![]);
    let written_over = |joins: bool| {
        let device = Null {
            joins,
            ..Null::like(256, true)
        };
        let p = plan(fuse(&graph).unwrap(), &device, &ByCost).unwrap();
        let both = p.steps.windows(2).filter(|s| {
            let (read, made) = (&s[0].reads[0], s[1].writes[0].as_ref().unwrap());
            (read.place, read.offset) == (made.place, made.offset)
        });
        both.count()
    };
    assert_eq!((written_over(true), written_over(false)), (0, 3));
}

#[test]
fn parts_of_a_concatenation_are_written_in_place() {
    let mut b = Builder::default();
    let (x, y) = (f32s(&mut b, &[4, 6]), f32s(&mut b, &[8, 3]));
    let p = b.map(ScalarOp::Exp, &[x]).unwrap();
    let q = b.map(ScalarOp::Neg, &[y]).unwrap();
    let q = b.reshape(q, [4, 6]).unwrap();
    let c = b.concat(1, &[p, q]).unwrap();
    let g = b.finish(vec![c], vec![]);
    assert_eq!(
        names(&planned(&g, true)),
        ["exp", "neg", "copy"],
        "an [8, 3] cannot lie in rows of 12"
    );
    let mut b = Builder::default();
    let x = f32s(&mut b, &[4, 6]);
    let p = b.map(ScalarOp::Exp, &[x]).unwrap();
    let q = b.map(ScalarOp::Abs, &[x]).unwrap();
    let c = b.concat(1, &[p, q]).unwrap();
    let g = b.finish(vec![c], vec![]);
    assert_eq!(names(&planned(&g, true)), ["exp", "abs"]);
    assert_eq!(names(&planned(&g, false)), ["exp", "copy", "abs", "copy"]);
}

#[test]
fn the_optimizer_updates_state_where_it_lies() {
    let mut b = Builder::default();
    let ty = TensorType::f32([10]);
    let s: Vec<NodeId> = (0..3).map(|_| b.input(Role::State, ty.clone())).collect();
    let (g, h) = (f32s(&mut b, &[10]), f32s(&mut b, &[8]));
    let next = b.composite(AdamW, &[s[0], g, s[1], s[2], h]).unwrap();
    let updates = (0..3).map(|k| Update {
        slot: k as u32,
        value: next[k],
    });
    let g = b.finish(vec![], updates.collect());
    let p = planned(&g, true);
    assert_eq!(names(&p), ["adamw"]);
    let places: Vec<_> = p.steps[0]
        .writes
        .iter()
        .flatten()
        .map(|w| w.place)
        .collect();
    assert_eq!(places, [Place::Input(0), Place::Input(1), Place::Input(2)]);
}

#[test]
fn old_state_read_later_is_not_overwritten() {
    let mut b = Builder::default();
    let p = b.input(Role::State, TensorType::f32([10]));
    let next = b.map(ScalarOp::Exp, &[p]).unwrap();
    let sum = b.reduce(crate::op::ReduceOp::Sum, 0, next).unwrap();
    let late = b.map(ScalarOp::Mul, &[p, sum]).unwrap();
    let g = b.finish(
        vec![late],
        vec![Update {
            slot: 0,
            value: next,
        }],
    );
    assert_eq!(names(&planned(&g, true)), ["exp", "sum", "mul", "copy"]);
}

#[test]
fn a_device_without_strides_gets_dense_operands() {
    let mut b = Builder::default();
    let x = f32s(&mut b, &[4, 6]);
    let w = b.slice(x, 1, 1, 3).unwrap();
    let m = b
        .push(Op::Reduce(crate::op::ReduceOp::Max, 1), &[w])
        .unwrap();
    let g = b.finish(vec![m], vec![]);
    assert_eq!(names(&planned(&g, true)), ["max"]);
    assert_eq!(names(&planned(&g, false)), ["copy", "max"]);
}

#[test]
fn the_verifier_finds_corrupted_plans() {
    let good = planned(&chain(3), true);
    let mut p = good.clone();
    p.steps.remove(0);
    assert!(p.verify().is_err(), "reads a value nobody wrote");
    let mut p = good.clone();
    p.steps[0].writes[0].as_mut().unwrap().bytes -= 4;
    assert!(p.verify().is_err(), "reads a value written but for its end");
    let mut p = good.clone();
    p.arena_bytes = 64;
    assert!(p.verify().is_err(), "leaves the arena");
    let mut p = good.clone();
    let stolen = p.steps[0].writes[0].unwrap();
    let w = p.steps[1].workspace.as_mut().unwrap();
    w.offset = stolen.offset;
    assert!(p.verify().is_err(), "workspace over an operand");
    let mut p = good;
    let norm = p
        .steps
        .iter()
        .position(|s| s.spec.name() == "rms_norm" && s.reads[0].place == Place::Arena);
    let norm = norm.unwrap();
    p.steps[norm].writes[0] = Some(Span {
        root: 999,
        ..p.steps[norm].reads[0]
    });
    assert!(p.verify().is_err(), "a norm may not overwrite its operand");
}
