//! Documents into rows of one length, with hardly any padding: best fit from a bounded look-ahead.
//! Invariant: every document goes into exactly one row, whole; none waits longer than the rows before it; at the
//! end of a pass nothing is left over.
//! Absent on purpose: cutting documents to fill a row.

use crate::Result;

/// Documents looked at to fill a row.
pub const LOOK_AHEAD: usize = 256;

/// What can be packed.
pub trait Packable {
    /// Model inputs it takes.
    fn inputs(&self) -> usize;
}

impl Packable for usize {
    fn inputs(&self) -> usize {
        *self
    }
}

impl Packable for tallow_llm::data::Row {
    fn inputs(&self) -> usize {
        self.ids.len().saturating_sub(1)
    }
}

impl Packable for super::Sample {
    fn inputs(&self) -> usize {
        self.row.inputs()
    }
}

/// Fills rows of `capacity` inputs.
#[derive(Clone, Debug)]
pub struct Packer<T> {
    capacity: usize,
    /// Documents waiting, the oldest first.
    pub(crate) pool: Vec<T>,
    /// The pass has ended, and only what waits is left.
    pub(crate) ended: bool,
}

impl<T: Packable> Packer<T> {
    /// Without documents.
    pub fn new(capacity: usize) -> Self {
        Packer {
            capacity,
            pool: vec![],
            ended: false,
        }
    }

    /// The documents of the next row: the one that waited longest, and of the others those that leave the least
    /// room. `pull` gives the next document, or `None` at the end of a pass; then this does so too, once all that
    /// waited is packed.
    ///
    /// # Errors
    /// Those of `pull`.
    pub fn row(&mut self, mut pull: impl FnMut() -> Result<Option<T>>) -> Result<Option<Vec<T>>> {
        while !self.ended && self.pool.len() < LOOK_AHEAD {
            match pull()? {
                Some(document) => self.pool.push(document),
                None => self.ended = true,
            }
        }
        if self.pool.is_empty() {
            self.ended = false;
            return Ok(None);
        }
        let mut chosen = self.choose();
        let mut row = Vec::with_capacity(chosen.len());
        chosen.sort_unstable_by(|a, b| b.cmp(a));
        for i in chosen {
            row.push(self.pool.remove(i));
        }
        row.reverse();
        Ok(Some(row))
    }

    /// Indices of the first document and of those that fill the row best: the fullest sum that can be reached,
    /// by the oldest documents that reach it.
    fn choose(&self) -> Vec<usize> {
        let room = self.capacity.saturating_sub(self.pool[0].inputs());
        // The document that first reached a sum, and the sum before it.
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; room + 1];
        let mut sums = vec![false; room + 1];
        sums[0] = true;
        let mut top = 0;
        for (i, document) in self.pool.iter().enumerate().skip(1) {
            let n = document.inputs();
            if n == 0 || n > room {
                continue;
            }
            for sum in (0..=top.min(room - n)).rev() {
                if sums[sum] && !sums[sum + n] {
                    sums[sum + n] = true;
                    reached[sum + n] = Some((i, sum));
                }
            }
            top = (top + n).min(room);
            if sums[room] {
                break;
            }
        }
        let mut chosen = vec![0];
        let mut at = (0..=room).rev().find(|s| sums[*s]).unwrap_or(0);
        while let Some((i, before)) = reached[at] {
            chosen.push(i);
            at = before;
        }
        chosen
    }
}

/// Rows that documents of these inputs take, and the share of them that is not padding.
pub fn measure(inputs: impl IntoIterator<Item = usize>, capacity: usize) -> (usize, f64) {
    let mut packer = Packer::new(capacity);
    let mut documents = inputs.into_iter();
    let (mut rows, mut used) = (0, 0);
    while let Ok(Some(row)) = packer.row(|| Ok(documents.next())) {
        rows += 1;
        used += row.iter().sum::<usize>();
    }
    (rows, used as f64 / (rows * capacity).max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(documents: &[usize], capacity: usize) -> Vec<Vec<usize>> {
        let mut packer = Packer::new(capacity);
        let mut rest = documents.iter().copied();
        let mut rows = vec![];
        while let Some(row) = packer.row(|| Ok(rest.next())).unwrap() {
            assert!(row.iter().sum::<usize>() <= capacity);
            rows.push(row);
        }
        rows
    }

    #[test]
    fn rows_are_filled_by_the_oldest_that_fill_them_best() {
        let want = [vec![6, 4], vec![5, 3], vec![7]];
        assert_eq!(rows(&[6, 5, 4, 3, 7], 10), want);
        assert_eq!(rows(&[10, 1, 10], 10), [vec![10], vec![1], vec![10]]);
        assert_eq!(rows(&[3, 3, 3, 3], 9), [vec![3, 3, 3], vec![3]]);
        assert!(rows(&[], 9).is_empty());
    }

    #[test]
    fn every_document_is_packed_once_and_rows_are_full() {
        let documents: Vec<usize> = (0..3000).map(|i| 20 + i * 7919 % 131).collect();
        let packed = rows(&documents, 512);
        let mut all: Vec<usize> = packed.concat();
        let mut want = documents.clone();
        all.sort_unstable();
        want.sort_unstable();
        assert_eq!(all, want);
        let (n, filled) = measure(documents, 512);
        assert_eq!(n, packed.len());
        assert!(filled > 0.99, "{filled}");
    }

    #[test]
    fn a_pass_ends_once_and_another_begins() {
        let mut packer = Packer::new(4);
        let mut rest = [Some(2), None, Some(3), None].into_iter();
        let mut next = || packer.row(|| Ok(rest.next().flatten())).unwrap();
        assert_eq!(next(), Some(vec![2]));
        assert_eq!(next(), None);
        assert_eq!(next(), Some(vec![3]));
        assert_eq!(next(), None);
    }
}
