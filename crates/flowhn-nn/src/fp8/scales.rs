//! The scales of casts to fp8, and the largest values that they follow from.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{Error, Graph, Result};

use super::format::Format;
use crate::kernels::FP8_SCALES;

/// What a slot scales. A projection has one of each, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Activation,
    Weight,
    Gradient,
}

const ROLES: [Role; 3] = [Role::Activation, Role::Weight, Role::Gradient];

impl Role {
    pub(crate) fn format(self) -> Format {
        match self {
            Self::Activation | Self::Weight => Format::E4M3,
            Self::Gradient => Format::E5M2,
        }
    }
}

/// The numbers of a slot, in their order: what products multiply with, what the cast multiplies with, the largest value that casts
/// have seen since the last step began, and the largest of the steps before, fading; negative while there was none.
const N_NUMBERS: i64 = 4;
const INVERSE: i64 = 0;
const SCALE: i64 = 1;
const LARGEST: i64 = 2;
const HELD: i64 = 3;

/// One tensor of a projection: where its scale is.
#[derive(Debug)]
pub(crate) struct Slot {
    /// f32 `[4]`, a row of the table.
    numbers: Tensor,
    role: Role,
    /// Whether the scale follows from something.
    is_seeded: Arc<AtomicBool>,
}

impl Clone for Slot {
    fn clone(&self) -> Self {
        Self { numbers: self.numbers.shallow_clone(), role: self.role, is_seeded: Arc::clone(&self.is_seeded) }
    }
}

impl Slot {
    pub(crate) fn format(&self) -> Format {
        self.role.format()
    }

    pub(crate) fn numbers(&self) -> &Tensor {
        &self.numbers
    }

    /// Whether the scale follows from something.
    pub(crate) fn is_seeded(&self) -> bool {
        self.is_seeded.load(Ordering::Relaxed)
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.numbers.data_ptr() == other.numbers.data_ptr()
    }

    /// What a product of the rounded values has to be multiplied with: f32 `[1]`.
    pub(crate) fn inverse(&self) -> Result<Tensor> {
        Ok(self.numbers.f_narrow(0, INVERSE, 1)?)
    }

    /// What a cast multiplies with: f32 `[1]`.
    pub(crate) fn scale(&self) -> Result<Tensor> {
        Ok(self.numbers.f_narrow(0, SCALE, 1)?)
    }

    /// Before the first cast, looks at these values, which are going to be rounded, to choose the scale.
    ///
    /// # Errors
    /// [`Error::Invalid`] while a CUDA graph is captured, which would look again in each replay.
    pub(crate) fn seed_with(&self, values: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if self.is_seeded() {
            return Ok(());
        }
        if Graph::is_capturing() {
            let message =
                "a scale has not been chosen yet, and a CUDA graph is captured: run a step before the capture";
            return Err(Error::invalid("fp8", message));
        }
        tch::no_grad(|| -> Result<()> {
            let largest = values()?.f_abs()?.f_max()?.f_to_kind(Kind::Float)?;
            self.numbers.f_narrow(0, LARGEST, 1)?.f_copy_(&largest.f_view(1)?)?;
            let _ = self.numbers.f_narrow(0, HELD, 1)?.f_zero_()?;
            next(&self.numbers.f_view([1, N_NUMBERS])?, self.role)
        })?;
        self.is_seeded.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Takes note of a largest value, a scalar; on the CPU.
    pub(crate) fn note(&self, largest: &Tensor) -> Result<()> {
        let mut noted = self.numbers.f_narrow(0, LARGEST, 1)?;
        let largest = noted.f_maximum(&largest.f_view(1)?)?;
        Ok(noted.f_copy_(&largest)?)
    }
}

/// The slots of all projections.
#[derive(Debug)]
pub(crate) struct Scales {
    /// f32 `[n_slots, 4]`.
    table: Tensor,
    is_seeded: Vec<Arc<AtomicBool>>,
    /// One NaN, bf16: see [`Fp8Place`](super::Fp8Place).
    nan: Tensor,
    /// How often scales changed.
    generation: Arc<AtomicU64>,
    n_paused: Cell<usize>,
}

impl Scales {
    pub(crate) fn new(n_projections: usize, device: Device) -> Result<Self> {
        let n_slots = ROLES.len() * n_projections;
        let table = Tensor::f_zeros([n_slots as i64, N_NUMBERS], (Kind::Float, device))?;
        let _ = table.f_narrow(1, HELD, 1)?.f_fill_(-1.)?;
        Ok(Self {
            table,
            is_seeded: (0..n_slots).map(|_| Arc::default()).collect(),
            nan: Tensor::f_full([1], f64::NAN, (Kind::BFloat16, device))?,
            generation: Arc::default(),
            n_paused: Cell::new(0),
        })
    }

    /// The slots of a projection.
    pub(crate) fn slots(&self, projection_idx: usize) -> Result<[Slot; 3]> {
        let slot = |role: Role| -> Result<Slot> {
            let slot_idx = ROLES.len() * projection_idx + role as usize;
            let numbers = self.table.f_select(0, slot_idx as i64)?;
            Ok(Slot { numbers, role, is_seeded: Arc::clone(&self.is_seeded[slot_idx]) })
        };
        Ok([slot(Role::Activation)?, slot(Role::Weight)?, slot(Role::Gradient)?])
    }

    /// Chooses the scales of the next step.
    pub(crate) fn next(&self) -> Result<()> {
        self.generation.fetch_add(1, Ordering::Relaxed);
        tch::no_grad(|| next(&self.table, Role::Activation))
    }

    /// Counts the changes of scales, and how many there have been.
    pub(crate) fn generation(&self) -> (Arc<AtomicU64>, u64) {
        (Arc::clone(&self.generation), self.generation.load(Ordering::Relaxed))
    }

    /// All numbers, f32 `[n_slots, 4]`, in memory that this keeps using.
    pub(crate) fn table(&self) -> &Tensor {
        &self.table
    }

    /// Overwrites all numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more or fewer.
    pub(crate) fn load(&self, table: &Tensor) -> Result<()> {
        if table.size() != self.table.size() {
            let want = format!("{:?}, four numbers for each tensor of a projection", self.table.size());
            return Err(Error::Shape { op: "fp8", arg: "scales", got: table.size(), want });
        }
        let held: Vec<f32> = Vec::try_from(table.f_select(1, HELD)?.f_to_device(Device::Cpu)?)?;
        tch::no_grad(|| self.table.shallow_clone().f_copy_(table))?;
        for (is_seeded, held) in self.is_seeded.iter().zip(held) {
            is_seeded.store(held >= 0., Ordering::Relaxed);
        }
        self.generation.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn nan(&self) -> &Tensor {
        &self.nan
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.n_paused.get() > 0
    }

    pub(crate) fn pause(&self) {
        self.n_paused.set(self.n_paused.get() + 1);
    }

    pub(crate) fn resume(&self) {
        self.n_paused.set(self.n_paused.get() - 1);
    }
}

/// The next scales of the rows of a table, of which the first has this role.
pub(crate) fn next(table: &Tensor, first: Role) -> Result<()> {
    if table.device().is_cuda() {
        const THREADS: u32 = 128;
        let n_slots = table.size()[0] as u32;
        let args = [Arg::Tensor(table), Arg::I32(n_slots as i32), Arg::I32(first as i32)];
        return Kernel { source: &FP8_SCALES, entry: "fp8_scales", defines: &[] }.launch(
            [n_slots.div_ceil(THREADS), 1, 1],
            THREADS,
            0,
            &args,
        );
    }
    let rows = Vec::<f32>::try_from(table.f_view(-1)?)?;
    let rows = rows.as_chunks().0.iter().zip(ROLES.iter().cycle().skip(first as usize));
    let rows: Vec<f32> = rows.flat_map(|(numbers, role)| next_numbers(*numbers, *role)).collect();
    Ok(table.shallow_clone().f_copy_(&Tensor::from_slice(&rows).f_view(table.size().as_slice())?)?)
}

/// The formula of `fp8_scales.cu`.
fn next_numbers([_, _, largest, held]: [f32; 4], role: Role) -> [f32; 4] {
    /// The largest exponent of a scale, up and down.
    const LIMIT: i32 = 96;
    // The exponent of what `held` is rounded to, and that of the scale of zeros: a gradient is a share of a mean over many tokens.
    let (top, start) = if role.format() == Format::E5M2 { (14, 20) } else { (7, 4) };
    let largest = if largest < f32::INFINITY { largest } else { 0. };
    let held = if held >= 0. || largest > 0. { largest.max(held * 0.9375) } else { held };
    let floor_log2 = |x: f32| (x.to_bits() >> 23) as i32 - 127;
    let exponent = if held > 0. { top - floor_log2(held) } else { start };
    let exponent = exponent.clamp(-LIMIT, LIMIT);
    let power = |exponent: i32| f32::from_bits(((127 + exponent) as u32) << 23);
    [power(-exponent), power(exponent), 0., held]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_leave_room_above_the_largest_value() {
        for role in ROLES {
            for held in [1e-20f32, 3e-6, 0.7, 1., 1.999, 448., 3e4, 1e20] {
                let [inverse, scale, largest, next_held] = next_numbers([0., 0., held, -1.], role);
                let scaled = f64::from(held * scale) / role.format().largest();
                assert!((1. / 3.5..=1. / 1.75).contains(&scaled), "{role:?} {held}: {scaled}");
                assert_eq!((inverse * scale, largest, next_held), (1., 0., held));
            }
        }
    }

    #[test]
    fn a_peak_fades_and_what_is_no_number_does_not_count() {
        let numbers = next_numbers([0., 0., 2., 8.], Role::Activation);
        assert_eq!(numbers, [1. / 32., 32., 0., 7.5]);
        for none in [0., f32::INFINITY, f32::NAN] {
            assert_eq!(next_numbers([0., 0., none, -1.], Role::Activation), [1. / 16., 16., 0., -1.]);
            assert_eq!(next_numbers([0., 0., none, 0.], Role::Gradient), [2f32.powi(-20), 2f32.powi(20), 0., 0.]);
            assert_eq!(next_numbers([0., 0., none, 16.], Role::Activation)[3], 15.);
        }
        let limits = [1e-38, f32::MAX].map(|held| next_numbers([0., 0., held, 0.], Role::Gradient)[1].log2());
        assert_eq!(limits, [96., -96.]);
    }

    #[test]
    fn what_was_never_seen_is_so_after_loading_too() {
        let scales = Scales::new(1, Device::Cpu).unwrap();
        let [x, ..] = scales.slots(0).unwrap();
        x.seed_with(|| Ok(Tensor::from_slice(&[0f32, -0.]))).unwrap();
        scales.next().unwrap();
        let other = Scales::new(1, Device::Cpu).unwrap();
        other.load(scales.table()).unwrap();
        let seeded = |scales: &Scales| -> Vec<bool> {
            scales.is_seeded.iter().map(|is_seeded| is_seeded.load(Ordering::Relaxed)).collect()
        };
        assert_eq!(seeded(&other), [true, false, false]);
        assert!(other.table().equal(scales.table()));
        assert!(other.load(&Tensor::zeros([2, 4], (Kind::Float, Device::Cpu))).is_err());
    }
}
