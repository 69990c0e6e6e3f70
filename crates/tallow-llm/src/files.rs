//! Files on disk: atomic writes, output folders, bounded reads, read-only mappings.
//! Invariant: a file written here is either whole and synced or not there at all.
//! Absent on purpose: locking. Two processes that write one file both succeed; the later rename wins.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result, io_error};

const WRITE_HINT: &str = "check free space and permissions, or choose another output folder";

/// A whole, synced file waiting beside its target for [`Staged::commit`]. Dropped uncommitted, it is deleted.
#[derive(Debug)]
pub struct Staged {
    temp: tempfile::NamedTempFile,
    target: PathBuf,
}

impl Staged {
    /// Writes and syncs a temporary file beside `target`. `fill` gets a buffered writer.
    pub fn write(
        target: &Path,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Self> {
        let fail = || io_error("write", target, WRITE_HINT);
        if target.is_dir() {
            return Err(fail()(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".tallow-").suffix(".tmp");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            // The umask applies, so the file gets the rights of any other new file.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let temp = builder.tempfile_in(parent(target)).map_err(fail())?;
        let mut writer = BufWriter::with_capacity(1 << 16, temp.as_file());
        fill(&mut writer)
            .and_then(|()| writer.flush())
            .and_then(|()| temp.as_file().sync_all())
            .map_err(fail())?;
        drop(writer);
        Ok(Self {
            temp,
            target: target.to_path_buf(),
        })
    }

    /// Puts the file in its place (replacing what was there) and syncs the folder.
    pub fn commit(self) -> Result<()> {
        let Self { temp, target } = self;
        temp.persist(&target)
            .map_err(|e| io_error("write", &target, WRITE_HINT)(e.error))?;
        sync_folder(parent(&target))
    }
}

/// Writes `path` whole or not at all: a temporary file beside it, synced, renamed, the folder synced.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    Staged::write(path, fill)?.commit()
}

/// Makes sure that files can be written into `dir`: creates it where needed and tries one file.
pub fn prepare_output_dir(dir: &Path) -> Result<()> {
    const HINT: &str = "choose another output folder";
    fs::create_dir_all(dir).map_err(io_error("create the folder", dir, HINT))?;
    let probe = tempfile::Builder::new()
        .prefix(".tallow-")
        .suffix(".tmp")
        .tempfile_in(dir)
        .map_err(io_error("write into the folder", dir, HINT))?;
    probe
        .close()
        .map_err(io_error("write into the folder", dir, HINT))
}

/// Reads a whole file of at most `limit_bytes`.
pub(crate) fn read_bounded(path: &Path, limit_bytes: u64, hint: &str) -> Result<Vec<u8>> {
    let file = open(path, hint)?;
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error("read", path, "check the path"))?;
    if bytes.len() as u64 > limit_bytes {
        let cause = io::Error::other(format!("it is larger than {limit_bytes} bytes"));
        return Err(io_error("read", path, "this is not the file it should be")(
            cause,
        ));
    }
    Ok(bytes)
}

/// Opens a regular file for reading; `hint` says what to do where it does not exist.
pub(crate) fn open(path: &Path, hint: &str) -> Result<File> {
    let fail = || io_error("read", path, "check the path and its permissions");
    // Asked before opening: opening a pipe would wait for a writer.
    let about = fs::metadata(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => Error::MissingFile {
            path: path.to_path_buf(),
            hint: hint.to_owned(),
        },
        _ => fail()(cause),
    })?;
    if !about.is_file() {
        return Err(fail()(io::Error::other("it is not a regular file")));
    }
    File::open(path).map_err(fail())
}

/// Maps a file read-only.
///
/// Known hazard: if another process truncates the file while it is mapped, reading the lost pages ends this
/// process (SIGBUS on Unix). Replacing the file by a rename, as [`write_atomic`] does, is safe.
pub(crate) fn map(path: &Path, hint: &str) -> Result<Arc<Mmap>> {
    let file = open(path, hint)?;
    #[expect(
        unsafe_code,
        reason = "mapping is the only way not to hold the weights twice; this is the one place"
    )]
    // SAFETY: the mapping is private to this process, read-only, and only ever lent as `&[u8]`. That nobody
    // changes or truncates the file while it is mapped is the user's part: no interface can enforce it, and
    // every program that maps model files relies on it.
    let mapped = unsafe { Mmap::map(&file) };
    mapped.map(Arc::new).map_err(io_error(
        "map",
        path,
        "check that the file system is readable",
    ))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

#[cfg(unix)]
fn sync_folder(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io_error("sync the folder", dir, WRITE_HINT))
}

/// Folders cannot be opened as files elsewhere; the rename itself is all there is.
#[cfg(not(unix))]
fn sync_folder(_dir: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_atomic(&path, |w| w.write_all(b"old")).unwrap();
        let error = write_atomic(&path, |w| {
            w.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert!(error.to_string().starts_with("cannot write "), "{error}");
        assert!(error.to_string().contains("check free space"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write_atomic(&path, |w| w.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_staged_file_that_is_dropped_disappears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let staged = Staged::write(&path, |w| w.write_all(b"x")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(staged);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn output_folders_are_created_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        prepare_output_dir(&deep).unwrap();
        assert_eq!(fs::read_dir(&deep).unwrap().count(), 0);
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = prepare_output_dir(&file.join("out")).unwrap_err();
        assert!(
            error.to_string().contains("choose another output folder"),
            "{error}"
        );
        assert!(write_atomic(&deep, |_| Ok(())).is_err());
    }

    #[test]
    fn reads_are_bounded_and_only_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read_bounded(&path, 5, "").unwrap(), b"12345");
        assert!(read_bounded(&path, 4, "").is_err());
        assert!(map(dir.path(), "").is_err());
        let error = map(&dir.path().join("none"), "look elsewhere").unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("none does not exist; look elsewhere"),
            "{error}"
        );
        fs::write(&path, b"").unwrap();
        assert_eq!(map(&path, "").unwrap().len(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn new_files_have_the_usual_rights() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let ours = dir.path().join("ours");
        let plain = dir.path().join("plain");
        write_atomic(&ours, |_| Ok(())).unwrap();
        fs::write(&plain, b"").unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
