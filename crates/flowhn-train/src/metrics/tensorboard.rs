//! TensorBoard's event files: protocol buffers in checksummed records.
//!
//! Only what scalars need is written, by hand: a `tensorflow.Event` with a wall time, a step and a summary of `(tag,
//! simple_value)` pairs. A resumed run opens another file whose first event says from which step on earlier files are void.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::storage::Disk;
use crate::{Error, Result};

/// A file of scalars for TensorBoard.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a file in `dir` for a run that has done `step` steps.
    ///
    /// # Errors
    /// [`Error::Io`], naming the file.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        let now = wall_time();
        let (host, process) = (crate::run_dir::host_name(), std::process::id());
        // The nanoseconds keep two sittings of one second apart.
        let name = format!("events.out.tfevents.{:010}.{host}.{process}.{}", now as u64, (now.fract() * 1e9) as u64);
        let path = dir.join(name);
        let file = File::create(&path).map_err(Error::io(&path, "write"))?;
        let mut writer = Self { path, file };
        writer.write(&[event(now, 0, |out| bytes_field(out, 3, b"brain.Event:2"))])?;
        if step > 0 {
            // A session log of status START voids what earlier files say of this step and later ones.
            writer.write(&[event(now, step + 1, |out| bytes_field(out, 7, &[0x08, 1]))])?;
        }
        Ok(writer)
    }

    /// Adds the scalars of a step, in one write.
    ///
    /// # Errors
    /// [`Error::DiskFull`] or [`Error::Io`], naming the file.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) -> Result<()> {
        let summary = scalars.iter().fold(Vec::new(), |mut summary, (tag, value)| {
            let mut entry = Vec::new();
            bytes_field(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | FIXED32);
            entry.extend(value.to_le_bytes());
            bytes_field(&mut summary, 1, &entry);
            summary
        });
        self.write(&[event(wall_time(), step, |out| bytes_field(out, 5, &summary))])
    }

    fn write(&mut self, events: &[Vec<u8>]) -> Result<()> {
        let records: Vec<u8> = events.iter().flat_map(|event| record(event)).collect();
        self.file.write_all(&records).map_err(|e| Error::writing(&Disk, &self.path, records.len() as u64, e))
    }
}

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH_DELIMITED: u8 = 2;
const FIXED32: u8 = 5;

fn event(wall_time: f64, step: u64, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![1 << 3 | FIXED64];
    out.extend(wall_time.to_le_bytes());
    out.push(2 << 3 | VARINT);
    varint(&mut out, step);
    fill(&mut out);
    out
}

fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | LENGTH_DELIMITED);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Length, its checksum, the bytes, their checksum.
fn record(bytes: &[u8]) -> Vec<u8> {
    let len = (bytes.len() as u64).to_le_bytes();
    [&len[..], &masked_crc32c(&len).to_le_bytes(), bytes, &masked_crc32c(bytes).to_le_bytes()].concat()
}

/// The checksum as TFRecord stores it, rotated and shifted so that a checksum of checksums is not degenerate.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with the Castagnoli polynomial, bit by bit: events are few and short.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let step = |crc: u32, _| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnoli() {
        // The check value of CRC-32C, and the vector of 32 zero bytes of RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn an_event_byte_by_byte() {
        let bytes = event(1., 300, |out| bytes_field(out, 3, b"ab"));
        let want = [&[0x09][..], &1f64.to_le_bytes(), &[0x10, 0xac, 0x02, 0x1a, 2, b'a', b'b']].concat();
        assert_eq!(bytes, want);
    }

    #[test]
    fn a_file_parses_back_record_by_record() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 20).unwrap();
        writer.scalars(21, &[("train/loss", 2.5), ("train/lr", 1e-3)]).unwrap();
        let mut bytes = &std::fs::read(&writer.path).unwrap()[..];
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(bytes[8..12].try_into().unwrap()), masked_crc32c(&bytes[..8]));
            let data = &bytes[12..12 + len];
            assert_eq!(u32::from_le_bytes(bytes[12 + len..16 + len].try_into().unwrap()), masked_crc32c(data));
            records.push(data.to_vec());
            bytes = &bytes[16 + len..];
        }
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"brain.Event:2"));
        // The session log: step 21, field 7, status START.
        assert_eq!(records[1][9..], [0x10, 21, 0x3a, 2, 0x08, 1]);
        let tag = b"train/loss";
        let at = records[2].windows(tag.len()).position(|window| window == tag).unwrap() + tag.len();
        assert_eq!(records[2][at], 0x15);
        assert_eq!(records[2][at + 1..at + 5], 2.5f32.to_le_bytes());
    }
}
