//! Writing a trace.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

use crate::{DATA, LAUNCHES, Record};

/// A trace that is being written. What a call has written stays, however the process ends.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    launches: File,
    data: File,
    n_data_bytes: u64,
    cubins: HashSet<u128>,
}

impl Writer {
    /// Begins a trace in a folder, which is made if need be.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if there is one in it; what the system says if it cannot be written.
    pub fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self {
            launches: File::create_new(dir.join(LAUNCHES))?,
            data: File::create(dir.join(DATA))?,
            n_data_bytes: 0,
            cubins: HashSet::new(),
            dir: dir.to_owned(),
        })
    }

    /// Keeps machine code; returns its file's name.
    ///
    /// # Errors
    /// What the system says if it cannot be written.
    pub fn cubin(&mut self, bytes: &[u8]) -> io::Result<String> {
        let hash = xxh3_128(bytes);
        let name = format!("{hash:032x}.cubin");
        if self.cubins.insert(hash) {
            fs::write(self.dir.join(&name), bytes)?;
        }
        Ok(name)
    }

    /// Keeps bytes of a region; returns where they begin.
    ///
    /// # Errors
    /// What the system says if they cannot be written.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<u64> {
        self.data.write_all(bytes)?;
        let at = self.n_data_bytes;
        self.n_data_bytes += bytes.len() as u64;
        Ok(at)
    }

    /// Adds a line.
    ///
    /// # Errors
    /// What the system says if it cannot be written.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        let line = serde_json::to_string(record)? + "\n";
        self.launches.write_all(line.as_bytes())
    }
}
