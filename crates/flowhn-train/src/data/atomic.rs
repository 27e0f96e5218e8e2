use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{Error, Result};

/// A file that appears under its name complete, or not at all.
///
/// Bytes go to a temporary file in the same directory; [`AtomicFile::commit`] flushes them to the disk and renames. A
/// process that dies before leaves only a hidden `.NAME.*.tmp`, which [`remove_stale`] clears away.
pub(super) struct AtomicFile {
    writer: BufWriter<NamedTempFile>,
    target: PathBuf,
}

impl AtomicFile {
    pub(super) fn create(target: &Path) -> Result<Self> {
        let dir = parent(target);
        fs::create_dir_all(dir).map_err(Error::io(dir, "create the directory"))?;
        let prefix = temp_prefix(target);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".tmp");
        #[cfg(unix)]
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        #[cfg(unix)]
        builder.permissions(permissions);
        let temp = builder.tempfile_in(dir).map_err(Error::io(dir, "create a temporary file in"))?;
        Ok(AtomicFile { writer: BufWriter::with_capacity(1 << 18, temp), target: target.to_owned() })
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// An unnamed file in the same directory, gone when it is closed.
    pub(super) fn scratch(&self) -> Result<File> {
        let dir = parent(&self.target);
        tempfile::tempfile_in(dir).map_err(Error::io(dir, "create a temporary file in"))
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io(&self.target, "write"))
    }

    /// Writes over the first bytes of the file, whatever has been written since.
    pub(super) fn rewrite_start(&mut self, bytes: &[u8]) -> Result<()> {
        use std::io::{Seek, SeekFrom};
        let mut rewrite = || {
            self.writer.seek(SeekFrom::Start(0))?;
            self.writer.write_all(bytes)?;
            self.writer.seek(SeekFrom::End(0)).map(drop)
        };
        rewrite().map_err(Error::io(&self.target, "write"))
    }

    /// Makes the file durable and gives it its name, replacing what had that name.
    pub(super) fn commit(self) -> Result<()> {
        let AtomicFile { writer, target } = self;
        let temp = writer.into_inner().map_err(|e| Error::io(&target, "write")(e.into_error()))?;
        temp.as_file().sync_all().map_err(Error::io(&target, "write"))?;
        temp.persist(&target).map_err(|e| Error::io(&target, "rename the finished file to")(e.error))?;
        // The rename itself is durable only once the directory is. Some file systems cannot sync a directory; the file
        // is in place all the same.
        if let Ok(dir) = File::open(parent(&target)) {
            let _ = dir.sync_all();
        }
        Ok(())
    }
}

/// Removes temporary files that an interrupted write of `target` left. The caller holds the lock on `target`.
pub(super) fn remove_stale(target: &Path) {
    let prefix = temp_prefix(target);
    let Ok(entries) = fs::read_dir(parent(target)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&prefix) && name.ends_with(".tmp") {
            // A leftover that cannot be removed costs disk space and nothing else.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn temp_prefix(target: &Path) -> String {
    format!(".{}.", target.file_name().unwrap_or_default().to_string_lossy())
}

fn parent(target: &Path) -> &Path {
    match target.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}
