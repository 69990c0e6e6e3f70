//! Several works of tallow's as one: each is started when the one before it is done.
//! Invariant: all of them are renewed, fed, run and checked; what comes out is the last one's.

use crate::ours::Ours;
use crate::work::{Check, Clock, Work};
use crate::{Error, Result};

/// At least one work.
pub(super) struct InTurn(Vec<Ours>);

impl InTurn {
    /// These.
    pub(super) fn new(works: Vec<Ours>) -> Self {
        InTurn(works)
    }
}

impl Work for InTurn {
    fn renew(&mut self, seed: u64) -> Result<()> {
        // Each with operands of its own.
        let each = self.0.iter_mut().zip(0..);
        let mut each = each.map(|(w, i): (_, u64)| w.renew(seed ^ (i << 32)));
        each.try_for_each(|r| r)
    }

    fn feed(&mut self, link: f32) -> Result<()> {
        self.0.iter_mut().try_for_each(|w| w.feed(link))
    }

    fn start(&mut self) -> Result<()> {
        let last = self.0.len() - 1;
        for (i, work) in self.0.iter_mut().enumerate() {
            work.start()?;
            if i < last {
                work.finish()?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<f32> {
        match self.0.last_mut() {
            Some(last) => last.finish(),
            None => Err(Error::Setting {
                name: "works in turn",
                want: "one or more",
                got: "none".to_owned(),
            }),
        }
    }

    fn fetch(&mut self, clock: &dyn Clock) -> Result<f64> {
        self.0.iter_mut().map(|w| w.fetch(clock)).sum()
    }

    fn check(&mut self, returned: f32) -> Result<Check> {
        let last = self.0.len().saturating_sub(1);
        let mut all: Option<Check> = None;
        for (i, work) in self.0.iter_mut().enumerate() {
            let value = if i == last { returned } else { work.finish()? };
            let one = work.check(value)?;
            all = Some(match all {
                None => one,
                Some(all) => Check {
                    worst: all.worst.max(one.worst),
                    compared: all.compared + one.compared,
                    of: all.of + one.of,
                    by: one.by,
                    at: if one.worst > all.worst {
                        one.at
                    } else {
                        all.at
                    },
                },
            });
        }
        all.ok_or_else(|| Error::Setting {
            name: "works in turn",
            want: "one or more",
            got: "none".to_owned(),
        })
    }

    fn remembers(&self) -> bool {
        self.0.iter().any(Work::remembers)
    }
}
