//! Works of whole models against the oracle, and other kernels as the judge of what is too large for it.

use super::*;
use crate::ours::judge::{judged, judged_half};
use crate::shapes::{ModelShape, SMALL};
use crate::work::{Judge, Work as _};

/// Small enough for a debug build.
const TOY: ModelShape = ModelShape {
    name: "toy",
    hidden: 32,
    layers: 2,
    heads: [4, 2, 8],
    mlp: 48,
    vocab: 101,
    ..SMALL
};

fn toy(stored: DType) -> tempfile::TempDir {
    written(ModelShape { stored, ..TOY })
}

fn written(shape: ModelShape) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path()).unwrap();
    dir
}

const ALL: [Doing; 5] = [
    Doing::Forward([1, 9]),
    Doing::Prefill,
    Doing::Decode,
    Doing::Train([2, 7]),
    Doing::TrainAgain([2, 7]),
];

fn run(work: &mut Ours) -> f32 {
    work.renew(3).unwrap();
    work.feed(0.4).unwrap();
    work.start().unwrap();
    work.finish().unwrap()
}

#[test]
fn every_work_agrees_with_the_oracle() {
    let dir = toy(DType::F32);
    let session = tallow::open("cpu").unwrap();
    for doing in ALL {
        for adapted in [None, Some(Adapted::seven(4))] {
            if adapted.is_none() && matches!(doing, Doing::Train(_) | Doing::TrainAgain(_)) {
                continue;
            }
            let made = work(&session, dir.path(), DType::F32, doing, adapted.as_ref());
            let mut made = made.unwrap().0;
            let y = run(&mut made);
            let check = made.check(y).unwrap();
            assert!(check.pass(), "{doing}: {check:?}");
            assert_eq!(check.compared, check.of);
            assert!(!made.check(y + 0.1).unwrap().pass());
        }
    }
}

#[test]
fn several_adapters_and_dora_agree_with_the_oracle() {
    let dir = toy(DType::F32);
    let session = tallow::open("cpu").unwrap();
    let two = Adapted {
        count: 2,
        ..Adapted::seven(4)
    };
    let dora = Adapted {
        dora: true,
        ..Adapted::seven(4)
    };
    for (doing, adapted) in [
        (Doing::Forward([2, 9]), &two),
        (Doing::Train([2, 7]), &two),
        (Doing::Train([2, 7]), &dora),
    ] {
        let made = || {
            work(&session, dir.path(), DType::F32, doing, Some(adapted))
                .unwrap()
                .0
        };
        let mut one = made();
        let y = run(&mut one);
        let check = one.check(y).unwrap();
        assert!(
            check.pass() && check.compared == check.of,
            "{doing}: {check:?}"
        );
        let mut turns = crate::suite::in_turn::InTurn::new(vec![made(), made()]);
        turns.renew(3).unwrap();
        turns.feed(0.4).unwrap();
        turns.start().unwrap();
        let y = turns.finish().unwrap();
        let both = turns.check(y).unwrap();
        assert!(
            both.pass() && both.compared == 2 * check.compared,
            "{doing}: {both:?}"
        );
        assert!(!turns.check(y + 0.1).unwrap().pass());
    }
    for bad in [Doing::Decode, Doing::Train([3, 7])] {
        assert!(work(&session, dir.path(), DType::F32, bad, Some(&two)).is_err());
    }
}

#[test]
fn a_dropped_adapter_is_noticed() {
    for layers in [2, 24] {
        dropped_adapter(layers);
    }
}

fn dropped_adapter(layers: usize) {
    let dir = written(ModelShape { layers, ..TOY });
    let session = tallow::open("cpu").unwrap();
    for doing in [Doing::Forward([1, 9]), Doing::Prefill, Doing::Decode] {
        let make = |adapted: Option<&Adapted>| {
            work(&session, dir.path(), DType::F32, doing, adapted)
                .unwrap()
                .0
        };
        let mut bare = make(None);
        run(&mut bare);
        // By every rule, the widest as well.
        let rules: [fn(Ours) -> Ours; 3] = [|o| o, Ours::in_half, Ours::all_in_half];
        for (i, rule) in rules.into_iter().enumerate() {
            let mut with = rule(make(Some(&Adapted::seven(4))));
            let y = run(&mut with);
            assert!(with.check(y).unwrap().pass());
            let y = with.take_results_of(&bare);
            let check = with.check(y).unwrap();
            assert!(check.worst > 2.0, "{doing}, rule {i}: {check:?}");
        }
    }
}

#[test]
fn a_step_without_its_optimizer_is_noticed_in_what_others_give() {
    let dir = toy(DType::F32);
    let session = tallow::open("cpu").unwrap();
    let seven = Adapted::seven(4);
    let doing = Doing::Train([2, 7]);
    let made = || {
        work(&session, dir.path(), DType::F32, doing, Some(&seven))
            .unwrap()
            .0
    };
    for half in [false, true] {
        let mut work = made();
        let y = run(&mut work);
        let after = work.results().unwrap();
        let mut judged = match half {
            true => judged_half(made()).only(&TRAINED),
            false => judged(made()).only(&TRAINED),
        };
        let drawn = judged.draw_all(3).unwrap();
        judged.feed(0.4).unwrap();
        let moments = &drawn[6];
        let mut got: Vec<Vec<f64>> = TRAINED.iter().map(|i| after[*i].clone()).collect();
        assert_eq!(got[2].len(), moments.len());
        assert!(judged.check_all(&got, y).unwrap().pass());
        got[2].clone_from(moments);
        let check = judged.check_all(&got, y).unwrap();
        assert!(check.worst > 2.0, "half {half}: {check:?}");
        assert!(!judged.check_all(&got[..2], y).unwrap().pass());
    }
}

#[test]
fn other_kernels_judge_what_the_oracle_cannot() {
    for judge in [Judge::Portable, Judge::Processor] {
        judged_by_others(judge);
    }
}

fn judged_by_others(judge: Judge) {
    let dir = toy(DType::BF16);
    let session = tallow::open_with(&tallow::OpenOptions {
        device: "cpu".into(),
        threads: None,
        weights: DType::BF16,
        choose: tallow::Choose::Estimate,
    });
    let session = session.unwrap();
    let seven = Adapted::seven(4);
    for doing in ALL {
        let twin = |adapted: Adapted| {
            let dir = dir.path().to_owned();
            move || {
                let made = work(
                    &kernels_of(judge, DType::BF16)?,
                    &dir,
                    DType::BF16,
                    doing,
                    Some(&adapted),
                );
                Ok(made?.0)
            }
        };
        let made = work(&session, dir.path(), DType::BF16, doing, Some(&seven));
        let mut made = made.unwrap().0;
        made.judge_by(Reference::Twin(judge, Box::new(twin(seven.clone()))));
        let y = run(&mut made);
        let check = made.check(y).unwrap();
        assert!(check.pass() && check.by == judge, "{doing}: {check:?}");
        // An adapter of other numbers is noticed.
        if !matches!(doing, Doing::Train(_) | Doing::TrainAgain(_)) {
            made.judge_by(Reference::Twin(judge, Box::new(twin(Adapted::seven(3)))));
            let y = run(&mut made);
            assert!(!made.check(y).unwrap().pass(), "{doing}");
        }
    }
}

#[test]
fn the_floor_counts_weights_once_and_adapters_beside_them() {
    let dir = toy(DType::F32);
    let session = tallow::open("cpu").unwrap();
    let cost = |adapted: Option<&Adapted>| {
        work(&session, dir.path(), DType::F32, Doing::Decode, adapted)
            .unwrap()
            .1
    };
    let bare = cost(None);
    let layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48;
    assert_eq!(bare.bytes, 4 * (2 * layer + 101 * 32));
    let with = cost(Some(&Adapted::seven(4)));
    let adapter = 2 * 4 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (32 + 48));
    assert_eq!(with.bytes - bare.bytes, 4 * adapter);
}
