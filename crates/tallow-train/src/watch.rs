//! What a run leaves to be looked at: `metrics.jsonl`, TensorBoard events, a page that draws itself.
//! Invariant: watching never changes a run; a file that can no longer be written is said once, and the run goes on.
//! Absent on purpose: the terminal and the network. The page is given out as text.

mod metrics;
mod page;
mod record;
mod tensorboard;

pub use metrics::{METRICS_FILE, Metrics, line};
pub use page::{compare_data, compare_html, data, html};
pub use record::{Mark, Point, Record, Sample, Standing, best};
pub use tensorboard::{TensorBoard, masked_crc};

use crate::{Event, Observer};
use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// Keeps the files of a run's folder, and the record that its page shows.
pub struct Watch {
    out: PathBuf,
    metrics: Option<Metrics>,
    record: Arc<Mutex<Record>>,
    problem: Option<String>,
}

impl Watch {
    /// Watches a run that writes to the folder `out`. The files are opened when the run begins.
    #[must_use]
    pub fn new(out: PathBuf, record: Arc<Mutex<Record>>) -> Self {
        Watch {
            out,
            metrics: None,
            record,
            problem: None,
        }
    }

    /// Why the files ended early, if they did.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        let metrics = self.metrics.as_ref().and_then(Metrics::problem);
        self.problem.as_deref().or(metrics)
    }

    fn open(&mut self, from_step: u64) {
        if self.metrics.is_some() || self.problem.is_some() {
            return;
        }
        match Metrics::open(&self.out, from_step) {
            Ok((metrics, past)) => {
                self.metrics = Some(metrics);
                let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
                *record = Record {
                    title: record.title.clone(),
                    facts: record.facts.clone(),
                    ..past
                };
            }
            Err(e) => {
                let dir = self.out.display();
                self.problem = Some(format!("{dir}: cannot write what happens in the run ({e})"));
            }
        }
    }
}

impl Observer for Watch {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        match event {
            Event::Resumed { step, .. } => self.open(*step),
            _ => self.open(0),
        }
        let line = line(event);
        if let Some(metrics) = &mut self.metrics {
            metrics.add(&line);
        }
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.add(&line);
        ControlFlow::Continue(())
    }
}
