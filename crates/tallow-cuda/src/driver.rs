//! One card through the driver: its context, its one stream, memory in stream order, loaded kernels.
//! Invariant: all work of a card goes through one stream, so memory may be freed, and buffers overwritten,
//! as soon as the host has asked for it: the card does things in the order asked.
//! Absent on purpose: what the kernels compute.
use crate::{
    compile::{Arch, Cache},
    error::{Error, Result},
};
use cudarc::driver::{
    DriverError,
    result::{self, stream::StreamKind},
    sys,
};
use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    sync::{Arc, Mutex, MutexGuard},
};

/// The oldest compute capability that the kernels run on.
const OLDEST: (u32, u32) = (8, 0);

/// A card in use.
pub(crate) struct Card {
    pub(crate) ctx: sys::CUcontext,
    device: sys::CUdevice,
    pub(crate) stream: sys::CUstream,
    /// Work is only ever captured from it, never run on it.
    pub(crate) capture: Mutex<Stream>,
    pub(crate) facts: Facts,
    modules: Mutex<HashMap<Arc<str>, Module>>,
    cache: Cache,
}
pub(crate) struct Stream(pub(crate) sys::CUstream);
struct Module(sys::CUmodule);
// SAFETY: the driver's handles may be used from any thread that has made the context current, which
// every method here does first; a capturing stream is behind its lock.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}
// SAFETY: as above.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Send for Module {}

/// What the driver says about a card.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) capability: (u32, u32),
    /// Multiprocessors.
    pub(crate) processors: u32,
    /// Bytes of memory.
    pub(crate) memory: usize,
    /// Most shared memory a block may ask for, in bytes.
    pub(crate) shared: usize,
}

pub(crate) fn ask(doing: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| Error::driver(doing, e)
}

/// Is the driver there?
pub(crate) fn present() -> bool {
    // SAFETY: opens and closes a library by the driver's name; its initialisers are trusted.
    unsafe { sys::is_culib_present() }
}

pub(crate) fn missing() -> Error {
    Error::MissingLibrary {
        library: "the NVIDIA driver (libcuda.so)",
        remedy: "install the driver of the card, and run where the card can be seen",
    }
}

/// The driver's version, where there is one: 13000 is 13.0.
pub(crate) fn version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the library is there, and the pointer is to an integer of ours.
    let code = present().then(|| unsafe { sys::cuDriverGetVersion(&mut version) })?;
    (code == sys::CUresult::CUDA_SUCCESS).then_some(version)
}

/// Major and minor of a version as the driver writes it.
pub(crate) fn split(version: i32) -> (i32, i32) {
    (version / 1000, version % 1000 / 10)
}

/// Does the driver load what the compiler makes, where both are there?
pub(crate) fn fits() -> Result<()> {
    match (version(), crate::compile::version()) {
        (Some(driver), Ok(compiler)) => Error::fits(split(driver), compiler),
        _ => Ok(()),
    }
}

/// Number of cards, with the driver started.
pub(crate) fn count() -> Result<usize> {
    if !present() {
        return Err(missing());
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        Err(e) => return Err(Error::driver("starting the driver", e)),
    }
    let n = result::device::get_count().map_err(ask("counting devices"))?;
    Ok(n as usize)
}

/// What the driver says about card `ordinal`, whether or not this crate can use it.
pub(crate) fn facts(ordinal: usize) -> Result<(sys::CUdevice, Facts)> {
    let count = count()?;
    if ordinal >= count {
        return Err(Error::NoDevice { ordinal, count });
    }
    let device = result::device::get(ordinal as i32).map_err(ask("opening a device"))?;
    let number = |which| {
        // SAFETY: `device` came from the driver.
        unsafe { result::device::get_attribute(device, which) }
            .map(|v| v as u32)
            .map_err(ask("reading properties of the device"))
    };
    use sys::CUdevice_attribute_enum as A;
    let facts = Facts {
        name: result::device::get_name(device).map_err(ask("reading the name of the device"))?,
        capability: (
            number(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        processors: number(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: `device` came from the driver.
        memory: unsafe { result::device::total_mem(device) }
            .map_err(ask("reading the memory of the device"))?,
        shared: number(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
    };
    Ok((device, facts))
}

/// A kernel ready to launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(crate) sys::CUfunction);
// SAFETY: a handle; see `Card`.
unsafe impl Send for Function {}

/// Device memory; freed in stream order when dropped.
pub(crate) struct Memory {
    card: Arc<Card>,
    pub(crate) at: u64,
}
impl Drop for Memory {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: `at` came from `malloc_async` on a card that `self` keeps, and is freed once. All work
            // that uses it was asked of the same stream before. A failing card frees nothing.
            let _ = unsafe { result::free_async(self.at, self.card.stream) };
        }
    }
}

/// A point in the stream.
pub(crate) struct Event {
    card: Arc<Card>,
    at: sys::CUevent,
}
// SAFETY: a handle; see `Card`.
unsafe impl Send for Event {}
impl Drop for Event {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: created by `Card::event` and destroyed once.
            let _ = unsafe { result::event::destroy(self.at) };
        }
    }
}

impl Event {
    /// Marks the point reached when everything asked so far is done.
    pub(crate) fn record(&self) -> Result<()> {
        self.card.enter()?;
        // SAFETY: both handles are alive as long as `self.card`.
        unsafe { result::event::record(self.at, self.card.stream) }
            .map_err(ask("marking the stream"))
    }
    /// Waits until the mark is reached.
    pub(crate) fn wait(&self) -> Result<()> {
        self.card.enter()?;
        // SAFETY: as above.
        unsafe { result::event::synchronize(self.at) }.map_err(ask("waiting for the card"))
    }
    /// Seconds from this mark to a later one; both reached.
    pub(crate) fn seconds_to(&self, later: &Event) -> Result<f64> {
        // SAFETY: as above.
        let ms = unsafe { result::event::elapsed(self.at, later.at) };
        Ok(f64::from(ms.map_err(ask("reading the clock of the card"))?) * 1e-3)
    }
}

/// Host memory that the card reads while the host goes on.
pub(crate) struct Pinned {
    card: Arc<Card>,
    pub(crate) at: *mut u8,
    pub(crate) bytes: usize,
}
// SAFETY: plain memory; who touches it when is the business of `staging`.
unsafe impl Send for Pinned {}
impl Drop for Pinned {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: transfers from it are waited for; it came from `malloc_host` and is freed once.
            unsafe {
                let _ = result::stream::synchronize(self.card.stream);
                let _ = result::free_host(self.at.cast());
            }
        }
    }
}

impl Card {
    /// Opens card `ordinal`; images of kernels are kept in `cache_folder`.
    pub(crate) fn open(
        ordinal: usize,
        cache_folder: Option<std::path::PathBuf>,
    ) -> Result<Arc<Self>> {
        let (device, facts) = facts(ordinal)?;
        if facts.capability < OLDEST {
            let Facts {
                name, capability, ..
            } = facts;
            return Err(Error::TooOld { name, capability });
        }
        fits()?;
        let arch = Arch::of(facts.capability);
        let cache = Cache::open(arch, cache_folder)?;
        // SAFETY: `device` came from the driver; the context is released by `Drop`.
        let ctx =
            unsafe { result::primary_ctx::retain(device) }.map_err(ask("opening the device"))?;
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(ctx) }.map_err(ask("entering the device"))?;
        let stream =
            || result::stream::create(StreamKind::NonBlocking).map_err(ask("making a stream"));
        let card = Card {
            ctx,
            device,
            stream: stream()?,
            capture: Mutex::new(Stream(stream()?)),
            facts,
            modules: Mutex::default(),
            cache,
        };
        card.keep_freed_memory()?;
        Ok(Arc::new(card))
    }
    /// Memory freed stays with the process, so that the next allocation costs nothing.
    fn keep_freed_memory(&self) -> Result<()> {
        let mut keep = u64::MAX;
        // SAFETY: the pool is the device's own; the value is a u64, as this attribute wants.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.device)
                .map_err(ask("finding the pool"))?;
            let which = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, which, (&raw mut keep).cast::<c_void>())
                .result()
                .map_err(ask("setting up the pool"))
        }
    }
    /// Bytes that an allocation could have: those of the card, and those that the pool keeps for the next one.
    pub(crate) fn free(&self) -> Result<usize> {
        self.enter()?;
        let (free, _) = result::mem_get_info().map_err(ask("reading the free memory"))?;
        use sys::CUmemPool_attribute_enum as A;
        let kept = |which: A| {
            let mut bytes = 0_u64;
            // SAFETY: the pool is the device's own; the value is a u64, as these attributes want.
            unsafe {
                let pool = result::device::get_default_mem_pool(self.device)?;
                sys::cuMemPoolGetAttribute(pool, which, (&raw mut bytes).cast::<c_void>())
                    .result()?;
            }
            Ok(bytes as usize)
        };
        let reserved = kept(A::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
        let used = kept(A::CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
        let idle = |e| Error::driver("reading the free memory", e);
        Ok(free + reserved.map_err(idle)?.saturating_sub(used.map_err(idle)?))
    }
    /// Makes the card current on this thread.
    pub(crate) fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self`.
        unsafe { result::ctx::set_current(self.ctx) }.map_err(ask("entering the device"))
    }
    /// Waits for everything asked so far.
    pub(crate) fn wait(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(ask("waiting for the card"))
    }
    /// Zeroed memory, aligned to 256 bytes.
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Memory> {
        self.enter()?;
        let size = bytes.next_multiple_of(256).max(256);
        // An allocation that fails ends captures that are under way.
        let _none = self.capture.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: the size is not zero; the memory belongs to the `Memory` made below.
        let got = unsafe { result::malloc_async(self.stream, size) };
        let at = match got {
            Ok(at) => at,
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, total) = result::mem_get_info().unwrap_or((0, self.facts.memory));
                let wanted = bytes;
                return Err(Error::OutOfMemory {
                    wanted,
                    free,
                    total,
                });
            }
            Err(e) => return Err(Error::driver("allocating", e)),
        };
        let card = self.clone();
        let memory = Memory { card, at };
        // SAFETY: `size` bytes at `at` were just allocated on this stream.
        unsafe { result::memset_d8_async(at, 0, size, self.stream) }
            .map_err(ask("clearing memory"))?;
        Ok(memory)
    }
    /// Waits for everything asked so far, then reads.
    pub(crate) fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: `from` holds as many bytes, which the caller checked; `to` stays until the wait is over.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(ask("downloading"))?;
        self.wait()
    }
    /// The same through pinned memory that is at least as large as `to`.
    pub(crate) fn download_through(
        &self,
        landing: &Pinned,
        from: u64,
        to: &mut [u8],
    ) -> Result<()> {
        // SAFETY: the pinned memory has at least as many bytes, and the caller holds it for itself; nothing
        // reads it before the wait below is over.
        let landed = unsafe { std::slice::from_raw_parts_mut(landing.at, to.len()) };
        self.download(from, landed)?;
        to.copy_from_slice(landed);
        Ok(())
    }
    /// Host memory for transfers.
    pub(crate) fn pinned(self: &Arc<Self>, bytes: usize) -> Result<Pinned> {
        self.enter()?;
        // SAFETY: the memory belongs to the `Pinned` made here.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(ask("allocating memory for transfers"))?;
        Ok(Pinned {
            card: self.clone(),
            at: at.cast(),
            bytes,
        })
    }
    /// A mark, not yet set.
    pub(crate) fn event(self: &Arc<Self>, timed: bool) -> Result<Event> {
        self.enter()?;
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let at = result::event::create(flags).map_err(ask("making a mark"))?;
        Ok(Event {
            card: self.clone(),
            at,
        })
    }
    fn lock_modules(&self) -> MutexGuard<'_, HashMap<Arc<str>, Module>> {
        self.modules.lock().unwrap_or_else(|e| e.into_inner())
    }
    /// Compiles what of `sources` (entry point and text) is not loaded, side by side, and loads it.
    pub(crate) fn load(&self, sources: &[(&'static str, Arc<str>)]) -> Result<()> {
        let known = self.lock_modules();
        let mut new: Vec<_> = sources
            .iter()
            .filter(|(_, s)| !known.contains_key(s))
            .collect();
        drop(known);
        new.sort_by_key(|(_, s)| s.clone());
        new.dedup_by_key(|(_, s)| s.clone());
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let share = new.len().div_ceil(threads).max(1);
        let cache = &self.cache;
        let images = std::thread::scope(|scope| -> Result<Vec<Vec<u8>>> {
            let run = |part: &[&(&'static str, Arc<str>)]| -> Result<Vec<Vec<u8>>> {
                part.iter()
                    .map(|(name, text)| cache.get(name, text))
                    .collect()
            };
            let parts: Vec<_> = new
                .chunks(share)
                .map(|p| scope.spawn(move || run(p)))
                .collect();
            let mut all = vec![];
            for p in parts {
                match p.join() {
                    Ok(images) => all.extend(images?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(all)
        })?;
        self.enter()?;
        for ((_, text), image) in new.into_iter().zip(images) {
            // SAFETY: the image is a whole cubin that the compiler made; the driver copies it.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            let module = module.map_err(ask("loading a kernel"))?;
            self.lock_modules().insert(text.clone(), Module(module));
        }
        Ok(())
    }
    /// The kernel `entry` of a loaded source, allowed `shared` bytes of dynamic shared memory.
    pub(crate) fn function(
        &self,
        entry: &'static str,
        text: &Arc<str>,
        shared: u32,
    ) -> Result<Function> {
        self.enter()?;
        let all = self.lock_modules();
        let refused = || Error::Driver {
            doing: "finding a kernel",
            code: format!("{entry} was not loaded (bug in tallow)"),
        };
        let module = all.get(text).ok_or_else(refused)?;
        let name = CString::new(entry).map_err(|_| refused())?;
        // SAFETY: modules stay loaded as long as `self`.
        let f = unsafe { result::module::get_function(module.0, name) }
            .map_err(ask("finding a kernel"))?;
        // What a kernel has without asking is 48 KiB, its own arrays included.
        if shared > 16 << 10 {
            let which =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: `f` was just found.
            unsafe { result::function::set_function_attribute(f, which, shared as i32) }
                .map_err(ask("setting up a kernel"))?;
        }
        Ok(Function(f))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        let modules = std::mem::take(&mut *self.lock_modules());
        let capture = self.capture.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: everything that used these handles kept an `Arc` of `self`, so nothing does any more.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for m in modules.into_values() {
                let _ = result::module::unload(m.0);
            }
            let _ = result::stream::destroy(capture.0);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
