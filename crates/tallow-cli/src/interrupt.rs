//! Ctrl-C.
//! Invariant: where files may be half-made (between [`polite`] and the end of its guard) the first Ctrl-C only
//! asks, and the verb stops at the next safe place; anywhere else, and the second time, the process ends at once.
//! Absent on purpose: other signals.
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);
static POLITE: AtomicUsize = AtomicUsize::new(0);

/// The user asked to stop.
#[derive(Debug)]
pub(crate) struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted: {}", self.0)
    }
}
impl std::error::Error for Interrupted {}

/// Catches Ctrl-C from here on.
pub(crate) fn install() {
    let handler = || {
        let again = ASKED.swap(true, Ordering::SeqCst);
        if again || POLITE.load(Ordering::SeqCst) == 0 {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
    };
    if let Err(e) = ctrlc::set_handler(handler) {
        tracing::warn!("Ctrl-C will end the process at once: {e}");
    }
}

/// As long as this lives, Ctrl-C waits to be noticed.
pub(crate) struct Polite(());

/// Asks for patience; see [`asked`].
pub(crate) fn polite() -> Polite {
    POLITE.fetch_add(1, Ordering::SeqCst);
    Polite(())
}

impl Drop for Polite {
    fn drop(&mut self) {
        POLITE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Has Ctrl-C been pressed?
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
