//! [`AdamW`](super::AdamW) on CUDA, by kernels of our own.

use flowhn_nn::{Weight, Written, mark_written};
use flowhn_torch::kernel::{Arg, Defines, Kernel};
use flowhn_torch::{DeviceProperties, Error as TensorError, Graph, catch};
use tch::{Device, Kind, Tensor};

use super::{AdamWOptions, Group, StateType, blockwise};
use crate::Result;
use crate::kernels::ADAMW;

/// Elements of an item, for each type of the state.
const CHUNK: [i64; 3] = [16_384, 16_384, 8192];
/// Threads of a block that adds up the squares of an item, likewise.
const THREADS: [i64; 3] = [256, 256, 64];
/// Threads of a block that updates. With codes there is one persistent block on each multiprocessor; its warps share the maps and run
/// independently, so that some compute while others wait for memory.
const UPDATE_THREADS: [i64; 3] = [256, 256, 640];
/// The macros of `adamw.cu` for each type of the state.
pub(crate) const VARIANTS: [Defines; 3] = [&defines(0), &defines(1), &defines(2)];

const fn defines(state: usize) -> [(&'static str, i64); 5] {
    [
        ("CHUNK", CHUNK[state]),
        ("THREADS", THREADS[state]),
        ("UPDATE_THREADS", UPDATE_THREADS[state]),
        ("VECS", 2),
        ("STATE", state as i64),
    ]
}

/// Addresses that one launch of `adamw_addresses` takes.
const N_ADDRESSES: usize = 56;
/// Numbers of a slot, `Slot` of `adamw.cu`: the addresses of parameter, two means and copy, the length, flags, and the addresses of the
/// factors of codes.
const SLOT_LEN: usize = 8;
/// The place of the copy's address in a slot.
const COPY: usize = 3;
/// The flags of a slot: the parameter decays; its gradient is bf16.
const DECAYS: i64 = 1;
const BF16_GRAD: i64 = 2;
/// Numbers of 4 bytes in `Factors`.
const N_FACTORS: i64 = 11;

/// What the kernels work from, all of it on the device, at addresses that never change.
#[derive(Debug)]
pub(super) struct Engine {
    variant: Defines<'static>,
    /// Threads of a block, and blocks of a launch: of the sums of squares and of the update.
    squares: (u32, u32),
    update: (u32, u32),
    /// i64 `[n_params, SLOT_LEN]`.
    slots: Tensor,
    /// What was last written to `slots`.
    written: Vec<i64>,
    /// Slot and number of each chunk, i32 `[n_items, 2]`.
    items: Tensor,
    n_items: u32,
    /// Addresses of the gradients, i64 `[n_params]`.
    gradients: Tensor,
    /// Sum of squares of each item, f64.
    partials: Tensor,
    /// The options, f64.
    settings: Tensor,
    /// What follows from norm, step and learning rate, f32, and a counter of the update's, i32, which begins at 0 in each step.
    factors: Tensor,
    /// The maps of codes, bytes, where means are kept as codes.
    maps: Option<Tensor>,
    /// The learning rate of the next update, an f32 scalar.
    lr: Tensor,
}

impl Engine {
    pub(super) fn new(groups: &[Group; 2], options: &AdamWOptions, device: Device) -> Result<Self> {
        let mut items: Vec<i32> = Vec::new();
        for (slot, weight) in weights(groups).enumerate() {
            let master = weight.master();
            if master.kind() != Kind::Float {
                let want = "Float on a CUDA device (Double runs on the CPU only)".to_owned();
                return Err(TensorError::Dtype { op: "adamw", arg: "parameter", got: master.kind(), want }.into());
            }
            let n_chunks = master.numel().div_ceil(CHUNK[options.state as usize] as usize) as i64;
            items.extend((0..n_chunks).flat_map(|chunk| [slot as i32, chunk as i32]));
        }
        let n_params = weights(groups).count() as i64;
        let n_items = items.len() as u32 / 2;
        let AdamWOptions { beta1, beta2, eps, weight_decay, clip_norm, state } = *options;
        let n_blocks = match (state, device) {
            (StateType::Int8, Device::Cuda(device_idx)) => DeviceProperties::of(device_idx)?.n_multiprocessors,
            _ => n_items,
        };
        Ok(catch(|| {
            let zeros = |shape: &[i64], kind: Kind| Tensor::f_zeros(shape, (kind, device));
            Ok(Self {
                variant: VARIANTS[state as usize],
                squares: (THREADS[state as usize] as u32, n_items),
                update: (UPDATE_THREADS[state as usize] as u32, n_blocks),
                slots: zeros(&[n_params, SLOT_LEN as i64], Kind::Int64)?,
                written: Vec::new(),
                items: Tensor::from_slice(&items).f_view([-1, 2])?.f_to_device(device)?,
                n_items,
                gradients: zeros(&[n_params], Kind::Int64)?,
                partials: zeros(&[i64::from(n_items)], Kind::Double)?,
                settings: Tensor::from_slice(&[beta1, beta2, eps, weight_decay, clip_norm]).f_to_device(device)?,
                factors: zeros(&[N_FACTORS], Kind::Float)?,
                maps: match state {
                    StateType::Int8 => Some(Tensor::from_slice(&blockwise::maps_bytes()).f_to_device(device)?),
                    StateType::Fp32 | StateType::Bf16 => None,
                },
                lr: zeros(&[], Kind::Float)?,
            })
        })?)
    }

    pub(super) fn set_learning_rate(&mut self, lr: f64) -> Result<()> {
        Ok(catch(|| Ok(tch::no_grad(|| self.lr.f_fill_(lr)).map(drop)?))?)
    }

    /// Updates the parameters with their gradients scaled, which stay as they are, and counts the step; returns the norm.
    pub(super) fn clip_and_update(&mut self, groups: &[Group; 2], step: &Tensor) -> Result<Tensor> {
        let copies = self.write_slots(groups)?;
        // Held to the end: a dense copy of a gradient belongs to nobody else.
        let held = groups.iter().flat_map(Group::grads).map(|grad| dense(grad?)).collect::<Result<Vec<_>>>()?;
        self.write_addresses(&held)?;
        let norm = catch(|| Ok(Tensor::f_empty([], (Kind::Float, self.lr.device()))?))?;
        let reached: Vec<&Tensor> = held.iter().flatten().collect();
        let gradients = Arg::Addresses { table: &self.gradients, reached: &reached };
        let reached: Vec<&Tensor> = copies.iter().chain(kept(groups)).collect();
        let slots = Arg::Addresses { table: &self.slots, reached: &reached };
        let items = Arg::Tensor(&self.items);
        let (threads, blocks) = self.squares;
        self.launch("adamw_squares", [blocks, 1, 1], threads, &[gradients, slots, items, Arg::Tensor(&self.partials)])?;
        let args = [
            Arg::Tensor(&self.partials),
            Arg::I32(self.n_items as i32),
            Arg::Tensor(&self.settings),
            Arg::Tensor(&self.lr),
            Arg::Tensor(step),
            Arg::Tensor(&norm),
            Arg::Tensor(&self.factors),
        ];
        self.launch("adamw_factors", [1, 1, 1], 1024, &args)?;
        let args = [
            gradients,
            slots,
            items,
            Arg::Tensor(&self.factors),
            Arg::I32(self.n_items as i32),
            Arg::opt(self.maps.as_ref()),
        ];
        let (threads, blocks) = self.update;
        self.launch("adamw_update", [blocks, 1, 1], threads, &args)?;
        Ok(norm)
    }

    /// As [`AdamW::mark_updated`](super::AdamW::mark_updated).
    pub(super) fn mark_updated(&self, groups: &[Group; 2]) -> Result<()> {
        let written = |slot: &[i64]| if slot[COPY] == 0 { Written::Master } else { Written::MasterAndCopy };
        Ok(mark_written(weights(groups).zip(self.written.chunks_exact(SLOT_LEN).map(written)))?)
    }

    /// Tells the kernels where parameters, means and copies are, if that is news: at first, and once copies have been made. Returns the
    /// copies.
    fn write_slots(&mut self, groups: &[Group; 2]) -> Result<Vec<Tensor>> {
        let mut slots = Vec::with_capacity(self.written.len());
        let mut copies = Vec::new();
        for (group, decays) in groups.iter().zip([DECAYS, 0]) {
            for ((weight, mean), mean_sq) in group.weights.iter().zip(&group.exp_avg).zip(&group.exp_avg_sq) {
                // Brought up to date also where this step overwrites it: in a capture, it is as fresh afterwards as it was before.
                let copy = weight.bf16_copy()?;
                let copy_address = copy.as_ref().map_or(0, |copy| copy.data_ptr() as i64);
                copies.extend(copy);
                let [param, m, v] =
                    [weight.master(), &mean.values, &mean_sq.values].map(|tensor| tensor.data_ptr() as i64);
                let flags = decays | if weight.grad_kind() == Kind::BFloat16 { BF16_GRAD } else { 0 };
                slots.extend([param, m, v, copy_address, weight.master().numel() as i64, flags]);
                slots.extend([mean, mean_sq].map(|mean| mean.absmax.as_ref().map_or(0, |x| x.data_ptr() as i64)));
            }
        }
        if slots == self.written {
            return Ok(copies);
        }
        if Graph::is_capturing() {
            let message =
                "the first step, and that after a change of the compute type, cannot be captured: run one first";
            return Err(TensorError::invalid("adamw", message).into());
        }
        let on_host = Tensor::from_slice(&slots);
        let shape = self.slots.size();
        catch(|| Ok(self.slots.f_copy_(&on_host.f_view(shape.as_slice())?).map(drop)?))?;
        self.written = slots;
        Ok(copies)
    }

    /// Tells the kernels where this step's gradients are, by arguments, which a captured step keeps.
    fn write_addresses(&self, gradients: &[Option<Tensor>]) -> Result<()> {
        for (idx, part) in gradients.chunks(N_ADDRESSES).enumerate() {
            let mut args = vec![Arg::Tensor(&self.gradients), Arg::I32((idx * N_ADDRESSES) as i32)];
            args.push(Arg::I32(part.len() as i32));
            args.extend(part.iter().map(|gradient| Arg::opt(gradient.as_ref())));
            args.resize(3 + N_ADDRESSES, Arg::Null);
            self.launch("adamw_addresses", [1, 1, 1], 1, &args)?;
        }
        Ok(())
    }

    fn launch(&self, entry: &'static str, grid: [u32; 3], block: u32, args: &[Arg]) -> Result<()> {
        Ok(Kernel { source: &ADAMW, entry, defines: self.variant }.launch(grid, block, 0, args)?)
    }
}

fn weights(groups: &[Group; 2]) -> impl Iterator<Item = &Weight> {
    groups.iter().flat_map(|group| &group.weights)
}

/// The parameters and their means.
fn kept(groups: &[Group; 2]) -> impl Iterator<Item = &Tensor> {
    let means = groups.iter().flat_map(|group| group.exp_avg.iter().chain(&group.exp_avg_sq));
    weights(groups).map(Weight::master).chain(means.flat_map(|mean| [&mean.values].into_iter().chain(&mean.absmax)))
}

/// The gradient as the kernels read it, element after element.
fn dense(gradient: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(catch(|| Ok(gradient.map(|gradient| gradient.f_contiguous()).transpose()?))?)
}
