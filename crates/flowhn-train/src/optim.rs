//! AdamW over all parameters in a handful of launches, and clipping by the global norm.

mod blockwise;
pub(crate) mod cuda;
mod host;
mod state;

use flowhn_nn::{Decay, Param, Params, Weight, Written, mark_written};
use flowhn_torch::op::{Arg, call};
use flowhn_torch::{Error as TensorError, catch};
use tch::{Device, Kind, Tensor};

pub use state::StateType;

use crate::Result;
use blockwise::Codes;
use state::Mean;

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean of squares.
    pub eps: f64,
    /// Decoupled weight decay of the parameters marked [`Decay::Yes`]; it is multiplied by the learning rate.
    pub weight_decay: f64,
    /// Gradients whose global L2 norm exceeds this are scaled down to it; 0 turns clipping off.
    pub clip_norm: f64,
    /// The type in which the two means are kept between updates.
    pub state: StateType,
}

/// AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2), with gradients clipped by their global norm.
///
/// With `c = min(1, clip_norm / (norm + 1e-6))`, the factor that clips, step `t` with learning rate `lr` takes a parameter `p`, its
/// gradient `g` and its means `m` and `v` to
///
/// ```text
/// m = beta1 m + (1 - beta1) c g      v = beta2 v + (1 - beta2) (c g)^2
/// p = p - lr weight_decay p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
/// ```
///
/// On the CPU that is libtorch's fused operator where the means are kept as f32. On CUDA kernels of our own do it in one pass for the norm
/// and one for the rest, which scales the gradient where it is read and writes the bf16 copy of the weight ([`Weight::bf16`]) where one
/// is kept; parameters are f32 there, and gradients f32 or bf16 ([`Weight::grad_kind`]).
///
/// Between updates the means may be kept in fewer bytes ([`StateType`]); the update computes in f32 and from what was kept.
///
/// A backward pass hands each parameter its gradient, or adds to the one that is there, so gradients accumulate over micro-batches until
/// [`AdamW::zero_grad`] forgets them. All parameters count in every step: for one that no backward pass reached, the gradient is 0.
///
/// The step counter, the clip factor and the norm stay on the device; nothing here waits for it.
///
/// ```
/// use flowhn_nn::{Decay, Param, Weight};
/// use flowhn_train::optim::{AdamW, AdamWOptions, StateType};
/// use tch::Tensor;
/// let weight = Tensor::from_slice(&[3f32, -2.]).set_requires_grad(true);
/// let param = Param { name: "w".to_owned(), weight: Weight::new(weight.shallow_clone()), decay: Decay::No };
/// let state = StateType::Fp32;
/// let options = AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 1., state };
/// let mut optimizer = AdamW::new(vec![param], options)?;
/// weight.square().sum(None).backward();
/// let norm = optimizer.step(0.01)?;
/// assert!((norm.double_value(&[]) - 52f64.sqrt()).abs() < 1e-5);
/// // The first step of Adam moves each weight by the learning rate, against its gradient.
/// assert!((weight.double_value(&[0]) - 2.99).abs() < 1e-6);
/// # Ok::<(), flowhn_train::Error>(())
/// ```
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    /// Parameters that decay and those that do not, in the order of the model.
    groups: [Group; 2],
    /// Updates done: a tensor of one element, on the parameters' device, that all parameters share.
    step: Tensor,
    engine: Engine,
}

/// What does the work, with the learning rate of the next update.
#[derive(Debug)]
enum Engine {
    /// libtorch's operator, and plain Rust where the means are not kept as f32.
    Host { lr: f64 },
    /// Our kernels, on CUDA.
    Kernels(Box<cuda::Engine>),
}

#[derive(Debug, Default)]
struct Group {
    names: Vec<String>,
    weights: Vec<Weight>,
    exp_avg: Vec<Mean>,
    exp_avg_sq: Vec<Mean>,
}

impl AdamW {
    /// An optimiser of all parameters of a model.
    ///
    /// # Errors
    /// As [`AdamW::new`].
    pub fn of_params(params: &Params, options: AdamWOptions) -> Result<Self> {
        Self::new(params.iter().cloned().collect(), options)
    }

    /// An optimiser of these parameters, all on one device and contiguous, with its means at zero.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] where there is no parameter, or one is not a leaf that requires a gradient, or not f32 on CUDA or beside
    /// means of another type.
    pub fn new(params: Vec<Param>, options: AdamWOptions) -> Result<Self> {
        let Some(first) = params.first() else {
            return Err(TensorError::invalid("adamw", "there are no parameters").into());
        };
        let device = first.weight.master().device();
        let mut groups = [Group::default(), Group::default()];
        let (signed, unsigned) = (Codes::signed(), Codes::unsigned());
        for Param { name, weight, decay } in params {
            let tensor = weight.master();
            if !tensor.requires_grad() || !tensor.is_leaf() || tensor.device() != device || !tensor.is_contiguous() {
                let message = format!("{name} is not a contiguous leaf on {device:?} that requires a gradient");
                return Err(TensorError::invalid("adamw", message).into());
            }
            if options.state != StateType::Fp32 && tensor.kind() != Kind::Float {
                let want = format!("Float where the state is {}", options.state);
                return Err(TensorError::Dtype { op: "adamw", arg: "parameter", got: tensor.kind(), want }.into());
            }
            let group = &mut groups[usize::from(decay == Decay::No)];
            group.exp_avg.push(Mean::zeros(tensor, options.state, &signed)?);
            group.exp_avg_sq.push(Mean::zeros(tensor, options.state, &unsigned)?);
            group.names.push(name);
            group.weights.push(weight);
        }
        let step = Tensor::zeros([], (Kind::Float, device));
        let engine = match device.is_cuda() {
            true => Engine::Kernels(Box::new(cuda::Engine::new(&groups, &options, device)?)),
            false => Engine::Host { lr: 0. },
        };
        Ok(Self { options, groups, step, engine })
    }

    /// Clips the gradients, updates the parameters with learning rate `lr`, and returns the global L2 norm that the gradients
    /// had before clipping, as an f32 scalar on the device. Afterwards gradients of the parameters' type are clipped on the CPU; all others
    /// are what they were.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if libtorch refuses.
    pub fn step(&mut self, lr: f64) -> Result<Tensor> {
        self.set_learning_rate(lr)?;
        self.clip_and_update()
    }

    /// Sets the learning rate of the updates that follow, also of one that was captured before.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if libtorch refuses.
    pub fn set_learning_rate(&mut self, lr: f64) -> Result<()> {
        match &mut self.engine {
            Engine::Host { lr: rate } => *rate = lr,
            Engine::Kernels(engine) => engine.set_learning_rate(lr)?,
        }
        Ok(())
    }

    /// As [`AdamW::step`], with the learning rate that was set before. Everything it does is work for the device, so it can be
    /// captured in a CUDA graph once it has run before; then [`AdamW::mark_updated`] belongs after each replay.
    ///
    /// # Errors
    /// As there, and where it is captured without having run, or having run with other bf16 copies.
    pub fn clip_and_update(&mut self) -> Result<Tensor> {
        let norm = tch::no_grad(|| match &mut self.engine {
            Engine::Kernels(engine) => engine.clip_and_update(&self.groups, &self.step),
            &mut Engine::Host { lr } => self.clip_and_update_on_host(lr),
        })?;
        self.mark_updated()?;
        Ok(norm)
    }

    /// Tells libtorch that the parameters have been updated, which it does not see in the replay of a captured update: a backward pass
    /// through what they were before is refused, and bf16 copies that the update did not write are made anew.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if libtorch refuses.
    pub fn mark_updated(&self) -> Result<()> {
        match &self.engine {
            // The fused operator does not count its writes either.
            Engine::Host { .. } => {
                let weights = self.groups.iter().flat_map(|group| &group.weights);
                Ok(mark_written(weights.map(|weight| (weight, Written::Master)))?)
            }
            Engine::Kernels(engine) => engine.mark_updated(&self.groups),
        }
    }

    /// Forgets all gradients.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if libtorch refuses.
    pub fn zero_grad(&mut self) -> Result<()> {
        for weight in self.groups.iter().flat_map(|group| &group.weights) {
            weight.clear_grad()?;
        }
        Ok(())
    }

    /// The state by name: `exp_avg.NAME` and `exp_avg_sq.NAME` of each parameter in the shape of the parameter and the type that they are
    /// kept in, and `step`. Where those are codes (u8), `exp_avg_absmax.NAME` and `exp_avg_sq_absmax.NAME` are the factors of their
    /// blocks, f32. The tensors share storage with the optimiser's.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("step".to_owned(), self.step.shallow_clone())];
        for group in &self.groups {
            for (idx, name) in group.names.iter().enumerate() {
                for (prefix, mean) in [("exp_avg", &group.exp_avg[idx]), ("exp_avg_sq", &group.exp_avg_sq[idx])] {
                    state.push((format!("{prefix}.{name}"), mean.values.shallow_clone()));
                    let absmax = mean.absmax.iter();
                    state.extend(absmax.map(|absmax| (format!("{prefix}_absmax.{name}"), absmax.shallow_clone())));
                }
            }
        }
        state
    }

    /// Overwrites the state with one that [`AdamW::state`] gave, on whatever device it is. It must have been kept in the same type:
    /// nothing is converted.
    ///
    /// # Errors
    /// A sentence that names the tensor that is missing, unknown or of another shape or type.
    pub fn load_state(&mut self, saved: &[(String, Tensor)]) -> std::result::Result<(), String> {
        let own = self.state();
        // Types first: codes bring tensors of their own, which would else be called unknown.
        for (name, tensor) in &own {
            let saved = saved.iter().find(|(saved, _)| saved == name);
            if let Some((_, values)) = saved.filter(|(_, values)| values.kind() != tensor.kind()) {
                return Err(format!("{name} is {:?}, expected {:?}", values.kind(), tensor.kind()));
            }
        }
        if let Some((name, _)) = saved.iter().find(|(name, _)| !own.iter().any(|(known, _)| known == name)) {
            return Err(format!("{name} belongs to no parameter of this model"));
        }
        for (name, mut tensor) in own {
            let Some((_, values)) = saved.iter().find(|(saved, _)| *saved == name) else {
                return Err(format!("it has no {name}"));
            };
            if values.size() != tensor.size() {
                return Err(format!("{name} has shape {:?}, expected {:?}", values.size(), tensor.size()));
            }
            tch::no_grad(|| tensor.f_copy_(values)).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The settings.
    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// Where the state lives.
    pub fn device(&self) -> Device {
        self.step.device()
    }

    /// The global L2 norm of the parameters, read from the device: finite exactly if none of them is infinite or NaN, up to
    /// the range of f32.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if libtorch refuses.
    pub fn params_norm(&self) -> Result<f64> {
        let [decaying, others] = &self.groups;
        let norm = tch::no_grad(|| norm_of(&[decaying.masters(), others.masters()]))?;
        Ok(catch(|| Ok(norm.double_value(&[])))?)
    }

    fn clip_and_update_on_host(&mut self, lr: f64) -> Result<Tensor> {
        let [decaying, others] = &self.groups;
        let grads = [decaying.defined_grads()?, others.defined_grads()?];
        let norm = norm_of(&grads)?;
        if self.options.clip_norm > 0. {
            scale(&grads, &catch(|| Ok((self.options.clip_norm / (&norm + 1e-6)).clamp_max(1.)))?)?;
        }
        self.step = catch(|| Ok(self.step.g_add_scalar_(1.)))?;
        if self.options.state == StateType::Fp32 {
            self.update(decaying, &grads[0], lr, self.options.weight_decay)?;
            self.update(others, &grads[1], lr, 0.)?;
        } else {
            let factors = host::Factors::new(&self.options, self.step.double_value(&[]), lr);
            host::update(decaying, &grads[0], &factors, true, 0)?;
            host::update(others, &grads[1], &factors, false, decaying.weights.len())?;
        }
        Ok(norm)
    }

    fn update(&self, group: &Group, grads: &[Tensor], lr: f64, weight_decay: f64) -> Result<()> {
        if group.weights.is_empty() {
            return Ok(());
        }
        let AdamWOptions { beta1, beta2, eps, .. } = self.options;
        let steps = vec![&self.step; group.weights.len()];
        let masters = group.masters();
        let args = [
            Arg::Tensors(&refs(&masters)),
            Arg::Tensors(&refs(grads)),
            Arg::Tensors(&means(&group.exp_avg)),
            Arg::Tensors(&means(&group.exp_avg_sq)),
            // The running maxima of AMSGrad, which this is not.
            Arg::Tensors(&[]),
            Arg::Tensors(&steps),
            Arg::Double(lr),
            Arg::Double(beta1),
            Arg::Double(beta2),
            Arg::Double(weight_decay),
            Arg::Double(eps),
            Arg::Bool(false),
            Arg::Bool(false),
        ];
        call("aten::_fused_adamw_", "", &args)?;
        Ok(())
    }
}

impl Group {
    /// The gradients as they are now, where there are any.
    fn grads(&self) -> impl Iterator<Item = flowhn_torch::Result<Option<Tensor>>> {
        let named = |name: &str, error| flowhn_torch::Error::invalid("adamw", format!("{name}: {error}"));
        self.names
            .iter()
            .zip(&self.weights)
            .map(move |(name, weight)| weight.grad().map_err(|error| named(name, error)))
    }

    /// The gradients in the type of the parameters, zeros where there is none.
    fn defined_grads(&self) -> Result<Vec<Tensor>> {
        let grads = self.weights.iter().zip(self.grads());
        let grad = |(weight, grad): (&Weight, flowhn_torch::Result<Option<Tensor>>)| match grad? {
            Some(grad) => Ok(grad.f_to_kind(weight.master().kind())?),
            None => Ok(weight.master().detach().f_zeros_like()?),
        };
        Ok(grads.map(grad).collect::<flowhn_torch::Result<_>>()?)
    }

    /// Handles of the masters.
    fn masters(&self) -> Vec<Tensor> {
        self.weights.iter().map(|weight| weight.master().shallow_clone()).collect()
    }
}

/// The L2 norm of all tensors together, an f32 scalar on their device.
fn norm_of(lists: &[Vec<Tensor>; 2]) -> Result<Tensor> {
    let mut norms = Vec::new();
    for list in lists.iter().filter(|list| !list.is_empty()) {
        let parts = call("aten::_foreach_norm", "Scalar", &[Arg::Tensors(&refs(list)), Arg::Double(2.)])?;
        norms.extend(parts.into_iter().flatten());
    }
    Ok(catch(|| Ok(Tensor::stack(&norms, 0).norm().to_kind(Kind::Float)))?)
}

/// Multiplies all tensors by a scalar on their device, in place.
fn scale(lists: &[Vec<Tensor>; 2], factor: &Tensor) -> Result<()> {
    for list in lists.iter().filter(|list| !list.is_empty()) {
        call("aten::_foreach_mul_", "Tensor", &[Arg::Tensors(&refs(list)), Arg::Tensor(factor)])?;
    }
    Ok(())
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

fn means(means: &[Mean]) -> Vec<&Tensor> {
    means.iter().map(|mean| &mean.values).collect()
}
