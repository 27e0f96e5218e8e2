//! Token embedding: the look-up of rows by id, in the type of computation.

use std::fmt::Display;

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::kind_define;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check, cpu};

use crate::cuda::embedding::EmbeddingCuda;
use crate::rows::{Rows, block_rows, map_blocks, no_kernel, with_contiguous_rows};
use crate::simd::{Real, Storage, dispatch};
use crate::{Decay, Init, Path, Weight};

/// Returns row `ids[..]` of the weight, rounded to `kind`.
///
/// The gradient of the weight is summed in the weight's own type, in the order of the tokens: it comes out the same on
/// any number of threads. Row `padding_idx` gets none.
///
/// On CUDA nothing waits for the device, so an id outside the vocabulary is no error there: its row is NaN.
/// [`check_ids`] finds it before ids are copied to the device.
///
/// # Shapes
/// - `weight_vd`: `[vocab_size, d_model]`, f32 (f64 for `Kind::Double`), contiguous
/// - `ids`: any shape, i64, each in `0..vocab_size`
/// - returns `[ids.., d_model]`
///
/// ```
/// use flowhn_nn::embedding;
/// use tch::{Kind, Tensor};
/// let weight = Tensor::from_slice(&[1f32, 2., 3., 4.]).view([2, 2]);
/// let x = embedding(&weight, &Tensor::from_slice(&[1i64, 0, 1]), Kind::BFloat16, None)?;
/// assert_eq!((x.size(), x.double_value(&[2, 0])), (vec![3, 2], 3.));
/// assert!(embedding(&weight, &Tensor::from_slice(&[0i64, 2]), Kind::Float, None).is_err());
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault; [`Error::Invalid`] with the
/// position and value of an id outside the vocabulary (on the CPU).
pub fn embedding(weight_vd: &Tensor, ids: &Tensor, kind: Kind, padding_idx: Option<i64>) -> Result<Tensor> {
    const OP: &str = "embedding";
    check::dims::<2>(OP, "weight_vd", weight_vd, "[vocab_size, d_model]")?;
    let weight_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    check::kind(OP, "weight_vd", weight_vd, &[weight_kind])?;
    check::kind(OP, "ids", ids, &[Kind::Int64])?;
    check::device(OP, "ids", ids, weight_vd.device())?;
    let look_up = |outputs: Result<Vec<Tensor>>| Ok(outputs?.swap_remove(0));
    match weight_vd.device() {
        Device::Cpu => {}
        Device::Cuda(_) => {
            kind_define(OP, "weight_vd", weight_vd)?;
            if !matches!(kind, Kind::Float | Kind::BFloat16) {
                return Err(wrong_kind(kind));
            }
            return look_up(apply(EmbeddingCuda::new(padding_idx, kind), &[weight_vd, ids]));
        }
        got => return Err(no_kernel(OP, "weight_vd", got)),
    }
    match kind {
        Kind::Float => look_up(apply(EmbeddingCpu::<f32>::new(padding_idx), &[weight_vd, ids])),
        Kind::BFloat16 => look_up(apply(EmbeddingCpu::<half::bf16>::new(padding_idx), &[weight_vd, ids])),
        Kind::Double => look_up(apply(EmbeddingCpu::<f64>::new(padding_idx), &[weight_vd, ids])),
        other => Err(wrong_kind(other)),
    }
}

fn wrong_kind(got: Kind) -> Error {
    Error::invalid("embedding", format!("kind is {got:?}, expected Float, BFloat16 or, on the CPU, Double"))
}

/// [`embedding`] with its weight.
#[derive(Debug)]
pub struct Embedding {
    weight: Weight,
    padding_idx: Option<i64>,
}

impl Embedding {
    /// Registers `name.weight`, `[vocab_size, d_model]`. The row of `padding_idx` is initialised like any other and
    /// gets no gradient from look-ups.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is taken, the initial values do not fit, or the padding id is outside the
    /// vocabulary.
    pub fn new(
        path: &mut Path,
        name: impl Display,
        vocab_size: i64,
        d_model: i64,
        init: Init,
        padding_idx: Option<i64>,
    ) -> Result<Self> {
        if let Some(id) = padding_idx.filter(|id| !(0..vocab_size).contains(id)) {
            return Err(Error::invalid("embedding", format!("the padding id {id} is not in 0..{vocab_size}")));
        }
        let weight = path.push(name).weight("weight", &[vocab_size, d_model], init, Decay::Yes)?;
        Ok(Self { weight, padding_idx })
    }

    /// Looks up ids of any shape; the result has the type `kind`.
    ///
    /// # Errors
    /// Those of [`embedding`].
    pub fn forward(&self, ids: &Tensor, kind: Kind) -> Result<Tensor> {
        let master_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        embedding(&self.weight.to(master_kind), ids, kind, self.padding_idx)
    }

    /// The weight, `[vocab_size, d_model]`.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }
}

struct EmbeddingCpu<T> {
    padding_idx: Option<i64>,
    vocab_size: i64,
    element: std::marker::PhantomData<fn() -> T>,
}

impl<T> EmbeddingCpu<T> {
    fn new(padding_idx: Option<i64>) -> Self {
        Self { padding_idx, vocab_size: 0, element: std::marker::PhantomData }
    }
}

impl<T: Storage + 'static> Function for EmbeddingCpu<T> {
    const NAME: &'static str = "embedding";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (weight, ids) = (inputs[0].contiguous(), inputs[1].contiguous());
        self.vocab_size = weight.size()[0];
        if ctx.is_recorded() {
            ctx.save(&ids);
        }
        let d = weight.size()[1] as usize;
        let ids_flat = check_ids("embedding", "ids", &ids, self.vocab_size, None)?;
        let weight = cpu::slice::<T::Acc>(&weight)?;
        let mut shape = ids.size();
        shape.push(d as i64);
        let block = block_rows(ids_flat.len());
        let x = cpu::build(&shape, |x: &mut [T]| {
            if d == 0 {
                return;
            }
            map_blocks(x, block * d, |block_idx, x| {
                dispatch(
                    #[inline(always)]
                    || {
                        for (x, &id) in x.chunks_exact_mut(d).zip(&ids_flat[block_idx * block..]) {
                            for (x, &weight) in x.iter_mut().zip(&weight[id as usize * d..][..d]) {
                                *x = T::narrow(weight);
                            }
                        }
                    },
                );
            });
        });
        Ok(vec![x])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let dx = with_contiguous_rows(&grads[0]);
        let dx_rows = Rows::<T>::new(&dx)?;
        let ids = cpu::slice::<i64>(&ctx.saved()[0])?;
        let d = dx.size().last().copied().unwrap_or(0);
        let dweight = cpu::build(&[self.vocab_size, d], |dweight: &mut [T::Acc]| {
            self.scatter(dweight, ids, &dx_rows, d as usize);
        });
        Ok(vec![Some(dweight), None])
    }
}

impl<T: Storage> EmbeddingCpu<T> {
    /// Adds row `t` of `dx` to row `ids[t]`. Tasks own rows of the result, and each row is summed in the order of its
    /// tokens.
    fn scatter(&self, dweight: &mut [T::Acc], ids: &[i64], dx: &Rows<T>, d: usize) {
        if dweight.is_empty() {
            return;
        }
        let tokens = TokensById::new(ids, self.vocab_size as usize);
        let block = block_rows(self.vocab_size as usize);
        map_blocks(dweight, block * d, |block_idx, rows| {
            dispatch(
                #[inline(always)]
                || {
                    for (i, sum) in rows.chunks_exact_mut(d).enumerate() {
                        let id = block_idx * block + i;
                        sum.fill(T::Acc::ZERO);
                        if Some(id as i64) == self.padding_idx {
                            continue;
                        }
                        for &token_idx in tokens.of(id) {
                            for (sum, dx) in sum.iter_mut().zip(dx.row(token_idx)) {
                                *sum += dx.widen();
                            }
                        }
                    }
                },
            );
        });
    }
}

/// The positions of every id, in order, by a counting sort.
struct TokensById {
    positions: Vec<usize>,
    /// Where the positions of an id end; those of the next begin there.
    ends: Vec<usize>,
}

impl TokensById {
    fn new(ids: &[i64], vocab_size: usize) -> Self {
        let mut ends = vec![0; vocab_size + 1];
        ids.iter().for_each(|&id| ends[id as usize + 1] += 1);
        for id in 0..vocab_size {
            ends[id + 1] += ends[id];
        }
        // `ends[id]` is now where the id begins, and moves to where it ends while its positions are filled in.
        let mut positions = vec![0; ids.len()];
        for (position, &id) in ids.iter().enumerate() {
            positions[ends[id as usize]] = position;
            ends[id as usize] += 1;
        }
        Self { positions, ends }
    }

    fn of(&self, id: usize) -> &[usize] {
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.positions[start..self.ends[id]]
    }
}

/// Ids on the CPU as a slice, each in `0..vocab_size` or equal to `ignored`; `op` and `arg` name them in the message.
///
/// # Errors
/// [`Error::Invalid`] with the position and value of one that is neither; that of [`cpu::slice`] for a tensor that is
/// not i64, contiguous and on the CPU.
pub fn check_ids<'a>(
    op: &'static str,
    arg: &'static str,
    ids: &'a Tensor,
    vocab_size: i64,
    ignored: Option<i64>,
) -> Result<&'a [i64]> {
    let flat = cpu::slice::<i64>(ids)?;
    match flat.iter().position(|&id| !(0..vocab_size).contains(&id) && Some(id) != ignored) {
        None => Ok(flat),
        Some(position) => {
            let mut rest = position as i64;
            let mut index: Vec<i64> = ids.size().iter().rev().map(|&size| (rest % size, rest /= size).0).collect();
            index.reverse();
            let or_ignored = ignored.map(|id| format!(" or {id}, which is ignored")).unwrap_or_default();
            Err(Error::invalid(
                op,
                format!("{arg}{index:?} is {}, expected 0..{vocab_size}{or_ignored}", flat[position]),
            ))
        }
    }
}
