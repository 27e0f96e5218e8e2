//! `runs/NAME/`: one run, one process at a time.
//!
//! ```text
//! config.toml        checked, complete configuration
//! tokenizer.json     copy of the tokenizer
//! metrics.jsonl      one object a step        validation.jsonl   one object a validation
//! events.out.…       TensorBoard              checkpoints/step-N/
//! loss.svg           drawn at validations     summary.json       written at the end
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint;
use crate::storage::{Storage, write_atomically};
use crate::{Error, Result};

/// The directory of the checkpoints inside a run's directory.
pub const CHECKPOINTS: &str = "checkpoints";
/// The checked configuration of the run.
pub const CONFIG: &str = "config.toml";
/// The copy of the tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// The log of training steps.
pub const METRICS: &str = "metrics.jsonl";
/// The log of validations.
pub const VALIDATION: &str = "validation.jsonl";
/// The plot of both.
pub const LOSS_PLOT: &str = "loss.svg";
/// What came out, in numbers.
pub const SUMMARY: &str = "summary.json";
const LOCK: &str = ".lock";

/// Whether a run starts or goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new run: the directory must not hold one.
    Fresh,
    /// The run in the directory goes on.
    Resume,
}

/// A run's directory, locked for this process until it is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    _lock: Lock,
}

/// A file that is locked for this process. The operating system drops the lock with the file, however the process ends.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing it is not enough: a process that is just being started shares it until its own program runs.
        let _ = self.0.unlock();
    }
}

impl RunDir {
    /// Makes or opens the directory and locks it.
    ///
    /// # Errors
    /// [`Error::RunDirUnwritable`], [`Error::RunLocked`]; [`Error::RunExists`] for a fresh start where there is a run;
    /// [`Error::NothingToResume`] the other way round.
    pub fn open(path: &Path, start: Start, storage: Arc<dyn Storage>) -> Result<Self> {
        let unwritable = |source| Error::RunDirUnwritable { path: path.to_owned(), source };
        if start == Start::Resume && !holds_a_run(path)? {
            return Err(Error::NothingToResume { path: path.to_owned() });
        }
        storage.create_dir_all(path).map_err(unwritable)?;
        let lock = lock(path)?;
        let run = Self { path: path.to_owned(), storage, _lock: lock };
        if start == Start::Fresh && holds_a_run(path)? {
            return Err(Error::RunExists { path: path.to_owned() });
        }
        // Creating this directory is also the proof that the run can be written to.
        run.storage.create_dir_all(&run.checkpoints()).map_err(unwritable)?;
        checkpoint::remove_stale(&*run.storage, &run.checkpoints());
        Ok(run)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its durable files go.
    pub fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// The directory of its checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes one of its small files whole or not at all.
    ///
    /// # Errors
    /// [`Error::DiskFull`] or [`Error::Io`], naming the file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_atomically(&*self.storage, &self.file(name), bytes)
    }
}

/// A start that failed before the configuration was written left nothing worth keeping.
fn holds_a_run(path: &Path) -> Result<bool> {
    Ok(path.join(CONFIG).exists() || !checkpoint::list(&path.join(CHECKPOINTS))?.is_empty())
}

fn lock(dir: &Path) -> Result<Lock> {
    let unwritable = |source| Error::RunDirUnwritable { path: dir.to_owned(), source };
    let path = dir.join(LOCK);
    let mut file =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(unwritable)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // The holder may be just about to write its name; without one the message still says what to do.
            let _ = file.read_to_string(&mut holder);
            let holder = match holder.trim() {
                "" => "another process".to_owned(),
                known => known.to_owned(),
            };
            return Err(Error::RunLocked { path: dir.to_owned(), holder });
        }
        Err(TryLockError::Error(source)) => return Err(unwritable(source)),
    }
    let named = (|| {
        file.set_len(0)?;
        file.rewind()?;
        write!(file, "process {} on {}", std::process::id(), host_name())
    })();
    named.map_err(unwritable)?;
    Ok(Lock(file))
}

/// This machine's name, as far as the operating system tells without further ado.
pub(crate) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").or_else(|_| std::env::var("COMPUTERNAME")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "this machine".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    #[test]
    fn a_file_that_others_share_does_not_keep_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let open = || RunDir::open(dir.path(), Start::Fresh, Arc::new(Disk));
        let run = open().unwrap();
        // What a process that was started in between has until it runs its own program.
        let shared = run._lock.0.try_clone().unwrap();
        drop(run);
        open().unwrap();
        drop(shared);
    }
}
