//! Tokens in, scores of the next token out, with a cache of what came before.
//! Invariant: after a size was used once, feeding tokens allocates nothing and makes no plan; the same tokens
//! give the same scores however they are cut, and rows of padding change none of them.
//! Absent on purpose: text and choice; see `generate.rs`. Several sequences at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tallow_core::op::Role;
use tallow_core::session::Program;
use tallow_core::tensor::Tensor;
use tallow_core::types::{DType, TensorType};

use crate::adapter::Adapter;
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sample::Sampling;

use super::draw::Draw;

/// Rows of a long piece of a prompt.
const LARGE: usize = 128;
/// Rows of a short piece.
const SMALL: usize = 16;
/// Up to this many tokens go through short pieces: fewer rows of padding than one long piece.
const FEW: usize = 5 * SMALL;
/// Caches larger than this know no short pieces, so that even long contexts make few plans.
const SMALL_CACHE: usize = 2048;
/// Time that tokens chosen ahead may take before the first of them is seen.
const AHEAD: Duration = Duration::from_millis(20);
/// Most tokens chosen ahead: what is gained by more is not worth the work thrown away when a text ends.
const MOST_AHEAD: usize = 16;
/// The position of a row of padding.
const PADDING: u32 = u32::MAX;

/// One sequence being continued.
pub struct Decoder {
    model: Model,
    adapter: Option<Adapter>,
    cache: Cache,
    /// Recordings by number of rows, made when first needed.
    steps: BTreeMap<usize, Step>,
    position: usize,
    /// Rows of the recording that ran last.
    last: usize,
    logits: Vec<f32>,
    /// What the device chose last.
    found: Vec<u32>,
    /// Tokens that one row is replayed for before it is waited for.
    ahead: usize,
    /// How a device behind a bus draws its tokens; `None`: it takes the likeliest.
    draw: Option<Draw>,
}

/// A recording that takes some rows of tokens at once.
struct Step {
    /// `[1, rows]`, and what goes into them.
    ids: (Tensor, Vec<u32>),
    pos: (Tensor, Vec<u32>),
    /// `[1]`: the row whose logits are wanted. A single row needs none.
    last: Option<Tensor>,
    /// Its outputs: the logits `[1, vocab]` and, on a device behind a bus, the token chosen `[1, 2]`.
    program: Program,
    /// What was chosen behind each position, `[1, capacity, 1, 2]`: a single row on a device behind
    /// a bus, which leaves its choice and the next position where it will read them itself.
    chosen: Option<Tensor>,
}

impl Decoder {
    /// A decoder for sequences of at least `tokens` tokens.
    ///
    /// # Errors
    /// More tokens than the model allows; no memory.
    pub fn new(model: &Model, adapter: Option<&Adapter>, tokens: usize) -> Result<Self> {
        Ok(Self {
            cache: Cache::new(model, tokens)?,
            model: model.clone(),
            adapter: adapter.cloned(),
            steps: BTreeMap::new(),
            position: 0,
            last: 0,
            logits: vec![0.0; model.config.vocab],
            found: Vec::with_capacity(MOST_AHEAD),
            ahead: 1,
            draw: None,
        })
    }

    /// From now on a device behind a bus draws tokens as `sampling` says, if it can: with a temperature and without a
    /// repetition penalty. Without a temperature it takes the likeliest.
    ///
    /// # Errors
    /// No memory.
    pub fn draw_by(&mut self, sampling: &Sampling) -> Result<()> {
        let session = &self.model.session;
        self.draw = match session.backend().far() {
            true => Draw::new(session, sampling)?,
            false => None,
        };
        self.steps.clear();
        Ok(())
    }

    /// Does [`Decoder::feed_choosing`] draw?
    pub(super) fn draws(&self) -> bool {
        self.draw.is_some()
    }

    /// Tokens fed so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Forgets the sequence; keeps memory and recordings.
    pub fn reset(&mut self) {
        self.position = 0;
        if let Some(draw) = &mut self.draw {
            draw.restart();
        }
    }

    /// Appends tokens (at least one) and waits for the scores `[vocab]` of the token that follows them.
    ///
    /// # Errors
    /// No tokens, tokens outside the vocabulary, more than fit; nothing has changed then.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&mut [f32]> {
        self.advance(ids)?;
        self.scores()
    }

    /// Appends tokens (at least one) and tells the likeliest token that follows them (or one that was drawn, see
    /// [`Decoder::draw_by`]), and what follows behind that, at most `most` tokens: all but the last of them are appended, too. A device behind a bus chooses them itself
    /// and goes on without waiting for anybody, for some tokens at a time; none where it finds none, and
    /// elsewhere: see [`Decoder::scores`].
    ///
    /// # Errors
    /// As [`Decoder::feed`].
    pub fn feed_choosing(&mut self, ids: &[u32], most: usize) -> Result<&[u32]> {
        let from = self.position;
        self.advance(ids)?;
        self.found.clear();
        let mut read = [0.0; 2 * MOST_AHEAD];
        let Some(step) = self.steps.get_mut(&self.last) else {
            return Ok(&self.found);
        };
        let session = &self.model.session;
        let n = match (&step.chosen, step.program.outputs.get(1)) {
            (Some(chosen), _) => {
                let room = self.cache.capacity() - self.position + 1;
                let n = self.ahead.min(most).min(room).max(1);
                let start = Instant::now();
                for _ in 1..n {
                    step.program.replay()?;
                }
                let at = 2 * (self.position - 1);
                session.read_part(chosen, at, &mut read[..2 * n])?;
                self.ahead = fit(start.elapsed() / n as u32);
                n
            }
            (None, Some(top)) => {
                session.read_into(top, &mut read[..2])?;
                1
            }
            (None, None) => return Ok(&self.found),
        };
        let vocab = self.model.config.vocab;
        let right = |f: &&[f32; 2]| f[1].is_finite() && (f[0] as usize) < vocab;
        let pairs = &read.as_chunks::<2>().0[..n];
        let ids_found = pairs.iter().take_while(right).map(|f| f[0] as u32);
        self.found.extend(ids_found);
        if self.found.is_empty() && n > 1 {
            // Its scores are gone: once more, for them alone.
            self.position = from;
            self.advance(ids)?;
        }
        if let Some(draw) = &mut self.draw {
            draw.count(self.found.len());
        }
        self.position += self.found.len().max(1) - 1;
        Ok(&self.found)
    }

    /// The scores `[vocab]` behind the tokens fed last.
    ///
    /// # Errors
    /// What the device reports.
    pub fn scores(&mut self) -> Result<&mut [f32]> {
        if let Some(step) = self.steps.get(&self.last) {
            let out = &step.program.outputs[0];
            self.model.session.read_into(out, &mut self.logits)?;
        }
        Ok(&mut self.logits)
    }

    /// Appends tokens without waiting.
    pub(super) fn advance(&mut self, ids: &[u32]) -> Result<()> {
        self.check(ids)?;
        if let Some(draw) = &self.draw {
            draw.write(&self.model.session)?;
        }
        let mut rest = ids;
        while !rest.is_empty() {
            let rows = piece(rest.len(), self.capacity());
            self.last = rows;
            let (now, later) = rest.split_at(rest.len().min(rows));
            if !self.steps.contains_key(&rows) {
                let step = self.record(rows)?;
                self.steps.insert(rows, step);
            }
            if let Some(step) = self.steps.get_mut(&rows) {
                step.run(&self.model, now, self.position)?;
            }
            self.position += now.len();
            rest = later;
        }
        Ok(())
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.model.config.vocab;
        let bad = |got: String| {
            Err(Error::Setting {
                name: "tokens",
                want: "at least one, each in the model's vocabulary",
                got,
            })
        };
        if ids.is_empty() {
            return bad("none".to_owned());
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return bad(format!("token {id} of {vocab}"));
        }
        match self.position + ids.len() {
            tokens if tokens > self.capacity() => Err(Error::TooLong {
                tokens,
                limit: self.capacity(),
            }),
            _ => Ok(()),
        }
    }

    fn record(&self, rows: usize) -> Result<Step> {
        let session = &self.model.session;
        let leaf = |n: &[usize], role| session.zeros(TensorType::u32(n), role);
        let role = match rows == 1 && session.backend().far() {
            true => Role::State,
            false => Role::Data,
        };
        let (ids, pos) = (leaf(&[1, rows], role)?, leaf(&[1, rows], role)?);
        let adapter = self.adapter.as_ref();
        let hidden = self.model.hidden(&ids, &pos, adapter, Some(&self.cache))?;
        let c = self.model.config.hidden;
        let mut x = hidden.x.reshape([rows, c])?;
        let last = (rows > 1).then(|| leaf(&[1], Role::Data)).transpose()?;
        if let Some(last) = &last {
            x = x.gather(last, x.dtype())?;
        }
        let logits = self.model.logits_with(&x, adapter)?;
        let mut outs = vec![&logits];
        let top = match (&self.draw, session.backend().far()) {
            (_, false) => None,
            (None, true) => Some(logits.top()?),
            (Some(draw), true) => Some(draw.of(&logits)?),
        };
        outs.extend(&top);
        let (mut updates, mut chosen) = (hidden.updates, None);
        if let (1, Some(draw)) = (rows, &self.draw) {
            updates.push(draw.next(session)?);
        }
        if let (1, Some(top)) = (rows, &top) {
            let log = TensorType::f32([1, self.capacity(), 1, 2]);
            let log = session.zeros(log, Role::State)?;
            updates.extend(self.own_next(top, [&ids, &pos, &log])?);
            chosen = Some(log);
        }
        Ok(Step {
            program: session.record(&outs, &updates)?,
            ids: (ids, vec![0; rows]),
            pos: (pos, vec![PADDING; rows]),
            last,
            chosen,
        })
    }

    /// What makes a single row's own choice `top [1, 2]` its next token: written over its id, one position on, and
    /// kept in `log`.
    fn own_next(&self, top: &Tensor, leaves: [&Tensor; 3]) -> Result<Vec<(Tensor, Tensor)>> {
        let [ids, pos, log] = leaves;
        let one = self.model.session.tensor_u32(&[1], [1, 1], Role::Data)?;
        // Where a score is NaN there is no token; what is looked up then must still be one.
        let last = Tensor::scalar((self.model.config.vocab - 1) as f32);
        let next = top.slice(1, 0, 1)?.minimum(&last)?.cast(DType::U32)?;
        let kept = log.kv_write(&top.reshape([1, 1, 1, 2])?, pos)?;
        Ok(vec![
            (ids.clone(), next),
            (log.clone(), kept),
            (pos.clone(), pos.add(&one)?),
        ])
    }
}

/// Tokens ahead, each of which takes `each`.
fn fit(each: Duration) -> usize {
    let n = AHEAD.as_secs_f64() / each.as_secs_f64().max(1e-9);
    (n as usize).clamp(1, MOST_AHEAD)
}

impl Step {
    /// Starts one replay on `now` (at most as many tokens as it has rows) from position `from` on.
    fn run(&mut self, model: &Model, now: &[u32], from: usize) -> Result<()> {
        let Self { ids, pos, last, .. } = self;
        ids.1.fill(0);
        ids.1[..now.len()].copy_from_slice(now);
        pos.1.fill(PADDING);
        for (i, p) in pos.1[..now.len()].iter_mut().enumerate() {
            *p = (from + i) as u32;
        }
        let session = &model.session;
        session.write_u32(&ids.0, &ids.1)?;
        session.write_u32(&pos.0, &pos.1)?;
        if let Some(last) = last {
            session.write_u32(last, &[now.len() as u32 - 1])?;
        }
        Ok(self.program.replay()?)
    }
}

/// Rows of the next recording to run for `rest` tokens.
fn piece(rest: usize, capacity: usize) -> usize {
    match rest {
        1 => 1,
        2..=FEW if capacity <= SMALL_CACHE => SMALL,
        _ => LARGE,
    }
}
