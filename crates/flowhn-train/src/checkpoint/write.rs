//! Writing a checkpoint so that it exists whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tch::Tensor;
use xxhash_rust::xxh3::Xxh3;

use super::state::{FORMAT, FileEntry, Progress, State, VERSION};
use super::{CONFIG_FILE, MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, list, step_dir, tensors};
use crate::storage::{DurableFile, Storage, write_atomically};
use crate::{Error, Result};

/// Everything that a checkpoint holds.
#[derive(Debug)]
pub struct Snapshot<'a> {
    /// Where the run stands.
    pub progress: Progress,
    /// The checked configuration as TOML.
    pub config: &'a str,
    /// The parameters by name.
    pub model: Vec<(String, Tensor)>,
    /// The optimiser's state by name.
    pub optimizer: Vec<(String, Tensor)>,
}

/// Writes `dir/step-N` and returns its path.
///
/// The files go to `dir/.step-N.tmp-PID`, each forced onto the disk, `state.json` last; then the directory gets its name and
/// that is made durable. A process that dies before leaves only the hidden directory, which [`remove_stale`] clears away.
///
/// # Errors
/// [`Error::DiskFull`] or [`Error::Io`], naming the file; earlier checkpoints are untouched and the temporary directory is
/// gone.
pub fn save(storage: &dyn Storage, dir: &Path, snapshot: &Snapshot) -> Result<PathBuf> {
    let step = snapshot.progress.step;
    let target = step_dir(dir, step);
    let temp = dir.join(format!(".step-{step}.tmp-{}", std::process::id()));
    let saved = write_files(storage, &temp, snapshot).and_then(|()| put_in_place(storage, dir, &temp, &target));
    if saved.is_err() {
        // The first error is the one to report; a directory that stays behind is cleared away by the next run.
        let _ = storage.remove_dir_all(&temp);
    }
    saved.map(|()| target)
}

fn write_files(storage: &dyn Storage, temp: &Path, snapshot: &Snapshot) -> Result<()> {
    storage.create_dir_all(temp).map_err(Error::io(temp, "create the directory"))?;
    let needed = tensors::data_bytes(&snapshot.model) + tensors::data_bytes(&snapshot.optimizer);
    // A disk that says it is too small is believed at once; one that says nothing may still prove so below.
    if let Ok(free_bytes) = storage.available_bytes(temp)
        && free_bytes < needed
    {
        return Err(Error::DiskFull { path: temp.join(MODEL_FILE), needed_bytes: needed, free_bytes });
    }
    let mut files = BTreeMap::new();
    let mut put = |name: &str, fill: &dyn Fn(&mut dyn Write) -> io::Result<()>| -> Result<()> {
        let path = temp.join(name);
        let entry = write_hashed(storage, &path, fill).map_err(|e| Error::writing(storage, &path, needed, e))?;
        files.insert(name.to_owned(), entry);
        Ok(())
    };
    put(CONFIG_FILE, &|out| out.write_all(snapshot.config.as_bytes()))?;
    put(MODEL_FILE, &|out| tensors::write(out, &snapshot.model))?;
    put(OPTIMIZER_FILE, &|out| tensors::write(out, &snapshot.optimizer))?;

    let state = State { format: FORMAT.to_owned(), version: VERSION, progress: snapshot.progress.clone(), files };
    let path = temp.join(STATE_FILE);
    let write_state = |out: &mut dyn Write| serde_json::to_writer_pretty(out, &state).map_err(io::Error::from);
    write_hashed(storage, &path, &write_state).map_err(|e| Error::writing(storage, &path, needed, e))?;
    storage.sync_dir(temp).map_err(Error::io(temp, "make durable"))
}

/// Writes a safetensors file of its own, whole or not at all, with words about it in its header.
///
/// # Errors
/// [`Error::DiskFull`] or [`Error::Io`], naming the file.
pub(crate) fn write_tensors(
    storage: &dyn Storage,
    path: &Path,
    tensors: &[(String, Tensor)],
    words: Option<HashMap<String, String>>,
) -> Result<()> {
    let mut bytes = Vec::new();
    tensors::write_with(&mut bytes, tensors, words).map_err(Error::io(path, "write"))?;
    write_atomically(storage, path, &bytes)
}

/// Gives the finished directory its name. A directory that has the name, such as a torn checkpoint of the same step, makes
/// room first.
fn put_in_place(storage: &dyn Storage, dir: &Path, temp: &Path, target: &Path) -> Result<()> {
    let old = target.exists().then(|| temp.with_extension(format!("old-{}", std::process::id())));
    if let Some(old) = &old {
        storage.rename(target, old).map_err(Error::io(target, "move out of the way"))?;
    }
    storage.rename(temp, target).map_err(Error::io(target, "rename the finished checkpoint to"))?;
    storage.sync_dir(dir).map_err(Error::io(dir, "make durable"))?;
    if let Some(old) = &old {
        let _ = storage.remove_dir_all(old);
    }
    Ok(())
}

/// Removes all but the newest `keep_last` checkpoints of the steps up to `written`; 0 keeps all. Call it once `written` is
/// durable. Returns what was removed.
///
/// Checkpoints of later steps are not counted: a resumed run that skipped a torn one would else prefer it to its own.
///
/// # Errors
/// [`Error::Io`] where the directory cannot be read or a checkpoint not removed.
pub fn prune(storage: &dyn Storage, dir: &Path, written: u64, keep_last: usize) -> Result<Vec<PathBuf>> {
    if keep_last == 0 {
        return Ok(Vec::new());
    }
    let mut steps = list(dir)?;
    steps.retain(|&(step, _)| step <= written);
    steps.truncate(steps.len().saturating_sub(keep_last));
    for (_, path) in &steps {
        storage.remove_dir_all(path).map_err(Error::io(path, "remove the old checkpoint"))?;
    }
    Ok(steps.into_iter().map(|(_, path)| path).collect())
}

/// Removes what an interrupted [`save`] left. The caller holds the lock of the run directory, so nobody is writing there.
pub fn remove_stale(storage: &dyn Storage, dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(".step-") && (name.contains(".tmp-") || name.contains(".old-")) {
            // A leftover that cannot be removed costs disk space and nothing else.
            let _ = storage.remove_dir_all(&entry.path());
        }
    }
}

fn write_hashed(
    storage: &dyn Storage,
    path: &Path,
    fill: &dyn Fn(&mut dyn Write) -> io::Result<()>,
) -> io::Result<FileEntry> {
    let mut out = Hashed { file: storage.create(path)?, hasher: Xxh3::new(), bytes: 0 };
    fill(&mut out)?;
    out.file.sync()?;
    Ok(FileEntry { bytes: out.bytes, xxh3: format!("{:032x}", out.hasher.digest128()) })
}

struct Hashed {
    file: Box<dyn DurableFile>,
    hasher: Xxh3,
    bytes: u64,
}

impl Write for Hashed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.file.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
