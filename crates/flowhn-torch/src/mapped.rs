//! Files mapped into memory, read-only.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::{Error, Result};

/// The bytes of a file, paged in as they are read.
///
/// The file must not be truncated or written while it is mapped; FlowHN only maps files that it wrote under a temporary name
/// and renamed, and never writes to them again.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is read-only and private to this value. Nobody in this process writes to the file: see the
        // contract in the type's documentation; a process that truncates it under us raises SIGBUS, as for any mapped file.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
