//! How many threads the peers use, said once and for all.
//! Without `RAYON_NUM_THREADS` candle 0.11 counts the cores in `/proc/cpuinfo` again for every product, which halves its
//! decode on a small model. That is not its arithmetic, so nobody is compared with it.
//! Absent on purpose: tallow's threads; `TALLOW_THREADS` decides those.

use std::process::Command;

use crate::Result;

const VARIABLE: &str = "RAYON_NUM_THREADS";

/// Runs this program again with as many threads as there are, unless the number was given. True where it has
/// run, and the caller has nothing left to do.
///
/// # Errors
/// A program that cannot be started, or that failed.
pub fn run_again_with_all() -> Result<bool> {
    if std::env::var_os(VARIABLE).is_some() {
        return Ok(false);
    }
    let all = std::thread::available_parallelism()?.to_string();
    let status = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, all)
        .status()?;
    match status.success() {
        true => Ok(true),
        false => Err(format!("the benchmark ended with {status}").into()),
    }
}

/// Threads of the peers.
#[must_use]
pub fn given() -> String {
    std::env::var(VARIABLE).unwrap_or_else(|_| "all".to_owned())
}
