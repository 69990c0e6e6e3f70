//! Compiled kernels kept on disk, where the adapter's driver gives them out (Vulkan).
//! Invariant: the driver is given only what a driver of the same adapter gave before, whole: a file begins with a sum
//! over the rest, and is written beside its place and renamed.
//! Absent on purpose: other APIs, which keep what they compile themselves.
use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

/// First bytes of a file, its format in them.
const MAGIC: &[u8] = b"tallow wgpu 1\n";
/// A file that has grown past this is begun anew: the driver never forgets a kernel.
const MOST_BYTES: usize = 64 << 20;

/// The driver's cache and its file.
pub(crate) struct Cache {
    pub(crate) driver: wgpu::PipelineCache,
    path: PathBuf,
    /// Kernels compiled since it was last written.
    new: AtomicUsize,
}

/// `TALLOW_CACHE`, else `$XDG_CACHE_HOME/tallow`, else `~/.cache/tallow`; `wgpu` in it.
fn folder() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let base = var("TALLOW_CACHE").map(PathBuf::from).or_else(|| {
        let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || var("HOME").map(|h| PathBuf::from(h).join(".cache"));
        cache.or_else(home).map(|c| c.join("tallow"))
    });
    base.map(|b| b.join("wgpu"))
}

/// FNV-1a.
fn sum(data: &[u8]) -> [u8; 8] {
    let step = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
    data.iter().fold(0xcbf2_9ce4_8422_2325, step).to_le_bytes()
}

/// What the driver gave, if `file` is whole.
fn unpack(file: &[u8]) -> Option<&[u8]> {
    let (kept, data) = file.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    (*kept == sum(data) && file.len() <= MOST_BYTES).then_some(data)
}

impl Cache {
    /// For the adapter of `device`; `None` where its API has none, or there is no place for files.
    pub(crate) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let path = folder()?.join(wgpu::util::pipeline_cache_key(info)?);
        let file = std::fs::read(&path).unwrap_or_default();
        let how = wgpu::PipelineCacheDescriptor {
            label: None,
            data: unpack(&file),
            fallback: true,
        };
        // SAFETY: the data is what `get_data` gave for an adapter with this key: nothing else is written under that
        // name, and a file that was changed since fails its sum.
        let driver = unsafe { device.create_pipeline_cache(&how) };
        Some(Cache {
            driver,
            path,
            new: AtomicUsize::new(0),
        })
    }
    /// A kernel was compiled.
    pub(crate) fn compiled(&self) {
        self.new.fetch_add(1, Ordering::Relaxed);
    }
    /// Writes the file if there is anything new. A cache that cannot be written costs time and nothing else.
    pub(crate) fn keep(&self) {
        if self.new.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        let Some(data) = self.driver.get_data() else {
            return;
        };
        if let Err(e) = self.write(&data) {
            tracing::warn!("{}: kernels cannot be kept: {e}", self.path.display());
        }
    }
    fn write(&self, data: &[u8]) -> std::io::Result<()> {
        let folder = self.path.parent().unwrap_or(&self.path);
        std::fs::create_dir_all(folder)?;
        let beside = self
            .path
            .with_extension(format!("{}.new", std::process::id()));
        std::fs::write(&beside, [MAGIC, &sum(data), data].concat())?;
        std::fs::rename(&beside, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_whole_is_not_given_to_the_driver() {
        let whole = [MAGIC, &sum(b"kernels"), b"kernels"].concat();
        assert_eq!(unpack(&whole), Some(&b"kernels"[..]));
        for n in 0..whole.len() {
            assert_eq!(unpack(&whole[..n]), None, "cut at {n}");
            let mut changed = whole.clone();
            changed[n] ^= 1;
            assert_eq!(unpack(&changed), None, "changed at {n}");
        }
    }
}
