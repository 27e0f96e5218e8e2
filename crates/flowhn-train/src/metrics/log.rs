//! A log of JSON lines.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use super::Record;
use crate::storage::Disk;
use crate::{Error, Result};

/// A file of JSON lines to which a run appends.
#[derive(Debug)]
pub struct Log<R> {
    path: PathBuf,
    file: File,
    _records: PhantomData<fn(R)>,
}

impl<R: Record> Log<R> {
    /// Opens the log for a run that has done `step` steps: what stands there of later steps, and a last line that a killed
    /// process left unfinished, is cut off. A run that has done none starts with an empty log.
    ///
    /// # Errors
    /// [`Error::Log`] where the file is not such a log, [`Error::Io`].
    pub fn open(path: &Path, step: Option<u64>) -> Result<Self> {
        let keep = match step {
            Some(step) => scan::<R>(path)?
                .take_while(|line| line.as_ref().map_or(true, |(record, _)| record.step() <= step))
                .try_fold(0, |_, line| line.map(|(_, end)| end))?,
            None => 0,
        };
        let mut file =
            OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(Error::io(path, "open"))?;
        file.set_len(keep as u64).map_err(Error::io(path, "truncate"))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io(path, "write"))?;
        Ok(Self { path: path.to_owned(), file, _records: PhantomData })
    }

    /// Appends lines, in one write.
    ///
    /// # Errors
    /// [`Error::DiskFull`] or [`Error::Io`], naming the file.
    pub fn append(&mut self, records: &[R]) -> Result<()> {
        let mut text = Vec::new();
        for record in records {
            let io = |error| Error::io(&self.path, "write")(std::io::Error::from(error));
            serde_json::to_writer(&mut text, record).map_err(io)?;
            text.push(b'\n');
        }
        self.file.write_all(&text).map_err(|e| Error::writing(&Disk, &self.path, text.len() as u64, e))
    }

    /// Waits until the lines are on the disk. A checkpoint calls for it first, so that no line that belongs to it is lost.
    ///
    /// # Errors
    /// [`Error::DiskFull`] or [`Error::Io`], naming the file.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::writing(&Disk, &self.path, 0, e))
    }
}

/// The records of a log; none where there is no file. A last line without its end, as a killed process leaves one, is not
/// counted.
///
/// # Errors
/// [`Error::Log`] where a line is something else, [`Error::Io`].
pub fn read<R: Record>(path: &Path) -> Result<Vec<R>> {
    scan::<R>(path)?.map(|line| line.map(|(record, _)| record)).collect()
}

/// Each complete line as a record and the offset behind it.
fn scan<R: Record>(path: &Path) -> Result<impl Iterator<Item = Result<(R, usize)>>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes.map_err(Error::io(path, "read"))?,
    };
    let path = path.to_owned();
    let (mut line, mut start) = (0, 0);
    Ok(std::iter::from_fn(move || {
        let end = start + bytes[start..].iter().position(|&byte| byte == b'\n')? + 1;
        line += 1;
        let record = serde_json::from_slice(&bytes[start..end]);
        start = end;
        Some(record.map(|record| (record, end)).map_err(|error| Error::Log {
            path: path.clone(),
            line,
            message: error.to_string(),
        }))
    }))
}

#[cfg(test)]
mod tests {
    use super::super::{StepRecord, ValidRecord};
    use super::*;

    fn record(step: u64) -> StepRecord {
        let loss = 1. / step as f32;
        StepRecord {
            step,
            tokens: 8 * step,
            loss,
            lr: 1e-3 / 3.,
            grad_norm: loss / 7.,
            tokens_per_s: 1e3,
            mfu: 0.5,
            max_memory_bytes: 1 << 40,
            elapsed_s: 0.1,
        }
    }

    #[test]
    fn the_keys_are_the_documented_ones_in_order() {
        let line = serde_json::to_value(record(3)).unwrap();
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        let want = "step tokens loss lr grad_norm tokens_per_s mfu max_memory_bytes elapsed_s";
        assert_eq!(keys.join(" "), want);
    }

    #[test]
    fn resuming_cuts_back_to_the_step_and_an_unfinished_line_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let records: Vec<StepRecord> = (1..=6).map(record).collect();
        Log::open(&path, None).unwrap().append(&records).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"step\": 7, \"los"].concat()).unwrap();
        assert_eq!(read::<StepRecord>(&path).unwrap(), records);

        let mut log = Log::open(&path, Some(4)).unwrap();
        log.append(&records[4..]).unwrap();
        log.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        // A log that is shorter than the checkpoint's step goes on where it ends.
        Log::<StepRecord>::open(&path, Some(400)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        Log::<StepRecord>::open(&path, None).unwrap();
        assert!(std::fs::read(&path).unwrap().is_empty());
    }

    #[test]
    fn floats_survive_to_the_last_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = Log::open(&path, None).unwrap();
        let mut bits = 0x3f80_0001u32;
        for step in 1..200 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) & 0x7eff_ffff;
            let loss = f32::from_bits(bits);
            log.append(&[StepRecord { loss, ..record(step) }]).unwrap();
            assert_eq!(read::<StepRecord>(&path).unwrap().pop().unwrap().loss.to_bits(), bits);
        }
    }

    #[test]
    fn a_foreign_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("validation.jsonl");
        std::fs::write(&path, "{\"epoch\": 1}\n").unwrap();
        let error = Log::<ValidRecord>::open(&path, Some(1)).unwrap_err().to_string();
        assert!(error.contains("validation.jsonl: line 1") && error.contains("epoch"), "{error}");
    }
}
