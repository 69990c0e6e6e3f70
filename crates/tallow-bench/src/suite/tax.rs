//! The adapter tax: the same work without and with an adapter, in turns, as a ratio.
//! Invariant: the sides of a task differ in the adapter only, ratios are taken inside a round, and each side passes its
//! own check, which an adapter that changes nothing would not.

use super::models::{Adapted, Doing, batch, work};
use super::{Context, Suite, Task};
use crate::Result;
use crate::measure::Contender;

const QV: &[&str] = &["q_proj", "v_proj"];

/// Each work of the first model of the run, by rank and by modules.
///
/// # Errors
/// None now.
pub fn tasks(cx: &Context) -> Result<Vec<Task>> {
    let length = if cx.quick { 128 } else { 512 };
    let all = [
        Doing::Forward(length),
        Doing::Prefill,
        Doing::Decode,
        Doing::Train(batch(cx)),
    ];
    Ok(all.into_iter().flat_map(|d| task(cx, d)).collect())
}

/// The adapters compared: by name.
fn sides(cx: &Context) -> Vec<(String, Adapted)> {
    let ranks: &[usize] = if cx.quick { &[8] } else { &[4, 8, 16, 64] };
    let seven = |r: &usize| (format!("all seven, rank {r}"), Adapted::seven(*r));
    let mut all: Vec<_> = ranks.iter().map(seven).collect();
    let qv = Adapted {
        names: QV,
        ..Adapted::seven(8)
    };
    all.push(("q and v, rank 8".to_owned(), qv));
    all
}

fn task(cx: &Context, doing: Doing) -> Option<Task> {
    let (model, dir) = cx.models.first()?.clone();
    Some(Task {
        suite: Suite::Tax,
        name: format!("{doing}, {model}"),
        tokens: Some(doing.tokens()),
        peer: None,
        make: Box::new(move |cx| {
            let one = |name: &str, adapted: Option<&Adapted>| -> Result<Contender> {
                let (work, cost) = work(&cx.session, &dir, cx.dtype, doing, adapted)?;
                Ok(cx.ours(name, work, &cost))
            };
            let mut all = vec![match doing {
                // Training goes back through the whole model in any case; this trains next to nothing.
                Doing::Train(_) => {
                    let least = Adapted {
                        rank: 1,
                        names: &["q_proj"],
                        first_layer: true,
                    };
                    one("forward and input gradients", Some(&least))?
                }
                _ => one("bare", None)?,
            }];
            for (name, adapted) in sides(cx) {
                all.push(one(&name, Some(&adapted))?);
            }
            Ok(all)
        }),
    })
}
