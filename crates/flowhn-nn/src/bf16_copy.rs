//! bf16 copies of weights that live as long as the weights: a forward pass then need not round every weight anew.

use std::cell::{Cell, OnceCell, RefCell};

use tch::{Kind, Tensor};

use flowhn_torch::op::{Arg, call};
use flowhn_torch::{Error, Graph, Result};

use crate::Weight;

/// A place for the copy of one weight.
///
/// libtorch counts how often a tensor was written in place, through whatever view. A copy remembers the count of the master that it
/// was made from, so it is up to date exactly if the two counts agree; that is looked at whenever the copy is asked for.
#[derive(Debug, Default)]
pub(crate) struct Bf16Copy {
    is_wanted: Cell<bool>,
    made: RefCell<Option<Made>>,
    /// A view of none of the master's elements: writing to it moves no byte and counts as a write to the master.
    no_elements: OnceCell<Tensor>,
}

#[derive(Debug)]
struct Made {
    values: Tensor,
    /// The master's count when the values were made.
    version: i64,
    /// As that of the master.
    no_elements: Tensor,
}

impl Weight {
    /// Wants a bf16 copy from the next [`Params::refresh_bf16_copies`](crate::Params::refresh_bf16_copies) on.
    pub fn want_bf16_copy(&self) {
        self.beside.copy.is_wanted.set(true);
    }

    /// The weight rounded to bf16, without autograd: the copy, brought up to date if the master was written since, or, where
    /// none is kept, a tensor made for the call. A copy is written when the master is next updated; it is saved for a backward
    /// pass like any tensor, and libtorch refuses that pass where the values have changed.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the copy is out of date while a CUDA graph is captured; [`Error::Torch`] if libtorch refuses.
    pub fn bf16(&self) -> Result<Tensor> {
        match self.bf16_copy()? {
            Some(copy) => Ok(copy),
            None => Ok(tch::no_grad(|| self.master().f_to_kind(Kind::BFloat16))?.f_detach()?),
        }
    }

    /// The copy, brought up to date, if there is one.
    ///
    /// # Errors
    /// As [`Weight::bf16`].
    pub fn bf16_copy(&self) -> Result<Option<Tensor>> {
        let mut made = self.beside.copy.made.borrow_mut();
        let Some(made) = made.as_mut() else { return Ok(None) };
        let version = self.master().f_internal_version()?;
        if made.version != version {
            refuse_in_capture("is out of date")?;
            tch::no_grad(|| made.values.f_copy_(self.master()))?;
            made.version = version;
        }
        Ok(Some(made.values.shallow_clone()))
    }

    /// Makes the copy if one is wanted and there is none, and brings it up to date.
    pub(crate) fn refresh_bf16_copy(&self) -> Result<()> {
        if self.beside.copy.is_wanted.get() && self.beside.copy.made.borrow().is_none() {
            refuse_in_capture("has not been made")?;
            let version = self.master().f_internal_version()?;
            let values = tch::no_grad(|| self.master().f_to_kind(Kind::BFloat16))?;
            let no_elements = no_elements(&values)?;
            *self.beside.copy.made.borrow_mut() = Some(Made { values, version, no_elements });
        }
        self.bf16_copy().map(drop)
    }
}

/// What a kernel of our own has written of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The master alone.
    Master,
    /// The master and, in the same pass, its bf16 copy.
    MasterAndCopy,
}

/// Tells that kernels of our own have written these weights.
///
/// libtorch does not see such writes. Here they are counted as its own are, so that a backward pass through values from before is
/// refused, and copies count as up to date or not. In the capture of a CUDA graph nothing is written yet, and what is said here
/// changes nothing as long as the copies are up to date; it is to be said after each replay.
///
/// # Errors
/// [`Error::Invalid`] for a copy that there is none of; [`Error::Torch`] if libtorch refuses.
pub fn mark_written<'a>(weights: impl IntoIterator<Item = (&'a Weight, Written)>) -> Result<()> {
    let weights: Vec<(&Weight, Written)> = weights.into_iter().collect();
    let (mut masters, mut copies) = (Vec::with_capacity(weights.len()), Vec::with_capacity(weights.len()));
    for (weight, written) in &weights {
        let view = match weight.beside.copy.no_elements.get() {
            Some(view) => view.shallow_clone(),
            None => {
                let view = no_elements(weight.master())?;
                weight.beside.copy.no_elements.get_or_init(|| view).shallow_clone()
            }
        };
        masters.push(view);
        match (weight.beside.copy.made.borrow().as_ref(), written) {
            (Some(made), Written::MasterAndCopy) => copies.push(made.no_elements.shallow_clone()),
            (None, Written::MasterAndCopy) => return Err(Error::invalid("mark_written", "a weight has no bf16 copy")),
            (_, Written::Master) => {}
        }
    }
    // One type a call: libtorch then looks at the whole list at once.
    for views in [masters, copies].iter().filter(|views| !views.is_empty()) {
        let views: Vec<&Tensor> = views.iter().collect();
        tch::no_grad(|| call("aten::_foreach_zero_", "", &[Arg::Tensors(&views)]))?;
    }
    for (weight, written) in weights {
        if let (Some(made), Written::MasterAndCopy) = (weight.beside.copy.made.borrow_mut().as_mut(), written) {
            made.version = weight.master().f_internal_version()?;
        }
    }
    Ok(())
}

/// A view of none of the elements, which shares the count of writes.
pub(crate) fn no_elements(tensor: &Tensor) -> Result<Tensor> {
    Ok(tch::no_grad(|| tensor.f_view(-1)?.f_narrow(0, 0, 0))?)
}

/// A copy made while a graph is captured would be made by its replays alone.
fn refuse_in_capture(what: &str) -> Result<()> {
    if !Graph::is_capturing() {
        return Ok(());
    }
    let message = format!("a copy {what} while a CUDA graph is captured: refresh the copies before the capture");
    Err(Error::invalid("bf16 copy of a weight", message))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{Decay, Init, Params};

    fn weight() -> (Params, Weight) {
        let mut params = Params::new(Device::Cpu, 0);
        let weight = params.root().weight("w", &[3, 2], Init::Normal { std: 1. }, Decay::Yes).unwrap();
        weight.want_bf16_copy();
        (params, weight)
    }

    fn is_fresh(weight: &Weight) -> bool {
        let want = weight.master().detach().to_kind(Kind::BFloat16);
        weight.bf16().unwrap().equal(&want)
    }

    #[test]
    fn there_is_one_copy_once_it_is_made() {
        let (params, weight) = weight();
        assert!(weight.bf16_copy().unwrap().is_none());
        let [a, b] = [(); 2].map(|()| weight.bf16().unwrap());
        assert_ne!(a.data_ptr(), b.data_ptr());
        params.refresh_bf16_copies().unwrap();
        let [a, b] = [(); 2].map(|()| weight.clone().bf16().unwrap());
        assert_eq!(a.data_ptr(), b.data_ptr());
        assert!(is_fresh(&weight) && !a.requires_grad());
    }

    #[test]
    fn every_write_to_the_master_reaches_the_copy() {
        let (params, weight) = weight();
        params.refresh_bf16_copies().unwrap();
        let address = weight.bf16().unwrap().data_ptr();
        let master = || weight.master().shallow_clone();
        let writes: [&dyn Fn(); 5] = [
            &|| params.assign("w", &Tensor::full([3, 2], 2.5, (Kind::Double, Device::Cpu))).unwrap(),
            &|| drop(master().fill_(3.)),
            &|| drop(master().detach().fill_(4.)),
            &|| drop(master().narrow(0, 1, 1).fill_(5.)),
            &|| drop(call("aten::_foreach_mul_", "Scalar", &[Arg::Tensors(&[&master()]), Arg::Double(2.)]).unwrap()),
        ];
        for (idx, write) in writes.into_iter().enumerate() {
            tch::no_grad(write);
            assert!(is_fresh(&weight), "write {idx}");
            assert_eq!(weight.bf16().unwrap().data_ptr(), address);
        }
    }

    #[test]
    fn writes_that_libtorch_does_not_see_are_counted_once_told() {
        let (params, weight) = weight();
        params.refresh_bf16_copies().unwrap();
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let y = (&x * weight.master() * weight.bf16().unwrap()).sum(None);
        let before = weight.master().internal_version();
        mark_written([(&weight, Written::MasterAndCopy)]).unwrap();
        assert!(weight.master().internal_version() > before);
        // The copy was written with it: nothing is rounded anew, also where that would be wrong, as here after a false report.
        let _ = tch::no_grad(|| weight.bf16().unwrap().fill_(7.));
        assert_eq!(weight.bf16().unwrap().double_value(&[0, 0]), 7.);
        assert!(y.f_backward().is_err(), "the backward pass would have used other values than the forward");
        mark_written([(&weight, Written::Master)]).unwrap();
        assert!(is_fresh(&weight));
    }
}
