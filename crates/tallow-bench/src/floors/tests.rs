//! Probes in a disturbed minute, on the simulated clock: honest rows get their figures, liars do not.

use std::cell::Cell;
use std::rc::Rc;

use super::*;
use crate::measure::tests::{BYTES, Liar, Lie, TRUE_S, World, measured};
use crate::probe::{Bandwidth, Peak, best};

/// The machine moves the bytes of a repetition in this share of the time that the honest work takes.
const SHARE: f64 = 0.8;

/// A look at the machine. Until `until` on its clock everything takes `slower` times as long.
fn probe(world: &Rc<World>, until: f64, slower: f64) -> Probe {
    let rate = best(world, 0.0, || {
        let disturbed = world.now.get() < until;
        world.pass(SHARE * TRUE_S * if disturbed { slower } else { 1.0 });
        BYTES as f64
    });
    Probe {
        bandwidth: vec![Bandwidth {
            threads: 1,
            bytes: 1 << 10,
            bytes_per_s: rate,
            by: None,
        }],
        peak: vec![Peak {
            threads: 1,
            dtype: "f32".into(),
            flops: 1e12,
            by: None,
        }],
    }
}

fn of(lie: Lie) -> (Rc<World>, Measured) {
    let (world, liar) = Liar::new(lie);
    let measured = measured(lie, (world.clone(), liar), false);
    (world, measured)
}

#[test]
fn a_row_under_the_floor_of_a_disturbed_probe_is_judged_anew() {
    let (world, row) = of(Lie::Honest);
    let until = world.now.get() + 1.0;
    let first = probe(&world, until, 2.0);
    assert!(world.now.get() < until);
    assert!(row.row(first.least(&row.need)).figures().is_none());
    // The second look is disturbed as well, the third is not.
    let looks = Cell::new(0);
    let again = || {
        looks.set(looks.get() + 1);
        if looks.get() == 2 {
            world.pass(1.0);
        }
        Ok(probe(&world, until, 2.0))
    };
    let mut floors = Floors::new(first, again);
    let (rows, told) = floors.rows("task", std::slice::from_ref(&row));
    let f = rows[0].figures().unwrap();
    let times = f.waited.median / rows[0].floor.seconds;
    assert!((times - 1.0 / SHARE).abs() < 0.01, "{times}");
    assert_eq!((looks.get(), told.len()), (2, 2));
    let text = told[1].to_string();
    assert!(text.contains("probed again: Honest was at 0.6"), "{text}");
    // What is known now stays known.
    let (rows, told) = floors.rows("next", &[row]);
    assert!(rows[0].figures().is_some() && told.is_empty());
    assert_eq!(looks.get(), 2);
}

#[test]
fn a_liar_is_caught_however_often_the_machine_is_probed_and_that_is_bounded() {
    let (world, row) = of(Lie::TooFast);
    let looks = Cell::new(0);
    let again = || {
        looks.set(looks.get() + 1);
        Ok(probe(&world, 0.0, 1.0))
    };
    let mut floors = Floors::new(probe(&world, 0.0, 1.0), again);
    for task in 0..10 {
        let (rows, told) = floors.rows("task", std::slice::from_ref(&row));
        assert!(matches!(
            &rows[0].verdict,
            Verdict::Invalid(Reason::UnderFloor { .. })
        ));
        let left = TRIES_A_RUN.saturating_sub(TRIES * task);
        assert_eq!(told.len(), left.min(TRIES));
    }
    assert_eq!(looks.get(), TRIES_A_RUN);
    // And it taught nothing.
    assert!(floors.probe.bandwidth.iter().all(|b| b.by.is_none()));
}

#[test]
fn what_a_valid_row_reaches_counts_for_those_behind_it_and_liars_teach_nothing() {
    let (world, honest) = of(Lie::Honest);
    // In a plan the honest work takes 80 µs; the floor of this probe is 85.
    let first = probe(&world, f64::INFINITY, 0.85 / SHARE);
    let before = first.least(&honest.need).seconds;
    let mut floors = Floors::new(first, || unreachable!("no row is far under its floor"));
    let (_, wrong) = of(Lie::Cached);
    let (rows, told) = floors.rows("lies", &[wrong]);
    assert!(rows[0].figures().is_none() && told.is_empty());
    assert_eq!(floors.probe.least(&honest.need).seconds, before);
    let (rows, told) = floors.rows("task", std::slice::from_ref(&honest));
    assert!(rows[0].figures().is_some());
    assert_eq!(rows[0].floor.seconds, before);
    assert!(
        matches!(&told[..], [Revised::Exceeded { engine, .. }] if engine == "Honest"),
        "{told:?}"
    );
    let after = floors.probe.least(&honest.need).seconds;
    assert!((after / (0.8 * TRUE_S) - 1.0).abs() < 0.01, "{after:e}");
    let by = floors.probe.bandwidth.iter().find_map(|b| b.by.clone());
    assert_eq!(by.as_deref(), Some("task, Honest"));
}

#[test]
fn threads_below_their_promise_are_looked_at_again_once() {
    let (world, row) = of(Lie::Honest);
    let with = |flops: f64| {
        let mut p = probe(&world, 0.0, 1.0);
        let two = Peak {
            threads: 2,
            flops,
            ..p.peak[0].clone()
        };
        p.peak.push(two);
        p
    };
    let mut floors = Floors::new(with(1e12), || Ok(with(1.9e12)));
    let (_, told) = floors.rows("task", std::slice::from_ref(&row));
    assert_eq!(told, [Revised::Short]);
    assert_eq!(floors.probe.flops(tallow::DType::F32, 2), 1.9e12);
    let (_, told) = floors.rows("next", &[row]);
    assert!(told.is_empty());
}

#[test]
fn a_probe_that_fails_is_told_and_not_tried_again() {
    let (world, row) = of(Lie::TooFast);
    let failing = || {
        Err(crate::Error::Setting {
            name: "probe",
            want: "a device",
            got: "none".into(),
        })
    };
    let mut floors = Floors::new(probe(&world, 0.0, 1.0), failing);
    let (rows, told) = floors.rows("task", std::slice::from_ref(&row));
    assert!(rows[0].figures().is_none());
    assert!(matches!(&told[..], [Revised::Failed { .. }]), "{told:?}");
    assert!(floors.rows("next", &[row]).1.is_empty());
}
