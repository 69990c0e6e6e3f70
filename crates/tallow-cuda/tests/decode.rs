//! What a decoder layer is for one token: steps that the card runs as one launch, against the oracle.
//! Invariant: a machine without a usable card prints why and passes; `TALLOW_REQUIRE_CUDA=1` makes that a failure.
use std::sync::Arc;
use tallow_conformance::{Case, check_all};
use tallow_core::{
    Result,
    backend::Backend,
    graph::{Builder, NodeId, Update},
    op::{Attention, Bits, Block, KvWrite, Linear, Mask, RmsNorm, Role, Rope, SwiGlu},
    oracle::{Value, sample},
    session::Session,
    types::{DType, TensorType},
};
use tallow_cuda::{Cuda, CudaOptions, Paper};

fn session() -> Option<Session> {
    let options = CudaOptions {
        ordinal: 0,
        weights: DType::F32,
    };
    match Cuda::open(&options) {
        Ok(c) => Some(Session::new(Arc::new(c))),
        Err(e) => {
            assert!(
                std::env::var_os("TALLOW_REQUIRE_CUDA").is_none(),
                "TALLOW_REQUIRE_CUDA is set, but {e}"
            );
            eprintln!("SKIP: {e}");
            None
        }
    }
}

/// Extents of a layer and of its cache.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    c: usize,
    mlp: usize,
    h: usize,
    hk: usize,
    d: usize,
    slots: usize,
    rank: usize,
    position: u32,
    /// Of attention's scores.
    cap: Option<f32>,
}

/// A graph under construction with the values of its inputs.
struct Writer {
    b: Builder,
    inputs: Vec<Value>,
    sizes: Sizes,
}

impl Writer {
    fn input(&mut self, role: Role, ty: TensorType) -> NodeId {
        let v = sample::random(&ty, 5, 91, self.inputs.len() as u32);
        self.inputs.push(v);
        self.b.input(role, ty)
    }
    fn frozen(&mut self, shape: &[usize], dtype: DType) -> NodeId {
        self.input(Role::Frozen, TensorType::new(shape, dtype))
    }
    fn norm(&mut self, x: NodeId) -> Result<NodeId> {
        let w = self.frozen(&[self.sizes.c], DType::F32);
        Ok(self.b.composite(RmsNorm { eps: 1e-5.into() }, &[x, w])?[0])
    }
    fn linear(
        &mut self,
        x: NodeId,
        ns: &[usize],
        bias: bool,
        residual: Option<NodeId>,
    ) -> Result<NodeId> {
        let (k, rank) = (self.b.shape(x).last(), self.sizes.rank);
        let mut ins = vec![x];
        let block = |n: &usize| Block {
            n: *n,
            bias,
            adapters: vec![(rank > 0).then_some((rank, 1.5.into()))],
        };
        let blocks: Vec<Block> = ns.iter().map(block).collect();
        for n in ns {
            ins.push(self.frozen(&[*n, k], DType::BF16));
            if bias {
                ins.push(self.frozen(&[*n], DType::F32));
            }
            if rank > 0 {
                ins.push(self.frozen(&[rank, k], DType::F32));
                ins.push(self.frozen(&[*n, rank], DType::F32));
            }
        }
        ins.extend(residual);
        let residual = residual.is_some();
        Ok(self.b.composite(Linear { blocks, residual }, &ins)?[0])
    }
    /// Two gated blocks, then attention behind a cache, then the scores of a vocabulary.
    fn layer(mut self) -> Result<Case> {
        let s = self.sizes;
        let mut x = self.input(Role::Data, TensorType::f32([1, 1, s.c]));
        let (mut outs, mut updates) = (vec![], vec![]);
        for _ in 0..2 {
            let y = self.norm(x)?;
            let both = self.linear(y, &[s.mlp, s.mlp], false, None)?;
            let gate = self.b.slice(both, 2, 0, s.mlp)?;
            let up = self.b.slice(both, 2, s.mlp, s.mlp)?;
            let y = self.b.composite(SwiGlu, &[gate, up])?[0];
            x = self.linear(y, &[s.c], false, Some(x))?;
        }
        let y = self.norm(x)?;
        let qkv = self.linear(y, &[s.h * s.d, s.hk * s.d, s.hk * s.d], true, None)?;
        let pos = self.b.input(Role::Data, TensorType::u32([1, 1]));
        self.inputs
            .push(Value::full(TensorType::u32([1, 1]), f64::from(s.position)));
        let freq = self.frozen(&[s.d / 2], DType::F32);
        let qk = self.b.slice(qkv, 2, 0, (s.h + s.hk) * s.d)?;
        let qk = self.b.reshape(qk, [1, 1, s.h + s.hk, s.d])?;
        let qk = self
            .b
            .composite(Rope { inverse: false }, &[qk, pos, freq])?[0];
        let q = self.b.slice(qk, 2, 0, s.h)?;
        let k = self.b.slice(qk, 2, s.h, s.hk)?;
        let v = self.b.slice(qkv, 2, (s.h + s.hk) * s.d, s.hk * s.d)?;
        let v = self.b.reshape(v, [1, 1, s.hk, s.d])?;
        let mut caches = vec![];
        for new in [k, v] {
            let slot = self.inputs.len() as u32;
            let old = self.input(Role::State, TensorType::f32([1, s.slots, s.hk, s.d]));
            let value = self.b.composite(KvWrite, &[old, new, pos])?[0];
            updates.push(Update { slot, value });
            caches.push(value);
        }
        let attention = Attention {
            scale: 0.2.into(),
            mask: Mask::Causal { window: None },
            cap: s.cap.map(Bits::from),
        };
        let o = self
            .b
            .composite(attention, &[q, caches[0], caches[1], pos])?[0];
        let o = self.b.reshape(o, [1, 1, s.h * s.d])?;
        x = self.linear(o, &[s.c], false, Some(x))?;
        let y = self.norm(x)?;
        outs.push(self.linear(y, &[2 * s.c + 3], false, None)?);
        Ok(Case {
            name: format!("{s:?}"),
            graph: self.b.finish(outs, updates),
            inputs: self.inputs,
        })
    }
}

/// Wide enough for a launch of all steps: odd numbers of units, pieces and parts.
const WIDE: Sizes = Sizes {
    c: 1048,
    mlp: 3080,
    h: 9,
    hk: 3,
    d: 40,
    slots: 300,
    rank: 7,
    position: 290,
    cap: None,
};

fn case(sizes: Sizes) -> Case {
    let writer = Writer {
        b: Builder::default(),
        inputs: vec![],
        sizes,
    };
    writer.layer().unwrap()
}

/// The launch of all steps bends no scores, so attention under a cap stands in launches of its own.
#[test]
fn attention_under_a_cap_is_not_in_the_launch_of_all_steps() {
    let paper = Arc::new(Paper::hopper(DType::BF16));
    let session = Session::new(paper.clone());
    for cap in [None, Some(50.0)] {
        let c = session.compile(&case(Sizes { cap, ..WIDE }).graph).unwrap();
        let all = paper.launched(&c.plan);
        let mut launches = all.iter().flat_map(|l| &l.launches);
        let apart = launches.any(|l| l.starts_with("decode "));
        assert_eq!(apart, cap.is_some(), "{all:?}");
    }
}

#[test]
fn a_layer_of_one_token_matches_the_oracle() {
    let Some(session) = session() else { return };
    let base = Sizes {
        c: 64,
        mlp: 96,
        h: 6,
        hk: 2,
        d: 16,
        slots: 40,
        rank: 4,
        position: 33,
        cap: None,
    };
    let wide = WIDE;
    let sizes = [
        wide,
        Sizes {
            rank: 0,
            position: 0,
            ..wide
        },
        Sizes {
            rank: 33,
            position: 64,
            ..wide
        },
        Sizes {
            cap: Some(0.3),
            ..wide
        },
        base,
        Sizes { rank: 0, ..base },
        Sizes {
            cap: Some(0.3),
            ..base
        },
        Sizes {
            c: 896,
            mlp: 1024,
            h: 14,
            hk: 2,
            d: 64,
            slots: 70,
            rank: 8,
            position: 64,
            cap: None,
        },
        Sizes {
            c: 72,
            mlp: 1032,
            h: 3,
            hk: 3,
            d: 24,
            rank: 17,
            position: 0,
            ..base
        },
        Sizes {
            c: 4096,
            mlp: 264,
            h: 4,
            hk: 1,
            d: 128,
            position: 39,
            ..base
        },
        Sizes {
            position: 40,
            ..base
        },
    ];
    check_all(&session, sizes.map(case).into());
}
