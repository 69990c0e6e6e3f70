//! Memory of operands and results: small ones lie side by side in slabs.
//! Invariant: parts begin at multiples of [`ALIGN`], do not overlap and are given out once, so each is zeros at first.
//! Absent on purpose: parts given out again. A slab goes when the last of its parts goes; what one small part can keep is
//! a slab.
//!
//! wgpu keeps account of every buffer of a submission, and asks the driver for a barrier on each. A model with adapters
//! has hundreds of small matrices, whose account took longer than all of their token's dispatches.
use crate::{
    error::{Error, Result},
    gpu::{ALIGN, Gpu, lock},
};
use std::sync::{Arc, Mutex};

/// Most bytes of a part.
const SMALL: usize = 4 << 20;
/// Bytes of the first slab. Each is twice as large as the one before, up to [`LARGEST`].
const FIRST: usize = 1 << 20;
const LARGEST: usize = 32 << 20;

/// A buffer of wgpu's.
pub(crate) struct Slab {
    buffer: wgpu::Buffer,
    #[cfg(target_os = "macos")]
    raw: Option<crate::mps::Raw>,
}

/// Memory of operands and results: `buffer` from byte `at` on.
pub(crate) struct Memory {
    slab: Arc<Slab>,
    pub(crate) at: usize,
}

impl std::ops::Deref for Memory {
    type Target = wgpu::Buffer;
    fn deref(&self) -> &wgpu::Buffer {
        &self.slab.buffer
    }
}

#[cfg(target_os = "macos")]
impl Memory {
    /// The buffer as Metal knows it.
    pub(crate) fn raw(&self) -> Option<&crate::mps::Raw> {
        self.slab.raw.as_ref()
    }
}

#[cfg(target_os = "macos")]
impl Slab {
    pub(crate) fn new(buffer: wgpu::Buffer, raw: Option<crate::mps::Raw>) -> Self {
        Slab { buffer, raw }
    }
    pub(crate) fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }
}

/// The slab that parts are taken from now.
struct Open {
    slab: Arc<Slab>,
    used: usize,
    bytes: usize,
}

#[derive(Default)]
pub(crate) struct Slabs(Mutex<Option<Open>>);

impl Slabs {
    /// Zeroed memory of at least `bytes` that kernels and, on a Mac, Apple's own products can use.
    pub(crate) fn memory(&self, gpu: &Gpu, bytes: usize) -> Result<Memory> {
        let whole = |slab| Memory { slab, at: 0 };
        if bytes > SMALL {
            return slab(gpu, bytes).map(whole);
        }
        let bytes = bytes.max(1).next_multiple_of(ALIGN);
        let open = &mut *lock(&self.0);
        if let Some(o) = open.as_mut().filter(|o| o.used + bytes <= o.bytes) {
            let (slab, at) = (o.slab.clone(), o.used);
            o.used += bytes;
            return Ok(Memory { slab, at });
        }
        let next = open.as_ref().map_or(FIRST, |o| 2 * o.bytes);
        let size = next.min(LARGEST).max(bytes);
        let made = match slab(gpu, size) {
            // There may be room for what was asked.
            Err(Error::OutOfMemory { .. } | Error::TooLarge { .. }) => {
                return slab(gpu, bytes).map(whole);
            }
            made => made?,
        };
        *open = Some(Open {
            slab: made.clone(),
            used: bytes,
            bytes: size,
        });
        Ok(whole(made))
    }
}

fn usage() -> wgpu::BufferUsages {
    wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST
}

#[cfg(not(target_os = "macos"))]
fn slab(gpu: &Gpu, bytes: usize) -> Result<Arc<Slab>> {
    let buffer = gpu.buffer(bytes, usage())?;
    Ok(Arc::new(Slab { buffer }))
}

#[cfg(target_os = "macos")]
fn slab(gpu: &Gpu, bytes: usize) -> Result<Arc<Slab>> {
    gpu.check()?;
    match crate::mps::memory(gpu, gpu.size(bytes)?, usage()) {
        None => Ok(Arc::new(Slab::new(gpu.buffer(bytes, usage())?, None))),
        Some(made) => {
            let made = made?;
            let mut encoder = gpu.encoder();
            encoder.clear_buffer(made.buffer(), 0, None);
            gpu.submit(vec![encoder.finish()])?;
            Ok(Arc::new(made))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adapter::{self, Choice},
        transfer::{Landing, download, upload},
    };

    #[test]
    fn small_memory_is_zeros_beside_its_neighbours() {
        let Ok((_, adapter)) = adapter::choose(Choice::Number(0)) else {
            return eprintln!("SKIP: no adapter");
        };
        let gpu = Gpu::open(&adapter).expect("opens");
        let landing = Landing::default();
        let sizes = [1, ALIGN - 1, ALIGN, ALIGN + 1, 5000, FIRST, SMALL, 3];
        let all = sizes.map(|bytes| gpu.slabs.memory(&gpu, bytes).expect("memory"));
        let own = gpu.slabs.memory(&gpu, SMALL + 1).expect("memory");
        assert!(all.iter().all(|m| **m != *own) && *all[0] == *all[1]);
        for (i, (m, bytes)) in all.iter().zip(sizes).enumerate() {
            let mut found = vec![9; bytes];
            download(&gpu, &landing, m, m.at, &mut found).expect("reads");
            assert!(found.iter().all(|b| *b == 0), "{i}");
            let whole = (&**m, m.at + bytes);
            upload(&gpu, &landing, whole, m.at, &vec![i as u8 + 1; bytes]).expect("writes");
        }
        for (i, (m, bytes)) in all.iter().zip(sizes).enumerate() {
            let mut found = vec![0; bytes];
            download(&gpu, &landing, m, m.at, &mut found).expect("reads");
            assert!(found.iter().all(|b| *b == i as u8 + 1), "{i}");
        }
    }
}
