//! Rows of token ids, the order they are drawn in, and batches padded to a few lengths.
//! Invariant: padding is never a target and has no position, so it changes no loss; one seed gives one
//! order on every machine; no more than [`MAX_BUCKETS`] lengths exist, so no more plans are made.
//! Absent on purpose: which documents share a row of a packed batch; that is `data::pack`'s.
use crate::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use std::path::Path;
use tallow_llm::data::{Encoder, Examples, Row};

/// A target that is not counted, and the position of padding.
pub const NONE: u32 = u32::MAX;
/// Lengths that batches are padded to.
pub const MAX_BUCKETS: usize = 8;
const SHORTEST_BUCKET: usize = 16;

/// Token ids of many rows, held in one piece.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    ids: Vec<u32>,
    /// Which of them are targets.
    counted: Vec<bool>,
    ends: Vec<usize>,
    /// The line each row comes from, 0 where none is known.
    lines: Vec<u64>,
    /// What became of the lines.
    pub tally: Tally,
}

/// What became of the lines read so far: nothing is cut or left out silently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows that were cut to the longest allowed length.
    pub cut: usize,
    /// Lines left out because they have fewer than two tokens.
    pub too_short: usize,
    /// Lines left out because nothing in what is left of them is to be predicted.
    pub no_target: usize,
}

impl Tally {
    /// Cuts a row after `longest` tokens and counts what happens; false if nothing is left to learn.
    pub fn fit(&mut self, row: &mut Row, longest: usize) -> bool {
        if row.ids.len() < 2 {
            self.too_short += 1;
            return false;
        }
        self.cut += usize::from(row.cut(longest));
        let learns = row.targets() > 0;
        self.no_target += usize::from(!learns);
        learns
    }
}

impl Rows {
    /// Adds a JSONL file, each row cut after `longest` tokens.
    ///
    /// # Errors
    /// A line that cannot be read.
    pub fn read(&mut self, path: &Path, encoder: &mut Encoder, longest: usize) -> Result<()> {
        let mut examples = Examples::open(path)?;
        while let Some(example) = examples.next() {
            let row = encoder.encode(&example?);
            let row = row.map_err(|e| examples.blame(e))?;
            self.push(row, longest, examples.line());
        }
        Ok(())
    }

    /// Adds a row, cut after `longest` tokens; a row of fewer than two, or one without a target, is only
    /// counted. `line`: where it stands in its file, from 1.
    pub fn push(&mut self, mut row: Row, longest: usize, line: u64) {
        if !self.tally.fit(&mut row, longest) {
            return;
        }
        self.ids.extend(&row.ids);
        self.counted.extend(&row.counted);
        self.ends.push(self.ids.len());
        self.lines.push(line);
    }

    /// The line that row `i` comes from, counted from 1.
    pub fn line(&self, i: usize) -> u64 {
        self.lines[i]
    }

    /// CRC-32C of all ids and of where rows end: other data has another, as good as always.
    pub fn checksum(&self) -> u32 {
        let add = crc32c::crc32c_append;
        let sum = self
            .ids
            .iter()
            .fold(0, |sum, id| add(sum, &id.to_le_bytes()));
        let end = |sum, end: &usize| add(sum, &(*end as u64).to_le_bytes());
        let sum = self.ends.iter().fold(sum, end);
        let counted = |sum, counted: &bool| add(sum, &[u8::from(*counted)]);
        self.counted.iter().fold(sum, counted)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True if there is no row.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> Doc<'_> {
        let start = i.checked_sub(1).map_or(0, |before| self.ends[before]);
        let at = start..self.ends[i];
        Doc {
            ids: &self.ids[at.clone()],
            counted: Some(&self.counted[at]),
        }
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Tokens of the longest row.
    pub fn longest(&self) -> usize {
        (0..self.len())
            .map(|i| self.row(i).ids.len())
            .max()
            .unwrap_or(0)
    }
}

/// Row indices, shuffled anew in every epoch, without end.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    rows: usize,
    epoch: u64,
    at: usize,
    order: Vec<usize>,
}

impl Order {
    /// The order of `rows` rows that belongs to a seed.
    pub fn new(seed: u64, rows: usize) -> Self {
        Order {
            seed,
            rows,
            epoch: 0,
            at: 0,
            order: shuffled(seed, 0, rows),
        }
    }

    /// The rows of the next batch: `want` of them, fewer where the epoch ends.
    pub fn next(&mut self, want: usize) -> &[usize] {
        if self.at == self.rows {
            self.epoch += 1;
            self.at = 0;
            self.order = shuffled(self.seed, self.epoch, self.rows);
        }
        let start = self.at;
        self.at = (start + want).min(self.rows);
        &self.order[start..self.at]
    }

    /// The epoch of the batch given out last, counted from 0.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Epoch, and how many of its rows were given out.
    pub fn cursor(&self) -> (u64, usize) {
        (self.epoch, self.at)
    }

    /// Continues at a cursor of an order with this seed and number of rows.
    pub fn seek(&mut self, epoch: u64, at: usize) {
        if epoch != self.epoch {
            self.order = shuffled(self.seed, epoch, self.rows);
        }
        (self.epoch, self.at) = (epoch, at.min(self.rows));
    }
}

/// Fisher and Yates's shuffle with a stream of its own for each epoch. Written out, because shuffles of
/// libraries may draw differently in their next version.
fn shuffled(seed: u64, epoch: u64, rows: usize) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(epoch);
    let mut order: Vec<usize> = (0..rows).collect();
    for i in (1..rows).rev() {
        let draw = u128::from(random.next_u64()) * (i as u128 + 1);
        order.swap(i, (draw >> 64) as usize);
    }
    order
}

/// The lengths that batches are padded to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets(Vec<usize>);

impl Buckets {
    /// 16, 32, 64, .. up to `longest` inputs, which is a length itself; at most [`MAX_BUCKETS`].
    pub fn up_to(longest: usize) -> Self {
        let longest = longest.max(1);
        let doubling = std::iter::successors(Some(SHORTEST_BUCKET), |n| n.checked_mul(2));
        let mut all: Vec<usize> = doubling.take_while(|n| *n < longest).collect();
        all.push(longest);
        let drop = all.len().saturating_sub(MAX_BUCKETS);
        Buckets(all.split_off(drop))
    }

    /// The shortest that holds `inputs` tokens, `None` if none does.
    pub fn fit(&self, inputs: usize) -> Option<usize> {
        self.0.iter().copied().find(|n| *n >= inputs)
    }

    /// All lengths, the shortest first.
    pub fn lengths(&self) -> &[usize] {
        &self.0
    }
}

/// A document on its way into a batch.
#[derive(Clone, Copy, Debug)]
pub struct Doc<'a> {
    /// Its tokens.
    pub ids: &'a [u32],
    /// Which of them are targets; `None`: all but the first.
    pub counted: Option<&'a [bool]>,
}

impl<'a> From<&'a Row> for Doc<'a> {
    fn from(row: &'a Row) -> Self {
        Doc {
            ids: &row.ids,
            counted: Some(&row.counted),
        }
    }
}

impl<'a> From<&'a [u32]> for Doc<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Doc { ids, counted: None }
    }
}

impl Doc<'_> {
    /// Model inputs it makes: its last token is only predicted.
    pub fn inputs(&self) -> usize {
        self.ids.len().saturating_sub(1)
    }
}

/// What a recording is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Rows and tokens `[b, t]`.
    pub dims: [usize; 2],
    /// Rows hold several documents.
    pub packed: bool,
}

impl From<[usize; 2]> for BatchShape {
    fn from(dims: [usize; 2]) -> Self {
        let packed = false;
        BatchShape { dims, packed }
    }
}

/// Model inputs of `b` rows padded to `t` tokens. A document of `n` ids has `n - 1` inputs, each with the id
/// after it as its target where that counts. A packed row holds several, one after another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Rows, empty ones included.
    pub b: usize,
    /// Tokens of each row.
    pub t: usize,
    /// Rows hold several documents: `starts` says where they begin.
    pub packed: bool,
    /// `[b, t]`; 0 at padding.
    pub ids: Vec<u32>,
    /// `[b, t]`, from 0 in each document; [`NONE`] at padding.
    pub pos: Vec<u32>,
    /// `[b, t]`, the index in its row of a document's first token; 0 at padding.
    pub starts: Vec<u32>,
    /// `[b, t]`; [`NONE`] where nothing is predicted.
    pub targets: Vec<u32>,
    /// Targets that count.
    pub counted: usize,
}

impl Batch {
    /// Makes it `b` rows of `t` tokens of padding.
    pub fn clear(&mut self, [b, t]: [usize; 2]) {
        (self.b, self.t, self.counted) = (b, t, 0);
        self.packed = false;
        for (list, value) in [
            (&mut self.ids, 0),
            (&mut self.pos, NONE),
            (&mut self.starts, 0),
            (&mut self.targets, NONE),
        ] {
            list.clear();
            list.resize(b * t, value);
        }
    }

    /// Fills `b` rows of `t` inputs with a document each; what is missing is padding.
    ///
    /// # Errors
    /// [`Error::BatchShape`] if there are more documents or one has more inputs.
    pub fn fill<'a, D: Into<Doc<'a>>>(
        &mut self,
        shape: [usize; 2],
        rows: impl IntoIterator<Item = D>,
    ) -> Result<()> {
        self.clear(shape);
        for (i, doc) in rows.into_iter().enumerate() {
            self.place(i, 0, doc.into())?;
        }
        Ok(())
    }

    /// Fills `b` rows of `t` inputs with several documents each, one after another.
    ///
    /// # Errors
    /// [`Error::BatchShape`] if there are more rows or one has more inputs.
    pub fn fill_packed<'a, D: Into<Doc<'a>>>(
        &mut self,
        shape: [usize; 2],
        rows: impl IntoIterator<Item = impl IntoIterator<Item = D>>,
    ) -> Result<()> {
        self.clear(shape);
        self.packed = true;
        for (i, row) in rows.into_iter().enumerate() {
            let mut at = 0;
            for doc in row {
                let doc = doc.into();
                self.place(i, at, doc)?;
                at += doc.inputs();
            }
        }
        Ok(())
    }

    /// Puts batches one after another, each with its rows padded to the shape `[b, t]`; of what is `None`, padding.
    ///
    /// # Errors
    /// [`Error::BatchShape`] if one is larger.
    pub fn stack<'a>(
        &mut self,
        [b, t]: [usize; 2],
        parts: impl ExactSizeIterator<Item = Option<&'a Batch>>,
    ) -> Result<()> {
        self.clear([b * parts.len(), t]);
        for (i, part) in parts.enumerate() {
            let Some(part) = part else { continue };
            if part.b > b || part.t > t {
                return Err(Error::BatchShape {
                    want_rows: b,
                    want_len: t,
                    rows: part.b,
                    len: part.t,
                });
            }
            self.packed |= part.packed;
            self.counted += part.counted;
            for row in 0..part.b {
                let from = row * part.t..(row + 1) * part.t;
                let to = (i * b + row) * t..(i * b + row) * t + part.t;
                self.ids[to.clone()].copy_from_slice(&part.ids[from.clone()]);
                self.pos[to.clone()].copy_from_slice(&part.pos[from.clone()]);
                self.starts[to.clone()].copy_from_slice(&part.starts[from.clone()]);
                self.targets[to].copy_from_slice(&part.targets[from]);
            }
        }
        Ok(())
    }

    /// Writes a document into row `i` from index `start` on.
    fn place(&mut self, i: usize, start: usize, doc: Doc<'_>) -> Result<()> {
        let n = doc.inputs();
        if i >= self.b || start + n > self.t {
            return Err(Error::BatchShape {
                want_rows: self.b,
                want_len: self.t,
                rows: i + 1,
                len: start + n,
            });
        }
        for k in 0..n {
            let at = i * self.t + start + k;
            self.ids[at] = doc.ids[k];
            self.pos[at] = k as u32;
            self.starts[at] = start as u32;
            if doc.counted.is_none_or(|c| c[k + 1]) {
                self.targets[at] = doc.ids[k + 1];
                self.counted += 1;
            }
        }
        Ok(())
    }

    /// Inputs that are not padding.
    pub fn inputs(&self) -> usize {
        self.pos.iter().filter(|p| **p != NONE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_shifted_and_padding_is_none() {
        let mut batch = Batch::default();
        batch.fill([3, 4], [&[5, 6, 7][..], &[8, 9]]).unwrap();
        assert_eq!(batch.ids, [5, 6, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
        let n = NONE;
        assert_eq!(batch.targets, [6, 7, n, n, 9, n, n, n, n, n, n, n]);
        assert_eq!(batch.pos, [0, 1, n, n, 0, n, n, n, n, n, n, n]);
        assert_eq!(batch.counted, 3);
        // A smaller batch leaves nothing of the larger one behind.
        batch.fill([1, 1], [&[1, 2][..]]).unwrap();
        assert_eq!((batch.ids, batch.counted), (vec![1], 1));
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused() {
        let mut batch = Batch::default();
        let two = [&[1, 2][..], &[3, 4]];
        assert!(matches!(
            batch.fill([1, 4], two),
            Err(Error::BatchShape { rows: 2, .. })
        ));
        assert!(matches!(
            batch.fill([1, 1], [&[1, 2, 3][..]]),
            Err(Error::BatchShape { len: 2, .. })
        ));
    }

    #[test]
    fn two_hundred_lengths_make_at_most_eight_buckets() {
        for longest in [1, 16, 100, 1024, 2048, 131_072] {
            let buckets = Buckets::up_to(longest);
            assert!(buckets.lengths().len() <= MAX_BUCKETS, "{buckets:?}");
            assert_eq!(buckets.fit(longest), Some(longest));
            assert_eq!(buckets.fit(longest + 1), None);
            for n in (1..=longest).step_by(longest.div_ceil(200)) {
                assert!(buckets.fit(n).is_some_and(|t| t >= n));
            }
        }
        assert_eq!(Buckets::up_to(100).lengths(), [16, 32, 64, 100]);
    }

    #[test]
    fn an_epoch_shows_every_row_once_and_the_next_in_another_order() {
        let mut order = Order::new(3, 10);
        let mut epoch = || -> Vec<usize> {
            let mut all = vec![];
            for want in [4, 4, 2] {
                let got = order.next(4).to_vec();
                assert_eq!(got.len(), want);
                all.extend(got);
            }
            all
        };
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut e in [first.clone(), second] {
            e.sort_unstable();
            assert_eq!(e, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(Order::new(3, 10).next(10), first);
        assert_ne!(Order::new(4, 10).next(10), first);
        // Fixed for good: a resumed run must draw what the first one would have drawn.
        assert_eq!(Order::new(0, 8).next(8), [7, 2, 1, 6, 0, 4, 3, 5]);
    }

    #[test]
    fn documents_of_a_row_count_from_0_and_keep_their_targets() {
        let mut batch = Batch::default();
        let answer = Row {
            ids: vec![5, 6, 7, 8],
            counted: vec![false, false, true, true],
        };
        let short = &[1, 2][..];
        let rows = [vec![Doc::from(&answer), short.into()], vec![short.into()]];
        batch.fill_packed([2, 5], rows).unwrap();
        let n = NONE;
        assert_eq!(batch.ids, [5, 6, 7, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(batch.pos, [0, 1, 2, 0, n, 0, n, n, n, n]);
        assert_eq!(batch.starts, [0, 0, 0, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(batch.targets, [n, 7, 8, 2, n, 2, n, n, n, n]);
        assert_eq!((batch.counted, batch.inputs(), batch.packed), (4, 5, true));
        let long = [[Doc::from(&answer), Doc::from(&answer)]];
        assert!(matches!(
            batch.fill_packed([1, 5], long),
            Err(Error::BatchShape { len: 6, .. })
        ));
    }

    #[test]
    fn rows_are_cut_and_counted() {
        let mut rows = Rows::default();
        let row = |ids: &[u32], first: usize| Row {
            ids: ids.to_vec(),
            counted: (0..ids.len()).map(|i| i >= first).collect(),
        };
        let all = [row(&[1], 1), row(&[1, 2, 3, 4], 1), row(&[5, 6], 1)];
        let late = [row(&[1, 2, 3, 4], 3)];
        for (row, line) in all.into_iter().chain(late).zip(1..) {
            rows.push(row, 3, line);
        }
        assert_eq!((rows.line(0), rows.line(1)), (2, 3));
        let want = Tally {
            cut: 2,
            too_short: 1,
            no_target: 1,
        };
        assert_eq!((rows.len(), rows.tally), (2, want));
        let ids = |i| rows.row(i).ids;
        assert_eq!((ids(0), ids(1)), (&[1, 2, 3][..], &[5, 6][..]));
        assert_eq!((rows.tokens(), rows.longest()), (5, 3));
    }
}
