//! Atomic writing: the only code by which the program writes files and folders.
//!
//! Contents are first written to a draft, under a temporary name beside the target, synced, and renamed, so that
//! readers see either the old or the new content at any instant, and a crash leaves one of the two. Owns the names of
//! drafts, their removal if a write fails or a signal ends the program ([`abandon`]), and the removal of drafts of
//! killed processes ([`sweep`]). Knows no contents.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tempfile::{NamedTempFile, TempDir};

/// Prefix of the names of drafts.
const DRAFT: &str = ".nfold-draft-";
/// Prefix of the name of a folder that is set aside while it is replaced, on file systems that can't exchange two
/// folders; the target's name follows.
const ASIDE: &str = ".nfold-aside-";
/// Age above which a draft counts as abandoned if its lock can't tell.
const OLD: Duration = Duration::from_secs(24 * 3600);

/// Drafts of this process; `None` once it ends.
static LIVE: Mutex<Option<BTreeSet<PathBuf>>> = Mutex::new(Some(BTreeSet::new()));

fn live() -> MutexGuard<'static, Option<BTreeSet<PathBuf>>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a file atomically, replacing an existing one. If the path is no regular file (a pipe, `/dev/stdout`), writes
/// to it directly.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = DraftFile::create(path)?;
    draft.write_all(bytes)?;
    draft.publish()
}

/// Checks that files can be written into `folder`, or into one that would be made there, before the work for them is done.
/// Leaves nothing.
pub fn check_folder(folder: &Path) -> io::Result<()> {
    let mut parents =
        folder.ancestors().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    let there = parents.find(|parent| parent.symlink_metadata().is_ok()).unwrap_or(folder);
    if !there.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    DraftFolder::create_in(there).map(drop)
}

/// A file that is being written; removed on drop unless it is published.
#[derive(Debug)]
pub struct DraftFile(Destination);

#[derive(Debug)]
enum Destination {
    /// Will be renamed to its target.
    Draft { file: BufWriter<File>, draft: Live<NamedTempFile>, target: PathBuf },
    /// A pipe or device, which can't be replaced.
    Direct(BufWriter<File>),
}

impl DraftFile {
    /// Creates a draft of the file `path`, in its folder. Follows a symbolic link, whose target will be replaced.
    pub fn create(path: &Path) -> io::Result<Self> {
        let there = fs::metadata(path).ok();
        if let Some(there) = &there {
            if there.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            if !there.is_file() {
                return Ok(Self(Destination::Direct(BufWriter::new(File::options().write(true).open(path)?))));
            }
        }
        let target = if path.is_symlink() { fs::canonicalize(path)? } else { path.into() };
        let folder = target.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sweep(folder);
        let create = || builder(0o666).tempfile_in(folder);
        let draft = Live::create(create, |draft| draft.path().to_path_buf(), |draft| draft.as_file().try_clone())?;
        if let Some(there) = there {
            draft.inner.as_file().set_permissions(there.permissions())?;
        }
        let file = BufWriter::new(draft.inner.as_file().try_clone()?);
        Ok(Self(Destination::Draft { file, draft, target }))
    }

    /// Syncs the file and renames it to its target.
    pub fn publish(self) -> io::Result<()> {
        match self.0 {
            Destination::Direct(mut file) => file.flush(),
            Destination::Draft { mut file, draft, target } => {
                file.flush()?;
                file.get_ref().sync_all()?;
                draft.publish(|draft| draft.persist(&target).map(drop).map_err(|e| e.error))?;
                sync_folder_of(&target)
            }
        }
    }
}

impl Write for DraftFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Destination::Draft { file, .. } | Destination::Direct(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Destination::Draft { file, .. } | Destination::Direct(file) => file.flush(),
        }
    }
}

/// A folder that is being written; removed on drop unless it is published.
#[derive(Debug)]
pub struct DraftFolder(Live<TempDir>);

impl DraftFolder {
    /// Creates an empty draft in the folder `parent`, which must be on the target's file system.
    pub fn create_in(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        Self::with_mode(parent, 0o777)
    }

    /// Creates a folder for temporary files that are never published, in the system's temporary folder, or in shared
    /// memory if that isn't writable: containers run with read-only root file systems.
    pub fn scratch() -> io::Result<Self> {
        Self::scratch_in(&[std::env::temp_dir(), PathBuf::from("/dev/shm")])
    }

    /// Creates it in the first of `parents` that is writable; otherwise returns the error of the first.
    fn scratch_in(parents: &[PathBuf]) -> io::Result<Self> {
        let make = |parent: &PathBuf| {
            sweep(parent);
            Self::with_mode(parent, 0o700)
        };
        let mut made = parents.iter().map(make);
        let first = made.next().unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        first.or_else(|error| made.find_map(Result::ok).ok_or(error))
    }

    fn with_mode(parent: &Path, mode: u32) -> io::Result<Self> {
        let create = || builder(mode).tempdir_in(parent);
        Live::create(create, |draft| draft.path().to_path_buf(), |draft| File::open(draft.path())).map(Self)
    }

    /// Path of the draft.
    pub fn path(&self) -> &Path {
        self.0.inner.path()
    }

    /// Writes a file in the draft and syncs it.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(self.path().join(name))?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    /// Renames the folder to `target`. If a folder with contents exists there, returns an error, unless `replace` is
    /// set: then the two are exchanged atomically, and the old one is removed.
    pub fn publish(self, target: &Path, replace: bool) -> io::Result<()> {
        File::open(self.path()).and_then(|folder| folder.sync_all())?;
        self.0.publish(|draft| {
            if replace && target.symlink_metadata().is_ok() {
                // the replaced folder has the draft's name now, and is removed with it
                return swap(draft.path(), target);
            }
            fs::rename(draft.path(), target)?;
            let _ = draft.keep();
            Ok(())
        })?;
        sync_folder_of(target)
    }
}

/// A draft, registered for removal when the process ends, and locked so that other processes see that it is in use.
#[derive(Debug)]
struct Live<T> {
    inner: T,
    listed: Listed,
}

/// Registration of a draft, removed on drop.
#[derive(Debug)]
struct Listed {
    path: PathBuf,
    /// Held open, since closing releases the lock.
    _lock: Option<File>,
}

/// Removes from an error the temporary path that `tempfile` appends, which means nothing to the user.
fn plain(error: io::Error) -> io::Error {
    let text = error.to_string();
    let said = text.split(" at path \"").next().unwrap_or(&text);
    io::Error::new(error.kind(), said.to_string())
}

impl<T> Live<T> {
    fn create(
        create: impl Fn() -> io::Result<T>,
        path: impl Fn(&T) -> PathBuf,
        open: impl Fn(&T) -> io::Result<File>,
    ) -> io::Result<Self> {
        loop {
            let mut live = live();
            let Some(list) = live.as_mut() else { return Err(io::ErrorKind::Interrupted.into()) };
            let inner = create().map_err(plain)?;
            let path = path(&inner);
            list.insert(path.clone());
            drop(live);
            // if the file system has no locks, age decides
            let lock = open(&inner).ok().filter(|file| file.lock().is_ok());
            let listed = Listed { path, _lock: lock };
            // a sweep may have removed it between creation and lock
            if listed.path.exists() {
                return Ok(Self { inner, listed });
            }
        }
    }

    /// Renames the draft, unless the process is ending.
    fn publish(self, rename: impl FnOnce(T) -> io::Result<()>) -> io::Result<()> {
        let Self { inner, listed } = self;
        let result = {
            let live = live();
            if live.is_none() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            rename(inner)
        };
        drop(listed);
        result
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        live().as_mut().map(|list| list.remove(&self.path));
    }
}

/// Removes all drafts of this process and refuses new ones, for a process that ends now, whatever its other threads do.
pub fn abandon() {
    let drafts = live().take().unwrap_or_default();
    for path in drafts {
        // a thread that still writes into the folder may create a file again
        for _ in 0..3 {
            remove(&path);
            if path.symlink_metadata().is_err() {
                break;
            }
        }
    }
}

/// Removes drafts in `folder` whose process is gone. A draft is in use while its lock is held; on file systems without
/// locks, and for drafts of other machines, an age of one day decides. Ignores failures.
pub fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // regular files and folders only: opening a pipe would block, and a symbolic link leads elsewhere
        let plain = entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_dir());
        if plain && name.strip_prefix(DRAFT).is_some_and(|rest| is_left(&entry.path(), rest)) {
            remove(&entry.path());
        }
    }
}

/// Whether the process of a draft is gone; `made` is the draft's name without `DRAFT`.
fn is_left(path: &Path, made: &str) -> bool {
    let aged = || {
        let modified = path.metadata().and_then(|m| m.modified());
        modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > OLD))
    };
    if !made.starts_with(machine()) {
        return aged();
    }
    match File::open(path).map(|file| file.try_lock()) {
        Ok(Ok(())) => true,
        Ok(Err(TryLockError::WouldBlock)) => false,
        Ok(Err(TryLockError::Error(_))) | Err(_) => aged(),
    }
}

fn remove(path: &Path) {
    let _ = match path.symlink_metadata() {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
}

/// Exchanges a folder with its replacement atomically if the system can; otherwise by two renames, between which
/// [`recover`] can restore the folder.
fn swap(fresh: &Path, target: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, fresh, CWD, target, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            // the file system or the kernel doesn't support the call
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    swap_in_two(fresh, target)
}

fn swap_in_two(fresh: &Path, target: &Path) -> io::Result<()> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let aside = target.with_file_name(format!("{ASIDE}{name}"));
    let mut tries = 3;
    loop {
        remove(&aside);
        fs::rename(target, &aside)?;
        match fs::rename(fresh, target) {
            Ok(()) => break,
            // a reader took this for an interrupted exchange and restored the folder
            Err(_) if tries > 0 && target.exists() => tries -= 1,
            Err(error) => {
                fs::rename(&aside, target)?;
                return Err(error);
            }
        }
    }
    // a reader may have removed it already
    let _ = fs::rename(aside, fresh);
    Ok(())
}

/// Completes exchanges of folders in `parent` that a killed process left half done: a folder that was set aside gets
/// its name back, unless that is taken.
pub fn recover(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if let Some(name) = entry.file_name().to_string_lossy().strip_prefix(ASIDE) {
            let target = parent.join(name);
            // renaming onto a folder with contents fails, so that a newer one stays
            if fs::rename(entry.path(), &target).is_err() && target.exists() {
                remove(&entry.path());
            }
        }
    }
}

/// Syncs the folder, so that a rename in it survives a crash.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // ignored: a folder without read permission can't be opened, and some file systems can't sync folders; the
        // rename is done
        Err(e) if !matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput) => Err(e),
        _ => Ok(()),
    }
}

/// Builder of this machine's drafts, with the usual permissions, since other users may read the result.
fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    static PREFIX: OnceLock<String> = OnceLock::new();
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX.get_or_init(|| format!("{DRAFT}{}-", machine())).as_str()).rand_bytes(10);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    builder
}

/// ID that distinguishes machines which share a file system, since they may not see each other's locks. The same in all
/// containers of a machine; changes when it restarts.
fn machine() -> &'static str {
    static MACHINE: OnceLock<String> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = boot.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        if digits.is_empty() { "here".into() } else { digits }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("folder");
        let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn scratch_goes_where_it_can() {
        let folder = tempfile::tempdir().expect("folder");
        let gone = folder.path().join("gone");
        let made = DraftFolder::scratch_in(&[gone.clone(), folder.path().into()]).expect("the second");
        assert!(made.path().starts_with(folder.path()));
        let error = DraftFolder::scratch_in(&[gone.clone(), gone]).map(drop).expect_err("neither");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.txt");
        let mut draft = DraftFile::create(&path).expect("draft");
        draft.write_all(b"half").expect("written");
        assert!(!path.exists());
        drop(draft);
        assert!(names(folder.path()).is_empty());
        write(&path, b"first").expect("written");
        write(&path, b"second").expect("replaced");
        assert_eq!(fs::read(&path).expect("file"), b"second");
        assert_eq!(names(folder.path()), ["a.txt"]);
        assert!(write(folder.path(), b"").is_err(), "a folder is no file");
    }

    #[cfg(unix)]
    #[test]
    fn permissions_stay_links_lead_on_and_devices_are_not_replaced() {
        use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};
        let folder = tempfile::tempdir().expect("folder");
        let (path, link) = (folder.path().join("a"), folder.path().join("link"));
        write(&path, b"x").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("set");
        symlink("a", &link).expect("link");
        write(&link, b"through").expect("written");
        assert!(link.is_symlink() && fs::read(&path).expect("file") == b"through");
        assert_eq!(fs::metadata(&path).expect("file").permissions().mode() & 0o777, 0o640);
        write(Path::new("/dev/null"), b"x").expect("written");
        assert!(fs::metadata("/dev/null").expect("device").file_type().is_char_device());
    }

    #[test]
    fn a_folder_is_replaced_in_one_step() {
        let folder = tempfile::tempdir().expect("folder");
        let target = folder.path().join("1");
        for (content, replace, done) in [("a", false, true), ("b", false, false), ("c", true, true), ("d", true, true)]
        {
            let draft = DraftFolder::create_in(folder.path()).expect("draft");
            draft.write("file", content.as_bytes()).expect("written");
            assert_eq!(draft.publish(&target, replace).is_ok(), done, "{content}");
            assert_eq!(names(folder.path()), ["1"]);
        }
        assert_eq!(fs::read(target.join("file")).expect("file"), b"d");
    }

    #[test]
    fn without_an_exchange_a_crash_at_any_point_leaves_a_whole_folder() {
        let parent = tempfile::tempdir().expect("folder");
        let at = |name: &str| parent.path().join(name);
        let make = |name: &str, content: &str| {
            fs::create_dir_all(at(name)).expect("made");
            fs::write(at(name).join("file"), content).expect("written");
        };
        let read = || fs::read_to_string(at("1").join("file")).expect("a version is there");
        let aside = format!("{ASIDE}1");
        // killed after the first rename, and after the second
        make(&aside, "old");
        recover(parent.path());
        assert_eq!(read(), "old");
        make(&aside, "older");
        recover(parent.path());
        assert_eq!((read().as_str(), names(parent.path())), ("old", vec!["1".to_string()]));
        make("fresh", "new");
        swap_in_two(&at("fresh"), &at("1")).expect("swapped");
        assert_eq!(read(), "new");
        assert_eq!(fs::read_to_string(at("fresh").join("file")).expect("old"), "old");
        // a replacement that can't be renamed leaves the old one
        assert!(swap_in_two(&at("nothing"), &at("1")).is_err());
        assert_eq!(read(), "new");
    }

    #[test]
    fn drafts_of_the_dead_are_swept_and_those_of_the_living_stay() {
        let folder = tempfile::tempdir().expect("folder");
        let here = format!("{DRAFT}{}-0123456789", machine());
        let elsewhere = format!("{DRAFT}0-0123456789");
        for name in [here.as_str(), &elsewhere, ".nfold-notes", "kept"] {
            fs::create_dir(folder.path().join(name)).expect("made");
        }
        let live = DraftFolder::create_in(folder.path()).expect("draft");
        assert!(!folder.path().join(&here).exists(), "its process is gone");
        sweep(folder.path());
        assert!(live.path().exists());
        assert!(folder.path().join(&elsewhere).exists(), "too young to tell");
        let long_ago = std::time::SystemTime::now() - OLD - Duration::from_secs(1);
        for name in [elsewhere.as_str(), ".nfold-notes", "kept"] {
            File::open(folder.path().join(name)).and_then(|f| f.set_modified(long_ago)).expect("aged");
        }
        sweep(folder.path());
        drop(live);
        assert_eq!(names(folder.path()), [".nfold-notes", "kept"]);
    }
}
