//! The file operations behind everything a run must not lose, as a trait so that tests can make them fail.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A file being written whose bytes can be forced onto the disk.
pub trait DurableFile: Write + Send {
    /// Writes out what is buffered and waits until it is on the disk.
    ///
    /// # Errors
    /// Those of the operating system; a full disk may show only here.
    fn sync(&mut self) -> io::Result<()>;
}

/// Where a run's durable files go: [`Disk`] outside tests.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Makes a directory and its parents; one that exists is fine.
    ///
    /// # Errors
    /// Those of the operating system, as for every operation below.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// Makes a file for writing; one that exists is emptied.
    ///
    /// # Errors
    /// As above.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DurableFile>>;
    /// Gives a file or directory another name, replacing a file of that name.
    ///
    /// # Errors
    /// As above.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes names in a directory durable.
    ///
    /// # Errors
    /// As above.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Removes a directory with everything in it.
    ///
    /// # Errors
    /// As above.
    fn remove_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// Bytes that are free for us on the disk of `dir`.
    ///
    /// # Errors
    /// As above.
    fn available_bytes(&self, dir: &Path) -> io::Result<u64>;
}

/// The operating system's files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl DurableFile for BufWriter<File> {
    fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.get_ref().sync_all()
    }
}

impl Storage for Disk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DurableFile>> {
        Ok(Box::new(BufWriter::with_capacity(1 << 20, File::create(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        // Windows cannot open a directory as a file and makes renames durable by itself.
        if cfg!(windows) {
            return Ok(());
        }
        File::open(dir)?.sync_all()
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir_all(dir)
    }

    fn available_bytes(&self, dir: &Path) -> io::Result<u64> {
        fs4::available_space(dir)
    }
}

/// Writes a small file so that it is there whole or as it was before.
///
/// # Errors
/// [`Error::DiskFull`] or [`Error::Io`], naming the file.
pub fn write_atomically(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> Result<()> {
    let temp = temp_path(path);
    let written = (|| {
        let mut file = storage.create(&temp)?;
        file.write_all(bytes)?;
        file.sync()?;
        storage.rename(&temp, path)?;
        storage.sync_dir(parent(path))
    })();
    written.map_err(|source| {
        // What is left of the temporary file is removed as far as possible; the error to report is the first one.
        let _ = fs::remove_file(&temp);
        Error::writing(storage, path, bytes.len() as u64, source)
    })
}

fn temp_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parent(path).join(format!(".{name}.tmp-{}", std::process::id()))
}

/// The directory that holds `path`; the working directory for a bare name.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        write_atomically(&Disk, &path, b"one").unwrap();
        write_atomically(&Disk, &path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_atomically(&Disk, &dir.path().join("no/where.json"), b"x").unwrap_err();
        assert!(error.to_string().contains("where.json: cannot write"), "{error}");
    }
}
