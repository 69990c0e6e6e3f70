//! The graphs of the clock are judged right: a right result passes, and every part of a wrong one is seen.
//! Absent on purpose: times.

use super::*;
use crate::suite::products::{LoraShape, lora};
use crate::work::Chain;

fn session() -> Session {
    tallow::open("cpu").unwrap()
}

fn softmax(s: &Session, join: Join) -> Ours {
    let mut o = Operands::new(s, 1);
    let x = o.data(TensorType::f32([3, 17]), Fill::Signed(2.0)).unwrap();
    let subject = Subject {
        carried: vec![x],
        again: Box::new(|x| Ok(vec![x[0].softmax()?])),
        updates: vec![],
        join,
        reference: Reference::Whole,
    };
    Ours::new(o, subject).unwrap()
}

fn run(work: &mut Ours, seed: u64) -> f32 {
    work.renew(seed).unwrap();
    work.feed(0.3).unwrap();
    work.start().unwrap();
    work.finish().unwrap()
}

fn chained(work: &mut Ours, n: usize) -> Result<Box<dyn Chain>, &'static str> {
    match work.chain(n).unwrap() {
        Chained::Plan(chain) => Ok(chain),
        Chained::No(why) => Err(why),
    }
}

#[test]
fn a_right_result_passes_and_a_changed_one_does_not() {
    let s = session();
    let mut work = softmax(&s, Join::Feed);
    let y = run(&mut work, 5);
    let check = work.check(y).unwrap();
    assert!(check.pass() && check.compared == 51, "{check:?}");
    assert!(
        !work.check(y + 1e-3).unwrap().pass(),
        "not what was returned"
    );
    let out = work.program.outputs[0].clone();
    let mut values = download(&s, &out).unwrap();
    values[7] *= 1.0 + 1e-4;
    upload(&s, &out, &values).unwrap();
    assert!(!work.check(y).unwrap().pass(), "one element is wrong");
}

#[test]
fn poison_is_there_until_something_is_written() {
    let mut work = softmax(&session(), Join::Feed);
    work.renew(1).unwrap();
    assert!(work.finish().unwrap().is_nan());
    assert!(!work.check(f32::NAN).unwrap().pass());
    assert!(!run(&mut work, 1).is_nan());
}

#[test]
fn what_is_fed_changes_what_is_returned_and_seeds_repeat() {
    let mut work = softmax(&session(), Join::Feed);
    let a = run(&mut work, 5);
    work.feed(0.9).unwrap();
    work.start().unwrap();
    assert_ne!(work.finish().unwrap(), a);
    assert_eq!(run(&mut work, 5), a);
    assert_ne!(run(&mut work, 6), a);
}

#[test]
fn chains_are_whole_and_right() {
    let s = session();
    for join in [Join::Feed, Join::Add] {
        let links = matches!(join, Join::Add);
        let mut work = softmax(&s, join);
        let mut chain = chained(&mut work, 5).unwrap();
        chain.renew(3).unwrap();
        assert!(!chain.check().unwrap().pass(), "nothing has run yet");
        chain.start().unwrap();
        chain.wait().unwrap();
        assert!(chain.check().unwrap().pass());
        let share = chain.share().unwrap();
        assert_eq!(share < 1.0, links, "{share}");
    }
    assert_eq!(
        chained(&mut softmax(&s, Join::None("no")), 5).err(),
        Some("no")
    );
}

#[test]
fn samples_of_a_product_see_a_dropped_adapter() {
    let s = session();
    let shape = LoraShape {
        m: 37,
        k: 96,
        n: 96,
        rank: 4,
    };
    for dtype in [DType::F32, DType::BF16] {
        let mut work = lora(&s, shape, dtype).unwrap();
        let y = run(&mut work, 5);
        let check = work.check(y).unwrap();
        assert!(check.pass() && check.compared < check.of, "{check:?}");
        // The same product without what the adapter adds.
        let out = work.program.outputs[0].clone();
        let bare = LoraShape { rank: 0, ..shape };
        let mut other = lora(&s, bare, dtype).unwrap();
        run(&mut other, 5);
        let values = download(&s, &other.program.outputs[0]).unwrap();
        upload(&s, &out, &values).unwrap();
        let y = work.finish().unwrap();
        assert!(!work.check(y).unwrap().pass());
        let mut chain = chained(&mut work, 3).unwrap();
        chain.renew(3).unwrap();
        chain.start().unwrap();
        chain.wait().unwrap();
        assert!(chain.check().unwrap().pass());
    }
}
