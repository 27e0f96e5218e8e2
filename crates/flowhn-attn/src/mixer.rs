//! The attention mixer: projections, rotary embedding, attention, with or without a cache.

// b batch, n tokens of the window (those that attention reads), m tokens of the source, d d_model, h n_heads, k n_kv_heads,
// p d_head

use tch::{Device, Kind, Tensor};

use flowhn_nn::{Activations, Bias, Init, Linear, Path, RmsNorm};
use flowhn_torch::{Error, Result, check, split_features};

use crate::{Clock, KvCache, Mask, Positions, Rope, attention, decode, rotary};

/// Whether queries see beyond the tokens routed to attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bridge {
    /// Keys and values come from the window alone.
    None,
    /// Keys and values come from every position of the block's input.
    Kv,
}

/// The shape of an attention mixer. `n_heads * d_head` need not be `d_model`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnConfig {
    /// Features of a token.
    pub d_model: i64,
    /// Query heads.
    pub n_heads: i64,
    /// Key and value heads; a divisor of `n_heads`.
    pub n_kv_heads: i64,
    /// Features of a head; even where there is rotary embedding.
    pub d_head: i64,
    /// Rotary embedding, if any.
    pub rope: Option<Rope>,
    /// What queries see.
    pub bridge: Bridge,
    /// Positions that a query sees, its own included; `None` for all before it.
    pub window: Option<usize>,
    /// Positions at the start of the sequence that every later query sees, whatever its window.
    pub n_sinks: usize,
    /// Whether the projections have biases, zero at first.
    pub bias: bool,
    /// With a value, an RMSNorm with this epsilon before the output projection, as in Hymba.
    pub out_norm_eps: Option<f64>,
}

impl AttnConfig {
    /// Plain attention of these sizes: no positions, no bridge, no window, no biases.
    pub const fn new(d_model: i64, n_heads: i64, n_kv_heads: i64, d_head: i64) -> Self {
        Self {
            d_model,
            n_heads,
            n_kv_heads,
            d_head,
            rope: None,
            bridge: Bridge::None,
            window: None,
            n_sinks: 0,
            bias: false,
            out_norm_eps: None,
        }
    }
}

/// How the projections start.
#[derive(Clone, Debug, PartialEq)]
pub struct AttnInit {
    /// Queries, keys and values.
    pub qkv: Init,
    /// The output projection.
    pub out: Init,
}

impl AttnInit {
    /// Normal values of one standard deviation everywhere.
    pub fn normal(std: f64) -> Self {
        Self { qkv: Init::Normal { std }, out: Init::Normal { std } }
    }
}

/// Where the tokens of a call stand.
#[derive(Clone, Copy, Debug)]
pub struct AttnContext<'a> {
    /// Positions of the window's tokens: `n`.
    pub positions: &'a Positions,
    /// Documents of the window's tokens: `[batch, n]`, i64, never decreasing along a sequence.
    pub segments_bn: Option<&'a Tensor>,
    /// Positions of the source's tokens, `m`; with a bridge only.
    pub source_positions: Option<&'a Positions>,
    /// Documents of the source's tokens: `[batch, m]`, i64, never decreasing along a sequence; with a bridge only.
    pub source_segments_bm: Option<&'a Tensor>,
}

impl<'a> AttnContext<'a> {
    /// A window without source and documents.
    pub fn new(positions: &'a Positions) -> Self {
        Self { positions, segments_bn: None, source_positions: None, source_segments_bm: None }
    }

    /// Adds the positions of the source.
    #[must_use]
    pub fn with_source(self, positions: &'a Positions) -> Self {
        Self { source_positions: Some(positions), ..self }
    }

    /// Adds the documents of the window and, with a bridge, of the source.
    #[must_use]
    pub fn with_segments(self, segments_bn: &'a Tensor, source_segments_bm: Option<&'a Tensor>) -> Self {
        Self { segments_bn: Some(segments_bn), source_segments_bm, ..self }
    }
}

/// Grouped-query causal attention with its projections.
#[derive(Debug)]
pub struct AttnMixer {
    config: AttnConfig,
    input: Input,
    out_norm: Option<RmsNorm>,
    o_proj: Linear,
}

#[derive(Debug)]
enum Input {
    /// One matrix for queries, keys and values of the same tokens.
    Window { qkv_proj: Linear },
    /// Queries of the window, keys and values of the source.
    Bridge { q_proj: Linear, kv_proj: Linear },
}

/// Keys and values of some tokens.
struct Heads {
    k_bmkp: Tensor,
    v_bmkp: Tensor,
}

impl AttnMixer {
    /// Registers `qkv_proj.weight`, `[(n_heads + 2 n_kv_heads) d_head, d_model]` with rows in the order queries, keys, values,
    /// or with a bridge `q_proj.weight` and `kv_proj.weight`; and `o_proj.weight`, `[d_model, n_heads d_head]`. Where the
    /// configuration asks for them, each projection has a `bias` too, and `out_norm.weight` is `[n_heads d_head]`.
    ///
    /// ```
    /// use flowhn_attn::{AttnConfig, AttnContext, AttnInit, AttnMixer, Positions, Rope};
    /// use flowhn_nn::Params;
    /// use tch::{Device, Kind, Tensor};
    /// let config = AttnConfig { rope: Some(Rope::new(10000.)), ..AttnConfig::new(16, 4, 2, 8) };
    /// let mut params = Params::new(Device::Cpu, 0);
    /// let mixer = AttnMixer::new(&mut params.root().push("attn"), config, AttnInit::normal(0.02))?;
    /// // Attention reads three of a sequence's tokens.
    /// let positions = Positions::new(&[4, 5, 9], Device::Cpu)?;
    /// let x = Tensor::randn([2, 3, 16], (Kind::Float, Device::Cpu));
    /// let y = mixer.forward(&x, None, &AttnContext::new(&positions), None)?;
    /// assert_eq!(y.size(), [2, 3, 16]);
    /// # Ok::<(), flowhn_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] for a shape that cannot be, and those of registering.
    pub fn new(path: &mut Path, config: AttnConfig, init: AttnInit) -> Result<Self> {
        config.check()?;
        let AttnConfig { d_model, n_heads, n_kv_heads, d_head, .. } = config;
        let (q, kv) = (n_heads * d_head, 2 * n_kv_heads * d_head);
        let mut linear = |name: &str, d_in, d_out, init: &Init| {
            Linear::new(path, name, d_in, d_out, init.clone(), Bias::zeros_if(config.bias))
        };
        let input = match config.bridge {
            Bridge::None => Input::Window { qkv_proj: linear("qkv_proj", d_model, q + kv, &init.qkv)? },
            Bridge::Kv => Input::Bridge {
                q_proj: linear("q_proj", d_model, q, &init.qkv)?,
                kv_proj: linear("kv_proj", d_model, kv, &init.qkv)?,
            },
        };
        let o_proj = linear("o_proj", q, d_model, &init.out)?;
        let out_norm = config.out_norm_eps.map(|eps| RmsNorm::new(path, "out_norm", q, eps)).transpose()?;
        Ok(Self { config, input, out_norm, o_proj })
    }

    /// The projection that alone reads the window's tokens, if they have no other reader: with a bridge they do.
    pub fn in_proj(&self) -> Option<&Linear> {
        match &self.input {
            Input::Window { qkv_proj } => Some(qkv_proj),
            Input::Bridge { .. } => None,
        }
    }

    /// The shape of the mixer.
    pub fn config(&self) -> &AttnConfig {
        &self.config
    }

    /// Lets the tokens of the window attend, and returns the change that attention makes to them.
    ///
    /// With a cache, keys and values of this call are appended first, and queries see all that is cached: a sequence may
    /// come in pieces of any size, down to single tokens, and every piece gets what it would have got in the whole.
    /// A window may be empty; with a bridge and a cache its source is then cached all the same.
    ///
    /// # Shapes
    /// - `x_bnd`: `[batch, n, d_model]`, the window's tokens, normed
    /// - `source_bmd`: `[batch, m, d_model]`, all tokens of the block's input, normed; with a bridge only
    /// - returns `[batch, n, d_model]`
    ///
    /// # Errors
    /// [`Error::Shape`] and its kin for tensors, [`Error::Invalid`] for a source or positions that are missing or too many.
    pub fn forward(
        &self,
        x_bnd: impl Into<Activations>,
        source_bmd: Option<&Tensor>,
        ctx: &AttnContext,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let x_bnd = x_bnd.into();
        let x = x_bnd.tensor();
        let batch = check::dims::<3>(OP, "x_bnd", x, "[batch, n, d_model]")?[0];
        let n = ctx.positions.len() as i64;
        check::shape(OP, "x_bnd", x, &[batch, n, self.config.d_model])?;
        check::device(OP, "x_bnd", x, ctx.positions.device())?;
        let (q_bnhp, kv, kv_positions, kv_segments) = match &self.input {
            Input::Window { qkv_proj } => {
                if source_bmd.is_some() || ctx.source_positions.is_some() {
                    let message = "a source was given, but only a mixer with a kv bridge reads one";
                    return Err(Error::invalid(OP, message));
                }
                let (q, kv) = self.window_heads(qkv_proj, &x_bnd, ctx.positions)?;
                (q, kv, ctx.positions, ctx.segments_bn)
            }
            Input::Bridge { q_proj, kv_proj } => {
                let (source, positions) = self.source(source_bmd, ctx, batch)?;
                let q = self.turned(self.heads(&q_proj.forward(&x_bnd)?)?, ctx.positions)?;
                (q, self.source_heads(kv_proj, source, positions)?, positions, ctx.source_segments_bm)
            }
        };

        let o_bnhp = match cache {
            None => self.attend(&q_bnhp, &kv.k_bmkp, &kv.v_bmkp, ctx, kv_positions, kv_segments)?,
            Some(cache) => {
                cache.append(&kv.k_bmkp, &kv.v_bmkp, kv_positions.host(), kv_segments)?;
                match (cache.keys()?, cache.values()?, cache.positions()) {
                    (Some(k), Some(v), Some(positions)) => {
                        let segments = cache.segments()?;
                        self.attend(&q_bnhp, &k, &v, ctx, positions, segments.as_ref())?
                    }
                    // Nothing was cached before and this call has no tokens either.
                    _ => q_bnhp,
                }
            }
        };
        self.project(&o_bnhp)
    }

    /// The output projection of what the heads found.
    fn project(&self, o_bnhp: &Tensor) -> Result<Tensor> {
        let size = o_bnhp.size();
        let o_bne = o_bnhp.f_reshape([size[0], size[1], self.config.n_heads * self.config.d_head])?;
        match &self.out_norm {
            Some(norm) => self.o_proj.forward(&norm.forward(&o_bne)?),
            None => self.o_proj.forward(&o_bne),
        }
    }

    /// Prepares the cache for [`AttnMixer::step`]: room for one more token, and on CUDA the device's knowledge of what is there. It
    /// belongs before each step, outside of its capture; [`KvCache::n_moves`] tells whether the memory is another one now.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a cache of other sizes or with documents; [`Error::Torch`] if the device has no memory.
    pub fn make_room(&self, cache: &mut KvCache, batch: i64, kind: Kind, device: Device) -> Result<()> {
        cache.make_room([batch, self.config.n_kv_heads, self.config.d_head], kind, device)
    }

    /// As [`AttnMixer::forward`] with a cache, for one token a sequence, at the position of `clock`, after [`AttnMixer::make_room`].
    /// On CUDA its kernels read the position and the length of the cache from the device, so that a CUDA graph may hold the step; a
    /// replay has to be counted by [`KvCache::count_step`].
    ///
    /// # Shapes
    /// - `x_b1d`: `[batch, 1, d_model]`, the token, normed
    /// - `source_b1d`: the same for a bridge
    /// - returns `[batch, 1, d_model]`
    ///
    /// # Errors
    /// As [`AttnMixer::forward`]; [`Error::Invalid`] for a clock of other angles than the mixer's, where there is no room and, on CUDA, for a
    /// `d_head` above 1024.
    pub fn step(
        &self,
        x_b1d: impl Into<Activations>,
        source_b1d: Option<&Tensor>,
        clock: &Clock,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        self.check_clock(clock)?;
        if clock.on_device().is_none() {
            let ctx = AttnContext {
                source_positions: source_b1d.map(|_| clock.positions()),
                ..AttnContext::new(clock.positions())
            };
            return self.forward(x_b1d, source_b1d, &ctx, Some(cache));
        }
        let x_b1d = x_b1d.into();
        let batch = check::dims::<3>(OP, "x_b1d", x_b1d.tensor(), "[batch, 1, d_model]")?[0];
        check::shape(OP, "x_b1d", x_b1d.tensor(), &[batch, 1, self.config.d_model])?;
        let (h, k, p) = (self.config.n_heads, self.config.n_kv_heads, self.config.d_head);
        let q_b1hp = match (&self.input, source_b1d) {
            (Input::Window { qkv_proj }, None) => {
                let [q, k, v] = pieces(&qkv_proj.forward(x_b1d)?, [[h, p], [k, p], [k, p]])?;
                decode::append(Some(&q), &k, &v, clock, cache)?
            }
            (Input::Bridge { q_proj, kv_proj }, Some(source)) => {
                check::shape(OP, "source_b1d", source, &[batch, 1, self.config.d_model])?;
                let q = self.heads(&q_proj.forward(x_b1d)?)?;
                let [k, v] = pieces(&kv_proj.forward(source)?, [[k, p], [k, p]])?;
                decode::append(Some(&q), &k, &v, clock, cache)?
            }
            _ => return Err(Error::invalid(OP, "a source goes with a kv bridge, and with nothing else")),
        };
        let q_b1hp = q_b1hp.ok_or_else(|| Error::invalid(OP, "the queries were lost"))?;
        self.project(&decode::attend(&q_b1hp, cache, self.config.window, self.config.n_sinks)?)
    }

    /// As [`AttnMixer::append_source`], for the token of a step.
    ///
    /// # Errors
    /// As [`AttnMixer::step`].
    pub fn step_source(&self, source_b1d: &Tensor, clock: &Clock, cache: &mut KvCache) -> Result<()> {
        let Input::Bridge { kv_proj, .. } = &self.input else { return Ok(()) };
        self.check_clock(clock)?;
        if clock.on_device().is_none() {
            return self.append_source(source_b1d, clock.positions(), None, cache);
        }
        let (k, p) = (self.config.n_kv_heads, self.config.d_head);
        let [k, v] = pieces(&kv_proj.forward(source_b1d)?, [[k, p], [k, p]])?;
        decode::append(None, &k, &v, clock, cache).map(drop)
    }

    /// Caches keys and values of tokens when none of them is routed to attention, as decoding through a bridge must.
    /// Without a bridge there is nothing to do.
    ///
    /// # Shapes
    /// - `source_bmd`: `[batch, m, d_model]`, tokens of the block's input, normed
    /// - `segments_bm`: `[batch, m]`, i64
    ///
    /// # Errors
    /// As [`AttnMixer::forward`].
    pub fn append_source(
        &self,
        source_bmd: &Tensor,
        positions: &Positions,
        segments_bm: Option<&Tensor>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let Input::Bridge { kv_proj, .. } = &self.input else { return Ok(()) };
        let batch = check::dims::<3>(OP, "source_bmd", source_bmd, "[batch, m, d_model]")?[0];
        let ctx = AttnContext::new(positions).with_source(positions);
        let (source, positions) = self.source(Some(source_bmd), &ctx, batch)?;
        let kv = self.source_heads(kv_proj, source, positions)?;
        cache.append(&kv.k_bmkp, &kv.v_bmkp, positions.host(), segments_bm)
    }

    /// The source of a bridge and its positions, checked.
    fn source<'a>(
        &self,
        source_bmd: Option<&'a Tensor>,
        ctx: &AttnContext<'a>,
        batch: i64,
    ) -> Result<(&'a Tensor, &'a Positions)> {
        let (Some(source), Some(positions)) = (source_bmd, ctx.source_positions) else {
            let message = "a mixer with a kv bridge needs the source tokens and their positions";
            return Err(Error::invalid(OP, message));
        };
        check::shape(OP, "source_bmd", source, &[batch, positions.len() as i64, self.config.d_model])?;
        check::device(OP, "source_bmd", source, positions.device())?;
        Ok((source, positions))
    }

    /// Queries, keys and values of the same tokens. Queries and keys lie side by side and are turned together.
    fn window_heads(&self, qkv_proj: &Linear, x_bnd: &Activations, positions: &Positions) -> Result<(Tensor, Heads)> {
        let (h, k, p) = (self.config.n_heads, self.config.n_kv_heads, self.config.d_head);
        let qkv = qkv_proj.forward(x_bnd)?;
        if self.config.rope.is_none() {
            let [q_bnhp, k_bmkp, v_bmkp] = pieces(&qkv, [[h, p], [k, p], [k, p]])?;
            return Ok((q_bnhp, Heads { k_bmkp, v_bmkp }));
        }
        let [qk, v_bmkp] = pieces(&qkv, [[h + k, p], [k, p]])?;
        let turned = self.turned(qk, positions)?;
        let size = turned.size();
        let [q_bnhp, k_bmkp] = pieces(&turned.f_reshape([size[0], size[1], (h + k) * p])?, [[h, p], [k, p]])?;
        Ok((q_bnhp, Heads { k_bmkp, v_bmkp }))
    }

    fn source_heads(&self, kv_proj: &Linear, source_bmd: &Tensor, positions: &Positions) -> Result<Heads> {
        let (k, p) = (self.config.n_kv_heads, self.config.d_head);
        let [k_bmkp, v_bmkp] = pieces(&kv_proj.forward(source_bmd)?, [[k, p], [k, p]])?;
        Ok(Heads { k_bmkp: self.turned(k_bmkp, positions)?, v_bmkp })
    }

    /// `[batch, tokens, heads * d_head]` seen as `[batch, tokens, heads, d_head]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        Ok(x.f_reshape([size[0], size[1], size[2] / self.config.d_head, self.config.d_head])?)
    }

    fn check_clock(&self, clock: &Clock) -> Result<()> {
        clock.check(OP, self.config.rope.map(|rope| (self.config.d_head, rope)))
    }

    fn turned(&self, x_bnhp: Tensor, positions: &Positions) -> Result<Tensor> {
        match self.config.rope {
            Some(rope) => rotary(&x_bnhp, &positions.rotary_table(self.config.d_head, rope)?),
            None => Ok(x_bnhp),
        }
    }

    fn attend(
        &self,
        q_bnhp: &Tensor,
        k_bmkp: &Tensor,
        v_bmkp: &Tensor,
        ctx: &AttnContext,
        k_positions: &Positions,
        k_segments_bm: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut mask = Mask::positions(ctx.positions, k_positions);
        mask = match (ctx.segments_bn, k_segments_bm) {
            // The queries are the keys.
            (Some(segments_bn), Some(k_segments_bm)) if std::ptr::eq(segments_bn, k_segments_bm) => {
                mask.with_documents(segments_bn)
            }
            (Some(q_segments_bn), Some(k_segments_bm)) => mask.with_segments(q_segments_bn, k_segments_bm),
            (None, None) => mask,
            _ => {
                return Err(Error::invalid(OP, "segments must be given for the queries and for all keys, or for none"));
            }
        };
        if let Some(window) = self.config.window {
            mask = mask.with_window(window).with_sinks(self.config.n_sinks);
        }
        attention(q_bnhp, k_bmkp, v_bmkp, &mask)
    }
}

const OP: &str = "attn_mixer";

impl AttnConfig {
    fn check(&self) -> Result<()> {
        let Self { d_model, n_heads, n_kv_heads, d_head, rope, window, .. } = *self;
        let message = if d_model < 1 || n_heads < 1 || n_kv_heads < 1 || d_head < 1 {
            format!(
                "d_model {d_model}, n_heads {n_heads}, n_kv_heads {n_kv_heads}, d_head {d_head} must all be positive"
            )
        } else if n_heads % n_kv_heads != 0 {
            format!("n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
        } else if rope.is_some() && d_head % 2 != 0 {
            format!("d_head is {d_head}, but rotary embedding needs an even one")
        } else if let Some(problem) = rope.and_then(|rope| rope.problem()) {
            format!("rotary embedding: {problem}")
        } else if window == Some(0) {
            "a window of 0 positions shows nothing; use 1 or more, or no window".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::invalid(OP, message))
    }
}

/// Features as groups of heads, `[heads, d_head]` each.
fn pieces<const N: usize>(x: &Tensor, shapes: [[i64; 2]; N]) -> Result<[Tensor; N]> {
    let pieces = split_features(x, &shapes.each_ref().map(|shape| &shape[..]))?;
    pieces.try_into().map_err(|_| Error::invalid(OP, "the heads did not split"))
}
