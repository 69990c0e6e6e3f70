//! The thread pool that kernels run on: awake while work keeps coming, asleep soon after.
//! Invariant: `run` returns only when every task has finished, and it never waits for a worker that
//! has not taken a task; it allocates nothing. Which worker runs a task is left to chance, so a
//! kernel must give the same bits whoever runs it.
//! Absent on purpose: priorities, futures, pinning. Tasks come from one range.
//!
//! A job is published in one word: an epoch and the range of tasks not yet taken. To take a task is to
//! shorten that range by compare-and-swap: even workers take the first, odd ones the last, so that
//! neighbouring tasks (and what they share) mostly meet the same worker. If that succeeds the job of that epoch
//! cannot have finished, so only then does a worker look at the job's pointer. A late worker finds no tasks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::error::Error;

/// The most threads that a pool may have.
pub const MAX_THREADS: usize = 1024;

/// How long a worker spins after its last work, unless told otherwise. Waking a parked one costs
/// about half of this.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(80);

/// How long the leader spins for tasks that others took, before it sleeps.
const LONG_WAIT: Duration = Duration::from_micros(100);

/// The most tasks of a job: the word holds two numbers up to this.
const MAX_TASKS: u64 = (1 << TASK_BITS) - 1;
const TASK_BITS: u32 = 20;

/// What the word says: the tasks `first..end` of a job are not yet taken.
#[derive(Clone, Copy)]
struct Left {
    epoch: u64,
    first: u64,
    end: u64,
}

impl Left {
    fn of(word: u64) -> Self {
        Self {
            epoch: word >> (2 * TASK_BITS),
            first: word >> TASK_BITS & MAX_TASKS,
            end: word & MAX_TASKS,
        }
    }

    fn word(self) -> u64 {
        self.epoch << (2 * TASK_BITS) | self.first << TASK_BITS | self.end
    }

    fn is_empty(self) -> bool {
        self.first == self.end
    }

    /// The task that `worker` takes, and what is left then. There is one.
    fn take(self, worker: usize) -> (u64, Self) {
        match worker % 2 {
            0 => (
                self.first,
                Self {
                    first: self.first + 1,
                    ..self
                },
            ),
            _ => (
                self.end - 1,
                Self {
                    end: self.end - 1,
                    ..self
                },
            ),
        }
    }
}

/// A task body: task index, worker index.
type Body<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// What a job is made of; lives on the stack of `run`.
struct Job<'a> {
    body: Body<'a>,
    tasks: usize,
}

/// One worker's place to sleep.
struct Bed {
    parked: AtomicBool,
    thread: OnceLock<Thread>,
}

/// The word on a cache line of its own, so that counting finished tasks does not disturb takers.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    word: Line<AtomicU64>,
    finished: Line<AtomicUsize>,
    job: AtomicPtr<Job<'static>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    beds: Box<[Bed]>,
    /// The leader, while it sleeps because a task takes long.
    leader: Mutex<Option<Thread>>,
    leader_sleeps: AtomicBool,
    spin: Duration,
    /// More threads than cores: a spinning one must let others run.
    crowded: bool,
}

/// A fixed set of threads. The caller of [`Pool::run`] is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    busy: AtomicBool,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` workers, the caller included: `threads - 1` are started.
    /// `threads` is clamped to 1..=[`MAX_THREADS`]. If the system refuses a thread the pool is
    /// smaller ([`Pool::threads`] tells).
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self::with_spin(threads, DEFAULT_SPIN)
    }

    /// As [`Pool::new`], with workers that spin for `spin` after their last work.
    #[must_use]
    pub fn with_spin(threads: usize, spin: Duration) -> Self {
        let threads = threads.clamp(1, MAX_THREADS);
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        let bed = || Bed {
            parked: AtomicBool::new(false),
            thread: OnceLock::new(),
        };
        let shared = Arc::new(Shared {
            word: Line(AtomicU64::new(0)),
            finished: Line(AtomicUsize::new(0)),
            job: AtomicPtr::new(ptr::null_mut()),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            beds: (1..threads).map(|_| bed()).collect(),
            leader: Mutex::new(None),
            leader_sleeps: AtomicBool::new(false),
            spin,
            crowded: threads > cores,
        });
        let mut handles = Vec::with_capacity(threads - 1);
        for worker in 1..threads {
            let its = Arc::clone(&shared);
            let name = format!("tallow-{worker}");
            match thread::Builder::new()
                .name(name)
                .spawn(move || its.work(worker))
            {
                Ok(handle) => handles.push(handle),
                Err(_) => break,
            }
        }
        Self {
            shared,
            busy: AtomicBool::new(false),
            handles,
        }
    }

    /// A pool as large as `TALLOW_THREADS` says, or [`default_threads`] where it is not set.
    ///
    /// # Errors
    /// [`Error::Threads`] if the variable is not a whole number from 1 to [`MAX_THREADS`].
    pub fn from_env() -> Result<Self, Error> {
        threads_from_env().map(Self::new)
    }

    /// How many workers there are, the caller included. Worker indices are below it.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `body(task, worker)` once for each task below `tasks`, on any workers, in any order.
    ///
    /// A call from inside a task, or while another thread's `run` is under way, runs all its tasks
    /// on the calling thread as worker 0. Scratch memory indexed by worker must therefore belong to
    /// one call.
    ///
    /// # Panics
    /// Goes on with the first panic of a task, when all other tasks have finished.
    pub fn run(&self, tasks: usize, body: Body<'_>) {
        if tasks <= 1 || self.handles.is_empty() || self.busy.swap(true, Ordering::Acquire) {
            for task in 0..tasks {
                body(task, 0);
            }
            return;
        }
        let mut panic = None;
        if tasks as u64 <= MAX_TASKS {
            panic = self.shared.lead(&Job { body, tasks }, self.handles.len());
        } else {
            let per = tasks.div_ceil(MAX_TASKS as usize);
            let many = |group: usize, worker: usize| {
                for task in group * per..tasks.min((group + 1) * per) {
                    body(task, worker);
                }
            };
            let job = Job {
                body: &many,
                tasks: tasks.div_ceil(per),
            };
            panic = panic.or(self.shared.lead(&job, self.handles.len()));
        }
        self.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // A worker catches every panic of a task, so there is no other to report.
            let _ = handle.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Publishes a job, takes part, waits for the tasks that others took.
    fn lead(&self, job: &Job<'_>, workers: usize) -> Option<Box<dyn Any + Send>> {
        let job_ptr: *const Job<'_> = job;
        self.job
            .store(job_ptr.cast::<Job<'static>>().cast_mut(), Ordering::Relaxed);
        self.finished.0.store(0, Ordering::Relaxed);
        // Only leaders change the epoch, and there is one leader at a time.
        let before = Left::of(self.word.0.load(Ordering::Relaxed));
        let left = Left {
            epoch: before.epoch.wrapping_add(1) & (u64::MAX >> (2 * TASK_BITS)),
            first: 0,
            end: job.tasks as u64,
        };
        self.word.0.store(left.word(), Ordering::Release);
        // Pairs with the fence in `sleep`: either the worker sees the job or we see it parked.
        fence(Ordering::SeqCst);
        for bed in self.beds.iter().take(workers.min(job.tasks - 1)) {
            bed.wake();
        }
        let mine = self.take_all(left.epoch, 0);
        self.wait_for(job.tasks - mine);
        self.job.store(ptr::null_mut(), Ordering::Relaxed);
        self.panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Takes and runs tasks of the job of `epoch` until none is left. Returns how many it ran.
    fn take_all(&self, epoch: u64, worker: usize) -> usize {
        let mut ran = 0;
        let mut word = self.word.0.load(Ordering::Acquire);
        loop {
            let left = Left::of(word);
            if left.epoch != epoch || left.is_empty() {
                return ran;
            }
            let (task, next) = left.take(worker);
            match self.word.0.compare_exchange_weak(
                word,
                next.word(),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    self.run_one(task as usize, worker);
                    ran += 1;
                    if worker != 0 {
                        self.finished.0.fetch_add(1, Ordering::Release);
                        self.call_leader();
                    }
                    word = self.word.0.load(Ordering::Acquire);
                }
                Err(now) => word = now,
            }
        }
    }

    /// Runs a task that was taken. Keeps the first panic.
    fn run_one(&self, task: usize, worker: usize) {
        // SAFETY: a task of the current job was taken and is not yet counted as finished, so
        // `lead` has not returned and the job on its stack is alive.
        let job = unsafe { &*self.job.load(Ordering::Relaxed) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.body)(task, worker))) {
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
    }

    /// Waits until workers have finished `count` tasks: those that they took.
    fn wait_for(&self, count: usize) {
        let mut since = None;
        let mut spins = 0u32;
        while self.finished.0.load(Ordering::Acquire) != count {
            spins += 1;
            if self.crowded {
                thread::yield_now();
            } else if !spins.is_multiple_of(32) {
                std::hint::spin_loop();
            } else if since.get_or_insert_with(Instant::now).elapsed() >= LONG_WAIT {
                self.sleep_until(count);
            }
        }
    }

    /// Sleeps until workers have finished `count` tasks. A worker whose core was taken away may be long in coming; who
    /// spins meanwhile uses up the time that this thread would need afterwards.
    #[cold]
    fn sleep_until(&self, count: usize) {
        let lock = || self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        *lock() = Some(thread::current());
        self.leader_sleeps.store(true, Ordering::SeqCst);
        // Pairs with the fence in `take_all`: either the count is seen here or the sleeper there.
        fence(Ordering::SeqCst);
        while self.finished.0.load(Ordering::Acquire) != count {
            thread::park();
        }
        self.leader_sleeps.store(false, Ordering::Relaxed);
        *lock() = None;
    }

    /// Wakes the leader if it sleeps.
    fn call_leader(&self) {
        fence(Ordering::SeqCst);
        if self.leader_sleeps.load(Ordering::Relaxed) {
            let leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(leader) = &*leader {
                leader.unpark();
            }
        }
    }

    /// The life of a started worker.
    fn work(&self, worker: usize) {
        let bed = &self.beds[worker - 1];
        let _ = bed.thread.set(thread::current());
        let mut since = Instant::now();
        let mut polls = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            let left = Left::of(self.word.0.load(Ordering::Acquire));
            if !left.is_empty() {
                self.take_all(left.epoch, worker);
                since = Instant::now();
                polls = 0;
                continue;
            }
            polls += 1;
            if polls.is_multiple_of(32) && since.elapsed() >= self.spin {
                self.sleep(bed);
                since = Instant::now();
            } else if self.crowded {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Parks until there is a job or an end.
    fn sleep(&self, bed: &Bed) {
        bed.parked.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        while bed.parked.load(Ordering::Acquire)
            && Left::of(self.word.0.load(Ordering::Acquire)).is_empty()
            && !self.stop.load(Ordering::SeqCst)
        {
            thread::park();
        }
        bed.parked.store(false, Ordering::Release);
    }
}

impl Bed {
    fn wake(&self) {
        if self.parked.load(Ordering::Relaxed)
            && self.parked.swap(false, Ordering::AcqRel)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

/// How many threads a pool gets by default: the physical cores that this process may use.
#[must_use]
pub fn default_threads() -> usize {
    let allowed = thread::available_parallelism().map_or(1, |n| n.get());
    allowed
        .min(num_cpus::get_physical().max(1))
        .min(MAX_THREADS)
}

/// What `TALLOW_THREADS` says, or [`default_threads`].
///
/// # Errors
/// [`Error::Threads`] if the variable is not a whole number from 1 to [`MAX_THREADS`].
pub fn threads_from_env() -> Result<usize, Error> {
    match std::env::var_os("TALLOW_THREADS") {
        None => Ok(default_threads()),
        Some(value) => parse_threads(&value.to_string_lossy()),
    }
}

fn parse_threads(value: &str) -> Result<usize, Error> {
    match value.trim().parse() {
        Ok(n) if (1..=MAX_THREADS).contains(&n) => Ok(n),
        _ => Err(Error::Threads {
            value: value.to_owned(),
            max: MAX_THREADS,
        }),
    }
}

#[cfg(test)]
mod tests;
