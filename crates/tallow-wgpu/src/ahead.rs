//! What the host reads after every replay, copied for it in the replay's own submission.
//! Invariant: a copy is given out only while the replay that made it is the last change of memory; everything that
//! changes memory counts ([`Gpu::changed`]).
//! Absent on purpose: guesses. A replay copies what was read after the one before it, and stops where nobody read it.
use crate::{
    error::Result,
    gpu::{ALIGN, Gpu, lock},
    transfer::{LANDING, WORD, land},
};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// The replay that changed memory last.
struct Newest {
    asker: u64,
    /// The number of that change.
    change: u64,
    /// Did it copy what was wished for?
    copied: bool,
}

/// What was read after a replay, in whole words.
struct Wish {
    asker: u64,
    src: wgpu::Buffer,
    range: Range<usize>,
    /// Has it been read since it was last copied?
    read: bool,
}

#[derive(Default)]
struct State {
    newest: Option<Newest>,
    wish: Option<Wish>,
    landing: Option<wgpu::Buffer>,
}

/// What is known of reads after replays.
#[derive(Default)]
pub(crate) struct Ahead(Mutex<State>);

/// A copy to be encoded behind a replay.
pub(crate) struct Copy {
    src: wgpu::Buffer,
    range: Range<usize>,
    to: wgpu::Buffer,
}

impl Copy {
    pub(crate) fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let (at, bytes) = (self.range.start as u64, self.range.len() as u64);
        encoder.copy_buffer_to_buffer(&self.src, at, &self.to, 0, bytes);
    }
}

/// A recording, as the one who asks for replays.
pub(crate) struct Asker {
    gpu: Arc<Gpu>,
    id: u64,
}

impl Asker {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Asker {
            gpu: gpu.clone(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }
    /// What the next replay copies. Until [`Asker::asked`] no copy is given out.
    pub(crate) fn copy(&self) -> Result<Option<Copy>> {
        let state = &mut *lock(&self.gpu.ahead.0);
        state.newest = None;
        let Some(wish) = state.wish.as_mut().filter(|w| w.asker == self.id) else {
            return Ok(None);
        };
        if !wish.read {
            state.wish = None;
            return Ok(None);
        }
        wish.read = false;
        let to = match &state.landing {
            Some(b) => b.clone(),
            None => {
                let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                let made = self.gpu.buffer(LANDING + ALIGN, usage)?;
                state.landing.insert(made).clone()
            }
        };
        Ok(Some(Copy {
            src: wish.src.clone(),
            range: wish.range.clone(),
            to,
        }))
    }
    /// A replay was handed in. `before`: changes counted before its last submission.
    pub(crate) fn asked(&self, before: u64, copied: bool) {
        lock(&self.gpu.ahead.0).newest = Some(Newest {
            asker: self.id,
            change: before + 1,
            copied,
        });
    }
}

/// A wish keeps memory alive that only the recording's owner wants.
impl Drop for Asker {
    fn drop(&mut self) {
        let state = &mut *lock(&self.gpu.ahead.0);
        state.wish.take_if(|w| w.asker == self.id);
    }
}

impl Ahead {
    /// Gives bytes of `src` from `at` on, if the newest replay has copied them.
    pub(crate) fn read(
        &self,
        gpu: &Gpu,
        src: &wgpu::Buffer,
        at: usize,
        dst: &mut [u8],
    ) -> Result<bool> {
        let Some((landing, skip)) = self.take(gpu, src, at, dst.len()) else {
            return Ok(false);
        };
        // Nobody who asks for a replay waits behind this.
        land(gpu, &landing, skip, dst)?;
        lock(&self.0).landing.get_or_insert(landing);
        Ok(true)
    }
    /// The landing of the newest replay, if it holds `len` bytes of `src` from `at` on, and where in it they begin.
    fn take(
        &self,
        gpu: &Gpu,
        src: &wgpu::Buffer,
        at: usize,
        len: usize,
    ) -> Option<(wgpu::Buffer, usize)> {
        let state = &mut *lock(&self.0);
        let fresh = |n: &&Newest| n.copied && n.change == gpu.changes();
        let newest = state.newest.as_ref().filter(fresh)?;
        let wish = state.wish.as_mut()?;
        let inside = wish.range.start <= at && at + len <= wish.range.end;
        if newest.asker != wish.asker || wish.src != *src || !inside {
            return None;
        }
        let landing = state.landing.take()?;
        wish.read = true;
        Some((landing, at - wish.range.start))
    }
    /// Bytes of `src` from `at` on were read in a submission of their own.
    pub(crate) fn missed(&self, gpu: &Gpu, src: &wgpu::Buffer, at: usize, len: usize) {
        let state = &mut *lock(&self.0);
        let fresh = |n: &&Newest| n.change == gpu.changes();
        let Some(newest) = state.newest.as_ref().filter(fresh) else {
            return;
        };
        let range = at / WORD * WORD..(at + len).next_multiple_of(WORD);
        // One that is read every time stays, whatever else is read beside it.
        let kept = |w: &Wish| w.asker == newest.asker && newest.copied && w.read;
        if range.len() <= LANDING && !state.wish.as_ref().is_some_and(kept) {
            state.wish = Some(Wish {
                asker: newest.asker,
                src: src.clone(),
                range,
                read: true,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{self, Choice};
    use crate::transfer::{Landing, download, upload};

    /// Adds one submission that fills `b` with `byte`, as a replay does.
    fn replay(gpu: &Gpu, asker: &Asker, b: &wgpu::Buffer, from: &wgpu::Buffer) -> bool {
        let copy = asker.copy().expect("memory");
        let mut encoder = gpu.encoder();
        encoder.copy_buffer_to_buffer(from, 0, b, 0, 16);
        if let Some(c) = &copy {
            c.encode(&mut encoder);
        }
        let before = gpu.changes();
        gpu.submit([encoder.finish()]).expect("submits");
        asker.asked(before, copy.is_some());
        copy.is_some()
    }

    #[test]
    fn what_is_read_after_each_replay_comes_with_it_and_is_never_stale() {
        let Ok((_, adapter)) = adapter::choose(Choice::Number(0)) else {
            eprintln!("SKIP: no adapter");
            return;
        };
        let gpu = Arc::new(Gpu::open(&adapter).expect("opens"));
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let make = || gpu.buffer(16, usage).expect("memory");
        let (b, from, landing) = (make(), make(), Landing::default());
        let put = |to: &wgpu::Buffer, v: u8| {
            upload(&gpu, &landing, (to, 16), 0, &[v; 16]).expect("uploads");
        };
        let get = |at: usize| {
            let mut got = [0; 3];
            download(&gpu, &landing, &b, at, &mut got).expect("reads");
            got
        };
        let asker = Asker::new(&gpu);
        for v in 1..6 {
            put(&from, v);
            assert_eq!(replay(&gpu, &asker, &b, &from), v > 1, "{v}");
            assert_eq!(get(5), [v; 3]);
            // Beside what was wished for, and behind a change.
            assert_eq!(get(12), [v; 3]);
            put(&b, 100 + v);
            assert_eq!(get(5), [100 + v; 3]);
            assert!(gpu.ahead.0.lock().expect("lock").wish.is_some());
        }
        // Twice unread: no longer copied.
        replay(&gpu, &asker, &b, &from);
        assert!(!replay(&gpu, &asker, &b, &from));
        // Another's replay in between takes nothing from ours.
        assert_eq!(get(0), [5; 3]);
        let other = Asker::new(&gpu);
        assert!(replay(&gpu, &asker, &b, &from));
        put(&from, 9);
        assert!(!replay(&gpu, &other, &b, &from));
        assert_eq!(get(0), [9; 3]);
        drop(other);
        assert!(gpu.ahead.0.lock().expect("lock").wish.is_none());
    }
}
