//! A norm or a gate of many rows in front of projections with adapters: one launch makes the rows and their `h`.
//! Invariant: what joins is checked without a card, what it computes with one. A machine without a usable card prints why and
//! passes; `TALLOW_REQUIRE_CUDA=1` makes that a failure.
use std::sync::Arc;
use tallow_conformance::{Case, distance};
use tallow_core::{
    Result,
    graph::{Builder, NodeId},
    op::{Block, Linear, RmsNorm, Role, SwiGlu},
    oracle::{Value, sample},
    scalar::ScalarOp,
    session::Session,
    types::{DType, TensorType},
};
use tallow_cuda::{Cuda, CudaOptions, Paper};

/// Rows `[m, k]`, and what is made of them.
#[derive(Clone, Copy, Debug)]
struct Front {
    m: usize,
    k: usize,
    /// Outputs of each projection.
    n: usize,
    /// Of each projection's adapter; 0: it has none.
    ranks: &'static [usize],
    /// Parts of the rows with adapters of their own.
    shares: usize,
    /// Is each one's rank greater than that of the one before?
    unlike: bool,
    gate: bool,
    /// Does another step read what the norm or the gate makes?
    kept: bool,
    /// Are the operands in bf16?
    inside: bool,
    /// Does a later step read them, as a residual sum does? If not, only the joined launch keeps them from being written over.
    alive: bool,
}

const NORM: Front = Front {
    m: 128,
    k: 512,
    n: 40,
    ranks: &[8],
    shares: 1,
    unlike: false,
    gate: false,
    kept: false,
    inside: true,
    alive: true,
};

struct Writer {
    b: Builder,
    inputs: Vec<Value>,
}

impl Writer {
    fn input(&mut self, role: Role, shape: &[usize]) -> NodeId {
        let ty = TensorType::new(shape, DType::F32);
        let v = sample::random(&ty, 3, 57, self.inputs.len() as u32);
        self.inputs.push(v);
        self.b.input(role, ty)
    }
    fn rows(&mut self, f: &Front) -> Result<NodeId> {
        let x = self.input(Role::Data, &[f.m, f.k]);
        match f.inside {
            true => self.b.map(ScalarOp::Tanh, &[x]),
            false => Ok(x),
        }
    }
    fn case(mut self, f: Front) -> Result<Case> {
        let x = self.rows(&f)?;
        let mut operands = vec![x];
        let v = if f.gate {
            let up = self.rows(&f)?;
            operands.push(up);
            self.b.composite(SwiGlu, &[x, up])?[0]
        } else {
            let w = self.input(Role::Frozen, &[f.k]);
            self.b.composite(RmsNorm { eps: 1e-5.into() }, &[x, w])?[0]
        };
        let (mut ins, mut blocks, n) = (vec![v], vec![], f.n);
        for rank in f.ranks {
            ins.push(self.input(Role::Frozen, &[n, f.k]));
            let mut adapters = vec![];
            for g in 0..f.shares {
                let rank = rank + g * usize::from(f.unlike);
                let scale = 0.5 + g as f32;
                adapters.push((rank > 0).then_some((rank, scale.into())));
                if rank > 0 {
                    ins.push(self.input(Role::Data, &[rank, f.k]));
                    ins.push(self.input(Role::Data, &[n, rank]));
                }
            }
            blocks.push(Block {
                n,
                bias: false,
                adapters,
            });
        }
        let residual = false;
        let mut outs = vec![self.b.composite(Linear { blocks, residual }, &ins)?[0]];
        let kept = f.kept.then_some(v);
        let later = operands.into_iter().filter(|_| f.alive).chain(kept);
        for v in later {
            outs.push(self.b.map(ScalarOp::Exp, &[v])?);
        }
        Ok(Case {
            name: format!("{f:?}"),
            graph: self.b.finish(outs, vec![]),
            inputs: self.inputs,
        })
    }
}

fn case(f: Front) -> Case {
    let writer = Writer {
        b: Builder::default(),
        inputs: vec![],
    };
    writer.case(f).unwrap()
}

/// Few rows and many, extents that are no multiple of a piece, ranks past one turn, projections without an adapter.
fn all() -> Vec<Front> {
    let some: [(usize, usize, &[usize]); 8] = [
        (128, 512, &[8]),
        (128, 2048, &[8]),
        (9, 64, &[1]),
        (130, 896, &[8, 8, 8]),
        (4100, 328, &[8, 0, 16]),
        (600, 77, &[33]),
        (35, 4096, &[24]),
        (131, 1336, &[1, 33, 5]),
    ];
    let gates = [(some[0], true), (some[4], false), (some[5], true)];
    let norms = (some.into_iter().enumerate()).map(|(i, s)| (s, false, i % 2 == 1));
    let mut all: Vec<_> = norms.collect();
    all.extend(gates.map(|(s, kept)| (s, true, kept)));
    let one = |((m, k, ranks), gate, kept): ((usize, usize, &'static [usize]), bool, bool)| Front {
        m,
        k,
        n: NORM.n,
        ranks,
        shares: 1,
        unlike: false,
        gate,
        kept,
        inside: m != 35 && m != 600,
        alive: true,
    };
    all.into_iter().map(one).collect()
}

/// Rows of several shares, each with adapters of its own: of one row, of some that are no whole block, of many.
fn shared() -> Vec<Front> {
    let some: [(usize, usize, &[usize], usize); 7] = [
        (128, 512, &[8], 8),
        (9, 64, &[1], 9),
        (130, 896, &[8, 8, 8], 2),
        (4100, 328, &[8, 0, 16], 4),
        (600, 77, &[33], 3),
        (35, 4096, &[24], 5),
        (264, 1336, &[1, 33, 5], 4),
    ];
    let one = |(gate, (m, k, ranks, shares))| Front {
        m,
        k,
        ranks,
        shares,
        gate,
        kept: gate && m == 600,
        inside: m != 35 && m != 600,
        ..NORM
    };
    let both = [false, true].into_iter();
    both.flat_map(|g| some.map(|s| one((g, s)))).collect()
}

fn dead(f: Front) -> Front {
    Front { alive: false, ..f }
}

/// One row: extents with all loads ahead of time and without, ranks of one turn, of some and of too many, outputs that are no
/// whole group of blocks.
fn one_row() -> Vec<Front> {
    let some: [(usize, usize, &[usize]); 8] = [
        (512, 512, &[8]),
        (2048, 2048, &[8]),
        (4096, 4096, &[8]),
        (896, 1152, &[8, 0, 8]),
        (2048, 512, &[16, 1, 15]),
        (4864, 896, &[5]),
        (512, 512, &[33]),
        (512, 40, &[8]),
    ];
    let one = |(k, n, ranks)| Front {
        m: 1,
        k,
        n,
        ranks,
        inside: false,
        ..NORM
    };
    some.into_iter().map(one).collect()
}

/// For each launch of the plan on paper, how many steps it does and the names of what is launched.
fn launched(f: Front) -> Vec<(usize, Vec<String>)> {
    let session = Session::new(Arc::new(Paper::hopper(DType::BF16)));
    let c = session.compile(&case(f).graph).unwrap();
    let parts = session.backend().launched(&c.plan).into_iter();
    let name = |l: &String| l.split(' ').next().unwrap_or_default().to_owned();
    let one = |l: tallow_core::backend::Launched| {
        (l.steps.count(), l.launches.iter().map(name).collect())
    };
    parts.map(one).collect()
}

#[test]
fn a_norm_or_a_gate_joins_the_product_behind_it() {
    let many = all().into_iter().chain(shared());
    for f in many.flat_map(|f| [f, dead(f)]) {
        let parts = launched(f);
        let mut want = vec!["framed".to_owned()];
        want.extend(f.ranks.iter().map(|_| "cublasLt".to_owned()));
        assert!(parts.contains(&(2, want)), "{f:?}: {parts:?}");
        let names = parts.iter().flat_map(|(_, l)| l);
        let alone = |n: &&String| ["rms_norm", "swiglu", "small", "frame"].contains(&n.as_str());
        assert_eq!(names.filter(alone).count(), 0, "{f:?}: {parts:?}");
    }
}

/// Shares whose adapters do not fit into one tail: of different ranks, or of too many together.
fn apart() -> [Front; 2] {
    let unlike = Front {
        shares: 2,
        unlike: true,
        ..NORM
    };
    let many = Front { shares: 64, ..NORM };
    [unlike, many]
}

#[test]
fn without_an_adapter_or_with_few_rows_nothing_joins() {
    let bare = Front {
        ranks: &[0],
        ..NORM
    };
    let names = |f| launched(f).into_iter().flat_map(|(_, l)| l);
    for f in [bare, Front { m: 8, ..NORM }] {
        assert!(names(f).any(|n| n == "rms_norm"), "{f:?}");
        assert!(names(f).all(|n| n != "framed"), "{f:?}");
    }
    // Shares that differ make their `h` of rows that lie there.
    for f in apart() {
        assert!(names(f).any(|n| n == "rms_norm"), "{f:?}");
        assert!(names(f).all(|n| n != "framed"), "{f:?}");
    }
    // A longer row than the kernel has room for.
    let long = Front { k: 4104, ..NORM };
    let count = |name: &str| names(long).filter(|n| n == name).count();
    assert_eq!((count("rms_norm"), count("framed")), (1, 1));
}

#[test]
fn blocks_of_one_row_make_its_h_themselves() {
    for f in one_row().into_iter().flat_map(|f| [f, dead(f)]) {
        let own = f.n > 40 && f.ranks.iter().sum::<usize>() <= 32;
        let want: &[&str] = if own { &["pairs"] } else { &["down", "pairs"] };
        let want: Vec<_> = want.iter().map(|n| (*n).to_owned()).collect();
        let parts = launched(f);
        assert!(parts.contains(&(2, want)), "{f:?}: {parts:?}");
    }
}

#[test]
fn joined_rows_are_near_the_oracle() {
    let options = CudaOptions {
        ordinal: 0,
        weights: DType::BF16,
    };
    let card = match Cuda::open(&options) {
        Ok(c) => Arc::new(c),
        Err(e) => {
            assert!(
                std::env::var_os("TALLOW_REQUIRE_CUDA").is_none(),
                "TALLOW_REQUIRE_CUDA is set, but {e}"
            );
            eprintln!("SKIP: {e}");
            return;
        }
    };
    let session = Session::new(card);
    let (mut bad, mut rounded, mut count) = (vec![], 0, 0);
    let many = all().into_iter().chain(shared());
    let many = many.flat_map(|f| [f, dead(f)]);
    for f in many.chain(one_row()).chain(apart()) {
        for d in distance(&session, &case(f)).unwrap() {
            count += 1;
            rounded += usize::from(d > 1e-5);
            if d.is_nan() || d > 2e-2 {
                bad.push(format!("{f:?}: {d:.2e}"));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    // Or bf16 did not run.
    assert!(rounded * 3 > count, "{rounded} of {count} were rounded");
}
