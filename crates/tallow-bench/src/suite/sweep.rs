//! Eight adapters trained side by side, against one over as many rows (what a token of a sweep costs) and against one after
//! another (what a sweep saves).
//! Invariant: all sides of a task train on equally many tokens; ratios are taken inside a round.

use super::models::{Adapted, Doing};
use super::tax::{Made, Side, made};
use super::{Context, Suite, Task};
use crate::Result;

/// Adapters.
const COUNT: usize = 8;
/// Rows and tokens a row of each adapter.
const SHAPES: [[usize; 2]; 5] = [[1, 16], [1, 32], [1, 64], [1, 128], [4, 128]];

/// A step of every model of the run, at several sizes.
///
/// # Errors
/// None now.
pub fn tasks(cx: &Context) -> Result<Vec<Task>> {
    let shapes = match &cx.batch {
        Some(given) => std::slice::from_ref(given),
        None if cx.quick => &SHAPES[..2],
        None => &SHAPES,
    };
    let mut all = vec![];
    for (model, dir) in &cx.models {
        for [b, t] in shapes {
            let dir = dir.clone();
            let doing = Doing::Train([COUNT * b, *t]);
            let (alone, seven) = (Doing::Train([*b, *t]), Adapted::seven(8));
            let beside = Adapted {
                count: COUNT,
                ..seven.clone()
            };
            all.push(Task {
                suite: Suite::Sweep,
                name: format!("{COUNT} adapters, {b}x{t} tokens each, {model}"),
                tokens: Some(doing.tokens()),
                peers: vec![],
                make: Box::new(move |cx| {
                    let sides: Vec<Side> = vec![
                        ("side by side".to_owned(), Made::Once(doing, Some(beside))),
                        (
                            "one adapter over all rows".to_owned(),
                            Made::Once(doing, Some(seven.clone())),
                        ),
                        (
                            "one after another".to_owned(),
                            Made::Turns(COUNT, alone, seven),
                        ),
                    ];
                    made(cx, &dir, sides)
                }),
            });
        }
    }
    Ok(all)
}
