//! Reads untrusted files without blocking: refuses pipes, sockets and devices, and files above a length limit, before
//! memory is allocated.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read as _};
use std::path::Path;

/// Opens a regular file for reading; follows symbolic links.
pub fn open(path: &Path) -> std::io::Result<File> {
    let refused = || Error::new(ErrorKind::InvalidInput, "it is not a regular file");
    // checked before opening, which has side effects on some devices
    if !std::fs::metadata(path)?.is_file() {
        return Err(refused());
    }
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        // in case it is replaced by a pipe between the check and opening
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(refused()) }
}

/// Reads a file of at most `limit` bytes.
pub fn read(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let file = open(path)?;
    let too_long =
        |length: u64| Error::new(ErrorKind::FileTooLarge, format!("it has {length} bytes, at most {limit} are taken"));
    let length = file.metadata()?.len();
    if length > limit {
        return Err(too_long(length));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).map_err(Error::other)?);
    // it may have grown since its length was read
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes)? as u64;
    if read > limit { Err(too_long(read)) } else { Ok(bytes) }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let folder = tempfile::tempdir().expect("folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), b"12345").expect("written");
        std::os::unix::fs::symlink(at("file"), at("link")).expect("linked");
        std::os::unix::fs::symlink(at("loop"), at("loop")).expect("linked");
        std::fs::create_dir(at("folder")).expect("made");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("bound");
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().expect("mkfifo");
        assert!(made.success());
        File::create(at("sparse")).and_then(|f| f.set_len(1 << 40)).expect("made");
        assert_eq!(read(&at("link"), 5).expect("a file"), b"12345");
        for refused in ["link", "sparse"] {
            assert_eq!(read(&at(refused), 4).expect_err(refused).kind(), ErrorKind::FileTooLarge);
        }
        for refused in ["folder", "socket", "pipe", "loop", "nothing"] {
            assert!(read(&at(refused), 100).is_err(), "{refused}");
        }
        assert!(read(Path::new("/dev/zero"), 100).is_err());
    }
}
