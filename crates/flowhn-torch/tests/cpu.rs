//! Elements of CPU tensors: what may be read, what is refused, and that views, strides and blocks agree with libtorch.

use std::panic::{AssertUnwindSafe, catch_unwind};

use flowhn_torch::cpu::{self, Element};
use flowhn_torch::op::{self, Arg};
use flowhn_torch::{Error, Result};
use half::bf16;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn refusal<T: std::fmt::Debug>(outcome: Result<T>) -> String {
    match outcome {
        Err(Error::Invalid { op, message }) => format!("{op}: {message}"),
        other => panic!("{other:?}"),
    }
}

/// Makes a tensor of the type, reads it back, and is refused every other type.
fn round_trip<T: Element + PartialEq + std::fmt::Debug>(elements: &[T]) {
    let n = elements.len() as i64;
    let tensor = cpu::from_slice(&[1, n], elements).unwrap();
    assert_eq!((tensor.kind(), tensor.size()), (T::KIND, vec![1, n]));
    assert_eq!(cpu::slice::<T>(&tensor).unwrap(), elements);
    assert_eq!(cpu::strided::<T>(&tensor).unwrap().data, elements);
    if T::KIND != Kind::Float {
        let message = refusal(cpu::slice::<f32>(&tensor));
        assert_eq!(message, format!("cpu::slice: the tensor is {:?} on the CPU, expected Float", T::KIND));
    }
}

#[test]
fn every_element_type_goes_there_and_back() {
    round_trip(&[1.5f32, f32::INFINITY, -0.]);
    round_trip(&[1.5f64, f64::MIN]);
    round_trip(&[bf16::from_f32(1.5), bf16::ZERO]);
    round_trip(&[i64::MAX, -1]);
    round_trip(&[i32::MIN, 7]);
    round_trip(&[0u8, 255]);
    round_trip(&[true, false, true]);
    round_trip::<f32>(&[]);
}

#[test]
fn tensors_without_plain_memory_are_refused() {
    let x = Tensor::from_slice(&[1f32, 2., 3., 4.]).view([2, 2]);
    let opaque = op::call("aten::to_mkldnn", "", &[Arg::Tensor(&x)]).unwrap().remove(0).unwrap();
    for read in [|t: &Tensor| refusal(cpu::slice::<f32>(t)), |t: &Tensor| refusal(cpu::strided::<f32>(t))] {
        assert!(read(&Tensor::new()).contains("undefined"));
        assert!(read(&x.to_sparse_sparse_dim(2)).contains("not strided"));
        assert!(read(&opaque).contains("not strided"));
        // The imaginary part of a conjugate is a view whose memory has the other sign.
        let negated = Tensor::complex(&x, &x).conj().imag();
        assert_eq!((negated.kind(), negated.double_value(&[0, 0])), (Kind::Float, -1.));
        assert!(read(&negated).contains("resolve_neg"));
        assert!(read(&Tensor::internal_efficientzerotensor([2], CPU)).contains("zero by definition"));
    }
    let meta = op::call("aten::to", "device", &[Arg::Tensor(&x), Arg::Str("meta"), Arg::Int(6)]);
    let meta = meta.unwrap().remove(0).unwrap();
    assert!(refusal(cpu::slice::<f32>(&meta)).contains("on meta"));
    assert!(refusal(cpu::slice::<f32>(&x.transpose(0, 1))).contains("strides [1, 2], not contiguous"));
    assert!(
        refusal(cpu::slice::<bool>(&Tensor::from_slice(&[0u8, 1, 2]).view_dtype(Kind::Bool))).contains("bytes is 2")
    );
}

#[test]
fn from_slice_and_build_check_their_shapes() {
    let wrong: [&[i64]; 4] = [&[3], &[-1, -2], &[i64::MAX, i64::MAX, 2], &[2, 0]];
    for shape in wrong {
        assert!(matches!(cpu::from_slice(shape, &[1f32, 2.]), Err(Error::Shape { .. })), "{shape:?}");
    }
    assert!(matches!(cpu::try_build::<f32, ()>(&[-1], |_| Ok(())), Err(Error::Torch(_))));
    assert!(catch_unwind(|| cpu::build::<f32>(&[-1], |_| ())).is_err());
    let failed = cpu::try_build::<f32, ()>(&[2], |_| Err(Error::invalid("fill", "no")));
    assert_eq!(failed.unwrap_err().to_string(), "fill: no");
    let (built, sum) = cpu::try_build(&[2, 2], |out: &mut [i64]| {
        out.copy_from_slice(&[1, 2, 3, 4]);
        Ok(out.iter().sum::<i64>())
    })
    .unwrap();
    assert_eq!((sum, built.int64_value(&[1, 0])), (10, 3));
    assert_eq!(cpu::build(&[], |out: &mut [f32]| out[0] = 2.).double_value(&[]), 2.);
    assert_eq!(cpu::slice::<bool>(&cpu::build(&[3], |_: &mut [bool]| ())).unwrap(), [false; 3]);
}

/// All index tuples of a shape, last axis fastest.
fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    shape.iter().fold(vec![vec![]], |tuples, &size| {
        tuples.iter().flat_map(|tuple| (0..size).map(move |i| [tuple.as_slice(), &[i]].concat())).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn strides_reach_the_elements_that_libtorch_sees(
        sizes in prop::collection::vec(1i64..5, 3),
        order in Just([0i64, 1, 2]).prop_shuffle(),
        start in 0i64..4, step in 1i64..4, expand in any::<bool>(),
    ) {
        let numel: i64 = sizes.iter().product();
        let base = Tensor::arange(numel, (Kind::Int64, Device::Cpu)).view(sizes.as_slice()).permute(order);
        let mut view = base.slice(0, start.min(base.size()[0]), None, step);
        if expand {
            view = view.unsqueeze(1).expand([-1, 3, -1, -1], false);
        }
        let seen = cpu::strided::<i64>(&view).unwrap();
        let want = Vec::<i64>::try_from(view.contiguous().view(-1)).unwrap();
        let got: Vec<i64> = indices(&seen.shape)
            .iter()
            .map(|index| seen.data[index.iter().zip(&seen.strides).map(|(i, stride)| i * stride).sum::<usize>()])
            .collect();
        prop_assert_eq!(got, want);
        // Not one element more than the strides reach.
        if let Some(last) = indices(&seen.shape).last() {
            let reach = last.iter().zip(&seen.strides).map(|(i, stride)| i * stride).sum::<usize>();
            prop_assert_eq!(seen.data.len(), reach + 1);
        } else {
            prop_assert!(seen.data.is_empty());
        }
    }

    #[test]
    fn column_blocks_cover_a_matrix_once(n_rows in 0usize..6, n_cols in 1usize..9, block_len in 1usize..11) {
        let mut matrix = vec![0usize; n_rows * n_cols];
        let blocks = cpu::column_blocks(&mut matrix, n_cols, block_len);
        prop_assert_eq!(blocks.len(), n_cols.div_ceil(block_len));
        std::thread::scope(|scope| {
            for mut block in blocks {
                scope.spawn(move || {
                    let (start, len) = (block.start(), block.n_cols());
                    for row_idx in 0..n_rows {
                        assert_eq!(block.row(row_idx).len(), len);
                        for (i, x) in block.row(row_idx).iter_mut().enumerate() {
                            *x += 1 + row_idx * n_cols + start + i;
                        }
                    }
                });
            }
        });
        let want: Vec<usize> = (1..=n_rows * n_cols).collect();
        prop_assert_eq!(matrix, want);
    }
}

#[test]
fn column_blocks_panic_as_documented() {
    let blocks = |len: usize, n_cols, block_len| {
        catch_unwind(|| cpu::column_blocks(&mut vec![0u8; len], n_cols, block_len).len()).ok()
    };
    assert_eq!(blocks(6, 3, 2), Some(2));
    assert_eq!([blocks(6, 0, 1), blocks(6, 3, 0), blocks(7, 3, 1)], [None; 3]);
    let mut matrix = [0u8; 6];
    let mut block = cpu::column_blocks(&mut matrix, 3, 2).remove(0);
    assert_eq!(block.row(1).len(), 2);
    assert!(catch_unwind(AssertUnwindSafe(|| block.row(2).len())).is_err());
}
