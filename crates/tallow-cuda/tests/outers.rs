//! Gradients of adapters, `dA = dhᵀ x` and `dB = s dyᵀ h`: products that stand one after another are one launch.
//! Invariant: what joins is checked without a card, what it computes with one. A machine without a usable card prints why and
//! passes; `TALLOW_REQUIRE_CUDA=1` makes that a failure.
use std::sync::Arc;
use tallow_conformance::{Case, distance};
use tallow_core::{
    Result,
    graph::{Builder, NodeId},
    op::{Role, SwiGlu},
    oracle::{Value, sample},
    scalar::ScalarOp,
    session::Session,
    types::{DType, TensorType},
};
use tallow_cuda::{Cuda, CudaOptions, Paper};

/// Projections that share `x [m, k]`, whose rows are divided into shares with adapters of their own.
#[derive(Clone, Copy, Debug)]
struct Adapters {
    /// Rows of a share.
    m: usize,
    k: usize,
    /// Outputs of each projection.
    ns: &'static [usize],
    /// Rank of each share.
    ranks: &'static [usize],
}

/// Ranks from 4 to 64 and one of no whole tile; rows that are no multiple of what a warp takes, or of a chunk, or fewer than
/// either; columns that no block fills, and on no 16 bytes.
const ALL: [Adapters; 12] = {
    const fn of(m: usize, k: usize, ns: &'static [usize], ranks: &'static [usize]) -> Adapters {
        Adapters { m, k, ns, ranks }
    }
    [
        of(4096, 896, &[896, 128, 128], &[8]),
        of(2048, 128, &[1152, 1152], &[8]),
        of(512, 192, &[192, 64, 64], &[8; 8]),
        of(512, 136, &[200], &[4, 8, 16, 32, 64]),
        of(300, 77, &[34, 40], &[5, 16, 33]),
        of(1025, 96, &[64], &[24]),
        of(4100, 80, &[64, 120], &[16]),
        of(271, 72, &[80, 72], &[64]),
        of(256, 72, &[80], &[4; 65]),
        of(257, 200, &[72, 72, 72], &[12, 20]),
        of(17, 64, &[96], &[8, 4]),
        of(1, 64, &[96], &[8; 3]),
    ]
};

struct Writer {
    b: Builder,
    inputs: Vec<Value>,
}

impl Writer {
    fn input(&mut self, shape: [usize; 2]) -> NodeId {
        let ty = TensorType::f32(shape);
        let v = sample::random(&ty, 3, 91, self.inputs.len() as u32);
        self.inputs.push(v);
        self.b.input(Role::Data, ty)
    }
    /// An intermediate that may lie in bf16.
    fn rows(&mut self, shape: [usize; 2]) -> Result<NodeId> {
        let both = [self.input(shape), self.input(shape)];
        Ok(self.b.composite(SwiGlu, &both)?[0])
    }
    fn case(mut self, a: Adapters) -> Result<Case> {
        let rows = a.m * a.ranks.len();
        let outputs = a.ns.iter().sum();
        let (x, dy) = (self.rows([rows, a.k])?, self.rows([rows, outputs])?);
        let narrow: Vec<_> = a
            .ranks
            .iter()
            .map(|r| [(); 2].map(|()| self.input([a.m, r * a.ns.len()])))
            .collect();
        let mut outs = vec![];
        for (g, (rank, [dh, h])) in a.ranks.iter().zip(narrow).enumerate() {
            let x = self.b.slice(x, 0, g * a.m, a.m)?;
            let dy = self.b.slice(dy, 0, g * a.m, a.m)?;
            let mut n0 = 0;
            for (i, n) in a.ns.iter().enumerate() {
                let part = |b: &mut Builder, v| b.slice(v, 1, i * rank, *rank);
                let (dh, h) = (part(&mut self.b, dh)?, part(&mut self.b, h)?);
                let dy = self.b.slice(dy, 1, n0, *n)?;
                n0 += n;
                outs.push(self.b.matmul(dh, true, x, false)?);
                let db = self.b.matmul(dy, true, h, false)?;
                outs.push(self.b.map_const(ScalarOp::Mul, db, 0.5 + g as f32)?);
            }
        }
        Ok(Case {
            name: format!("{a:?}"),
            graph: self.b.finish(outs, vec![]),
            inputs: self.inputs,
        })
    }
}

fn case(a: Adapters) -> Case {
    let writer = Writer {
        b: Builder::default(),
        inputs: vec![],
    };
    writer.case(a).unwrap()
}

/// For each launch that does several steps of the plan on paper, how many, and what is launched.
fn joined(a: Adapters) -> Vec<(usize, Vec<String>)> {
    let session = Session::new(Arc::new(Paper::hopper(DType::BF16)));
    let c = session.compile(&case(a).graph).unwrap();
    let all = session.backend().launched(&c.plan).into_iter();
    let all = all.map(|l| (l.steps.count(), l.launches));
    all.filter(|(steps, _)| *steps > 1).collect()
}

#[test]
fn products_of_all_projections_and_shares_are_one_launch() {
    for a in ALL.into_iter().filter(|a| a.m >= 256) {
        let products = 2 * a.ns.len() * a.ranks.len();
        let parts = joined(a);
        // So many addresses fit into the arguments of a launch.
        let want = match products {
            ..=128 => vec![products],
            _ => vec![128, products - 128],
        };
        let steps: Vec<_> = parts.iter().map(|(n, _)| *n).collect();
        assert_eq!(steps, want, "{a:?}: {parts:?}");
        let outer = |(_, l): &(usize, Vec<String>)| l.len() == 1 && l[0].starts_with("outer (");
        assert!(parts.iter().all(outer), "{a:?}: {parts:?}");
    }
}

#[test]
fn what_projections_share_is_read_once() {
    // 14 blocks of 64 columns for x, 14 + 2 + 2 for the three gradients of what they make; four would be 14 each.
    let parts = joined(ALL[0]);
    assert!(parts[0].1[0].starts_with("outer (32 x "), "{parts:?}");
    let parts = joined(ALL[2]);
    assert!(parts[0].1[0].starts_with("outer (64 x "), "{parts:?}");
}

#[test]
fn gradients_of_adapters_are_near_the_oracle() {
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
    for a in ALL {
        let case = case(a);
        let first = distance(&session, &case).unwrap();
        for d in &first {
            count += 1;
            rounded += usize::from(*d > 1e-5);
            if d.is_nan() || *d > 2e-2 {
                bad.push(format!("{a:?}: {d:.2e}"));
            }
        }
        // Equal runs give equal bits, whichever block comes last.
        assert_eq!(first, distance(&session, &case).unwrap(), "{a:?}");
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    // Or bf16 did not run.
    assert!(rounded * 3 > count * 2, "{rounded} of {count} were rounded");
}
