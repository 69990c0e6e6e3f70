//! Peers of this process against the oracle: they pass, and a changed element does not.

use super::*;
use crate::peer::{ModelJob, RowOp};
use crate::shapes::{ModelShape, SMALL};
use crate::suite::layers::Layer;
use crate::suite::models::{Adapted, Doing};
use crate::work::Wall;

fn context(dtype: DType) -> Context {
    let session = tallow::open_with(&tallow::OpenOptions {
        device: "cpu".into(),
        threads: None,
        weights: dtype,
        choose: tallow::Choose::Estimate,
    });
    Context {
        session: session.unwrap(),
        threads: 2,
        dtype,
        quick: true,
        batch: None,
        models: vec![],
        spinner: None,
    }
}

fn local(name: &'static str) -> Local {
    Local {
        name,
        device: candle_core::Device::Cpu,
        elsewhere: false,
    }
}

/// How many ways there were, over all peers.
fn passes(job: &Job, cx: &Context) -> usize {
    let mut ways = 0;
    for name in ENGINES {
        for mut made in local(name).contenders(job, cx).unwrap() {
            let who = format!("{} {job:?}", made.engine);
            let work = &mut made.work;
            work.renew(3).unwrap();
            assert!(work.finish().unwrap().is_nan(), "{who}");
            let n = if work.remembers() { 1 } else { 3 };
            let done = work.waited(&Wall::new(), n, 0.4).unwrap();
            let y = done.links[n - 1].1;
            let check = work.check(y).unwrap();
            assert!(check.pass(), "{who}: {check:?}");
            assert!(!work.check(y + 0.5).unwrap().pass(), "{who}");
            ways += 1;
        }
    }
    ways
}

#[test]
fn products_and_rows_agree_with_the_oracle() {
    let shape = LoraShape {
        m: 17,
        k: 33,
        n: 29,
        rank: 5,
    };
    let bare = LoraShape { rank: 0, ..shape };
    for dtype in [DType::F32, DType::BF16] {
        let cx = context(dtype);
        for job in [Job::Lora(shape), Job::Lora(bare)] {
            assert_eq!(passes(&job, &cx), 3);
        }
    }
    let cx = context(DType::F32);
    for op in RowOp::ALL {
        assert_eq!(passes(&Job::Rows(op), &cx), 1);
    }
}

#[test]
fn layers_agree_with_the_oracle() {
    let cx = context(DType::F32);
    for (layer, ways) in [
        (Layer::Attention(19, false), 2),
        (Layer::Attention(19, true), 1),
        (Layer::SwiGlu(false), 1),
        (Layer::SwiGlu(true), 1),
        (Layer::CrossEntropy(false), 1),
        (Layer::CrossEntropy(true), 1),
        (Layer::Rope, 1),
        (Layer::AdamW, 1),
    ] {
        assert_eq!(passes(&Job::Layer(layer), &cx), ways, "{layer}");
    }
}

#[test]
fn models_agree_with_the_oracle() {
    let dir = tempfile::tempdir().unwrap();
    let toy = ModelShape {
        name: "toy",
        hidden: 32,
        layers: 2,
        heads: [4, 2, 8],
        mlp: 48,
        vocab: 101,
        ..SMALL
    };
    toy.write(dir.path()).unwrap();
    let cx = context(DType::F32);
    for (doing, ways) in [
        (Doing::Forward([2, 9]), 2),
        (Doing::Prefill, 2),
        (Doing::Decode, 3),
        (Doing::Train([2, 7]), 1),
        (Doing::TrainAgain([2, 7]), 0),
    ] {
        for adapted in [None, Some(Adapted::seven(4))] {
            if adapted.is_none() && matches!(doing, Doing::Train(_) | Doing::TrainAgain(_)) {
                continue;
            }
            let job = Job::Model(ModelJob {
                dir: dir.path().to_owned(),
                doing,
                adapted,
            });
            assert_eq!(passes(&job, &cx), ways, "{doing}");
        }
    }
}
