//! Some works alone and beside a program that keeps every core busy, in turns: what is lost must be the share that the
//! other program takes, and no more.
//! Invariant: the two sides are the same work; only the other program is told to compute or to rest.

use super::models::{Adapted, Doing, batch};
use super::products::{FIRST, LoraShape, lora};
use super::{Context, Suite, Task, models, rows};
use crate::load::{Beside, Load};
use crate::measure::Contender;
use crate::ours::Ours;
use crate::peer::RowOp;
use crate::probe::Cost;
use crate::{Error, Result};

type Make = Box<dyn Fn(&Context) -> Result<(Ours, Cost)>>;

/// Products, a norm, and a model that decodes and trains.
///
/// # Errors
/// None now; what cannot be started is a row that says so.
pub fn tasks(cx: &Context) -> Result<Vec<Task>> {
    let mut works: Vec<(String, Option<usize>, Make)> = vec![];
    let ks: &[usize] = if cx.quick { &[1024] } else { &[1024, 2048] };
    let mut shapes = vec![FIRST];
    for m in [1, 128] {
        let shape = |k: &usize| LoraShape {
            m,
            k: *k,
            n: *k,
            rank: 8,
        };
        shapes.extend(ks.iter().map(shape));
    }
    for shape in shapes {
        let make =
            move |cx: &Context| Ok((lora(&cx.session, shape, cx.dtype)?, shape.cost(cx.dtype)));
        works.push((shape.to_string(), None, Box::new(make)));
    }
    let norm = RowOp::RmsNorm;
    let make = move |cx: &Context| Ok((rows::work(cx, norm)?, rows::cost(norm)));
    works.push((format!("{} 4x16x1024", norm.title()), None, Box::new(make)));
    if let Some((model, dir)) = cx.models.first().cloned() {
        for doing in [Doing::Decode, Doing::Train(batch(cx))] {
            let dir = dir.clone();
            let make = move |cx: &Context| {
                models::work(&cx.session, &dir, cx.dtype, doing, Some(&Adapted::seven(8)))
            };
            let name = format!("{doing}, {model}, all seven, rank 8");
            works.push((name, Some(doing.tokens()), Box::new(make)));
        }
    }
    let task = |(name, tokens, make): (String, Option<usize>, Make)| Task {
        suite: Suite::Busy,
        name,
        tokens,
        peers: vec![],
        make: Box::new(move |cx: &Context| {
            let (alone, cost) = make(cx)?;
            let (beside, _) = make(cx)?;
            let command = cx.spinner.as_ref().ok_or_else(|| Error::Setting {
                name: "suite busy",
                want: "a program that keeps the cores busy",
                got: "none".to_owned(),
            })?;
            let beside = Beside::new(beside, Load::start(command)?);
            Ok(vec![
                cx.ours("alone", alone, &cost),
                Contender {
                    engine: "every core busy".to_owned(),
                    work: Box::new(beside),
                    need: cx.need(&cost),
                    lazy: false,
                    memory: None,
                },
            ])
        }),
    };
    Ok(works.into_iter().map(task).collect())
}
