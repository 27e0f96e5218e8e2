//! Machine code on disk, so that a variant is compiled once for a machine and not once for a process.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use xxhash_rust::xxh3::xxh3_128;

static PROBLEM: OnceLock<String> = OnceLock::new();

/// Where compiled kernels are kept: `$FLOWHN_KERNEL_CACHE`, else `$XDG_CACHE_HOME/flowhn/kernels`, else
/// `~/.cache/flowhn/kernels`; `None` where none of these variables is set or `FLOWHN_KERNEL_CACHE` is empty.
pub fn cache_dir() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    if let Some(own) = folder("FLOWHN_KERNEL_CACHE") {
        return (!own.as_os_str().is_empty()).then_some(own);
    }
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let cache =
        folder("XDG_CACHE_HOME").and_then(absolute).or_else(|| folder("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("flowhn/kernels"))
}

/// Why compiled kernels could not be kept, if that happened in this process: they work, but the next process compiles them again.
pub fn cache_problem() -> Option<&'static str> {
    PROBLEM.get().map(String::as_str)
}

/// The file of one variant: everything that determines its machine code is in the name.
pub(super) fn file(name: &str, arch: &str, key: &str) -> Option<PathBuf> {
    let stem = name.strip_suffix(".cu").unwrap_or(name);
    Some(cache_dir()?.join(format!("{stem}-{arch}-{:032x}.cubin", xxh3_128(key.as_bytes()))))
}

/// The machine code in the file. A cubin is an ELF file, and ours end in their checksum; anything else is as good as absent.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let sum = bytes.split_off(bytes.len().checked_sub(16)?);
    (bytes.starts_with(b"\x7fELF") && sum == xxh3_128(&bytes).to_le_bytes()).then_some(bytes)
}

/// Keeps the machine code. A folder that cannot be written costs the next process a compilation and nothing else.
pub(super) fn write(path: &Path, cubin: &[u8]) {
    let attempt = || -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Written beside and renamed, so that other processes see the whole file or none.
        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        let bytes = [cubin, &xxh3_128(cubin).to_le_bytes()].concat();
        fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })
    };
    if let Err(error) = attempt() {
        let _ = PROBLEM.set(format!(
            "compiled kernels could not be kept in {}: {error}; every start compiles them anew until \
             FLOWHN_KERNEL_CACHE names a folder that can be written",
            path.parent().unwrap_or(path).display()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_files_count_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/k.cubin");
        write(&path, b"\x7fELF code");
        assert_eq!(read(&path).unwrap(), b"\x7fELF code");
        let mut bytes = fs::read(&path).unwrap();
        bytes[6] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(read(&path).is_none());
        fs::write(&path, b"short").unwrap();
        assert!(read(&path).is_none());
        assert!(read(&folder.path().join("absent")).is_none());
    }

    #[test]
    fn a_folder_that_is_a_file_is_a_problem_and_no_panic() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(&file.path().join("k.cubin"), b"\x7fELF");
        assert!(cache_problem().unwrap().contains("FLOWHN_KERNEL_CACHE"));
    }
}
