//! What a replay may cost: no allocation between upload and read, and the memory that was predicted.
//! Absent on purpose: time.
use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use tallow::{
    DType, Role, Session, Tensor, TensorType,
    llm::{
        adapter::Adapter,
        cache::Cache,
        model::{LoadOptions, Model},
        peft::{AdapterConfig, Targets},
    },
    value_and_grad,
};

/// Counts what goes through the allocator.
struct Counting;
static CALLS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(by: usize) {
    CALLS.fetch_add(1, Relaxed);
    let live = LIVE.fetch_add(by, Relaxed) + by;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call is handed to the system's allocator as it came; only counters are added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, l: Layout) -> *mut u8 {
        grown(l.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(l) }
    }
    unsafe fn dealloc(&self, p: *mut u8, l: Layout) {
        LIVE.fetch_sub(l.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, l) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Counters are shared: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A random model in a folder: `[hidden, layers, heads, kv heads, mlp, vocab]`.
fn write_model(dir: &Path, [c, layers, h, hk, mlp, v]: [usize; 6]) {
    let d = c / h;
    let config = format!(
        r#"{{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":{c},"num_hidden_layers":{layers},
        "num_attention_heads":{h},"num_key_value_heads":{hk},"intermediate_size":{mlp},"vocab_size":{v},"rms_norm_eps":1e-5,
        "rope_theta":10000.0,"max_position_embeddings":2048,"hidden_act":"silu","tie_word_embeddings":false,
        "torch_dtype":"float32","bos_token_id":1,"eos_token_id":2}}"#
    );
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![v, c]),
        ("lm_head.weight".into(), vec![v, c]),
        ("model.norm.weight".into(), vec![c]),
    ];
    for i in 0..layers {
        let p = format!("model.layers.{i}");
        for (name, n, k) in [
            ("self_attn.q_proj", h * d, c),
            ("self_attn.k_proj", hk * d, c),
            ("self_attn.v_proj", hk * d, c),
            ("self_attn.o_proj", c, h * d),
            ("mlp.gate_proj", mlp, c),
            ("mlp.up_proj", mlp, c),
            ("mlp.down_proj", c, mlp),
        ] {
            shapes.push((format!("{p}.{name}.weight"), vec![n, k]));
        }
        shapes.push((format!("{p}.input_layernorm.weight"), vec![c]));
        shapes.push((format!("{p}.post_attention_layernorm.weight"), vec![c]));
    }
    let number = |i: usize| 0.04 * ((i as f32 * 0.618_034).fract() - 0.5);
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, s)| {
            let n = s.iter().product::<usize>();
            let bytes = (0..n).flat_map(|i| number(i + n).to_le_bytes()).collect();
            (name, s, bytes)
        })
        .collect();
    let view = |(name, s, b): &'_ (String, Vec<usize>, Vec<u8>)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, s.clone(), b).unwrap();
        (name.clone(), view.data().to_vec(), view.shape().to_vec())
    };
    let owned: Vec<_> = data.iter().map(view).collect();
    let views = owned.iter().map(|(n, b, s)| {
        let dtype = safetensors::Dtype::F32;
        (
            n.clone(),
            safetensors::tensor::TensorView::new(dtype, s.clone(), b).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

fn session() -> Session {
    tallow::open("cpu").unwrap()
}

/// A small model with adapters on all it has. Its files are mapped, so their folder may go.
fn small() -> (Session, Model, Adapter) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), [64, 2, 4, 2, 96, 128]);
    let s = session();
    let m = Model::load(&s, dir.path(), &LoadOptions::default()).unwrap();
    let a = Adapter::new(&m, &AdapterConfig::new(4, 8.0, Targets::AllLinear), 1).unwrap();
    (s, m, a)
}

/// Everything one training step binds.
struct Step {
    program: tallow::Program,
    ids: Tensor,
    targets: Tensor,
    hyper: Tensor,
    /// First and second moments: kept to be counted.
    _moments: [Tensor; 2],
}

fn training_step(s: &Session, m: &Model, a: &Adapter, b: usize, t: usize) -> Step {
    let n = (b * t) as u32;
    let ids = s.tensor_u32(&vec![3; b * t], [b, t], Role::Data).unwrap();
    let targets = s.tensor_u32(&vec![4; b * t], [b, t], Role::Data).unwrap();
    let at: Vec<u32> = (0..n).map(|i| i % t as u32).collect();
    let pos = s.tensor_u32(&at, [b, t], Role::Data).unwrap();
    let x = m.hidden(&ids, &pos, Some(a), None).unwrap().x;
    let loss = m.nll(&x, &targets).unwrap().mean_all().unwrap();
    let parts = a.parts().unwrap();
    let wrt: Vec<&Tensor> = parts.iter().map(|p| &p.1).collect();
    let g = value_and_grad(&loss, &wrt).unwrap();
    let flat: Vec<Tensor> = g
        .grads
        .iter()
        .map(|g| g.reshape([g.shape().numel()]).unwrap())
        .collect();
    let flat = Tensor::concat(0, &flat.iter().collect::<Vec<_>>()).unwrap();
    let zeros = || s.zeros(TensorType::f32([a.elems()]), Role::State).unwrap();
    let moments = [zeros(), zeros()];
    let hyper = s
        .tensor(
            &[1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.0316, 1.0],
            [8],
            Role::Data,
        )
        .unwrap();
    let [p, m2, v2] = a
        .params
        .adamw(&flat, &moments[0], &moments[1], &hyper)
        .unwrap();
    let updates = [
        (a.params.clone(), p),
        (moments[0].clone(), m2),
        (moments[1].clone(), v2),
    ];
    Step {
        program: s.record(&[&g.loss], &updates).unwrap(),
        ids,
        targets,
        hyper,
        _moments: moments,
    }
}

#[test]
fn nothing_is_allocated_from_upload_to_read() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let (s, m, a) = small();
    let mut step = training_step(&s, &m, &a, 2, 16);
    let cache = Cache::new(&m, 64).unwrap();
    let id = s.tensor_u32(&[5], [1, 1], Role::Data).unwrap();
    let pos = s.tensor_u32(&[9], [1, 1], Role::Data).unwrap();
    let h = m.hidden(&id, &pos, Some(&a), Some(&cache)).unwrap();
    let mut decode = s.record(&[&m.logits(&h.x).unwrap()], &h.updates).unwrap();
    let (mut loss, mut logits) = ([0.0], vec![0.0; 128]);
    let out = [step.program.outputs[0].clone(), decode.outputs[0].clone()];
    for round in 0..3 {
        let before = CALLS.load(Relaxed);
        s.write_u32(&step.ids, &[7; 32]).unwrap();
        s.write_u32(&step.targets, &[9; 32]).unwrap();
        s.write(
            &step.hyper,
            &[1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.0316, 1.0],
        )
        .unwrap();
        s.write_u32(&id, &[6]).unwrap();
        step.program.replay().unwrap();
        s.read_into(&out[0], &mut loss).unwrap();
        decode.replay().unwrap();
        s.read_into(&out[1], &mut logits).unwrap();
        assert_eq!(
            CALLS.load(Relaxed) - before,
            0,
            "allocations in round {round}"
        );
        assert!(loss[0].is_finite() && logits.iter().all(|l| l.is_finite()));
    }
}

#[test]
fn peak_memory_is_within_a_tenth_of_the_prediction() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), [256, 6, 8, 4, 688, 4096]);
    let mapped = std::fs::metadata(dir.path().join("model.safetensors"))
        .unwrap()
        .len() as usize;
    let base = LIVE.load(Relaxed);
    PEAK.store(base, Relaxed);
    let s = session();
    let m = Model::load(&s, dir.path(), &LoadOptions::default()).unwrap();
    let a = Adapter::new(&m, &AdapterConfig::new(8, 16.0, Targets::AllLinear), 1).unwrap();
    let mut step = training_step(&s, &m, &a, 4, 128);
    step.program.replay().unwrap();
    let measured = (PEAK.load(Relaxed) - base + mapped) as f64;
    let memory = step.program.compiled.plan.memory();
    let predicted = memory.total() as f64;
    let off = measured / predicted - 1.0;
    println!(
        "predicted {predicted:.0}, measured {measured:.0} bytes ({:+.1} %); {memory:?}",
        off * 100.0
    );
    assert!(
        off.abs() <= 0.1,
        "predicted {predicted:.0} bytes, measured {measured:.0}: {memory:?}"
    );
    assert_eq!(a.params.dtype(), DType::F32);
}

/// Weights in a device's own layout live as long as their model, not as long as the session.
#[test]
fn packed_weights_are_given_back_with_their_model() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let (s, m, a) = small();
    let step = training_step(&s, &m, &a, 1, 8);
    let packed = s.prepared_bytes();
    let again = training_step(&s, &m, &a, 1, 8);
    assert!(packed > 100_000, "{packed} bytes");
    assert_eq!(s.prepared_bytes(), packed, "one copy for both recordings");
    drop((step, again, a));
    assert_eq!(s.prepared_bytes(), packed, "the model is still there");
    drop(m);
    assert_eq!(s.prepared_bytes(), 0);
}
