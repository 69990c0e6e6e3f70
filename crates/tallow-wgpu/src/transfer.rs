//! Bytes between the host and the GPU.
//! Invariant: an upload reaches memory after all work asked before it and before all asked later; a download sees all
//! work asked before it. Both take any start and length, though the GPU copies whole words.
//! Absent on purpose: mapped memory of kernels. Uploads go through the queue's own staging.
use crate::{
    error::{Error, Result},
    gpu::{ALIGN, Gpu, lock},
};
use std::sync::{Mutex, mpsc};

/// The GPU copies whole words.
pub(crate) const WORD: usize = 4;
/// Bytes of a piece of a long transfer.
const PIECE: usize = 32 << 20;
/// Bytes of the memory that short downloads land in: the scores of a large vocabulary.
pub(crate) const LANDING: usize = 1 << 20;

/// Where downloads land.
#[derive(Default)]
pub(crate) struct Landing(Mutex<Option<wgpu::Buffer>>);

/// Writes `src` to `dst` from byte `at` on; `total` bytes of `dst` are in use.
pub(crate) fn upload(
    gpu: &Gpu,
    landing: &Landing,
    (dst, total): (&wgpu::Buffer, usize),
    at: usize,
    src: &[u8],
) -> Result<()> {
    gpu.check()?;
    let (start, end) = (at / WORD * WORD, (at + src.len()).next_multiple_of(WORD));
    let whole = start == at && (end == at + src.len() || at + src.len() == total);
    if whole && end == at + src.len() {
        for (i, piece) in src.chunks(PIECE).enumerate() {
            let to = at + i * PIECE;
            gpu.write(dst, to as u64, piece);
            if src.len() > PIECE {
                // Sends it off, so that staging does not pile up.
                gpu.submit([gpu.encoder().finish()])?;
            }
        }
        return gpu.check();
    }
    // Words at the edges hold other bytes too.
    let mut words = vec![0; end - start];
    if !whole {
        download(gpu, landing, dst, start, &mut words)?;
    }
    words[at - start..at - start + src.len()].copy_from_slice(src);
    upload(gpu, landing, (dst, total), start, &words)
}

/// Waits for all work asked before, then copies bytes of `src` from `at` on.
pub(crate) fn download(
    gpu: &Gpu,
    landing: &Landing,
    src: &wgpu::Buffer,
    at: usize,
    dst: &mut [u8],
) -> Result<()> {
    gpu.check()?;
    if gpu.ahead.read(gpu, src, at, dst)? {
        return gpu.check();
    }
    gpu.ahead.missed(gpu, src, at, dst.len());
    for (i, piece) in dst.chunks_mut(PIECE).enumerate() {
        let from = at + i * PIECE;
        let (start, end) = (
            from / WORD * WORD,
            (from + piece.len()).next_multiple_of(WORD),
        );
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        if end - start > LANDING {
            let long = gpu.buffer(end - start, usage)?;
            fetch(gpu, &long, src, start..end, from - start, piece)?;
            continue;
        }
        let mut kept = lock(&landing.0);
        let short = match kept.take() {
            Some(b) => b,
            None => gpu.buffer(LANDING + ALIGN, usage)?,
        };
        fetch(gpu, &short, src, start..end, from - start, piece)?;
        *kept = Some(short);
    }
    Ok(())
}

/// Copies `range` of `src` into `landing`, and from there the bytes after the first `skip` into `dst`.
fn fetch(
    gpu: &Gpu,
    landing: &wgpu::Buffer,
    src: &wgpu::Buffer,
    range: std::ops::Range<usize>,
    skip: usize,
    dst: &mut [u8],
) -> Result<()> {
    let bytes = (range.end - range.start) as u64;
    let mut encoder = gpu.encoder();
    encoder.copy_buffer_to_buffer(src, range.start as u64, landing, 0, bytes);
    gpu.submit_reads([encoder.finish()])?;
    land(gpu, landing, skip, dst)
}

/// Waits for `landing`, then gives its bytes after the first `skip`.
pub(crate) fn land(gpu: &Gpu, landing: &wgpu::Buffer, skip: usize, dst: &mut [u8]) -> Result<()> {
    let bytes = (skip + dst.len()).next_multiple_of(WORD) as u64;
    let (tell, told) = mpsc::channel();
    landing.map_async(wgpu::MapMode::Read, 0..bytes, move |r| {
        // Nobody listens only if waiting failed, which is told.
        let _ = tell.send(r);
    });
    let mut early = None;
    gpu.wait_until(|| {
        early = told.try_recv().ok();
        early.is_some()
    })?;
    let refused = |why: String| Error::Refused {
        doing: "reading from the GPU",
        why,
    };
    // Another thread that polls may be the one that tells.
    let mapped = early.map_or_else(|| told.recv(), Ok);
    let mapped = mapped.map_err(|e| refused(e.to_string()))?;
    mapped.map_err(|e| refused(e.to_string()))?;
    {
        let view = landing
            .get_mapped_range(0..bytes)
            .map_err(|e| refused(e.to_string()))?;
        dst.copy_from_slice(&view[skip..skip + dst.len()]);
    }
    landing.unmap();
    gpu.check()
}
