//! Kernel sources into machine code for one architecture: NVRTC, and a cache on disk.
//! Invariant: a cached image is used only if the whole text it was made from, the architecture and the
//! compiler's version are the ones asked for; the files carry them, names are only a hint.
//! Absent on purpose: PTX. Compiling to machine code finds errors here and not on the card.
use crate::error::{Error, Result};
use cudarc::nvrtc::{result as rtc, sys};
use std::{
    ffi::{CStr, CString, c_char},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

/// What every kernel begins with.
pub(crate) const PRELUDE: &str = include_str!("prelude.cu");

/// An architecture to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arch {
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// With the features that only this architecture has, and no later one.
    pub exact: bool,
}

impl Arch {
    /// What is compiled for a card of this compute capability.
    pub fn of(capability: (u32, u32)) -> Self {
        Arch {
            capability,
            exact: capability.0 >= 9,
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.capability;
        let exact = if self.exact { "a" } else { "" };
        write!(f, "sm_{major}{minor}{exact}")
    }
}

/// Machine code.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The image that the driver loads.
    pub cubin: Vec<u8>,
    /// The assembler's report: registers, shared memory, spills. Empty if the image came from the cache.
    pub report: String,
}

/// Is the compiler there?
pub(crate) fn present() -> bool {
    // SAFETY: opens and closes a library by the compiler's name; its initialisers are trusted.
    unsafe { sys::is_culib_present() }
}

pub(crate) fn missing() -> Error {
    Error::MissingLibrary {
        library: "NVRTC (libnvrtc.so, the CUDA compiler)",
        remedy: "install the CUDA toolkit or `pip install nvidia-cuda-nvrtc` and put its folder on LD_LIBRARY_PATH",
    }
}

/// The compiler's version: major and minor.
pub(crate) fn version() -> Result<(i32, i32)> {
    if !present() {
        return Err(missing());
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and both pointers are to integers of ours.
    let code = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    match code {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok((major, minor)),
        _ => Err(missing()),
    }
}

/// Compiles `source` for `arch`.
///
/// # Errors
/// No compiler; a kernel it refuses.
pub fn compile(name: &str, source: &str, arch: Arch) -> Result<Compiled> {
    if !present() {
        return Err(missing());
    }
    let fail = |log: String| Error::Compile {
        name: name.into(),
        arch: arch.to_string(),
        log,
    };
    let text = CString::new(source).map_err(|e| fail(e.to_string()))?;
    let program = rtc::create_program(&text, None).map_err(|e| fail(e.to_string()))?;
    let options = [
        format!("--gpu-architecture={arch}"),
        "--std=c++17".into(),
        "--ptxas-options=-v".into(),
    ];
    // SAFETY: `program` was just made and is destroyed once, below.
    let done = unsafe { rtc::compile_program(program, &options) };
    // SAFETY: as above.
    let report = unsafe { rtc::get_program_log(program) };
    let report = report.map(|l| text_of(&l)).unwrap_or_default();
    // SAFETY: as above.
    let image = unsafe { cubin(program) };
    // SAFETY: as above; nothing uses it afterwards.
    let destroyed = unsafe { rtc::destroy_program(program) };
    done.map_err(|e| fail(format!("{e}: {report}")))?;
    destroyed.map_err(|e| fail(e.to_string()))?;
    Ok(Compiled {
        cubin: image.map_err(|e| fail(e.to_string()))?,
        report,
    })
}

/// # Safety
/// `program` is alive.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, rtc::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the caller's promise; `bytes` is ours.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut bytes) }.result()?;
    let mut image = vec![0u8; bytes];
    // SAFETY: the caller's promise; the image has the size just asked for.
    unsafe { sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()) }.result()?;
    Ok(image)
}

fn text_of(log: &[c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::from_utf8_lossy(&bytes).into_owned(),
        |s| s.to_string_lossy().into_owned(),
    )
}

/// Compiled images on disk.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    folder: Option<PathBuf>,
    arch: Arch,
    version: (i32, i32),
}

impl Cache {
    /// For `arch` and the compiler found; in `folder`, or nowhere.
    pub(crate) fn open(arch: Arch, folder: Option<PathBuf>) -> Result<Self> {
        Ok(Cache {
            folder,
            arch,
            version: version()?,
        })
    }
    /// `TALLOW_CACHE`, else `$XDG_CACHE_HOME/tallow`, else `~/.cache/tallow`.
    pub(crate) fn default_folder() -> Option<PathBuf> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let base = var("TALLOW_CACHE").map(PathBuf::from).or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || var("HOME").map(|h| PathBuf::from(h).join(".cache"));
            cache.or_else(home).map(|c| c.join("tallow"))
        });
        base.map(|b| b.join("cuda"))
    }
    /// Everything the image depends on, in front of it in its file.
    fn key(&self, source: &str) -> Vec<u8> {
        let (major, minor) = self.version;
        let mut key = format!(
            "tallow cubin\n{} {major}.{minor}\n{}\n",
            self.arch,
            source.len()
        )
        .into_bytes();
        key.extend_from_slice(source.as_bytes());
        key
    }
    fn path(&self, key: &[u8]) -> Option<PathBuf> {
        let mut hash = DefaultHasher::new();
        key.hash(&mut hash);
        let name = format!("{}-{:016x}.cubin", self.arch, hash.finish());
        self.folder.as_ref().map(|f| f.join(name))
    }
    /// From the cache, or compiled and put there.
    pub(crate) fn get(&self, name: &str, source: &str) -> Result<Vec<u8>> {
        let key = self.key(source);
        let path = self.path(&key);
        let kept = path.as_deref().and_then(|p| std::fs::read(p).ok());
        if let Some(image) = kept.as_deref().and_then(|f| f.strip_prefix(&key[..])) {
            return Ok(image.to_vec());
        }
        let image = compile(name, source, self.arch)?.cubin;
        if let Some(path) = path
            && let Err(e) = write(&path, &key, &image)
        {
            tracing::debug!("cannot keep a compiled kernel in {}: {e}", path.display());
        }
        Ok(image)
    }
}

/// Beside its target first, then renamed: a reader never sees half a file.
fn write(path: &Path, key: &[u8], image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!(
        "{}.{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&beside, [key, image].concat())?;
    std::fs::rename(&beside, path)
}
