//! What turns the two branches' outputs into one: the table of fusion modules.
//!
//! | kind | tokens shared out | every token to both | starts as |
//! |---|---|---|---|
//! | `none` | merge | `a + s` | the identity |
//! | `mean` | merge | `(a + s) / 2` | itself |
//! | `proj` | `W merge(a, s)`, `W: [d, d]` | `W [s, a]`, `W: [d, 2d]` | the identity: `I`, `[I I]` |
//! | `gated` | `merge(g_a(a) a, g_s(s) s)` | `g_a(a) a + g_s(s) s` | the identity |
//! | `branch_proj` | as `proj` | as `proj` | a normal draw |
//!
//! `branch_proj` is the released FlowHN block's, where features are concatenated with the SSM's first. `gated` is a gate per
//! feature that each branch computes from its own output, `g(x) = 2 sigmoid(W x + b)` with `W` and `b` zero at first, so that
//! both gates start at 1 and lie between 0 and 2.
//!
//! Where only one branch exists, merging is the identity and the module holds that branch's parameters alone.

// b batch, l seq_len, n and m tokens of one branch, d d_model

use tch::Tensor;

use flowhn_nn::{Activations, Bias, Init, Linear, Path, Residual, RmsNorm};
use flowhn_torch::{Error, Result, check};

use crate::merge::{concat_sums, merge_sums_for};
use crate::{Route, merge, merge_residual, merge_residual_norm};

/// A way to fuse the branches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FusionKind {
    /// Nothing learned.
    None,
    /// Nothing learned: the mean where both branches read a token.
    Mean,
    /// A linear map that starts as the identity.
    Proj,
    /// A gate on each branch that starts open.
    Gated,
    /// A linear map that starts as independent normal values of this standard deviation.
    BranchProj {
        /// Standard deviation of the initial weights.
        std: f64,
    },
}

/// One entry of [`FUSIONS`].
#[derive(Clone, Copy, Debug)]
pub struct FusionSpec {
    /// The name that configurations use.
    pub name: &'static str,
    /// One sentence for people who choose.
    pub summary: &'static str,
    /// The kind; where it has an initial standard deviation, that of the released block.
    pub kind: FusionKind,
}

/// All fusion modules.
pub const FUSIONS: &[FusionSpec] = &[
    FusionSpec {
        name: "none",
        summary: "Puts the branches' tokens back in order (or adds the branches where both read every token).",
        kind: FusionKind::None,
    },
    FusionSpec {
        name: "mean",
        summary: "Puts the branches' tokens back in order, or takes the mean where both read every token.",
        kind: FusionKind::Mean,
    },
    FusionSpec {
        name: "proj",
        summary: "A linear map of the merged tokens that starts as the identity.",
        kind: FusionKind::Proj,
    },
    FusionSpec {
        name: "gated",
        summary: "A gate per branch and feature, computed from the branch's own output, that starts open.",
        kind: FusionKind::Gated,
    },
    FusionSpec {
        name: "branch_proj",
        summary: "The released block's linear map of the merged tokens, initialised at random.",
        kind: FusionKind::BranchProj { std: 0.02 },
    },
];

impl FusionSpec {
    /// The entry of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        FUSIONS.iter().find(|spec| spec.name == name)
    }
}

/// Which branches a block has and what they read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// Each token goes to one of two branches.
    Split,
    /// Every token goes to both branches.
    Both,
    /// There is only an attention branch.
    AttnOnly,
    /// There is only an SSM branch.
    SsmOnly,
}

/// The shape that a fusion module is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FuseShape {
    /// Features of a token.
    pub d_model: i64,
    /// Which branches there are.
    pub topology: Topology,
}

/// A fusion module with its parameters.
#[derive(Debug)]
pub struct Fusion {
    shape: FuseShape,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Plain,
    Mean,
    Proj(Linear),
    Gated { attn: Option<Linear>, ssm: Option<Linear> },
}

impl Fusion {
    /// Registers the parameters of a module: `branch_proj.weight`, or `attn_gate` and `ssm_gate` with `weight` and `bias`.
    ///
    /// # Errors
    /// Those of registering, as when a name is taken.
    pub fn new(path: &mut Path, kind: FusionKind, shape: FuseShape) -> Result<Self> {
        let d = shape.d_model;
        let d_in = if shape.topology == Topology::Both { 2 * d } else { d };
        let mut proj = |init| Linear::new(path, "branch_proj", d_in, d, init, Bias::None).map(Form::Proj);
        let form = match kind {
            FusionKind::None => Form::Plain,
            FusionKind::Mean => Form::Mean,
            FusionKind::Proj => proj(Init::Eye)?,
            FusionKind::BranchProj { std } => proj(Init::Normal { std })?,
            FusionKind::Gated => {
                let mut gate = |name: &str, absent: Topology| match shape.topology == absent {
                    true => Ok(None),
                    false => Linear::new(path, name, d, d, Init::Zeros, Bias::Init(Init::Zeros)).map(Some),
                };
                Form::Gated { attn: gate("attn_gate", Topology::SsmOnly)?, ssm: gate("ssm_gate", Topology::AttnOnly)? }
            }
        };
        Ok(Self { shape, form })
    }

    /// The fused tokens, in the order of the sequence.
    ///
    /// A branch's output may be absent where it has no token: where the block lacks the branch, or where its route is empty.
    ///
    /// # Shapes
    /// - `a_bnd`: `[batch, attn.len(), d_model]`, `s_bmd`: `[batch, ssm.len(), d_model]`, of one dtype
    /// - returns `[batch, seq_len, d_model]`
    ///
    /// ```
    /// use flowhn_fuse::{FuseShape, Fusion, FusionKind, Route, Topology};
    /// use flowhn_nn::Params;
    /// use tch::{Device, Kind, Tensor};
    /// let mut params = Params::new(Device::Cpu, 0);
    /// let shape = FuseShape { d_model: 2, topology: Topology::Split };
    /// let fusion = Fusion::new(&mut params.root(), FusionKind::Proj, shape)?;
    /// let (attn, ssm) = (Route::new(3, &[2..3], Device::Cpu)?, Route::new(3, &[0..2], Device::Cpu)?);
    /// let a = Tensor::ones([1, 1, 2], (Kind::Float, Device::Cpu));
    /// let s = Tensor::zeros([1, 2, 2], (Kind::Float, Device::Cpu));
    /// let y = fusion.forward(Some(&a), Some(&s), &attn, &ssm)?;
    /// assert_eq!(Vec::<f32>::try_from(y.view(-1)).unwrap(), [0., 0., 0., 0., 1., 1.]);
    /// # Ok::<(), flowhn_fuse::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if the routes are not of the module's topology or an output with tokens is missing; those of
    /// [`merge`].
    pub fn forward(&self, a: Option<&Tensor>, s: Option<&Tensor>, attn: &Route, ssm: &Route) -> Result<Tensor> {
        let (a_bnd, s_bmd) = self.outputs("fusion", a, s, attn, ssm)?;
        self.fuse(&a_bnd, &s_bmd, attn, ssm)
    }

    /// `x_bld + forward(a, s)`, in one pass where merging is the last step of the module.
    ///
    /// # Shapes
    /// As [`Fusion::forward`]; `x_bld`: `[batch, seq_len, d_model]`.
    ///
    /// # Errors
    /// As [`Fusion::forward`], also for `x_bld`.
    pub fn forward_residual(
        &self,
        x_bld: &Tensor,
        a: Option<&Tensor>,
        s: Option<&Tensor>,
        attn: &Route,
        ssm: &Route,
    ) -> Result<Tensor> {
        let (a_bnd, s_bmd) = self.outputs("fusion", a, s, attn, ssm)?;
        match (&self.form, self.shape.topology) {
            (Form::Proj(_), _) | (_, Topology::Both) => Ok(x_bld.f_add(&self.fuse(&a_bnd, &s_bmd, attn, ssm)?)?),
            (Form::Plain | Form::Mean | Form::Gated { .. }, _) => {
                let (a_bnd, s_bmd) = self.gated(a_bnd, s_bmd)?;
                merge_residual(x_bld, &a_bnd, &s_bmd, attn, ssm)
            }
        }
    }

    /// [`Fusion::forward_residual`] and the norm of its result, in one pass where no product stands between. What the branches' last
    /// sublayers add is added on the way. `reader` is the projection that alone reads the norm, if it is one: what that multiplies in fp8
    /// may be rounded here.
    ///
    /// # Shapes
    /// As [`Fusion::forward_residual`]; the norm is over `d_model`.
    ///
    /// # Errors
    /// As [`Fusion::forward_residual`], and those of the norm.
    pub fn forward_residual_norm(
        &self,
        x_bld: &Tensor,
        a: Option<&Residual>,
        s: Option<&Residual>,
        attn: &Route,
        ssm: &Route,
        (norm, reader): (&RmsNorm, Option<&Linear>),
    ) -> Result<(Tensor, Activations)> {
        const OP: &str = "fusion";
        let normed = |x: &Tensor, delta: Option<&Tensor>| match reader {
            Some(reader) => norm.forward_residual_for(reader, x, delta),
            None => norm.forward_residual(x, delta).map(|(sum, normed)| (sum, normed.into())),
        };
        let topology = self.shape.topology;
        if let (Form::Proj(proj), Topology::Split | Topology::Both, Some(a), Some(s)) = (&self.form, topology, a, s) {
            let _checked = self.outputs(OP, Some(&a.x), Some(&s.x), attn, ssm)?;
            let joined = match topology {
                Topology::Both => concat_sums(s, a)?.into(),
                _ => merge_sums_for(proj, a, s, attn, ssm)?,
            };
            return normed(x_bld, Some(&proj.forward(joined)?));
        }
        let [a, s] = [a, s].map(|x| x.map(Residual::sum).transpose());
        let (a_bnd, s_bmd) = self.outputs(OP, a?.as_ref(), s?.as_ref(), attn, ssm)?;
        match (&self.form, self.shape.topology) {
            (Form::Proj(_), _) | (_, Topology::Both) => normed(x_bld, Some(&self.fuse(&a_bnd, &s_bmd, attn, ssm)?)),
            (Form::Plain | Form::Mean | Form::Gated { .. }, _) => {
                let (a_bnd, s_bmd) = self.gated(a_bnd, s_bmd)?;
                let (sum_bld, normed_bld) = merge_residual_norm(x_bld, &a_bnd, &s_bmd, attn, ssm, norm)?;
                Ok((sum_bld, normed_bld.into()))
            }
        }
    }

    fn fuse(&self, a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Result<Tensor> {
        let both = self.shape.topology == Topology::Both;
        match &self.form {
            Form::Proj(proj) if both => proj.forward(&Tensor::f_cat(&[s_bmd, a_bnd], -1)?),
            Form::Proj(proj) => proj.forward(&merge(a_bnd, s_bmd, attn, ssm)?),
            Form::Mean if both => Ok(a_bnd.f_add(s_bmd)?.f_mul_scalar(0.5)?),
            Form::Plain | Form::Mean | Form::Gated { .. } => {
                let (a_bnd, s_bmd) = self.gated(a_bnd.shallow_clone(), s_bmd.shallow_clone())?;
                if both { Ok(a_bnd.f_add(&s_bmd)?) } else { merge(&a_bnd, &s_bmd, attn, ssm) }
            }
        }
    }

    /// The branches' outputs through their gates, if there are any.
    fn gated(&self, a_bnd: Tensor, s_bmd: Tensor) -> Result<(Tensor, Tensor)> {
        let through = |gate: Option<&Linear>, x: Tensor| match gate {
            Some(gate) if x.numel() > 0 => Ok::<_, Error>(x.f_mul(&gate.forward(&x)?.f_sigmoid()?.f_mul_scalar(2.)?)?),
            _ => Ok(x),
        };
        match &self.form {
            Form::Gated { attn, ssm } => Ok((through(attn.as_ref(), a_bnd)?, through(ssm.as_ref(), s_bmd)?)),
            _ => Ok((a_bnd, s_bmd)),
        }
    }

    /// Checks the routes against the topology and the outputs against the routes; an absent output becomes one without tokens.
    fn outputs(
        &self,
        op: &'static str,
        a: Option<&Tensor>,
        s: Option<&Tensor>,
        attn: &Route,
        ssm: &Route,
    ) -> Result<(Tensor, Tensor)> {
        let fits = match self.shape.topology {
            Topology::Split => attn.partitions_with(ssm),
            Topology::Both => attn.is_all() && ssm.is_all() && attn.seq_len() == ssm.seq_len(),
            Topology::AttnOnly => attn.is_all() && ssm.is_empty() && attn.seq_len() == ssm.seq_len(),
            Topology::SsmOnly => attn.is_empty() && ssm.is_all() && attn.seq_len() == ssm.seq_len(),
        };
        if !fits {
            let message = format!(
                "the module is made for topology {:?}, but attn reads {:?} and ssm reads {:?} of {} tokens",
                self.shape.topology,
                attn.spans(),
                ssm.spans(),
                attn.seq_len()
            );
            return Err(Error::invalid(op, message));
        }
        let present = a.or(s).ok_or_else(|| Error::invalid(op, "there is no branch output to fuse"))?;
        let batch = check::dims::<3>(op, "branch output", present, "[batch, tokens, d_model]")?[0];
        let output = |arg: &'static str, x: Option<&Tensor>, route: &Route| match x {
            Some(x) => {
                check::shape(op, arg, x, &[batch, route.len() as i64, self.shape.d_model])?;
                check::kind(op, arg, x, &[present.kind()])?;
                Ok(x.shallow_clone())
            }
            None if route.is_empty() => {
                Ok(Tensor::f_zeros([batch, 0, self.shape.d_model], (present.kind(), present.device()))?)
            }
            None => Err(Error::invalid(op, format!("{arg} is missing, but its route has {} tokens", route.len()))),
        };
        Ok((output("a_bnd", a, attn)?, output("s_bmd", s, ssm)?))
    }
}
