//! The adapter tax: the same work without and with adapters, in turns, as a ratio: by rank, by modules, and by number of
//! adapters side by side; what DoRA and layers computed again add to a training step, and what the latter save.
//! Invariant: the sides of a task differ in one thing only, ratios are taken inside a round, and each side passes its
//! own check, which an adapter that changes nothing would not.

use std::path::Path;

use super::in_turn::InTurn;
use super::models::{Adapted, Doing, batch, work};
use super::{Context, Suite, Task};
use crate::Result;
use crate::measure::Contender;
use crate::ours::Ours;
use crate::peer::{Job, ModelJob};
use crate::probe::Need;
use crate::work::Work as _;

const QV: &[&str] = &["q_proj", "v_proj"];
const ONE: &[&str] = &["down_proj"];
/// Adapters side by side, the most of them.
const MOST: usize = 8;

/// A row of a task: what it is called, and what it does.
pub(super) type Side = (String, Made);

/// How the contender of a row is made.
pub(super) enum Made {
    /// One recording.
    Once(Doing, Option<Adapted>),
    /// One recording, and by how much the process grows with it.
    Grown(Doing, Adapted),
    /// So many recordings, one after another.
    Turns(usize, Doing, Adapted),
}

/// Each work of the first model of the run.
///
/// # Errors
/// None now.
pub fn tasks(cx: &Context) -> Result<Vec<Task>> {
    let length = if cx.quick { 128 } else { 512 };
    let works = [
        Doing::Forward([1, length]),
        Doing::Prefill,
        Doing::Decode,
        Doing::Train(batch(cx)),
    ];
    let mut all = vec![];
    for doing in works {
        all.extend(task(cx, doing.to_string(), (doing, true), sides(cx, doing)));
    }
    let tokens = if cx.quick { 16 } else { 64 };
    let doing = Doing::Train([MOST, tokens]);
    let name = format!("adapters side by side, {doing}");
    all.extend(task(cx, name, (doing, false), side_by_side(tokens)));
    let doing = Doing::Forward([MOST, tokens]);
    let name = format!("adapters side by side, {doing}");
    all.extend(task(cx, name, (doing, false), shared(doing)));
    let doing = Doing::Train(batch(cx));
    all.extend(task(
        cx,
        format!("DoRA, {doing}"),
        (doing, false),
        dora(doing),
    ));
    let again = Doing::TrainAgain(batch(cx));
    all.extend(task(
        cx,
        again.to_string(),
        (doing, false),
        kept(doing, again),
    ));
    Ok(all)
}

fn seven(rank: usize) -> Adapted {
    Adapted::seven(rank)
}

/// One adapter: by rank and by modules.
fn sides(cx: &Context, doing: Doing) -> Vec<Side> {
    let first = match doing {
        // Training goes back through the whole model in any case; this trains next to nothing.
        Doing::Train(_) | Doing::TrainAgain(_) => {
            let least = Adapted {
                names: &["q_proj"],
                first_layer: true,
                ..seven(1)
            };
            ("forward and input gradients", Some(least))
        }
        _ => ("bare", None),
    };
    let mut all = vec![(first.0.to_owned(), Made::Once(doing, first.1))];
    let mut add = |name: String, a: Adapted| all.push((name, Made::Once(doing, Some(a))));
    let ranks: &[usize] = if cx.quick { &[8] } else { &[4, 8, 16, 64] };
    for r in ranks {
        add(format!("all seven, rank {r}"), seven(*r));
    }
    let some = [("q and v, rank 8", QV), ("down, rank 8", ONE)];
    for (name, names) in some.into_iter().take(if cx.quick { 1 } else { 2 }) {
        let some = Adapted { names, ..seven(8) };
        add(name.to_owned(), some);
    }
    all
}

/// Several adapters in one step, each with its own rows, against one over all rows.
fn side_by_side(t: usize) -> Vec<Side> {
    let doing = Doing::Train([MOST, t]);
    let mut all = vec![(
        "one over all rows".to_owned(),
        Made::Once(doing, Some(seven(8))),
    )];
    for count in [2, 4, MOST] {
        let some = Adapted { count, ..seven(8) };
        all.push((format!("{count} adapters"), Made::Once(doing, Some(some))));
    }
    all
}

fn shared(doing: Doing) -> Vec<Side> {
    let mut all = vec![("bare".to_owned(), Made::Once(doing, None))];
    for count in [1, 2, 4, MOST] {
        let some = Adapted { count, ..seven(8) };
        let name = if count == 1 { "adapter" } else { "adapters" };
        all.push((format!("{count} {name}"), Made::Once(doing, Some(some))));
    }
    all
}

fn dora(doing: Doing) -> Vec<Side> {
    let with = Adapted {
        dora: true,
        ..seven(8)
    };
    vec![
        ("LoRA".to_owned(), Made::Once(doing, Some(seven(8)))),
        ("DoRA".to_owned(), Made::Once(doing, Some(with))),
    ]
}

fn kept(doing: Doing, again: Doing) -> Vec<Side> {
    vec![
        ("layers kept".to_owned(), Made::Grown(doing, seven(8))),
        (
            "layers computed again".to_owned(),
            Made::Grown(again, seven(8)),
        ),
    ]
}

/// On the first model of the run.
fn task(
    cx: &Context,
    name: String,
    (doing, by_others): (Doing, bool),
    sides: Vec<Side>,
) -> Option<Task> {
    let (model, dir) = cx.models.first()?.clone();
    // Of others the first side, and one of all seven at rank 8: their own tax.
    let others = sides.iter().enumerate().filter_map(|(i, (name, made))| {
        let wanted = i == 0 || name == "all seven, rank 8";
        match made {
            Made::Once(doing, adapted) if wanted && by_others => {
                let job = ModelJob {
                    dir: dir.clone(),
                    doing: *doing,
                    adapted: adapted.clone(),
                };
                Some((name.clone(), Job::Model(job)))
            }
            _ => None,
        }
    });
    Some(Task {
        suite: Suite::Tax,
        name: format!("{name}, {model}"),
        tokens: Some(doing.tokens()),
        peers: others.collect(),
        make: Box::new(move |cx| made(cx, &dir, sides)),
    })
}

/// The contenders of these sides, of the model in `dir`.
pub(super) fn made(cx: &Context, dir: &Path, sides: Vec<Side>) -> Result<Vec<Contender>> {
    let one = |doing, adapted: Option<&Adapted>| work(&cx.session, dir, cx.dtype, doing, adapted);
    let of = |(name, made): Side| match made {
        Made::Once(doing, adapted) => {
            let (work, cost) = one(doing, adapted.as_ref())?;
            Ok(cx.model(&name, work, &cost))
        }
        Made::Grown(doing, adapted) => {
            // What all recordings share is there before.
            run(&mut one(doing, Some(&adapted))?.0)?;
            let before = resident_bytes();
            let (mut work, cost) = one(doing, Some(&adapted))?;
            run(&mut work)?;
            let grew = resident_bytes().zip(before);
            let mut made = cx.model(&name, work, &cost);
            if let Some(memory) = &mut made.memory {
                memory.grew = grew.map(|(now, then)| now.saturating_sub(then));
            }
            Ok(made)
        }
        Made::Turns(n, doing, adapted) => {
            let each = (0..n).map(|_| one(doing, Some(&adapted)));
            let each = each.collect::<Result<Vec<_>>>()?;
            let need = Need {
                times: n,
                ..cx.need(&each[0].1)
            };
            let works = each.into_iter().map(|(w, _)| w).collect();
            Ok(Contender {
                engine: name,
                work: Box::new(InTurn::new(works)),
                need,
                lazy: false,
                memory: None,
            })
        }
    };
    sides.into_iter().map(of).collect()
}

fn run(work: &mut Ours) -> Result<f32> {
    work.renew(1)?;
    work.feed(0.5)?;
    work.start()?;
    work.finish()
}

/// Memory of this process, where the system says so.
fn resident_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
