//! Weights that are rounded to fp8 once a step.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use flowhn_torch::check;
use flowhn_torch::op::{Arg, call};
use flowhn_torch::{DeviceProperties, Error, Graph, Result};

use super::cast::{MULTIPLE, Rounded, cast};
use super::place::Fp8Place;
use super::scales::{Scales, Slot};
use crate::bf16_copy::no_elements;
use crate::{Params, Weight};

/// A place for what fp8 needs of one weight.
#[derive(Debug, Default)]
pub(crate) struct Fp8Copy {
    is_projection: Cell<bool>,
    used: RefCell<Option<Used>>,
}

/// A weight whose products are taken in fp8.
#[derive(Debug)]
struct Used {
    scales: Rc<Scales>,
    /// Those of the activation, the weight and the gradient.
    slots: [Slot; 3],
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    rounded: Rounded,
    /// How often the master had been written when it was rounded.
    version: i64,
}

/// What a product needs of a weight `[d_out, d_in]`.
pub(crate) struct Fp8Factors {
    /// `[d_out, d_in]`, E4M3.
    pub(crate) plain: Tensor,
    /// `[d_in, d_out]`, E4M3.
    pub(crate) transposed: Tensor,
    /// Those of the activation, the weight and the gradient.
    pub(crate) slots: [Slot; 3],
    /// The type that the gradient of the weight leaves its product in.
    pub(crate) grad_kind: Kind,
    /// Counts the changes of scales; how many there had been.
    generation: (Arc<AtomicU64>, u64),
}

impl Fp8Factors {
    /// Checks that the scales are those of the time when the factors were taken.
    pub(crate) fn check_scales(&self, op: &'static str) -> Result<()> {
        let (counter, taken) = &self.generation;
        match counter.load(Ordering::Relaxed) == *taken {
            true => Ok(()),
            false => Err(Error::invalid(op, "a step began between forward and backward: scales have changed")),
        }
    }
}

/// How many projections take their products in fp8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fp8Projections {
    /// Those that do.
    pub n_fp8: usize,
    /// Those that were meant to, also those that cannot: the sizes of their weights are no multiples of 16.
    pub n_meant: usize,
}

/// While it lives, projections compute in the type of their activations.
#[derive(Debug)]
pub struct Fp8Paused(Rc<Scales>);

impl Drop for Fp8Paused {
    fn drop(&mut self) {
        self.0.resume();
    }
}

impl Weight {
    /// Tells that a [`Linear`](crate::Linear) multiplies with it.
    pub(crate) fn mark_projection(&self) {
        self.beside.fp8.is_projection.set(true);
    }

    /// Whether a [`Linear`](crate::Linear) multiplies with it.
    pub(crate) fn is_projection(&self) -> bool {
        self.beside.fp8.is_projection.get()
    }

    /// Whether products with it are to be taken in fp8.
    pub(crate) fn takes_fp8(&self) -> bool {
        self.beside.fp8.used.borrow().as_ref().is_some_and(|used| !used.scales.is_paused())
    }

    /// The weight in fp8 as it is now, if products are to be taken so.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is out of date while a CUDA graph is captured; [`Error::Torch`] if libtorch refuses.
    pub(crate) fn fp8(&self) -> Result<Option<Fp8Factors>> {
        let mut used = self.beside.fp8.used.borrow_mut();
        let Some(used) = used.as_mut().filter(|used| !used.scales.is_paused()) else { return Ok(None) };
        let version = self.master().f_internal_version()?;
        if used.made.as_ref().is_none_or(|made| made.version != version) {
            if Graph::is_capturing() {
                let message = "a weight is out of date while a CUDA graph is captured: begin the step in the capture";
                return Err(Error::invalid("fp8", message));
            }
            self.round_to_fp8(used)?;
        }
        let Some(Made { rounded: Rounded { plain: Some(plain), transposed: Some(transposed) }, .. }) = &used.made
        else {
            return Err(Error::invalid("fp8", "a weight was not rounded in both orders"));
        };
        Ok(Some(Fp8Factors {
            plain: plain.shallow_clone(),
            transposed: transposed.shallow_clone(),
            slots: used.slots.clone(),
            grad_kind: self.grad_kind(),
            generation: used.scales.generation(),
        }))
    }

    /// Where to leave activations of this shape and type that only products with this weight read; nowhere if those take them in bf16, or if their
    /// scale has not been chosen yet, which asks for the values.
    pub(crate) fn fp8_place(&self, shape: &[i64], kind: Kind) -> Result<Option<Fp8Place>> {
        let used = self.beside.fp8.used.borrow();
        let Some(Used { scales, slots: [slot, ..], .. }) = used.as_ref().filter(|used| !used.scales.is_paused()) else {
            return Ok(None);
        };
        let fits = kind == Kind::BFloat16 && shape.iter().all(|&n| n > 0) && shape.last() == self.size().last();
        (fits && slot.is_seeded()).then(|| Fp8Place::new(shape, slot, scales.nan())).transpose()
    }

    fn round_to_fp8(&self, used: &mut Used) -> Result<()> {
        let [_, slot, _] = &used.slots;
        let (weight, version) = (self.bf16()?, self.master().f_internal_version()?);
        slot.seed_with(|| Ok(weight.shallow_clone()))?;
        let rounded = match used.made.take() {
            Some(made) => made.rounded,
            None => {
                let size = weight.size();
                Rounded::empty(size[0], size[1], true, true, &weight, slot.format())?
            }
        };
        tch::no_grad(|| cast(&weight, slot, &rounded))?;
        // The kernel's writes, counted as libtorch counts its own: a backward pass through the values before is refused.
        let views = [&rounded.plain, &rounded.transposed].into_iter().flatten().map(no_elements);
        for view in views.collect::<Result<Vec<_>>>()? {
            tch::no_grad(|| call("aten::zero_", "", &[Arg::Tensor(&view)]))?;
        }
        used.made = Some(Made { rounded, version });
        Ok(())
    }
}

impl Params {
    /// From now on projections ([`Linear`](crate::Linear)) whose weights have names that are meant take their products in fp8, where
    /// both sizes of the weight are multiples of 16. Their activations have to be bf16.
    ///
    /// # Errors
    /// [`Error::Device`] for a CUDA device without 8-bit floats; [`Error::Torch`] if there is no memory.
    pub fn use_fp8(&mut self, is_meant: impl Fn(&str) -> bool) -> Result<Fp8Projections> {
        check_device(self.device())?;
        let is_meant = |param: &&crate::Param| param.weight.is_projection() && is_meant(&param.name);
        let meant: Vec<&Weight> = self.iter().filter(is_meant).map(|param| &param.weight).collect();
        let fits = |weight: &&&Weight| weight.size().iter().all(|size| size % MULTIPLE == 0);
        let fitting: Vec<&Weight> = meant.iter().filter(fits).copied().collect();
        let scales = Rc::new(Scales::new(fitting.len(), self.device())?);
        for (projection_idx, weight) in fitting.iter().enumerate() {
            let slots = scales.slots(projection_idx)?;
            *weight.beside.fp8.used.borrow_mut() = Some(Used { scales: Rc::clone(&scales), slots, made: None });
        }
        let counts = Fp8Projections { n_fp8: fitting.len(), n_meant: meant.len() };
        self.fp8 = Some(scales);
        Ok(counts)
    }

    /// Begins a step: chooses its scales from what the last one saw, and rounds the weights. All of it is work for the device, so it
    /// can be captured in a CUDA graph once a step has run before. Without fp8 there is nothing to do.
    ///
    /// # Errors
    /// [`Error::Kernel`] or [`Error::Torch`] if the device refuses.
    pub fn begin_fp8_step(&self) -> Result<()> {
        let Some(scales) = &self.fp8 else { return Ok(()) };
        scales.next()?;
        self.iter().try_for_each(|param| match param.weight.beside.fp8.used.borrow_mut().as_mut() {
            Some(used) => param.weight.round_to_fp8(used),
            None => Ok(()),
        })
    }

    /// Until the guard is dropped, projections compute in the type of their activations, and scales see nothing.
    pub fn pause_fp8(&self) -> Option<Fp8Paused> {
        self.fp8.as_ref().map(|scales| {
            scales.pause();
            Fp8Paused(Rc::clone(scales))
        })
    }

    /// What the next step's scales follow from, f32 `[3 n_fp8, 4]`; with it and the weights, training goes on as if it had never
    /// stopped. It shares its memory.
    pub fn fp8_scales(&self) -> Option<Tensor> {
        self.fp8.as_ref().map(|scales| scales.table().shallow_clone())
    }

    /// Overwrites what [`Params::fp8_scales`] tells, on whatever device the values are.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more or fewer; [`Error::Invalid`] where nothing is in fp8.
    pub fn load_fp8_scales(&self, values: &Tensor) -> Result<()> {
        match &self.fp8 {
            Some(scales) => scales.load(values),
            None => Err(Error::invalid("fp8", "there are scales of fp8, and no projection takes its products so")),
        }
    }
}

/// 8-bit floats came with compute capability 8.9.
fn check_device(device: Device) -> Result<()> {
    const MIN_CAPABILITY: u32 = 89;
    let Device::Cuda(device_idx) = device else { return Ok(()) };
    let properties = DeviceProperties::of(device_idx)?;
    let (capability, name) = (properties.compute_capability, &properties.name);
    if capability >= MIN_CAPABILITY {
        return Ok(());
    }
    let (major, minor) = (capability / 10, capability % 10);
    let want = format!("a device with 8-bit floats, compute capability 8.9 or more; {name} has {major}.{minor}");
    Err(Error::Device { op: "fp8", arg: "parameters", got: device, want })
}

/// Checks that activations are of the type that is rounded to fp8, and as long as the rows of the weight.
pub(crate) fn check_activations(x: &Tensor, weight: &Weight) -> Result<()> {
    const OP: &str = "linear in fp8";
    check::kind(OP, "x", x, &[Kind::BFloat16])?;
    let d_in = weight.size()[1];
    match x.size().last() == Some(&d_in) {
        true => Ok(()),
        false => Err(Error::Shape { op: OP, arg: "x", got: x.size(), want: format!("[.., {d_in}]") }),
    }
}
