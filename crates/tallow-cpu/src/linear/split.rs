//! How a product is cut into tasks: blocks of rows times groups of panels.
//! Invariant: every row and panel belongs to one task; tasks of the same rows are neighbours.
//! Absent on purpose: measuring. The estimate is crude: it only keeps tasks from being too small.

use std::ops::{Range, RangeInclusive};

use crate::tile::MR;

/// The most rows of a task of a linear: their part of `x` fits the second-level cache.
pub(super) const MAX_ROWS: usize = 8 * MR;
/// The fewest, where there are more: a panel read from memory feeds that many.
pub(super) const MIN_ROWS: usize = 4 * MR;
/// The least work of a task in cycles of the multipliers, a microsecond or two.
const MIN_CYCLES: usize = 6000;
/// Cycles to load a row of a panel: from the second-level cache, from the last one.
const LOAD: usize = 5;
const COLD_LOAD: usize = 16;
/// Tasks a thread, so that a thread that comes late or whose core is slow leaves its share to others.
const PER_THREAD: usize = 32;
/// Of one row.
const PER_THREAD_ROW: usize = 4;

/// Panels that one row is multiplied with at once (see `tile::Strip`).
const STRIP: usize = 4;

/// A product cut into `row_blocks * groups` tasks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    m: usize,
    panels: usize,
    /// Rows of a task; the last block may have fewer.
    pub(super) rows: usize,
    row_blocks: usize,
    groups: usize,
    /// Panels that a group begins on multiples of.
    unit: usize,
}

impl Split {
    /// Cuts `m` rows and `panels` panels, whose sums have `k` terms, for `threads` threads. A task
    /// has at most `limits.end()` rows, and where there are more, about `limits.start()` or more.
    pub(super) fn new(
        (m, panels, k): (usize, usize, usize),
        limits: RangeInclusive<usize>,
        threads: usize,
    ) -> Self {
        // A panel's row costs two cycles a row of `x`, and at least the time to load it. One row is a
        // decoded token: all weights are read for it, so they come from afar.
        let (load, per_thread) = match m {
            1 => (COLD_LOAD, PER_THREAD_ROW),
            _ => (LOAD, PER_THREAD),
        };
        let cycles = panels.max(1) * k * (2 * m).max(load);
        let want = if threads == 1 {
            1
        } else {
            (threads * per_thread).min(cycles / MIN_CYCLES)
        };
        let row_blocks = m
            .div_ceil(*limits.end())
            .max(want.min(m.div_ceil(*limits.start())))
            .max(1);
        let rows = m.div_ceil(row_blocks).next_multiple_of(MR).min(m).max(1);
        let row_blocks = m.div_ceil(rows);
        // One row is multiplied with several panels at once, where there are enough of them.
        let unit = if m == 1 && panels >= STRIP * want {
            STRIP
        } else {
            1
        };
        let most = panels.div_ceil(unit).max(1);
        let groups = want.div_ceil(row_blocks.max(1)).clamp(1, most);
        Self {
            m,
            panels,
            rows,
            row_blocks,
            groups,
            unit,
        }
    }

    pub(super) fn tasks(&self) -> usize {
        self.row_blocks * self.groups
    }

    /// Index of the row block, its rows, and the panels of a task.
    pub(super) fn task(&self, task: usize) -> (usize, Range<usize>, Range<usize>) {
        let (block, group) = (task / self.groups, task % self.groups);
        let rows = block * self.rows..self.m.min((block + 1) * self.rows);
        let units = self.panels.div_ceil(self.unit);
        let cut = |g: usize| (g * units / self.groups * self.unit).min(self.panels);
        (block, rows, cut(group)..cut(group + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_and_panel_once() {
        for m in [0, 1, 2, 12, 13, 47, 48, 49, 96, 97, 128, 512, 1000] {
            for panels in [0, 1, 2, 3, 16, 128] {
                for threads in [1, 2, 3, 64] {
                    let split = Split::new((m, panels, 256), MIN_ROWS..=MAX_ROWS, threads);
                    let mut seen = vec![0u32; m * panels];
                    for task in 0..split.tasks() {
                        let (_, rows, cols) = split.task(task);
                        assert!(rows.len() <= split.rows && split.rows <= MAX_ROWS);
                        for i in rows {
                            cols.clone().for_each(|p| seen[i * panels + p] += 1);
                        }
                    }
                    assert!(
                        seen.iter().all(|&n| n == 1),
                        "{m} {panels} {threads}: {split:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn work_for_every_thread_where_there_is_enough() {
        for (m, panels, k) in [
            (1, 128, 1024),
            (8, 64, 1024),
            (512, 16, 256),
            (4096, 16, 512),
        ] {
            for threads in [2, 16] {
                assert!(
                    Split::new((m, panels, k), MIN_ROWS..=MAX_ROWS, threads).tasks() >= 2 * threads
                );
            }
        }
        assert_eq!(Split::new((1, 1, 64), MIN_ROWS..=MAX_ROWS, 64).tasks(), 1);
    }
}
