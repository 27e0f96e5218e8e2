//! Results on disk, with the settings that they belong to.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::eval::write_json;

/// A file of a result.
#[derive(Serialize, Deserialize)]
struct Kept<T> {
    /// Everything on which the result depends, as text.
    settings: String,
    result: T,
}

/// The result in a file if it was found under the same settings; under any, where `settings` is `None`.
pub fn read<T: DeserializeOwned>(path: &Path, settings: Option<&str>) -> Option<T> {
    // A file that cannot be read is one that is made again.
    let kept: Kept<T> = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    settings.is_none_or(|settings| settings == kept.settings).then_some(kept.result)
}

/// Writes a result with its settings, whole or not at all.
///
/// # Errors
/// Those of the file system.
pub fn write<T: Serialize>(path: &Path, settings: &str, result: &T) -> Result<()> {
    write_json(path, &Kept { settings: settings.to_owned(), result })
}
