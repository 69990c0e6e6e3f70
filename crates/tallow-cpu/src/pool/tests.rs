//! Tests of the pool: every task once, whatever the timing; panics; nesting; drop.
//! Invariant: each test counts every single task.
//! Absent on purpose: timing assertions. A busy machine would break them.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use super::*;

fn each_once(pool: &Pool, tasks: usize) {
    let seen: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
    pool.run(tasks, &|task, worker| {
        assert!(worker < pool.threads());
        seen[task].fetch_add(1, Relaxed);
    });
    assert!(seen.iter().all(|s| s.load(Relaxed) == 1), "{tasks} tasks");
}

#[test]
fn every_task_runs_once() {
    for threads in [1, 2, 3, 9] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            each_once(&pool, tasks);
        }
    }
}

#[test]
fn results_written_by_tasks_are_seen_by_the_caller() {
    let pool = Pool::with_spin(4, Duration::from_micros(5));
    let mut sum = 0usize;
    for round in 0..20_000usize {
        let total = AtomicUsize::new(0);
        pool.run(1 + round % 9, &|task, _| {
            total.fetch_add(task + 1, Relaxed);
        });
        let n = 1 + round % 9;
        assert_eq!(total.load(Relaxed), n * (n + 1) / 2);
        sum += n;
        if round % 500 == 0 {
            // Long enough for all workers to park.
            thread::sleep(Duration::from_micros(300));
        }
    }
    assert!(sum > 0);
}

#[test]
fn a_parked_pool_wakes() {
    let pool = Pool::with_spin(3, Duration::ZERO);
    thread::sleep(Duration::from_millis(20));
    let workers: Vec<AtomicU32> = (0..3).map(|_| AtomicU32::new(0)).collect();
    let barrier = Barrier::new(3);
    // The barrier passes only if three different workers take a task each.
    pool.run(3, &|_, worker| {
        workers[worker].fetch_add(1, Relaxed);
        barrier.wait();
    });
    assert!(workers.iter().all(|w| w.load(Relaxed) == 1));
}

#[test]
fn a_leader_that_waits_long_is_woken() {
    let pool = Pool::new(3);
    for _ in 0..20 {
        let late = AtomicUsize::new(0);
        let barrier = Barrier::new(3);
        pool.run(3, &|_, worker| {
            // All three have a task; the leader is done first and falls asleep.
            barrier.wait();
            if worker != 0 {
                thread::sleep(Duration::from_millis(2 * worker as u64));
                late.fetch_add(1, Relaxed);
            }
        });
        assert_eq!(late.load(Relaxed), 2);
    }
}

#[test]
fn panics_reach_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(3);
    for bad in [0, 5, 31] {
        let ran = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(32, &|task, _| {
                ran.fetch_add(1, Relaxed);
                assert!(task != bad, "task {task} failed");
            });
        }));
        let panic = result.expect_err("one task panics");
        let text = panic.downcast_ref::<String>().expect("a formatted message");
        assert!(text.contains(&format!("task {bad} failed")), "{text}");
        assert_eq!(ran.load(Relaxed), 32);
        each_once(&pool, 100);
    }
}

#[test]
fn nested_and_concurrent_runs_complete() {
    let pool = Pool::new(3);
    let count = AtomicUsize::new(0);
    pool.run(8, &|_, _| {
        pool.run(5, &|_, worker| {
            assert_eq!(worker, 0);
            count.fetch_add(1, Relaxed);
        });
    });
    assert_eq!(count.load(Relaxed), 40);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for tasks in 0..200 {
                    each_once(&pool, tasks);
                }
            });
        }
    });
}

#[test]
fn more_tasks_than_the_word_holds() {
    let pool = Pool::new(2);
    let tasks = (MAX_TASKS as usize) * 2 + 3;
    let sum = [const { AtomicU64::new(0) }; 2];
    pool.run(tasks, &|task, worker| {
        sum[worker].fetch_add(task as u64, Relaxed);
    });
    let n = tasks as u64;
    assert_eq!(sum[0].load(Relaxed) + sum[1].load(Relaxed), n * (n - 1) / 2);
}

#[test]
fn drop_ends_spinning_and_parked_workers() {
    for _ in 0..50 {
        let pool = Pool::new(4);
        each_once(&pool, 16);
        drop(pool);
        let pool = Pool::with_spin(4, Duration::ZERO);
        thread::sleep(Duration::from_micros(200));
        drop(pool);
    }
}

#[test]
fn thread_counts_are_parsed_strictly() {
    assert_eq!(parse_threads("3"), Ok(3));
    for bad in ["", "0", "-1", "two", "4096", "1.5"] {
        let text = parse_threads(bad)
            .expect_err("not a number of threads")
            .to_string();
        assert!(
            text.contains("1 to 1024") && text.contains(&format!("\"{bad}\"")),
            "{text}"
        );
    }
    assert!(default_threads() >= 1);
}
