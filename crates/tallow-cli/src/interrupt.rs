//! Ctrl-C and SIGTERM.
//! Invariant: where files may be half-made (between [`polite`] and the end of its guard) the first signal only
//! asks, and the verb stops at the next safe place; anywhere else, and the second time, the process ends at once.
//! Absent on purpose: other signals.
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use std::{
    io,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// The last signal; 0 where none has come.
static ASKED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);
/// Does the next signal end the process?
static AT_ONCE: LazyLock<Arc<AtomicBool>> = LazyLock::new(|| Arc::new(AtomicBool::new(true)));

/// The user asked to stop.
#[derive(Debug)]
pub(crate) struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted: {}", self.0)
    }
}
impl std::error::Error for Interrupted {}

/// 130 for Ctrl-C, 143 for SIGTERM.
pub(crate) fn exit_code() -> u8 {
    match ASKED.load(Ordering::SeqCst) {
        n if n == SIGTERM as usize => 128 + SIGTERM as u8,
        _ => 128 + SIGINT as u8,
    }
}

/// Catches signals from here on.
pub(crate) fn install() {
    let catch = |signal: i32| -> io::Result<()> {
        // In this order: what the first one sets, the second one finds.
        flag::register_conditional_shutdown(signal, 128 + signal, AT_ONCE.clone())?;
        flag::register(signal, AT_ONCE.clone())?;
        flag::register_usize(signal, ASKED.clone(), signal as usize)?;
        Ok(())
    };
    for signal in [SIGINT, SIGTERM] {
        if let Err(e) = catch(signal) {
            tracing::warn!("signal {signal} will end the process at once: {e}");
        }
    }
}

/// As long as this lives, a first signal waits to be noticed.
pub(crate) struct Polite(());

/// Asks for patience; see [`asked`]. Not to be asked for twice at a time.
pub(crate) fn polite() -> Polite {
    AT_ONCE.store(false, Ordering::SeqCst);
    Polite(())
}

impl Drop for Polite {
    fn drop(&mut self) {
        AT_ONCE.store(true, Ordering::SeqCst);
    }
}

/// Has a signal come?
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::SeqCst) != 0
}
