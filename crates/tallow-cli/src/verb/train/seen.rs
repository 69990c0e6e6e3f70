//! How a run is seen: on the terminal, in files beside the adapter, on a page.
//! Invariant: watching costs a run little and never its result; what cannot be written is said once.
//! Absent on purpose: the page's own drawing (`tallow-train`'s `watch`).
use super::Args;
use crate::{
    dashboard::{self, Page, Shared},
    out,
    progress::{Progress, Show},
};
use anyhow::Result;
use std::{
    ops::ControlFlow,
    path::Path,
    sync::{Arc, PoisonError},
};
use tallow::{
    llm::{
        Adapter, GenerateOptions, Generator, Model, Sampling, Tokenizer,
        data::{Encoder, Examples, LossOn, Row},
        files,
    },
    train::{
        Event, Observer,
        watch::{Sample, Watch, html},
    },
};

/// The page of a run that is over, beside the adapter.
pub(super) const REPORT_FILE: &str = "report.html";
/// Tokens of a sample's prompt where the data does not say where it ends, and most tokens added.
const PROMPT_TOKENS: usize = 32;
const ADDED_TOKENS: usize = 64;

/// Tells everyone.
pub(super) struct Seen {
    pub(super) progress: Progress,
    watch: Watch,
    record: Shared,
}

impl Observer for Seen {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        // The watch first: what has happened is written before anybody may stop the run.
        let _ = self.watch.event(event);
        self.progress.event(event)
    }
}

impl Seen {
    /// Opens the page, if it is asked for.
    pub(super) fn new(args: &Args, facts: Vec<(String, String)>) -> Result<Self> {
        let record = Shared::default();
        {
            let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
            record.title = args.out.display().to_string();
            record.facts = facts;
        }
        if let Some(port) = args.dashboard {
            let address = dashboard::serve(Page::Run(Arc::clone(&record)), port)?;
            eprintln!("dashboard: http://{address}/");
        }
        Ok(Seen {
            progress: Progress::new(match args.json {
                true => Show::Nothing,
                false => Show::Progress,
            }),
            watch: Watch::new(args.out.clone(), Arc::clone(&record)),
            record,
        })
    }

    /// Writes the page of a run that is over, with some text before and after.
    pub(super) fn finish(&mut self, out: &Path, samples: Vec<Sample>) -> Result<()> {
        if let Some(problem) = self.watch.problem() {
            out::warn(problem);
        }
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        (record.samples, record.done) = (samples, true);
        let page = html(&record, false);
        files::write_atomic(&out.join(REPORT_FILE), |w| w.write_all(page.as_bytes()))?;
        Ok(())
    }
}

/// The first lines of a file, each continued without and with the adapter, likeliest token by token.
pub(super) fn samples(
    (model, adapter, tokenizer): (&Model, &Adapter, &Tokenizer),
    (file, loss_on): (&Path, LossOn),
    count: usize,
) -> Result<Vec<Sample>> {
    if count == 0 {
        return Ok(vec![]);
    }
    let options = || GenerateOptions {
        sampling: Sampling::greedy(),
        max_new_tokens: ADDED_TOKENS,
        stop: vec![],
        ignore_eos: false,
    };
    let mut bare = Generator::new(model, None, options())?;
    let mut tuned = Generator::new(model, Some(adapter), options())?;
    let mut encoder = Encoder::new(tokenizer, &model.config, loss_on);
    let mut all = vec![];
    for example in Examples::open(file)? {
        let row = encoder.encode(&example?)?;
        let Some(at) = split(&row).filter(|at| *at < model.config.max_positions) else {
            continue;
        };
        let (prompt, wanted) = row.ids.split_at(at);
        all.push(Sample {
            prompt: tokenizer.decode(prompt)?,
            wanted: tokenizer.decode(&wanted[..wanted.len().min(ADDED_TOKENS)])?,
            before: continued(&mut bare, tokenizer, prompt)?,
            after: continued(&mut tuned, tokenizer, prompt)?,
        });
        if all.len() == count {
            break;
        }
    }
    Ok(all)
}

/// Where the prompt of a row ends: before what counts, or early in a row that counts as a whole.
fn split(row: &Row) -> Option<usize> {
    let first = row.counted.iter().position(|c| *c)?;
    let whole = PROMPT_TOKENS.min(row.ids.len() / 2);
    let at = if first > 1 { first } else { whole };
    (at > 0 && at < row.ids.len()).then_some(at)
}

fn continued(generator: &mut Generator, tokenizer: &Tokenizer, prompt: &[u32]) -> Result<String> {
    let mut text = String::new();
    for piece in generator.stream_ids(tokenizer, prompt.to_vec())? {
        text.push_str(&piece?.text);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_ends_where_counting_begins() {
        let row = |counted: &[bool]| Row {
            ids: (0..counted.len() as u32).collect(),
            counted: counted.to_vec(),
        };
        assert_eq!(split(&row(&[false, false, false, true, true])), Some(3));
        assert_eq!(split(&row(&[false, true, true, true, true, true])), Some(3));
        assert_eq!(split(&row(&[false, false])), None);
        assert_eq!(split(&row(&[false; 1])), None);
    }
}
