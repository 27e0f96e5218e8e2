//! Tensors from safetensors files.

use std::collections::HashMap;
use std::path::Path;

use flowhn_torch::MappedFile;
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The tensors of a file by name, and its metadata.
#[derive(Debug)]
pub struct WeightFile {
    /// Tensors on the CPU.
    pub tensors: HashMap<String, Tensor>,
    /// What the file says of itself.
    pub metadata: HashMap<String, String>,
}

impl WeightFile {
    /// Reads a whole safetensors file.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it cannot be opened, [`Error::Weights`] if it is not a safetensors file or has a type that no model uses.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_bytes(path, &MappedFile::open(path)?)
    }

    /// Reads the bytes of a whole safetensors file; errors call it `path`.
    ///
    /// # Errors
    /// [`Error::Weights`] as [`WeightFile::read`].
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let fail = |message: String| Error::Weights { path: path.to_owned(), message };
        let invalid = |error| fail(format!("not a safetensors file: {error}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(invalid)?;
        let views = SafeTensors::deserialize(bytes).map_err(invalid)?;
        let tensors = views
            .iter()
            .map(|(name, view)| {
                let kind = match view.dtype() {
                    Dtype::F64 => Kind::Double,
                    Dtype::F32 => Kind::Float,
                    Dtype::F16 => Kind::Half,
                    Dtype::BF16 => Kind::BFloat16,
                    Dtype::I64 => Kind::Int64,
                    Dtype::I32 => Kind::Int,
                    other => return Err(fail(format!("`{name}` is {other:?}, which no model uses"))),
                };
                let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
                Ok((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }
}
