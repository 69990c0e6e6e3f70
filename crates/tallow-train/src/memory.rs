//! Memory: what a run will take, before anything runs, and settings that fit.
//! Invariant: predictions come from the plans that will be recorded, so they are exact for tallow's own buffers.
//! Absent on purpose: the allocator's and the tokenizer's own needs.
use crate::{Error, Feed, Result, TrainConfig, Trainer, run::Job};
use tallow_core::{op::Role, plan::Memory, session::Session, types::TensorType};
use tallow_llm::model::Model;

/// Bytes that can be had: of the machine, or of the limit this process runs under. `None` where nobody knows.
pub fn free_bytes() -> Option<usize> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let machine = system.available_memory();
    let limit = system.cgroup_limits().map(|l| l.free_memory);
    let least = limit.map_or(machine, |l| l.min(machine));
    usize::try_from(least).ok().filter(|n| *n > 0)
}

/// Bytes that a plan on `session` can have: of its device, or of the machine.
fn free_on(session: &Session) -> Option<usize> {
    session.backend().free_bytes().or_else(free_bytes)
}

/// What is said of them.
fn is_free(session: &Session) -> &'static str {
    match session.backend().free_bytes() {
        Some(_) => "is free on the device",
        None => "is free",
    }
}

/// `3.2 GiB`.
pub fn show(bytes: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

/// Bytes a set of recordings takes: what they share once, the rest of each.
fn together(plans: &[Memory]) -> usize {
    let most = |of: fn(&Memory) -> usize| plans.iter().map(of).max().unwrap_or(0);
    let shared = most(|m| m.frozen) + most(|m| m.prepared) + most(|m| m.state);
    let own = |m: &Memory| m.arena + m.data + m.outputs;
    shared + plans.iter().map(own).sum::<usize>()
}

/// Refuses a model that cannot even read one token in the memory that is free on its device.
///
/// # Errors
/// [`Error::TooLarge`]; a model that cannot be planned.
pub fn check_model(model: &Model) -> Result<()> {
    let s = &model.session;
    let one = || s.zeros(TensorType::u32([1, 1]), Role::Data);
    let x = model.hidden(&one()?, &one()?, None, None)?.x;
    let memory = s.explain(&[&model.nll(&x, &one()?)?], &[])?.plan.memory();
    // Frozen weights are in memory already, or mapped.
    let need = memory.total() - memory.frozen;
    match free_on(s) {
        Some(free) if need > free => Err(Error::TooLarge {
            what: "this model".into(),
            need: show(need),
            have: show(free),
            is: is_free(s),
            hint: "use a smaller model, or --dtype bf16",
        }),
        _ => Ok(()),
    }
}

/// Refuses a run whose largest batch cannot fit into the memory that is free on its device; its memory. Where that is
/// enough to make it fit, cheap values are computed again.
pub(crate) fn check(trainer: &mut Trainer, feeds: &[Feed]) -> Result<Memory> {
    let Some(shape) = feeds
        .iter()
        .filter_map(|f| f.shapes().last().copied())
        .max()
    else {
        return Ok(Memory::default());
    };
    let mut memory = trainer.plan(shape)?.plan.memory();
    let Some(free) = free_on(trainer.session()) else {
        return Ok(memory);
    };
    // Frozen weights are in memory already, or mapped.
    let need = |m: &Memory| m.total() - m.frozen;
    if need(&memory) > free {
        trainer.spare();
        memory = trainer.plan(shape)?.plan.memory();
    }
    match need(&memory) > free {
        true => Err(Error::TooLarge {
            what: match trainer.members() {
                1 => format!("a step over {} x {} tokens", shape[0], shape[1]),
                n => format!(
                    "a step of {n} adapters over {} x {} tokens each",
                    shape[0], shape[1]
                ),
            },
            need: show(need(&memory)),
            have: show(free),
            is: is_free(trainer.session()),
            hint: "use a smaller --batch with --accumulate, a shorter --seq-len, or --memory",
        }),
        false => Ok(memory),
    }
}

/// The jobs' settings with rows a batch and batches a step chosen to fit into the memory of the first: as few batches
/// as possible, the same rows a step; cheap values are computed again before rows are split, layers only where nothing
/// else fits. And whether cheap values are.
pub(crate) fn fit(jobs: &[&Job], feeds: &mut [Feed]) -> Result<(Vec<TrainConfig>, bool)> {
    let configs = || jobs.iter().map(|j| j.config.clone());
    let config = jobs[0].config;
    let Some(limit) = jobs[0].memory_bytes else {
        return Ok((configs().collect(), false));
    };
    let rows = config.batch * config.accumulate;
    let mut least = usize::MAX;
    let divides = |b: &usize| rows.is_multiple_of(*b);
    let batches: Vec<usize> = (1..=rows).rev().filter(divides).collect();
    // Smaller batches cost less than computing layers again, and more than computing norms and gates again.
    let all = [config.checkpoint_layers, true].into_iter();
    let all = all.flat_map(|again| batches.iter().map(move |b| (*b, again)));
    for (batch, checkpoint_layers) in all {
        let fitted = configs().map(|c| TrainConfig {
            batch,
            accumulate: rows / batch,
            checkpoint_layers,
            ..c
        });
        let fitted: Vec<TrainConfig> = fitted.collect();
        feeds.iter_mut().for_each(|f| f.set_batch(batch));
        let members: Vec<_> = jobs.iter().map(|j| j.adapter).zip(&fitted).collect();
        let mut trainer = Trainer::side_by_side(jobs[0].model, &members)?;
        let mut shapes: Vec<_> = feeds.iter().flat_map(Feed::shapes).collect();
        shapes.sort_unstable();
        shapes.dedup();
        for sparing in [false, true] {
            if sparing {
                trainer.spare();
            }
            let plans = shapes.iter().map(|s| Ok(trainer.plan(*s)?.plan.memory()));
            let need = together(&plans.collect::<Result<Vec<_>>>()?);
            if need <= limit {
                return Ok((fitted, sparing));
            }
            least = least.min(need);
        }
    }
    Err(Error::TooLarge {
        what: format!("a step of {rows} rows, one at a time and with layers computed again,"),
        need: show(least),
        have: show(limit),
        is: "is allowed",
        hint: "use a shorter --seq-len, a smaller model, or a larger --memory",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recordings_share_weights_and_state() {
        let one = Memory {
            arena: 100,
            prepared: 10,
            frozen: 7,
            state: 5,
            data: 2,
            outputs: 1,
        };
        let two = Memory { arena: 50, ..one };
        assert_eq!(together(&[one]), one.total());
        assert_eq!(together(&[one, two]), 10 + 7 + 5 + 103 + 53);
    }

    #[test]
    fn bytes_are_shown_in_binary_units() {
        assert_eq!(show(3 << 30), "3.0 GiB");
        assert_eq!(show(1536), "1.5 KiB");
        assert_eq!(show(12), "12 B");
    }
}
