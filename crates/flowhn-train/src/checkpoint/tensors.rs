//! Named tensors as a safetensors file, written through a seam and one tensor at a time.

use std::collections::HashMap;
use std::io::{self, Write};

use flowhn_torch::cpu;
use half::bf16;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, TensorView};
use tch::{Device, Kind, Tensor};

/// The types that a file may have, in words.
const KINDS: &str = "f32, f64, i64, bf16 and u8";

/// Bytes that [`write`] writes for the elements, without the header.
pub(super) fn data_bytes(tensors: &[(String, Tensor)]) -> u64 {
    tensors.iter().map(|(_, tensor)| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
}

/// Writes the tensors, wherever they live; a tensor on a device is copied to the host when its turn comes.
pub(super) fn write(out: &mut dyn Write, tensors: &[(String, Tensor)]) -> io::Result<()> {
    write_with(out, tensors, None)
}

/// [`write`], with words about the file in its header.
pub(super) fn write_with(
    out: &mut dyn Write,
    tensors: &[(String, Tensor)],
    words: Option<HashMap<String, String>>,
) -> io::Result<()> {
    // Wide elements first, so that every tensor is aligned in the file.
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.kind().elt_size_in_bytes()));

    let mut infos = Vec::with_capacity(sorted.len());
    let mut end = 0;
    for (name, tensor) in &sorted {
        let start = end;
        end += tensor.numel() * tensor.kind().elt_size_in_bytes();
        let shape = tensor.size().into_iter().map(|size| size as usize).collect();
        infos.push((name.clone(), TensorInfo { dtype: dtype(tensor.kind())?, shape, data_offsets: (start, end) }));
    }
    let metadata = Metadata::new(words, infos).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    // The format asks for elements that start at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    sorted.into_iter().try_for_each(|(_, tensor)| write_elements(out, tensor))
}

fn write_elements(out: &mut dyn Write, tensor: &Tensor) -> io::Result<()> {
    let host = tensor.detach().to_device(Device::Cpu).contiguous();
    match host.kind() {
        Kind::Double => out.write_all(bytemuck::cast_slice(cpu::slice::<f64>(&host).map_err(io::Error::other)?)),
        Kind::Int64 => out.write_all(bytemuck::cast_slice(cpu::slice::<i64>(&host).map_err(io::Error::other)?)),
        Kind::BFloat16 => out.write_all(bytemuck::cast_slice(cpu::slice::<bf16>(&host).map_err(io::Error::other)?)),
        Kind::Uint8 => out.write_all(cpu::slice::<u8>(&host).map_err(io::Error::other)?),
        _ => out.write_all(bytemuck::cast_slice(cpu::slice::<f32>(&host).map_err(io::Error::other)?)),
    }
}

fn dtype(kind: Kind) -> io::Result<Dtype> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::Double => Ok(Dtype::F64),
        Kind::Int64 => Ok(Dtype::I64),
        Kind::BFloat16 => Ok(Dtype::BF16),
        Kind::Uint8 => Ok(Dtype::U8),
        other => Err(io::Error::other(format!("checkpoints hold {KINDS} tensors, not {other:?}"))),
    }
}

/// The tensors of a file, on the host, in the order of their names.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut views = file.tensors();
    views.sort_by(|(left, _), (right, _)| left.cmp(right));
    views.into_iter().map(|(name, view)| to_tensor(&view).map(|tensor| (name, tensor))).collect()
}

fn to_tensor(view: &TensorView) -> Result<Tensor, String> {
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    // The format guarantees as many bytes as the shape has elements; they are copied, so they need no alignment.
    Ok(match view.dtype() {
        Dtype::F32 => cpu::build(&shape, |out: &mut [f32]| bytemuck::cast_slice_mut(out).copy_from_slice(view.data())),
        Dtype::F64 => cpu::build(&shape, |out: &mut [f64]| bytemuck::cast_slice_mut(out).copy_from_slice(view.data())),
        Dtype::I64 => cpu::build(&shape, |out: &mut [i64]| bytemuck::cast_slice_mut(out).copy_from_slice(view.data())),
        Dtype::BF16 => {
            cpu::build(&shape, |out: &mut [bf16]| bytemuck::cast_slice_mut(out).copy_from_slice(view.data()))
        }
        Dtype::U8 => cpu::build(&shape, |out: &mut [u8]| out.copy_from_slice(view.data())),
        other => return Err(format!("checkpoints hold {KINDS} tensors, not {other:?}")),
    })
}

#[cfg(test)]
mod tests {
    use flowhn_torch::testing::same_bits;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(values in prop::collection::vec(any::<f32>(), 0..40), n_doubles in 0usize..5) {
            let doubles: Vec<f64> = (0..n_doubles).map(|i| i as f64 / 3.).collect();
            let tensors = vec![
                ("b.weight".to_owned(), Tensor::from_slice(&values)),
                ("a".to_owned(), Tensor::from_slice(&doubles)),
                ("step".to_owned(), Tensor::from(7i64)),
                ("x.bf16".to_owned(), Tensor::from_slice(&values).to_kind(Kind::BFloat16)),
                ("x.codes".to_owned(), Tensor::from_slice(&[0u8, 255, 7])),
            ];
            let mut bytes = Vec::new();
            write(&mut bytes, &tensors).unwrap();
            let back = read(&bytes).unwrap();
            let names: Vec<&str> = back.iter().map(|(name, _)| name.as_str()).collect();
            prop_assert_eq!(names, ["a", "b.weight", "step", "x.bf16", "x.codes"]);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(cpu::slice::<f32>(&back[1].1).unwrap()), bits(&values));
            prop_assert_eq!(cpu::slice::<f64>(&back[0].1).unwrap(), doubles.as_slice());
            prop_assert_eq!(back[2].1.int64_value(&[]), 7);
            prop_assert!(same_bits(&back[3].1, &tensors[3].1) && same_bits(&back[4].1, &tensors[4].1));
        }
    }

    #[test]
    fn a_transposed_tensor_is_written_by_its_shape() {
        let tensor = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).view([2, 3]).transpose(0, 1);
        let mut bytes = Vec::new();
        write(&mut bytes, &[("t".to_owned(), tensor.shallow_clone())]).unwrap();
        assert!(read(&bytes).unwrap()[0].1.equal(&tensor));
    }

    #[test]
    fn a_half_tensor_is_refused_by_its_type() {
        let tensor = Tensor::zeros([2], (Kind::Half, Device::Cpu));
        let error = write(&mut Vec::new(), &[("t".to_owned(), tensor)]).unwrap_err();
        assert!(error.to_string().contains("Half"), "{error}");
    }
}
