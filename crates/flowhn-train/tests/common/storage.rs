//! Storage that fails on request, also for a process that may do everything.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use flowhn_train::storage::{Disk, DurableFile, Storage};

/// A disk with room for so many more bytes.
#[derive(Clone, Debug)]
pub struct SmallDisk {
    left: Arc<AtomicU64>,
    /// What it says is free; `None` for a system that does not tell.
    says: Option<u64>,
    /// Whether the process is dead once the disk is full: nothing works any more, not even cleaning up.
    dies: bool,
    dead: Arc<AtomicBool>,
}

impl SmallDisk {
    pub fn new(bytes: u64) -> Self {
        Self { left: Arc::new(AtomicU64::new(bytes)), says: None, dies: false, dead: Arc::default() }
    }

    /// Tells beforehand how much is free.
    pub fn honest(bytes: u64) -> Self {
        Self { says: Some(bytes), ..Self::new(bytes) }
    }

    /// Takes the process with it.
    pub fn deadly(bytes: u64) -> Self {
        Self { dies: true, ..Self::new(bytes) }
    }

    fn alive(&self) -> io::Result<()> {
        match self.dead.load(Ordering::Relaxed) {
            true => Err(io::Error::other("the process is dead")),
            false => Ok(()),
        }
    }
}

struct SmallFile {
    disk: SmallDisk,
    file: Box<dyn DurableFile>,
}

impl Write for SmallFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.disk.alive()?;
        let left = self.disk.left.load(Ordering::Relaxed);
        let n = buf.len().min(left as usize);
        if n == 0 && !buf.is_empty() {
            self.disk.dead.store(self.disk.dies, Ordering::Relaxed);
            // What was written so far reaches the disk, as it may in a crash.
            self.file.sync()?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.disk.left.store(left - n as u64, Ordering::Relaxed);
        self.file.write(&buf[..n])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl DurableFile for SmallFile {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.alive()?;
        self.file.sync()
    }
}

impl Storage for SmallDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.alive()?;
        Disk.create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DurableFile>> {
        self.alive()?;
        Ok(Box::new(SmallFile { disk: self.clone(), file: Disk.create(path)? }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.alive()?;
        Disk.rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.alive()?;
        Disk.sync_dir(dir)
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.alive()?;
        Disk.remove_dir_all(dir)
    }

    fn available_bytes(&self, _dir: &Path) -> io::Result<u64> {
        self.says.map_or_else(|| Err(io::ErrorKind::Unsupported.into()), Ok)
    }
}

/// A disk that cannot be written at all.
#[derive(Debug)]
pub struct ReadOnly;

fn read_only<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Storage for ReadOnly {
    fn create_dir_all(&self, _dir: &Path) -> io::Result<()> {
        read_only()
    }

    fn create(&self, _path: &Path) -> io::Result<Box<dyn DurableFile>> {
        read_only()
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        read_only()
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        read_only()
    }

    fn remove_dir_all(&self, _dir: &Path) -> io::Result<()> {
        read_only()
    }

    fn available_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(0)
    }
}
