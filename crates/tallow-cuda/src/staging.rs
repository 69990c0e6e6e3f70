//! Uploads while the card is busy: a ring of pinned memory guarded by fences.
//! Invariant: a byte of the ring is written again only after the transfer that read it is done, and a transfer
//! runs after everything asked of the stream before it. So replay n+1's data cannot reach what replay n reads.
//! Absent on purpose: downloads, which wait anyway.
use crate::{
    driver::{Card, Event, Pinned},
    error::{Error, Result},
};
use cudarc::driver::result;
use std::sync::Arc;

/// Pieces of the ring.
const SLOTS: usize = 4;
/// Bytes of a piece.
const SLOT_BYTES: usize = 4 << 20;

struct Slot {
    memory: Pinned,
    /// Set when the host moved on to the next slot; reached when all transfers from this one are done.
    fence: Event,
    used: usize,
    fenced: bool,
}

/// The ring.
pub(crate) struct Staging {
    card: Arc<Card>,
    slots: Vec<Slot>,
    current: usize,
}

impl Staging {
    pub(crate) fn new(card: &Arc<Card>) -> Result<Self> {
        let slot = |_| {
            Ok(Slot {
                memory: card.pinned(SLOT_BYTES)?,
                fence: card.event(false)?,
                used: 0,
                fenced: false,
            })
        };
        Ok(Staging {
            card: card.clone(),
            slots: (0..SLOTS).map(slot).collect::<Result<_>>()?,
            current: 0,
        })
    }
    /// Room for up to `want` bytes: at least one byte, in the current slot or the next.
    fn room(&mut self, want: usize) -> Result<(*mut u8, usize)> {
        if self.slots[self.current].used == SLOT_BYTES {
            let left = &mut self.slots[self.current];
            left.fence.record()?;
            left.fenced = true;
            self.current = (self.current + 1) % SLOTS;
            let next = &mut self.slots[self.current];
            if next.fenced {
                next.fence.wait()?;
            }
            (next.used, next.fenced) = (0, false);
        }
        let slot = &mut self.slots[self.current];
        let bytes = want.min(SLOT_BYTES - slot.used);
        let at = slot.memory.at.wrapping_add(slot.used);
        debug_assert!(slot.used + bytes <= slot.memory.bytes);
        // The next transfer starts at a multiple of 64 bytes.
        slot.used = (slot.used + bytes).next_multiple_of(64).min(SLOT_BYTES);
        Ok((at, bytes))
    }
    /// Copies `src` to the card's memory at `to`, after everything asked before; returns when `src` is free again.
    ///
    /// # Safety
    /// `src.len()` bytes at `to` belong to a live allocation of this card.
    pub(crate) unsafe fn upload(&mut self, to: u64, src: &[u8]) -> Result<()> {
        self.card.enter()?;
        let mut done = 0;
        while done < src.len() {
            let (at, bytes) = self.room(src.len() - done)?;
            // SAFETY: `room` gave `bytes` bytes that no transfer reads any more; `src` has as many left.
            let piece = unsafe {
                std::ptr::copy_nonoverlapping(src[done..].as_ptr(), at, bytes);
                std::slice::from_raw_parts(at, bytes)
            };
            // SAFETY: the target is the caller's promise; the piece stays until its fence is reached.
            unsafe { result::memcpy_htod_async(to + done as u64, piece, self.card.stream) }
                .map_err(|e| Error::driver("uploading", e))?;
            done += bytes;
        }
        Ok(())
    }
}
