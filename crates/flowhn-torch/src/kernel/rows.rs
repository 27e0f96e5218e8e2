//! The host's half of `rows.cuh`: where the rows of tensors start, and how threads share them out.

use tch::{Device, Tensor};

use super::Arg;
use crate::{DeviceProperties, Error, Result};

/// The longest row that a team of threads holds in its registers.
pub const MAX_WIDTH: i64 = 32_768;

/// Elements of a vector, `VEC` of `rows.cuh`.
const VEC: i64 = 8;

/// How a kernel reads and writes rows: the macro `ROWS_ALIGNED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowAccess {
    /// 16 bytes at a time.
    Vectors,
    /// Element by element.
    Elements,
}

impl RowAccess {
    /// For rows of `d` elements of each of these tensors.
    pub fn of(d: i64, tensors: &[&Tensor]) -> Self {
        match rows_are_aligned(d, tensors) {
            true => Self::Vectors,
            false => Self::Elements,
        }
    }
}

/// A compiled form of a kernel whose teams hold rows in registers: how many vectors a thread holds, and the bounds that leave it
/// registers enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowForm {
    /// Vectors that a thread holds: `VECS`.
    pub n_vectors: u32,
    /// Most threads of a block: `MAX_THREADS`.
    pub max_threads: u32,
    /// Blocks that a multiprocessor has registers for: `MIN_BLOCKS`.
    pub min_blocks: u32,
}

impl RowForm {
    /// For rows that no other form holds; it may spill registers.
    const WIDEST: Self = Self::new(4, 1024, 1);

    /// The form with these macros.
    pub const fn new(n_vectors: u32, max_threads: u32, min_blocks: u32) -> Self {
        Self { n_vectors, max_threads, min_blocks }
    }

    /// The macros, with the dtype of the rows as a number.
    pub const fn defines(self, x_kind: i64, access: RowAccess) -> [(&'static str, i64); 5] {
        [
            ("X_KIND", x_kind),
            ("ROWS_ALIGNED", matches!(access, RowAccess::Vectors) as i64),
            ("VECS", self.n_vectors as i64),
            ("MAX_THREADS", self.max_threads as i64),
            ("MIN_BLOCKS", self.min_blocks as i64),
        ]
    }

    /// The macros for rows of bf16 that are rounded to fp8 where they are computed ([`Fp8Blocks`]).
    pub const fn fp8_defines(self) -> [(&'static str, i64); 6] {
        let [x_kind, aligned, vectors, threads, blocks] = self.defines(1, RowAccess::Vectors);
        [x_kind, aligned, vectors, threads, blocks, Fp8Blocks::DEFINE]
    }

    /// Threads that a row of `d` elements takes.
    fn team(self, d: i64) -> u32 {
        (d.clamp(1, MAX_WIDTH) as u32).div_ceil(VEC as u32 * self.n_vectors).next_multiple_of(32)
    }
}

/// How a block's threads share out rows: teams of whole warps, a row to a team.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowTiling {
    /// The compiled form.
    pub form: RowForm,
    /// Threads of a team.
    pub team: u32,
    /// Teams of a block.
    pub n_teams: u32,
}

impl RowTiling {
    /// The tiling for rows of `d` elements: of `forms` the one with the fewest idle threads, the last of those that tie.
    ///
    /// # Errors
    /// [`Error::Invalid`] for rows longer than [`MAX_WIDTH`].
    pub fn new(op: &'static str, d: i64, forms: &[RowForm]) -> Result<Self> {
        if d > MAX_WIDTH {
            let message =
                format!("rows of {d} elements are longer than the {MAX_WIDTH} that the CUDA kernel holds; use the CPU");
            return Err(Error::invalid(op, message));
        }
        let fits = |form: &&RowForm| form.team(d) <= form.max_threads;
        let held = |form: &&RowForm| form.n_vectors * form.team(d);
        let form = *forms.iter().rev().filter(fits).min_by_key(held).unwrap_or(&RowForm::WIDEST);
        let team = form.team(d);
        // A team of several warps has a barrier of its own, and a block has 15.
        let n_teams = (form.max_threads / team).clamp(1, if team > 32 { 15 } else { 32 });
        Ok(Self { form, team, n_teams })
    }

    /// Threads of a block.
    pub fn block(&self) -> u32 {
        self.team * self.n_teams
    }

    /// The macros of the form.
    pub fn defines(&self, x_kind: i64, access: RowAccess) -> [(&'static str, i64); 5] {
        self.form.defines(x_kind, access)
    }

    /// Blocks for `n_rows` rows that nothing outlives: several waves even out what the ends of blocks leave idle.
    ///
    /// # Errors
    /// As [`RowTiling::n_resident_blocks`].
    pub fn n_blocks(&self, n_rows: i64, device: Device) -> Result<i64> {
        self.capped(n_rows, device, 64)
    }

    /// Blocks for `n_rows` rows whose sums stay in registers: as many as run at once, at least one.
    ///
    /// # Errors
    /// [`Error::Torch`] where the device does not answer.
    pub fn n_resident_blocks(&self, n_rows: i64, device: Device) -> Result<i64> {
        self.capped(n_rows, device, self.form.min_blocks.into())
    }

    fn capped(&self, n_rows: i64, device: Device, per_multiprocessor: i64) -> Result<i64> {
        let Device::Cuda(device_idx) = device else {
            return Err(Error::Device { op: "rows", arg: "x", got: device, want: "a CUDA device".to_owned() });
        };
        let n_teams = i64::from(self.n_teams);
        let cap = i64::from(DeviceProperties::of(device_idx)?.n_multiprocessors) * per_multiprocessor;
        Ok(((n_rows + n_teams - 1) / n_teams).clamp(1, cap.max(1)))
    }

    /// Bytes of shared memory in which each thread keeps its columns of `n` weights (`OwnWeight` of `norm.cuh`, which keeps them in registers
    /// where a thread has more than two vectors); behind the last row the same bytes serve to [add up columns](Self::column_bytes).
    pub fn weight_bytes(&self, n: usize) -> usize {
        match self.form.n_vectors as usize {
            n_vectors @ ..=2 => n * n_vectors * self.column_bytes(),
            _ => self.column_bytes(),
        }
    }

    /// Bytes of shared memory for adding up the columns of a block's teams.
    pub fn column_bytes(&self) -> usize {
        4 * VEC as usize * self.block() as usize
    }
}

/// What blocks need that round their rows to fp8 where they compute them (`fp8_rows.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8Blocks {
    /// Bytes of shared memory.
    pub shared_bytes: usize,
}

impl Fp8Blocks {
    /// Rows of a block.
    const ROWS: i64 = 32;
    /// The widest rows.
    const MAX_WIDTH: i64 = 4096;
    /// The macro beside those of [`RowForm::defines`].
    pub const DEFINE: (&'static str, i64) = ("FP8_ROWS", Self::ROWS);

    /// For rows of `d` elements of these tensors, on a CUDA device; none where rows are not aligned or too wide, and are rounded by a
    /// kernel of its own.
    ///
    /// # Errors
    /// [`Error::Torch`] where the device does not answer.
    pub fn new(d: i64, tensors: &[&Tensor]) -> Result<Option<Self>> {
        let Some(Device::Cuda(device_idx)) = tensors.first().map(|x| x.device()) else { return Ok(None) };
        let shared_bytes = (Self::ROWS * d + 128) as usize;
        let fits = shared_bytes as u64 <= DeviceProperties::of(device_idx)?.shared_bytes_per_block;
        Ok((fits && d <= Self::MAX_WIDTH && rows_are_aligned(d, tensors)).then_some(Self { shared_bytes }))
    }

    /// Blocks for so many rows, with those that are added.
    pub fn n_blocks(&self, n_padded: i64) -> i64 {
        (n_padded + Self::ROWS - 1) / Self::ROWS
    }
}

/// The rows of tensors `[.., d]` that agree in all axes but the last, as kernels walk them: `[outer, inner, d]` with two strides.
#[derive(Debug)]
pub struct Rows {
    tensors: Vec<Tensor>,
    strides: Vec<[i64; 2]>,
    n_rows: i32,
    inner: i32,
}

impl Rows {
    /// Looks at the tensors, or at contiguous copies of those whose last axis is not dense and of all if no two strides reach
    /// every row.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more than `i32::MAX` rows.
    pub fn new(op: &'static str, tensors: &[&Tensor]) -> Result<Self> {
        let mut tensors: Vec<Tensor> = tensors.iter().map(|x| with_dense_rows(x)).collect::<Result<_>>()?;
        let axes = match merged_axes(&tensors) {
            axes if axes.len() <= 2 => axes,
            _ => {
                tensors = tensors.iter().map(Tensor::f_contiguous).collect::<std::result::Result<_, _>>()?;
                merged_axes(&tensors)
            }
        };
        let axis = |i: usize| axes.get(i).cloned().unwrap_or_else(|| Axis { size: 1, strides: vec![0; tensors.len()] });
        let (inner, outer) = (axis(0), axis(1));
        let strides = outer.strides.iter().zip(&inner.strides).map(|(&outer, &inner)| [outer, inner]).collect();
        let n_rows = inner.size * outer.size;
        let too_many = |_| Error::invalid(op, format!("{n_rows} rows are more than a launch counts; split the batch"));
        let (n_rows, inner) = (i32::try_from(n_rows).map_err(too_many)?, i32::try_from(inner.size).map_err(too_many)?);
        Ok(Self { tensors, strides, n_rows, inner: inner.max(1) })
    }

    /// The tensor to pass in the place of the one given as number `idx`.
    pub fn tensor(&self, idx: usize) -> &Tensor {
        &self.tensors[idx]
    }

    /// Number of rows.
    pub fn n_rows(&self) -> i32 {
        self.n_rows
    }

    /// The argument `inner`: rows of the inner axis.
    pub fn inner(&self) -> Arg<'static> {
        Arg::I32(self.inner)
    }

    /// The two stride arguments of tensor `idx`; zeros for one that was not given.
    pub fn strides(&self, idx: usize) -> [Arg<'static>; 2] {
        self.strides.get(idx).copied().unwrap_or([0, 0]).map(Arg::I64)
    }
}

/// One axis of several tensors.
#[derive(Clone, Debug)]
struct Axis {
    size: i64,
    strides: Vec<i64>,
}

/// The leading axes of the tensors, innermost first, merged where in every tensor one continues the other.
fn merged_axes(tensors: &[Tensor]) -> Vec<Axis> {
    let shape = tensors[0].size();
    let strides: Vec<Vec<i64>> = tensors.iter().map(Tensor::stride).collect();
    let mut axes: Vec<Axis> = Vec::new();
    for i in (0..shape.len().saturating_sub(1)).rev().filter(|&i| shape[i] != 1) {
        let outer: Vec<i64> = strides.iter().map(|strides| strides[i]).collect();
        match axes.last_mut() {
            Some(inner) if outer.iter().zip(&inner.strides).all(|(outer, stride)| *outer == stride * inner.size) => {
                inner.size *= shape[i];
            }
            _ => axes.push(Axis { size: shape[i], strides: outer }),
        }
    }
    axes
}

/// The same tensor where its last axis is contiguous in memory, a copy where it is not.
pub fn with_dense_rows(tensor: &Tensor) -> Result<Tensor> {
    let (size, stride) = (tensor.size(), tensor.stride());
    Ok(match (size.last(), stride.last()) {
        (Some(&size), Some(&stride)) if size > 1 && stride != 1 => tensor.f_contiguous()?,
        _ => tensor.shallow_clone(),
    })
}

/// The argument `aligned`: [`rows_are_aligned`].
pub fn aligned(d: i64, tensors: &[&Tensor]) -> Arg<'static> {
    Arg::I32(i32::from(rows_are_aligned(d, tensors)))
}

/// Whether rows of `d` elements of each of these tensors may be read 16 bytes at a time.
pub fn rows_are_aligned(d: i64, tensors: &[&Tensor]) -> bool {
    let fits = |x: &&Tensor| {
        let (size, stride) = (x.size(), x.stride());
        let mut leading = size.iter().zip(&stride).rev().skip(1).filter(|&(&size, _)| size > 1);
        (x.data_ptr() as usize).is_multiple_of(16) && leading.all(|(_, stride)| stride % VEC == 0)
    };
    d % VEC == 0 && tensors.iter().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn every_tiling_covers_the_row() {
        let forms = [RowForm::new(1, 512, 1), RowForm::new(2, 512, 1), RowForm::new(3, 256, 1)];
        for d in [1, 7, 8, 67, 128, 256, 257, 768, 1024, 1536, 2048, 4096, 4097, 6145, 8192, 8193, 16_384, MAX_WIDTH] {
            let tiling = RowTiling::new("test", d, &forms).unwrap();
            assert!(i64::from(tiling.form.n_vectors * tiling.team) * VEC >= d, "{d}: {tiling:?}");
            assert!(tiling.team.is_multiple_of(32) && tiling.block() <= tiling.form.max_threads, "{d}: {tiling:?}");
            assert_eq!(tiling.form == RowForm::WIDEST, d > 8192, "{d}: {tiling:?}");
        }
        let vectors = |d| RowTiling::new("test", d, &forms).unwrap().form.n_vectors;
        assert_eq!([128, 768, 1536, 2048].map(vectors), [1, 3, 3, 2]);
        let message = RowTiling::new("test", MAX_WIDTH + 1, &forms).unwrap_err().to_string();
        assert!(message.contains("use the CPU"), "{message}");
    }

    #[test]
    fn rows_are_walked_with_two_strides() {
        let base = Tensor::arange(4 * 6 * 5 * 10, (Kind::Float, Device::Cpu)).view([4, 6, 5, 10]);
        let walk = |views: &[&Tensor]| {
            let rows = Rows::new("test", views).unwrap();
            let mut starts = vec![Vec::new(); views.len()];
            for row in 0..i64::from(rows.n_rows) {
                let (outer, inner) = (row / i64::from(rows.inner), row % i64::from(rows.inner));
                for (i, starts) in starts.iter_mut().enumerate() {
                    let offset = outer * rows.strides[i][0] + inner * rows.strides[i][1];
                    let elements = crate::cpu::strided::<f32>(rows.tensor(i)).unwrap();
                    starts.push(f64::from(elements.data[offset as usize]));
                }
            }
            for (view, starts) in views.iter().zip(starts) {
                let want =
                    Vec::<f64>::try_from(view.select(-1, 0).contiguous().view(-1).to_kind(Kind::Double)).unwrap();
                assert_eq!(starts, want, "{:?} {:?}", view.size(), view.stride());
            }
        };
        let three = base.select(2, 0);
        walk(&[&base]);
        walk(&[&three]);
        walk(&[&three.narrow(2, 3, 5), &three.contiguous().narrow(2, 0, 5)]);
        walk(&[&three.transpose(0, 1), &three.transpose(0, 1).contiguous()]);
        walk(&[&base.narrow(2, 0, 3).narrow(1, 1, 4)]);
        walk(&[&base.transpose(0, 2).narrow(1, 0, 2)]);
        walk(&[&base.permute([3, 1, 2, 0])]);
        walk(&[&base.select(0, 1).select(0, 2).select(0, 3)]);
        walk(&[&base.narrow(0, 0, 0)]);
    }

    #[test]
    fn alignment_asks_for_widths_strides_and_addresses() {
        let x = Tensor::zeros([3, 4, 24], (Kind::BFloat16, Device::Cpu));
        let is = |d, x: &Tensor| rows_are_aligned(d, &[x]);
        assert!(is(24, &x) && is(16, &x.narrow(2, 8, 16)));
        assert!(!is(20, &x.narrow(2, 0, 20)) && !is(16, &x.narrow(2, 1, 16)));
        assert!(!is(8, &Tensor::zeros([3, 12], (Kind::BFloat16, Device::Cpu)).narrow(1, 0, 8)));
    }
}
