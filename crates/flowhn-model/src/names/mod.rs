//! The names that other implementations give to weights, and how their matrices lie in ours.
//!
//! We merge what reads the same input into one matrix (q, k, v; gate, up), so several of their tensors may be rows of one of ours.
//! Each family of models is one table in [`tables`]; golden files, import and export all read it.

mod fold;
mod tables;

use std::collections::{HashMap, HashSet};

use tch::Tensor;

pub use fold::Fold;

use crate::{Error, Model, Result};

/// A family of models with names of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// The script that the authors of arXiv 2505.19472 released.
    Released,
    /// `LlamaForCausalLM` of `transformers`.
    Llama,
    /// `MambaForCausalLM` of `transformers`.
    Mamba,
    /// `Mamba2ForCausalLM` of `transformers`.
    Mamba2,
    /// `JambaForCausalLM` of `transformers`, without experts.
    Jamba,
    /// `FalconH1ForCausalLM` of `transformers`.
    FalconH1,
}

/// One tensor of another implementation and the rows of our parameter that it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ForeignName {
    /// The name there.
    pub theirs: String,
    /// Name of our parameter.
    pub ours: String,
    /// First row and number of rows; `None` for the whole parameter.
    pub rows: Option<(i64, i64)>,
}

/// The names of one family.
struct NameTable {
    /// What is theirs, for errors.
    title: &'static str,
    /// Pairs of ours and theirs outside the blocks.
    outer: &'static [(&'static str, &'static str)],
    /// What stands before the index of a block.
    layers: &'static str,
    /// Inside a block, our prefix and theirs; the first that fits counts. Where there are several, each is some rows of ours.
    parts: &'static [(&'static str, &'static [&'static str])],
}

impl Family {
    /// The names of a model's parameters in this family, one or more for each.
    ///
    /// # Errors
    /// [`Error::Input`] for a parameter that the family does not have.
    pub fn names(self, model: &Model) -> Result<Vec<ForeignName>> {
        let table = tables::of(self);
        let mut names = Vec::new();
        for param in model.params() {
            let ours = param.name.as_str();
            let theirs = match ours.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
                None => {
                    table.outer.iter().find(|(name, _)| *name == ours).map(|(_, theirs)| vec![(*theirs).to_owned()])
                }
                Some((idx, part)) => table
                    .in_block(part)
                    .map(|parts| parts.into_iter().map(|name| format!("{}{idx}.{name}", table.layers)).collect()),
            };
            let theirs =
                theirs.ok_or_else(|| Error::Input(format!("{} have no counterpart of `{ours}`", table.title)))?;
            match row_counts(model, ours).filter(|_| theirs.len() > 1) {
                None => names.extend(theirs.into_iter().map(|name| ForeignName::whole(name, ours))),
                Some(counts) => {
                    let mut start = 0;
                    for (theirs, len) in theirs.into_iter().zip(counts) {
                        names.push(ForeignName { theirs, ours: ours.to_owned(), rows: Some((start, len)) });
                        start += len;
                    }
                }
            }
        }
        Ok(names)
    }

    /// Overwrites a model's parameters with tensors under this family's names, of any float type, times the factors of `fold`.
    ///
    /// The matrix of a tied head may be among them if it equals the embedding's.
    ///
    /// # Errors
    /// [`Error::Input`] that lists all names that are missing, left over or of a wrong shape. The model is then as it was.
    pub fn load(self, model: &Model, tensors: &HashMap<String, Tensor>, fold: &Fold) -> Result<()> {
        let names = self.names(model)?;
        let known: HashSet<&str> = names.iter().map(|name| name.theirs.as_str()).collect();
        let missing: Vec<&str> = known_in_order(&names).filter(|name| !tensors.contains_key(*name)).collect();
        let mut left_over: Vec<&str> = tensors.keys().map(String::as_str).filter(|key| !known.contains(key)).collect();
        left_over.retain(|key| !self.repeats_embedding(model, &names, tensors, key));
        left_over.sort_unstable();
        let mut misshapen = Vec::new();
        for name in &names {
            let (Some(tensor), Some(want)) = (tensors.get(&name.theirs), name.shape(model)) else { continue };
            if tensor.size() != want {
                misshapen.push(format!("{} is {:?}, expected {want:?}", name.theirs, tensor.size()));
            }
        }
        if !(missing.is_empty() && left_over.is_empty() && misshapen.is_empty()) {
            let shapes = if misshapen.is_empty() { String::new() } else { format!(", of a wrong shape {misshapen:?}") };
            return Err(Error::Input(format!(
                "the weights do not fit the model: missing {missing:?}, left over {left_over:?}{shapes}"
            )));
        }
        for param in model.params() {
            let pieces = names.iter().filter(|name| name.ours == param.name);
            let pieces: Vec<Tensor> =
                pieces.map(|name| fold.apply(&name.theirs, &tensors[&name.theirs])).collect::<Result<_>>()?;
            let whole = if let [one] = pieces.as_slice() { one.shallow_clone() } else { Tensor::f_cat(&pieces, 0)? };
            model.params().assign(&param.name, &whole.f_reshape(param.weight.size())?)?;
        }
        Ok(())
    }

    /// The model's parameters under this family's names, f32 copies on the CPU.
    ///
    /// # Errors
    /// As [`Family::names`].
    pub fn export(self, model: &Model) -> Result<Vec<(String, Tensor)>> {
        self.names(model)?
            .into_iter()
            .map(|name| {
                let piece = name.piece_of(model, |weight| Ok(weight.detach()))?;
                let copy = piece.f_to_device(tch::Device::Cpu)?.f_contiguous()?.copy();
                Ok((name.theirs, copy))
            })
            .collect()
    }

    /// Whether `key` is the matrix of a tied head, equal to the embedding's.
    fn repeats_embedding(
        self,
        model: &Model,
        names: &[ForeignName],
        tensors: &HashMap<String, Tensor>,
        key: &str,
    ) -> bool {
        let head = tables::of(self).outer.iter().find(|(ours, _)| *ours == "lm_head.weight").map(|(_, theirs)| *theirs);
        let embed = names.iter().find(|name| name.ours == "embed.weight").and_then(|name| tensors.get(&name.theirs));
        model.config().tie_embeddings && head == Some(key) && embed.is_some_and(|embed| *embed == tensors[key])
    }
}

impl ForeignName {
    fn whole(theirs: String, ours: &str) -> Self {
        Self { theirs, ours: ours.to_owned(), rows: None }
    }

    /// What this name means of a tensor made from our parameter, such as its values or its gradient, in their shape.
    ///
    /// # Errors
    /// [`Error::Input`] if the model has no such parameter; [`Error::Tensor`] if libtorch refuses.
    pub fn piece_of(&self, model: &Model, of: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let param =
            model.params().get(&self.ours).ok_or_else(|| Error::Input(format!("no parameter `{}`", self.ours)))?;
        let whole = of(param.weight.master())?;
        let piece = match self.rows {
            Some((start, len)) => whole.f_narrow(0, start, len)?,
            None => whole,
        };
        let shape = self.shape(model).unwrap_or_else(|| piece.size());
        Ok(piece.f_reshape(shape)?)
    }

    /// The shape of their tensor. A depthwise convolution has an axis of size 1 there that ours does not.
    fn shape(&self, model: &Model) -> Option<Vec<i64>> {
        let mut shape = model.params().get(&self.ours)?.weight.size();
        if let Some((_, len)) = self.rows {
            shape[0] = len;
        }
        if self.ours.ends_with("conv1d.weight") {
            shape.insert(1, 1);
        }
        Some(shape)
    }
}

impl NameTable {
    /// Their names of a block's parameter: the prefix replaced, the rest kept.
    fn in_block(&self, part: &str) -> Option<Vec<String>> {
        self.parts.iter().find_map(|(ours, theirs)| {
            let rest = part.strip_prefix(ours)?;
            Some(theirs.iter().map(|theirs| format!("{theirs}{rest}")).collect())
        })
    }
}

/// The rows of the tensors that are one of our merged projections.
fn row_counts(model: &Model, ours: &str) -> Option<Vec<i64>> {
    let (attn, d_ff) = (model.config().attn, model.config().d_ff as i64);
    let projection = ours.rsplit('.').nth(1)?;
    match projection {
        "qkv_proj" => Some([attn.d_q(), attn.d_kv(), attn.d_kv()].map(|rows| rows as i64).to_vec()),
        "gate_up_proj" => Some(vec![d_ff, d_ff]),
        _ => None,
    }
}

fn known_in_order(names: &[ForeignName]) -> impl Iterator<Item = &str> {
    names.iter().map(|name| name.theirs.as_str())
}
