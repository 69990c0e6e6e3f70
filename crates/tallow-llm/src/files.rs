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

/// Makes the folder `target` whole or not at all: `fill` writes into a temporary folder beside it (and syncs
/// its files), which is synced and renamed. What was there under that name is removed, last of all.
pub fn write_folder_atomic<E: From<Error>>(
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let fail = || io_error("write the folder", target, WRITE_HINT);
    let beside = parent(target);
    let temp = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".tallow-").suffix(".tmp");
        builder.tempdir_in(beside)
    };
    let made = temp().map_err(fail())?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let usual = fs::metadata(beside).map_err(fail())?.permissions().mode();
        let rights = fs::Permissions::from_mode(usual & 0o777);
        fs::set_permissions(made.path(), rights).map_err(fail())?;
    }
    fill(made.path())?;
    sync_folder(made.path())?;
    // Removed when dropped, with what was moved into it.
    let old = temp().map_err(fail())?;
    if target.exists() {
        fs::rename(target, old.path().join("old")).map_err(fail())?;
    }
    fs::rename(made.path(), target).map_err(fail())?;
    // It has another name now; there is nothing left to remove.
    let _ = made.keep();
    Ok(sync_folder(beside)?)
}

/// Removes a folder so that it is never seen half there: it is renamed first.
pub fn remove_folder(dir: &Path) -> Result<()> {
    let fail = || io_error("remove the folder", dir, "check its permissions");
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tallow-").suffix(".tmp");
    let trash = builder.tempdir_in(parent(dir)).map_err(fail())?;
    fs::rename(dir, trash.path().join("old")).map_err(fail())?;
    trash.close().map_err(fail())
}

/// Removes what killed processes left behind in `dir`: temporary files and folders of this module.
pub fn sweep(dir: &Path) -> Result<()> {
    let fail = || io_error("clean the folder", dir, "check its permissions");
    for entry in fs::read_dir(dir).map_err(fail())? {
        let entry = entry.map_err(fail())?;
        let name = entry.file_name();
        let ours = name
            .to_str()
            .is_some_and(|n| n.starts_with(".tallow-") && n.ends_with(".tmp"));
        if ours && entry.path().is_dir() {
            fs::remove_dir_all(entry.path()).map_err(fail())?;
        } else if ours {
            fs::remove_file(entry.path()).map_err(fail())?;
        }
    }
    Ok(())
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
pub fn read_bounded(path: &Path, limit_bytes: u64, hint: &str) -> Result<Vec<u8>> {
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

/// Writes a new file and syncs it, for use inside [`write_folder_atomic`].
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(io_error("write", path, WRITE_HINT))
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
    fn a_folder_is_whole_or_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("step-1");
        let fill = |text: &'static [u8]| move |d: &Path| write_synced(&d.join("a"), text);
        write_folder_atomic(&target, fill(b"old")).unwrap();
        let error = write_folder_atomic(&target, |d| {
            write_synced(&d.join("a"), b"half")?;
            write_synced(&d.join("none/b"), b"")
        });
        assert!(error.is_err());
        assert_eq!(fs::read(target.join("a")).unwrap(), b"old");
        write_folder_atomic(&target, fill(b"new")).unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        // What a killed process leaves is swept, what others own is not.
        fs::create_dir(dir.path().join(".tallow-x.tmp")).unwrap();
        fs::write(dir.path().join(".tallow-x.tmp/a"), b"").unwrap();
        fs::write(dir.path().join(".tallow-y.tmp"), b"").unwrap();
        fs::write(dir.path().join(".other"), b"").unwrap();
        sweep(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        remove_folder(&target).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
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
