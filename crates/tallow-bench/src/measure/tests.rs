//! Liars: works that try to look fast. The clock is simulated, so nothing here depends on the machine.
//! Each way of fooling a benchmark is a variant of [`Lie`]; the honest work passes with the very figures it was given.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::*;
use tallow::DType;

use crate::calm::Unwatched;
use crate::probe::{Bound, Cost};
use crate::work::Judge;

/// Seconds that the work takes.
pub(crate) const TRUE_S: f64 = 100e-6;
/// The floor: the honest work is at twice that.
const FLOOR_S: f64 = 50e-6;
/// Seconds of a call that does nothing.
const CALL_S: f64 = 50e-9;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Lie {
    /// None: it computes when started.
    Honest,
    /// Honest, but new operands lie far away, and the first to look at them waits for them.
    Cold,
    /// Honest, on a device whose clock is low until it has worked for a second.
    Asleep,
    /// Honest, but it starts without waiting, as a GPU does, in plans too.
    Asynchronous,
    /// The same, with plans whose wait does not wait.
    PlanNotWaited,
    /// Honest when asked, but many starts and one wait compute only the last result.
    Lazy,
    /// Builds a graph that nobody evaluates; what was read last is returned.
    Unevaluated,
    /// Computes the one element that is looked at.
    Dropped,
    /// Computes the first time, and remembers.
    Cached,
    /// Takes its time and writes nothing.
    WritesNothing,
    /// Returns before the device is done, with what happens to lie there.
    ClockReadEarly,
    /// As before, after half of the time, and waits when asked a second time.
    ClockReadHalfway,
    /// Takes a constant time for any chain, in a plan that is folded to one step.
    FoldedPlan,
    /// Takes the right time for something else.
    Wrong,
    /// Times grow, but far too fast.
    TooFast,
    /// Remembers results by their operands: a queue on the same operands is computed once.
    Memoised,
    /// Computes every third time and gives what it gave before otherwise.
    EveryThird,
    /// Computes the element that is looked at, and the others when they are read.
    Sliced,
    /// Knows the element early, and gives it back while the device is at work.
    Guessed,
}

/// The simulated machine: a clock, and a device that may be behind it.
pub(crate) struct World {
    pub(crate) now: Cell<f64>,
    device_until: Cell<f64>,
    lie: Lie,
    /// Seconds that the work takes.
    true_s: f64,
    /// Seconds that any wait for an asynchronous device takes on top.
    wait_s: f64,
}

impl World {
    pub(crate) fn pass(&self, s: f64) {
        self.now.set(self.now.get() + s);
    }
    /// Something of `s` seconds is put on the device.
    fn enqueue(&self, s: f64) {
        let from = self.now.get().max(self.device_until.get());
        self.device_until.set(from + s);
    }
    fn wait(&self) {
        self.now
            .set(self.now.get().max(self.device_until.get()) + self.wait_s);
    }
}

impl Clock for Rc<World> {
    fn now(&self) -> f64 {
        World::pass(self, 1e-9);
        self.now.get()
    }
}

/// `y[i] = 2 x[i] + 1`, with four elements; element 0 is fed and returned.
pub(crate) struct Liar {
    world: Rc<World>,
    x: [f32; 4],
    y: Rc<RefCell<[f32; 4]>>,
    pending: bool,
    first: Option<[f32; 4]>,
    returned: f32,
    asked: usize,
    cold: bool,
    /// Starts so far.
    starts: usize,
    /// What the last result was computed from.
    from: [f32; 4],
}

fn right(x: [f32; 4]) -> [f32; 4] {
    x.map(|v| 2.0 * v + 1.0)
}

fn compared(got: [f32; 4], want: [f32; 4]) -> Check {
    let off = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs()));
    let worst = off.fold(0.0, |m: f64, v| {
        if v.is_nan() {
            f64::MAX
        } else {
            m.max(v / 1e-6)
        }
    });
    Check {
        worst,
        compared: 4,
        of: 4,
        by: Judge::Oracle,
        at: None,
    }
}

impl Liar {
    pub(crate) fn new(lie: Lie) -> (Rc<World>, Self) {
        Self::that(lie, TRUE_S, 0.0)
    }
    fn that(lie: Lie, true_s: f64, wait_s: f64) -> (Rc<World>, Self) {
        let world = Rc::new(World {
            now: Cell::new(0.0),
            device_until: Cell::new(0.0),
            lie,
            true_s,
            wait_s,
        });
        let liar = Liar {
            world: world.clone(),
            x: [0.0; 4],
            y: Rc::new(RefCell::new([f32::NAN; 4])),
            pending: false,
            first: None,
            returned: 0.5,
            asked: 0,
            cold: true,
            starts: 0,
            from: [f32::NAN; 4],
        };
        (world, liar)
    }
    fn write(&self, y: [f32; 4]) {
        *self.y.borrow_mut() = y;
    }
}

impl Work for Liar {
    fn renew(&mut self, seed: u64) -> Result<()> {
        let mut rng = fastrand::Rng::with_seed(seed);
        self.x = std::array::from_fn(|_| rng.f32());
        self.cold = true;
        self.write([f32::NAN; 4]);
        Ok(())
    }
    fn feed(&mut self, link: f32) -> Result<()> {
        self.x[0] = link;
        self.world.pass(CALL_S);
        Ok(())
    }
    fn start(&mut self) -> Result<()> {
        let (w, x) = (self.world.clone(), self.x);
        w.pass(CALL_S);
        self.asked = 0;
        let cold = std::mem::take(&mut self.cold);
        match w.lie {
            Lie::Cold => {
                w.pass(if cold { 20.0 * TRUE_S } else { TRUE_S });
                self.write(right(x));
            }
            Lie::Asleep => {
                self.starts += 1;
                let awake = self.starts as f64 * 4.0 * TRUE_S > 1.0;
                w.pass(if awake { TRUE_S } else { 4.0 * TRUE_S });
                self.write(right(x));
            }
            Lie::Honest | Lie::FoldedPlan => {
                w.pass(TRUE_S);
                self.write(right(x));
            }
            Lie::Asynchronous | Lie::PlanNotWaited => {
                w.enqueue(w.true_s);
                self.write(right(x));
            }
            Lie::Lazy | Lie::Unevaluated => self.pending = true,
            Lie::Dropped => {
                w.pass(TRUE_S);
                self.y.borrow_mut()[0] = right(x)[0];
            }
            Lie::Cached => {
                let known = self.first.is_some();
                w.pass(if known { FLOOR_S } else { TRUE_S });
                let y = *self.first.get_or_insert(right(x));
                self.write(y);
            }
            Lie::WritesNothing => w.pass(TRUE_S),
            Lie::ClockReadEarly => {
                w.enqueue(TRUE_S);
                w.pass(FLOOR_S);
            }
            Lie::ClockReadHalfway => {
                w.pass(0.6 * TRUE_S);
                w.enqueue(0.4 * TRUE_S);
            }
            Lie::Wrong => {
                w.pass(TRUE_S);
                self.write(right(x).map(|v| v + 1e-3));
            }
            Lie::TooFast => {
                w.pass(0.1 * FLOOR_S);
                self.write(right(x));
            }
            Lie::Memoised => {
                if self.from != x {
                    w.pass(w.true_s);
                }
                self.from = x;
                self.write(right(x));
            }
            Lie::EveryThird => {
                self.starts += 1;
                w.pass(w.true_s / 3.0);
                if self.starts.is_multiple_of(3) || self.y.borrow()[0].is_nan() {
                    self.write(right(x));
                }
            }
            Lie::Sliced => {
                w.pass(0.25 * w.true_s);
                self.y.borrow_mut()[0] = right(x)[0];
                self.pending = true;
            }
            Lie::Guessed => {
                w.pass(0.1 * w.true_s);
                w.enqueue(0.9 * w.true_s);
                self.write(right(x));
            }
        }
        Ok(())
    }
    fn finish(&mut self) -> Result<f32> {
        let w = self.world.clone();
        w.pass(CALL_S);
        self.asked += 1;
        match w.lie {
            Lie::Asynchronous | Lie::PlanNotWaited => w.wait(),
            Lie::Lazy if self.pending => {
                w.pass(TRUE_S);
                self.write(right(self.x));
                self.pending = false;
            }
            // What the result was some time ago.
            Lie::Unevaluated => return Ok(self.returned),
            Lie::ClockReadEarly => {
                self.returned += 1.0;
                return Ok(self.returned);
            }
            Lie::Guessed if self.asked == 1 => {}
            Lie::Guessed => w.wait(),
            Lie::ClockReadHalfway if self.asked == 1 => return Ok(self.returned),
            Lie::ClockReadHalfway => {
                w.wait();
                self.write(right(self.x));
            }
            _ => {}
        }
        Ok(self.y.borrow()[0])
    }
    fn fetch(&mut self, clock: &dyn Clock) -> Result<f64> {
        let start = clock.now();
        self.world.wait();
        if self.world.lie == Lie::Sliced && std::mem::take(&mut self.pending) {
            self.world.pass(0.75 * self.world.true_s);
            self.write(right(self.x));
        }
        Ok(clock.now() - start)
    }
    fn check(&mut self, returned: f32) -> Result<Check> {
        self.world.wait();
        if self.world.lie == Lie::ClockReadEarly {
            self.write(right(self.x));
        }
        let y = *self.y.borrow();
        match y[0].to_bits() == returned.to_bits() {
            true => Ok(compared(y, right(self.x))),
            false => Ok(compared([f32::NAN; 4], y)),
        }
    }
    fn chain(&mut self, n: usize) -> Result<Chained> {
        let has_plans = [
            Lie::Honest,
            Lie::FoldedPlan,
            Lie::Asynchronous,
            Lie::PlanNotWaited,
        ];
        if !has_plans.contains(&self.world.lie) {
            return Ok(Chained::No("it has no plans"));
        }
        let world = self.world.clone();
        Ok(Chained::Plan(Box::new(Plan { n, world })))
    }
}

struct Plan {
    n: usize,
    world: Rc<World>,
}

/// Share of the work's time that it takes in a plan.
const IN_PLAN: f64 = 0.8;

impl Chain for Plan {
    fn renew(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
    fn start(&mut self) -> Result<()> {
        let one = IN_PLAN * self.world.true_s;
        match self.world.lie {
            Lie::FoldedPlan => self.world.pass(30.0 * one),
            Lie::Asynchronous | Lie::PlanNotWaited => {
                self.world.pass(CALL_S);
                self.world.enqueue(one * self.n as f64);
            }
            _ => self.world.pass(one * self.n as f64),
        }
        Ok(())
    }
    fn wait(&mut self) -> Result<()> {
        if self.world.lie == Lie::Asynchronous {
            self.world.wait();
        }
        Ok(())
    }
    fn share(&mut self) -> Result<f64> {
        Ok(1.0)
    }
    fn check(&mut self) -> Result<Check> {
        Ok(compared([1.0; 4], [1.0; 4]))
    }
}

fn judge(lie: Lie, lazy: bool) -> Row {
    judge_that(lie, Liar::new(lie), (FLOOR_S, lazy))
}

fn judge_that(lie: Lie, (clock, liar): (Rc<World>, Liar), (floor_s, lazy): (f64, bool)) -> Row {
    let floor = Floor {
        seconds: floor_s,
        bytes: 1,
        flops: 1.0,
        bound: Bound::Bandwidth,
    };
    measured(lie, (clock, liar), lazy).row(floor)
}

/// A liar, measured; it must move this many bytes.
pub(crate) const BYTES: usize = 1 << 20;

pub(crate) fn measured(lie: Lie, (clock, liar): (Rc<World>, Liar), lazy: bool) -> Measured {
    let mut all = [contender(&format!("{lie:?}"), liar, lazy)];
    let all = measure(&clock, &Settings::QUICK, &mut all, &mut Unwatched, &|| {
        false
    });
    all.unwrap().0.remove(0)
}

fn contender(engine: &str, liar: Liar, lazy: bool) -> Contender {
    let cost = Cost {
        bytes: BYTES,
        flops: 1.0,
        dtype: DType::F32,
    };
    Contender {
        engine: engine.to_owned(),
        work: Box::new(liar),
        need: Need {
            cost,
            threads: 1,
            times: 1,
        },
        lazy,
        memory: None,
    }
}

fn reason(lie: Lie) -> Reason {
    match judge(lie, false).verdict {
        Verdict::Invalid(reason) => reason,
        Verdict::Valid(f) => panic!("{lie:?} was believed: {f:?}"),
    }
}

fn near(a: f64, b: f64) {
    assert!((a / b - 1.0).abs() < 0.01, "{a:e} is not {b:e}");
}

#[test]
fn an_honest_work_gets_its_own_time() {
    let row = judge(Lie::Honest, false);
    let f = row.figures().unwrap();
    near(f.waited.median, TRUE_S);
    near(f.queued.as_ref().unwrap().median, TRUE_S);
    near(f.in_plan.as_ref().unwrap().median, IN_PLAN * TRUE_S);
    near(f.growth, 4.0);
    assert_eq!(f.waited.samples.len(), Settings::QUICK.rounds);
    assert!(f.check.pass());
}

#[test]
fn operands_that_lie_far_away_are_in_no_time() {
    let row = judge(Lie::Cold, false);
    let f = row.figures().unwrap();
    near(f.waited.median, TRUE_S);
    near(f.queued.as_ref().unwrap().median, TRUE_S);
    near(f.growth, 4.0);
}

#[test]
fn starting_without_waiting_is_no_lie() {
    let row = judge(Lie::Asynchronous, false);
    let f = row.figures().unwrap();
    near(f.queued.as_ref().unwrap().median, TRUE_S);
    near(f.in_plan.as_ref().unwrap().median, IN_PLAN * TRUE_S);
    near(f.built.median, CALL_S);
}

#[test]
fn a_wait_that_takes_longer_than_the_work_is_in_what_is_waited_for_only() {
    // A small kernel behind a bus: 2 µs, and 10 µs for any wait.
    let (true_s, wait_s) = (2e-6, 10e-6);
    let device = Liar::that(Lie::Asynchronous, true_s, wait_s);
    let row = judge_that(Lie::Asynchronous, device, (0.5 * true_s, false));
    let f = row.figures().unwrap();
    assert!((true_s + wait_s..true_s + 1.1 * wait_s).contains(&f.waited.median));
    let alone = |s: &Summary, own_s: f64| (own_s..1.1 * own_s).contains(&s.median);
    assert!(alone(f.queued.as_ref().unwrap(), true_s), "{f:?}");
    let in_plan = f.in_plan.as_ref().unwrap();
    assert!(alone(in_plan, IN_PLAN * true_s), "{f:?}");
}

#[test]
fn a_work_of_seconds_gets_fewer_rounds_and_the_same_judgement() {
    let true_s = 10.0;
    let judged = |lie| judge_that(lie, Liar::that(lie, true_s, 0.0), (0.5 * true_s, false));
    let row = judged(Lie::Asynchronous);
    let f = row.figures().unwrap();
    assert_eq!(f.waited.samples.len(), LEAST_ROUNDS);
    assert!((3.9..4.1).contains(&f.growth), "{}", f.growth);
    assert!(judged(Lie::PlanNotWaited).figures().is_none());
}

#[test]
fn a_plan_that_is_not_waited_for_is_caught() {
    assert!(
        matches!(reason(Lie::PlanNotWaited), Reason::Growth { column, .. } | Reason::UnderFloor { column, .. } if column == "in plan")
    );
}

#[test]
fn a_lazy_engine_is_found_out_unless_it_says_so() {
    assert!(matches!(reason(Lie::Lazy), Reason::Growth { column, .. } if column == "queued"));
    let row = judge(Lie::Lazy, true);
    let f = row.figures().unwrap();
    near(f.waited.median, TRUE_S);
    assert!(f.queued.is_none());
    assert!(f.not_executed.as_ref().unwrap().median < FLOOR_S);
}

#[test]
fn an_unevaluated_graph_is_caught() {
    // Constant garbage: four times as much of it takes four times as long, but it is not what the oracle says.
    assert!(matches!(reason(Lie::Unevaluated), Reason::Check { .. }));
}

#[test]
fn a_dropped_result_is_caught() {
    assert!(matches!(reason(Lie::Dropped), Reason::Check { .. }));
}

#[test]
fn a_cached_result_is_caught() {
    assert!(matches!(reason(Lie::Cached), Reason::Check { .. }));
}

#[test]
fn a_kernel_that_writes_nothing_is_caught() {
    assert_eq!(reason(Lie::WritesNothing), Reason::Poisoned);
}

#[test]
fn a_clock_read_before_the_work_ends_is_caught() {
    assert!(matches!(
        reason(Lie::ClockReadEarly),
        Reason::Changed { .. }
    ));
    assert!(matches!(
        reason(Lie::ClockReadHalfway),
        Reason::Changed { .. }
    ));
}

#[test]
fn late_work_is_noticed_though_its_value_was_guessed() {
    assert!(doubt::still_running(2e-3, 1e-3).is_some());
    assert!(doubt::still_running(2e-3, 1.0).is_none());
    assert!(doubt::still_running(20e-6, 10e-6).is_none());
}

/// Of a work that takes a millisecond, a hundred times its floor.
fn reason_far_above(lie: Lie) -> Reason {
    let true_s = 1e-3;
    match judge_that(lie, Liar::that(lie, true_s, 0.0), (true_s / 100.0, false)).verdict {
        Verdict::Invalid(reason) => reason,
        Verdict::Valid(f) => panic!("{lie:?} was believed: {f:?}"),
    }
}

#[test]
fn lies_far_above_the_floor_are_caught_as_well() {
    let honest = Liar::that(Lie::Asynchronous, 1e-3, 0.0);
    let row = judge_that(Lie::Asynchronous, honest, (1e-5, false));
    near(row.figures().unwrap().waited.median, 1e-3);
    let why = reason_far_above(Lie::Memoised);
    assert!(
        matches!(&why, Reason::Growth { column, .. } if column == "queued"),
        "{why}"
    );
    let why = reason_far_above(Lie::Sliced);
    assert!(matches!(why, Reason::PutOff { .. }), "{why}");
    let why = reason_far_above(Lie::Guessed);
    assert!(matches!(why, Reason::StillRunning { .. }), "{why}");
}

#[test]
fn work_that_is_done_only_now_and_then_is_caught_though_the_last_was_done() {
    // Whether the last of the checked loop is one that is done depends on where the counting begins.
    let caught = [0, 1, 2].map(|phase| {
        let (world, mut liar) = Liar::new(Lie::EveryThird);
        liar.starts = phase;
        let row = judge_that(Lie::EveryThird, (world, liar), (1e-6, false));
        match row.verdict {
            Verdict::Invalid(Reason::Check { .. }) => "check",
            Verdict::Invalid(Reason::Changed { .. }) => "again",
            other => panic!("{other:?}"),
        }
    });
    assert!(
        caught.contains(&"check") && caught.contains(&"again"),
        "{caught:?}"
    );
}

#[test]
fn a_plan_that_was_folded_is_caught() {
    assert!(
        matches!(reason(Lie::FoldedPlan), Reason::Growth { column, .. } if column == "in plan")
    );
}

#[test]
fn a_wrong_result_and_an_impossible_time_are_caught() {
    assert!(matches!(reason(Lie::Wrong), Reason::Check { .. }));
    assert!(matches!(reason(Lie::TooFast), Reason::UnderFloor { .. }));
}

#[test]
fn no_figure_leaves_an_invalid_row() {
    let row = judge(Lie::Cached, false);
    assert!(row.figures().is_none());
    let json = serde_json::to_string(&row).unwrap();
    assert!(!json.contains("waited"), "{json}");
    assert_eq!(serde_json::from_str::<Row>(&json).unwrap(), row);
    let row = judge(Lie::Honest, false);
    let json = serde_json::to_string(&row).unwrap();
    assert_eq!(serde_json::from_str::<Row>(&json).unwrap(), row);
}

#[test]
fn contenders_take_turns_and_a_stop_leaves_nothing_half_done() {
    let (clock, liar) = Liar::new(Lie::Honest);
    let mut all = [contender("stopped", liar, false)];
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() > 3
    };
    let stopped = measure(&clock, &Settings::QUICK, &mut all, &mut Unwatched, &stop);
    assert!(stopped.is_none());
}

#[test]
fn a_device_is_woken_before_the_first_round() {
    let waited = |wake_s: f64| {
        let (clock, liar) = Liar::new(Lie::Asleep);
        let mut all = [contender("sleeper", liar, false)];
        let settings = Settings {
            wake_s,
            ..Settings::QUICK
        };
        let (all, _) = measure(&clock, &settings, &mut all, &mut Unwatched, &|| false).unwrap();
        match &all[0].found {
            Ok(f) => f.waited.median / TRUE_S,
            Err(why) => panic!("{why}"),
        }
    };
    assert!((0.99..1.01).contains(&waited(WAKE_S)));
    assert!(waited(0.0) > 3.0);
}

/// A machine that somebody else has, in some looks.
struct Now<F>(usize, F);

impl<F: Fn(usize) -> bool> Calm for Now<F> {
    fn is(&mut self, _: bool) -> bool {
        self.0 += 1;
        (self.1)(self.0 - 1)
    }
}

fn rounds(calm: impl Fn(usize) -> bool) -> (usize, Rounds) {
    let (clock, liar) = Liar::new(Lie::Honest);
    let mut all = [contender("honest", liar, false)];
    let calm = &mut Now(0, calm);
    let (all, rounds) = measure(&clock, &Settings::QUICK, &mut all, calm, &|| false).unwrap();
    let figures = all[0].found.clone().unwrap();
    assert_eq!(figures.waited.samples.len(), figures.built.samples.len());
    (figures.waited.samples.len(), rounds)
}

#[test]
fn rounds_on_a_machine_that_is_not_ours_are_run_again_or_told() {
    let wanted = Settings::QUICK.rounds;
    let told = |again, disturbed| (wanted, Rounds { again, disturbed });
    assert_eq!(rounds(|_| true), told(0, 0));
    // Behind the third round, and before the fifth.
    assert_eq!(rounds(|look| look != 5), told(1, 0));
    assert_eq!(rounds(|look| look != 8), told(1, 0));
    assert_eq!(rounds(|look| look != 5 && look != 12), told(2, 0));
    // Always: as many again as there are, then they are kept; the first of them only warms up.
    assert_eq!(rounds(|_| false), told(wanted, wanted));
}
