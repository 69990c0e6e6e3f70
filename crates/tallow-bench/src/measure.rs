//! The honest clock. Several contenders take turns on one work; each becomes a row of figures, or a row that says
//! why it has none.
//! Invariant: a figure exists only in [`Verdict::Valid`]. Between two reads of the clock every repetition is fed what
//! came out of the one before; outputs are poisoned before, compared with the oracle after.
//! Absent on purpose: what is measured, and the machine's clock, which come from outside; and the floor, which `floors` knows.

use serde::{Deserialize, Serialize};
use tallow::Session;

use crate::calm::{Calm, Rounds};
use crate::probe::{Floor, Need};
use crate::stats::{Summary, median};
use crate::work::{Chain, Chained, Check, Clock, Looped, Queued, Work, link};
use crate::{Error, Result};

pub(crate) mod doubt;
mod proof;
#[cfg(test)]
pub(crate) mod tests;

pub use doubt::Reason;

/// Seconds of work after which a GPU's clock is up.
const WAKE_S: f64 = 2.0;
/// Seconds of each part of it.
const BUSY_S: f64 = 0.05;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Rounds kept; one more is run before them and thrown away.
    pub rounds: usize,
    /// Shortest time of one loop of one contender in one round, in seconds.
    pub loop_s: f64,
    /// How often growth may be measured before it counts as wrong: another program may disturb it.
    pub tries: usize,
    /// Seconds for the rounds of one contender, and for one measurement of its growth, after which no more are begun than it takes
    /// at least; `None`: there is time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enough_s: Option<f64>,
    /// Seconds of work before the first round. A GPU that had nothing to do while a model was read has lowered its clock: an
    /// H200 without a CUDA program in 3 s from 1980 to 450 MHz.
    #[serde(default)]
    pub wake_s: f64,
}

impl Settings {
    /// Enough to trust the 10th and 90th percentile.
    pub const FULL: Self = Self {
        rounds: 21,
        loop_s: 3e-3,
        tries: 4,
        enough_s: None,
        wake_s: 0.0,
    };
    /// For a first look.
    pub const QUICK: Self = Self {
        rounds: 7,
        loop_s: 1e-3,
        tries: 4,
        enough_s: Some(30.0),
        wake_s: 0.0,
    };
    /// The same, on the device of `session`.
    #[must_use]
    pub fn on(self, session: &Session) -> Self {
        match session.backend().far() {
            true => Self {
                wake_s: WAKE_S,
                ..self
            },
            false => self,
        }
    }
    /// Has it gone on for long enough by now, with so many contenders?
    fn enough(&self, clock: &dyn Clock, since: f64, contenders: usize) -> bool {
        self.enough_s
            .is_some_and(|s| clock.now() - since > s * contenders as f64)
    }
}

/// One engine at the start.
pub struct Contender {
    /// "tallow", "candle 0.11.1", "bare".
    pub engine: String,
    /// What it does.
    pub work: Box<dyn Work>,
    /// The least of it, from which the floor is made.
    pub need: Need,
    /// Does it put off work until somebody asks, so that many starts and one wait compute one result?
    pub lazy: bool,
    /// What it takes, where that is known.
    pub memory: Option<Memory>,
}

/// Bytes that a work takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Intermediates, by the plan.
    pub intermediates: usize,
    /// With state, operands and results; without weights, which works share.
    pub own: usize,
    /// By how much the process grew when it was made and first run, where that was looked at.
    pub grew: Option<usize>,
}

/// Seconds of one repetition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The host's time to start it.
    pub built: Summary,
    /// Many started, one wait. `None` for a lazy engine, which has no such thing.
    pub queued: Option<Summary>,
    /// A lazy engine timed as people time it: many started, the last result waited for. The others were NOT EXECUTED.
    pub not_executed: Option<Summary>,
    /// Each result waited for and fed to the next repetition.
    pub waited: Summary,
    /// Inside a replayed plan of dependent repetitions.
    pub in_plan: Option<Summary>,
    /// Why there is no such plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_plan: Option<String>,
    /// The check of a timed result.
    pub check: Check,
    /// How many times as long four times the dependent repetitions took.
    pub growth: f64,
}

/// Is it to be believed?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// These are its figures.
    Valid(Box<Figures>),
    /// It has none.
    Invalid(Reason),
}

/// A contender that was measured, and is not yet held against a floor.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Which engine.
    pub engine: String,
    /// The least of it.
    pub need: Need,
    /// What it took, or why that is not to be believed, whatever the floor.
    pub found: Result<Figures, Reason>,
    /// What it takes, where that is known.
    pub memory: Option<Memory>,
}

impl Measured {
    /// As a row above `floor`, or one that says why it has no figures.
    #[must_use]
    pub fn row(&self, floor: Floor) -> Row {
        let found = self.found.clone();
        let above = found.and_then(|f| doubt::above(&f, &floor).map(|()| f));
        Row {
            engine: self.engine.clone(),
            floor,
            verdict: match above {
                Ok(figures) => Verdict::Valid(Box::new(figures)),
                Err(reason) => Verdict::Invalid(reason),
            },
            memory: self.memory.clone(),
        }
    }
}

/// One engine on one work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Which engine.
    pub engine: String,
    /// No time can be shorter.
    pub floor: Floor,
    /// Figures, or the reason why there are none.
    pub verdict: Verdict,
    /// What it takes, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
}

impl Row {
    /// The figures of a valid row.
    #[must_use]
    pub fn figures(&self) -> Option<&Figures> {
        match &self.verdict {
            Verdict::Valid(f) => Some(f),
            Verdict::Invalid(_) => None,
        }
    }
}

/// Fewest rounds kept, however long they take.
const LEAST_ROUNDS: usize = 3;
/// Most repetitions of a loop.
const MOST: usize = 20_000;
/// Most repetitions in a plan, times four for growth.
const MOST_IN_PLAN: usize = 16;
/// and where most of a repetition is waiting for it: a plan as long as the others would be little more than its submission,
const MOST_FAR: usize = 64;
/// so it is replayed at least so often before it is waited for.
const REPLAYS_FAR: usize = 4;
/// A plan shorter than this holds more repetitions: the first finds its operands in no cache, and the last writes all results,
/// which must be little of it.
const PLAN_S: f64 = 1e-3;

/// Least starts in a queue of a lazy engine: what is put off costs nothing.
const LAZY: usize = 64;

/// What is known of a contender so far.
struct Track {
    /// Repetitions of a loop.
    n: usize,
    built: Vec<f64>,
    queued: Vec<f64>,
    waited: Vec<f64>,
    in_plan: Vec<f64>,
    /// Seconds of a second wait behind each loop, and of one of its repetitions.
    more: Vec<f64>,
    one: Vec<f64>,
    check: Option<Check>,
    growth: f64,
    /// Replays of a plan before a wait.
    replays: usize,
    /// The plan with `n` repetitions, and one with four times as many.
    chains: Option<(usize, [Box<dyn Chain>; 2])>,
    no_plan: Option<&'static str>,
    wrong: Option<Reason>,
}

impl Track {
    fn new() -> Self {
        Track {
            n: 1,
            built: vec![],
            queued: vec![],
            waited: vec![],
            in_plan: vec![],
            more: vec![],
            one: vec![],
            check: None,
            growth: f64::NAN,
            replays: 1,
            chains: None,
            no_plan: None,
            wrong: None,
        }
    }

    /// Drops what the round after warming up and `kept - 1` others left.
    fn forget(&mut self, kept: usize) {
        let counted = kept.saturating_sub(1);
        for samples in [
            &mut self.built,
            &mut self.queued,
            &mut self.waited,
            &mut self.in_plan,
        ] {
            samples.truncate(counted);
        }
    }
}

/// One contender with what is known of it, under the clock.
struct Bench<'a> {
    clock: &'a dyn Clock,
    settings: &'a Settings,
    who: &'a mut Contender,
    track: &'a mut Track,
}

/// Measures all contenders, in turns. Rounds in which the machine was not ours are run again, as often as there are rounds.
/// `stop` is asked between turns; what was stopped gives nothing.
pub fn measure(
    clock: &dyn Clock,
    settings: &Settings,
    contenders: &mut [Contender],
    calm: &mut dyn Calm,
    stop: &dyn Fn() -> bool,
) -> Option<(Vec<Measured>, Rounds)> {
    let tracks = contenders.iter().map(|_| Track::new()).collect();
    let mut turns = Turns {
        clock,
        settings,
        contenders,
        tracks,
        stop,
    };
    calm.begin();
    turns.each(0, |bench| bench.calibrate())?;
    let asleep = clock.now();
    while clock.now() - asleep < settings.wake_s && turns.left() {
        turns.each(0, |bench| bench.busy())?;
    }
    let mut rounds = Rounds::default();
    let (mut kept, mut turn) = (0, 0);
    let since = clock.now();
    // The first warms up.
    while kept <= settings.rounds {
        if kept > LEAST_ROUNDS && settings.enough(clock, since, turns.contenders.len()) {
            break;
        }
        let before = calm.is(true);
        turns.each(turn, |bench| bench.round(turn, kept > 0))?;
        turn += 1;
        let fine = before && calm.is(false);
        if !fine && rounds.again < settings.rounds {
            rounds.again += 1;
            turns.tracks.iter_mut().for_each(|t| t.forget(kept));
            continue;
        }
        rounds.disturbed += usize::from(!fine && kept > 0);
        kept += 1;
    }
    turns.each(0, |bench| bench.growth())?;
    turns.each(0, |bench| bench.checked())?;
    let all = turns.contenders.iter().zip(turns.tracks);
    let all = all.map(|(who, track)| Measured {
        engine: who.engine.clone(),
        need: who.need,
        found: figures(who, track),
        memory: who.memory.clone(),
    });
    Some((all.collect(), rounds))
}

/// All contenders, each under the clock when it is its turn.
struct Turns<'a> {
    clock: &'a dyn Clock,
    settings: &'a Settings,
    contenders: &'a mut [Contender],
    tracks: Vec<Track>,
    stop: &'a dyn Fn() -> bool,
}

impl Turns<'_> {
    /// Is anybody still to be measured?
    fn left(&self) -> bool {
        self.tracks.iter().any(|t| t.wrong.is_none())
    }
    /// Gives each its turn at `stage`; who begins changes with `turn`. `None` if it was stopped.
    fn each(
        &mut self,
        turn: usize,
        stage: impl Fn(&mut Bench<'_>) -> Result<(), Doubt>,
    ) -> Option<()> {
        let count = self.contenders.len();
        for i in (0..count).map(|i| (i + turn) % count) {
            if (self.stop)() {
                return None;
            }
            let mut bench = Bench {
                clock: self.clock,
                settings: self.settings,
                who: &mut self.contenders[i],
                track: &mut self.tracks[i],
            };
            if bench.track.wrong.is_none()
                && let Err(doubt) = stage(&mut bench)
            {
                bench.track.wrong = Some(doubt.reason());
            }
        }
        Some(())
    }
}

/// Why a contender is out: it failed, or it is not to be believed.
enum Doubt {
    Failed(Error),
    Wrong(Reason),
}

impl Doubt {
    fn reason(self) -> Reason {
        match self {
            Doubt::Failed(e) => Reason::Failed {
                what: e.to_string(),
            },
            Doubt::Wrong(r) => r,
        }
    }
}

impl From<Error> for Doubt {
    fn from(e: Error) -> Self {
        Doubt::Failed(e)
    }
}

impl From<Reason> for Doubt {
    fn from(r: Reason) -> Self {
        Doubt::Wrong(r)
    }
}

impl Bench<'_> {
    /// `n` repetitions, each waited for and fed from the one before.
    fn waited(&mut self, n: usize, seed: u64) -> Result<Looped, Doubt> {
        self.who.work.renew(seed)?;
        self.warm(seed)?;
        self.loop_of(n, seed)
    }

    /// New operands have driven everything else out of the caches, and another contender had the processor: the first repetition
    /// would be another work than the rest, and one alone another than many. So one is run before, and not timed.
    fn warm(&mut self, seed: u64) -> Result<(), Doubt> {
        let first = link(3.0, seed as usize);
        self.who.work.waited(self.clock, 1, first)?;
        Ok(())
    }

    /// The repetitions alone.
    fn loop_of(&mut self, n: usize, seed: u64) -> Result<Looped, Doubt> {
        let first = link(1.0, seed as usize);
        let done = self.who.work.waited(self.clock, n, first)?;
        let last = done.links.last().map_or(f32::NAN, |l| l.1);
        self.settled(last, done.seconds / n as f64)?;
        Ok(done)
    }

    /// `n` repetitions started, one wait.
    fn queued(&mut self, n: usize, seed: u64) -> Result<Queued, Doubt> {
        self.who.work.renew(seed)?;
        self.warm(seed)?;
        self.queue_of(n, seed)
    }

    /// The starts alone.
    fn queue_of(&mut self, n: usize, seed: u64) -> Result<Queued, Doubt> {
        let first = link(2.0, seed as usize);
        let done = self.who.work.queued(self.clock, n, first)?;
        self.settled(done.last, done.seconds / n as f64)?;
        Ok(done)
    }

    /// Waiting again must find nothing to wait for, and the same result.
    fn settled(&mut self, last: f32, one_s: f64) -> Result<(), Doubt> {
        if last.is_nan() {
            return Err(Reason::Poisoned.into());
        }
        let (again, more_s) = self.who.work.again(self.clock)?;
        self.track.more.push(more_s);
        self.track.one.push(one_s);
        match again.to_bits() == last.to_bits() {
            false => Err(doubt::changed(last, again).into()),
            true => Ok(()),
        }
    }

    /// Keeps the device at work for a while, without waits between: they would let a GPU's clock fall.
    fn busy(&mut self) -> Result<(), Doubt> {
        let one = self.track.one.last().copied().unwrap_or(BUSY_S);
        let n = (BUSY_S / one.max(1e-9)).ceil().clamp(1.0, MOST as f64) as usize;
        match self.who.lazy {
            true => self.waited(n, 0).map(|_| ()),
            false => self.queued(n, 0).map(|_| ()),
        }
    }

    /// Finds how many repetitions a loop needs; makes the plans.
    fn calibrate(&mut self) -> Result<(), Doubt> {
        let goal = self.settings.loop_s;
        // The first run of anything is slow, and so is the first look at new operands.
        self.waited(1, 0)?;
        let mut one = self.loop_of(1, 0)?.seconds;
        loop {
            let n = (goal / one.max(1e-9)).ceil().clamp(1.0, MOST as f64) as usize;
            if n <= self.track.n {
                break;
            }
            // By steps, for the same reason.
            self.track.n = n.min(self.track.n * 8);
            one = self.waited(self.track.n, 0)?.seconds / self.track.n as f64;
        }
        // What is put off takes no time in a queue.
        let queued = match self.who.lazy {
            true => one,
            false => self.queued(self.track.n, 0)?.seconds / self.track.n as f64,
        };
        let far = one > 2.0 * queued;
        let (reps, most, replays) = match far {
            true => (PLAN_S / queued.max(1e-9), MOST_FAR, REPLAYS_FAR),
            false => (PLAN_S / one.max(1e-9), MOST_IN_PLAN, 1),
        };
        let reps = reps.ceil().clamp(2.0, most as f64) as usize;
        self.track.replays = (self.track.n / reps).clamp(replays, 64);
        let work = &mut self.who.work;
        let track = &mut self.track;
        match (work.chain(reps)?, work.chain(4 * reps)?) {
            (Chained::Plan(a), Chained::Plan(b)) => track.chains = Some((reps, [a, b])),
            (Chained::No(why), _) | (_, Chained::No(why)) => track.no_plan = Some(why),
        }
        Ok(())
    }

    /// Seconds of `chains[k]`, replayed as often as a loop holds it, one behind the other, and waited for once. A wait for
    /// each would be most of the time of a short plan on a device behind a bus.
    fn in_plan(&mut self, k: usize, seed: u64) -> Result<Option<(f64, usize)>, Doubt> {
        let Some((reps, chains)) = &mut self.track.chains else {
            return Ok(None);
        };
        let times = self.track.replays;
        let chain = &mut chains[k];
        chain.renew(seed)?;
        // As before a loop.
        chain.start()?;
        chain.wait()?;
        let start = self.clock.now();
        for _ in 0..times {
            chain.start()?;
        }
        chain.wait()?;
        let seconds = self.clock.now() - start;
        Ok(Some((seconds * chain.share()?, times * *reps)))
    }

    /// One round of every loop, with operands of its own. Not counted, it warms up.
    fn round(&mut self, round: usize, counted: bool) -> Result<(), Doubt> {
        let (n, round) = (self.track.n, round as u64);
        let waited = self.waited(n, round + 1)?.seconds;
        let starts = if self.who.lazy { n.max(LAZY) } else { n };
        let queued = self.queued(starts, 1000 + round)?;
        let in_plan = self.in_plan(0, round)?;
        let in_plan = in_plan.map(|(seconds, n)| seconds / n as f64);
        if counted {
            let per = 1.0 / n as f64;
            self.track.waited.push(waited * per);
            self.track.built.push(queued.built_s / starts as f64);
            self.track.queued.push(queued.seconds / starts as f64);
            self.track.in_plan.extend(in_plan);
        }
        Ok(())
    }
}

fn figures(who: &Contender, track: Track) -> Result<Figures, Reason> {
    if let Some(reason) = track.wrong {
        return Err(reason);
    }
    // Of all loops, so that another program that takes the processor for a moment is not taken for a lie.
    if let Some(reason) = doubt::still_running(median(&track.more), median(&track.one)) {
        return Err(reason);
    }
    let some = |samples| Summary::of(samples).ok_or(Reason::Stopped);
    let queued = some(track.queued)?;
    let in_plan = Summary::of(track.in_plan);
    let waited = some(track.waited)?;
    let (queued, not_executed) = match who.lazy {
        true => (None, Some(queued)),
        false => (Some(queued), None),
    };
    Ok(Figures {
        built: some(track.built)?,
        queued,
        not_executed,
        waited,
        in_plan,
        no_plan: track.no_plan.map(str::to_owned),
        check: track.check.ok_or(Reason::Stopped)?,
        growth: track.growth,
    })
}
