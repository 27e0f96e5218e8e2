//! Named parameters: the list that an optimiser, a checkpoint and an importer walk through.

use std::fmt::{self, Display};
use std::rc::Rc;

use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use flowhn_torch::{Error, Result, cpu};

use crate::bf16_copy::Bf16Copy;
use crate::bf16_grad::Bf16Grad;
use crate::fp8::{Fp8Copy, Fp8Scales};
use crate::grad_place::InPlace;
use crate::init::{Init, stream};

/// An fp32 master parameter. Handles are cheap and share storage: a layer holds one, the list of [`Params`] another.
///
/// Beside a master there may be a copy in bf16, see [`Weight::want_bf16_copy`].
#[derive(Debug)]
pub struct Weight {
    master: Tensor,
    pub(crate) beside: Rc<Beside>,
}

/// What there is beside a master, shared by its handles.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    pub copy: Bf16Copy,
    pub bf16_grad: Bf16Grad,
    pub in_place: InPlace,
    pub fp8: Fp8Copy,
}

impl Weight {
    /// A parameter of these values, which the handle shares.
    pub fn new(master: Tensor) -> Self {
        Self { master, beside: Rc::default() }
    }

    /// The master itself: a leaf of autograd, f32.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// The weight in a compute type, through autograd; free where it is the master's own type.
    pub fn to(&self, kind: Kind) -> Tensor {
        if kind == self.master.kind() { self.master.shallow_clone() } else { self.master.to_kind(kind) }
    }

    /// Size of each axis.
    pub fn size(&self) -> Vec<i64> {
        self.master.size()
    }
}

impl Clone for Weight {
    fn clone(&self) -> Self {
        Self { master: self.master.shallow_clone(), beside: Rc::clone(&self.beside) }
    }
}

/// Whether weight decay applies to a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// It does: matrices of projections and embeddings.
    Yes,
    /// It does not: norms, biases, `A_log`, `D`.
    No,
}

/// One entry of [`Params`].
#[derive(Clone, Debug)]
pub struct Param {
    /// Full name, parts joined by dots.
    pub name: String,
    /// The values.
    pub weight: Weight,
    /// Whether weight decay applies.
    pub decay: Decay,
}

/// The parameters of a model, in the order in which its layers made them.
#[derive(Debug)]
pub struct Params {
    device: Device,
    seed: u64,
    list: Vec<Param>,
    /// The scales of projections in fp8, if there are any.
    pub(crate) fp8: Option<Rc<Fp8Scales>>,
}

impl Params {
    /// An empty list for `device`; initial values follow from `seed` and each parameter's name.
    pub fn new(device: Device, seed: u64) -> Self {
        Self { device, seed, list: Vec::new(), fp8: None }
    }

    /// The place where layers register their parameters.
    ///
    /// ```
    /// use flowhn_nn::{Decay, Init, Params};
    /// use tch::Device;
    /// let mut params = Params::new(Device::Cpu, 0);
    /// params.root().push("layer").weight("weight", &[2, 3], Init::Normal { std: 0.02 }, Decay::Yes)?;
    /// assert_eq!(params.get("layer.weight").unwrap().weight.size(), [2, 3]);
    /// # Ok::<(), flowhn_torch::Error>(())
    /// ```
    pub fn root(&mut self) -> Path<'_> {
        Path { params: self, prefix: String::new() }
    }

    /// All parameters, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Param> {
        self.list.iter()
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.list.iter().find(|param| param.name == name)
    }

    /// Number of parameters' elements.
    pub fn n_elements(&self) -> u64 {
        self.list.iter().map(|param| param.weight.master.numel() as u64).sum()
    }

    /// Where the parameters live.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Overwrites one parameter with `values`, of any float type, on any device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such parameter, [`Error::Shape`] if the shape differs.
    pub fn assign(&self, name: &str, values: &Tensor) -> Result<()> {
        let param =
            self.get(name).ok_or_else(|| Error::invalid("assign", format!("there is no parameter `{name}`")))?;
        if param.weight.size() != values.size() {
            let want = format!("{:?} as parameter `{name}` has", param.weight.size());
            return Err(Error::Shape { op: "assign", arg: "values", got: values.size(), want });
        }
        tch::no_grad(|| param.weight.master.shallow_clone().f_copy_(values).map(drop)).map_err(Error::from)
    }

    /// Makes the bf16 copies that are wanted and not there yet, and brings all of them up to date, in the current stream. With
    /// nothing to do it costs the host a look at each parameter; so do it at the start of every pass that uses them.
    ///
    /// # Errors
    /// As [`Weight::bf16`].
    pub fn refresh_bf16_copies(&self) -> Result<()> {
        self.list.iter().try_for_each(|param| param.weight.refresh_bf16_copy())
    }

    /// Forgets all gradients, see [`Weight::clear_grad`].
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch refuses.
    pub fn zero_grad(&self) -> Result<()> {
        self.list.iter().try_for_each(|param| param.weight.clear_grad())
    }
}

impl<'a> IntoIterator for &'a Params {
    type Item = &'a Param;
    type IntoIter = std::slice::Iter<'a, Param>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A position in the tree of names.
pub struct Path<'a> {
    params: &'a mut Params,
    prefix: String,
}

impl fmt::Debug for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Path({})", self.prefix)
    }
}

impl Path<'_> {
    /// The child called `name`.
    pub fn push(&mut self, name: impl Display) -> Path<'_> {
        let prefix = self.join(name);
        Path { params: self.params, prefix }
    }

    /// Registers a parameter under this path.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is taken or the initial values do not fit the shape.
    pub fn weight(&mut self, name: impl Display, shape: &[i64], init: Init, decay: Decay) -> Result<Weight> {
        let name = self.join(name);
        if self.params.get(&name).is_some() {
            return Err(Error::invalid("params", format!("two parameters are called `{name}`")));
        }
        let values = init.values(shape, &stream(self.params.seed, &name))?;
        let tensor = cpu::from_slice(shape, &values)?.f_to_device(self.params.device)?.f_set_requires_grad(true)?;
        let weight = Weight::new(tensor);
        self.params.list.push(Param { name, weight: weight.clone(), decay });
        Ok(weight)
    }

    /// The random stream that the parameter `name` would draw from, for values that [`Init`] has no variant for.
    pub fn rng(&self, name: impl Display) -> ChaCha8Rng {
        stream(self.params.seed, &self.join(name))
    }

    /// Where the parameters will live.
    pub fn device(&self) -> Device {
        self.params.device
    }

    fn join(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_nest_and_must_be_unique() {
        let mut params = Params::new(Device::Cpu, 0);
        let mut root = params.root();
        let mut layer = root.push("layers").push(3).push("norm").weight("weight", &[4], Init::Ones, Decay::No);
        assert!(layer.is_ok());
        layer = root.push("layers").push(3).push("norm").weight("weight", &[4], Init::Ones, Decay::No);
        assert!(layer.unwrap_err().to_string().contains("layers.3.norm.weight"));
        assert_eq!(params.n_elements(), 4);
    }

    #[test]
    fn handles_share_storage() {
        let mut params = Params::new(Device::Cpu, 0);
        let weight = params.root().weight("w", &[2], Init::Zeros, Decay::Yes).unwrap();
        params.assign("w", &Tensor::from_slice(&[1f64, 2.])).unwrap();
        assert_eq!(Vec::<f32>::try_from(weight.master().detach()).unwrap(), [1., 2.]);
        assert!(params.assign("w", &Tensor::zeros([3], (Kind::Float, Device::Cpu))).is_err());
        assert!(params.assign("v", &Tensor::zeros([2], (Kind::Float, Device::Cpu))).is_err());
    }

    #[test]
    fn other_parameters_leave_a_parameter_as_it_was() {
        let draw = |with_other: bool| {
            let mut params = Params::new(Device::Cpu, 7);
            let mut root = params.root();
            if with_other {
                root.weight("other", &[5], Init::Normal { std: 1. }, Decay::Yes).unwrap();
            }
            let weight = root.weight("w", &[5], Init::Normal { std: 1. }, Decay::Yes).unwrap();
            Vec::<f32>::try_from(weight.master().detach()).unwrap()
        };
        assert_eq!(draw(false), draw(true));
    }
}
