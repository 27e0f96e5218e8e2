//! Keys and values of the positions that attention has read.

// b batch, m cached tokens, k key heads, p d_head

use tch::Tensor;

use flowhn_torch::{Error, Result, check};

use crate::Positions;

/// Tokens that a new cache has room for.
const MIN_CAPACITY: i64 = 64;

/// The key-value cache of one block: what attention has read so far, with absolute positions and, for packed documents,
/// segment ids.
///
/// A cache holds values, not a graph: no gradient flows back to what was cached.
///
/// ```
/// use flowhn_attn::KvCache;
/// use tch::{Device, Kind, Tensor};
/// let mut cache = KvCache::new();
/// let kv = Tensor::zeros([1, 3, 2, 8], (Kind::Float, Device::Cpu));
/// cache.append(&kv, &kv, &[0, 1, 5], None)?;
/// assert_eq!((cache.len(), cache.last_position()), (3, Some(5)));
/// # Ok::<(), flowhn_attn::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct KvCache {
    filled: Option<Filled>,
}

/// What a cache knows from its first tokens on.
#[derive(Debug)]
struct Filled {
    keys: Buffer,
    values: Buffer,
    segments: Option<Buffer>,
    positions: Positions,
}

impl KvCache {
    /// An empty cache; it takes batch size, heads, dtype and device from the first tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies tokens in.
    ///
    /// # Shapes
    /// - `k_bmkp`, `v_bmkp`: `[batch, m, n_kv_heads, d_head]`, one dtype, any strides
    /// - `positions`: `m`, increasing, later than those in the cache
    /// - `segments_bm`: `[batch, m]`, i64; with all tokens or with none
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`] if the tokens differ from those in the cache or from each other;
    /// [`Error::Invalid`] for positions that do not increase and for segments that come only with some tokens. The cache is
    /// then as it was.
    pub fn append(
        &mut self,
        k_bmkp: &Tensor,
        v_bmkp: &Tensor,
        positions: &[i64],
        segments_bm: Option<&Tensor>,
    ) -> Result<()> {
        const OP: &str = "kv_cache";
        let [batch, _, n_kv_heads, d_head] = check::dims(OP, "k_bmkp", k_bmkp, "[batch, m, n_kv_heads, d_head]")?;
        let m = positions.len() as i64;
        check::shape(OP, "k_bmkp", k_bmkp, &[batch, m, n_kv_heads, d_head])?;
        check::shape(OP, "v_bmkp", v_bmkp, &[batch, m, n_kv_heads, d_head])?;
        check::kind(OP, "v_bmkp", v_bmkp, &[k_bmkp.kind()])?;
        check::device(OP, "v_bmkp", v_bmkp, k_bmkp.device())?;
        if let Some(segments_bm) = segments_bm {
            check::shape(OP, "segments_bm", segments_bm, &[batch, m])?;
            check::kind(OP, "segments_bm", segments_bm, &[tch::Kind::Int64])?;
            check::device(OP, "segments_bm", segments_bm, k_bmkp.device())?;
        }
        if m == 0 {
            return Ok(());
        }
        let Some(filled) = &mut self.filled else {
            self.filled = Some(Filled {
                positions: Positions::new(positions, k_bmkp.device())?,
                keys: Buffer::new(k_bmkp)?,
                values: Buffer::new(v_bmkp)?,
                segments: segments_bm.map(Buffer::new).transpose()?,
            });
            return Ok(());
        };

        let cached = filled.keys.view()?;
        check::shape(OP, "k_bmkp", k_bmkp, &[cached.size()[0], m, cached.size()[2], cached.size()[3]])?;
        check::kind(OP, "k_bmkp", k_bmkp, &[cached.kind()])?;
        check::device(OP, "k_bmkp", k_bmkp, cached.device())?;
        if filled.segments.is_some() != segments_bm.is_some() {
            return Err(Error::invalid(OP, "segments must come with all tokens of a cache or with none"));
        }
        filled.keys.reserve(m)?;
        filled.values.reserve(m)?;
        if let Some(segments) = &mut filled.segments {
            segments.reserve(m)?;
        }
        // Positions are the last thing that can be refused; after them only copies follow.
        filled.positions.extend(positions)?;
        filled.keys.push(k_bmkp)?;
        filled.values.push(v_bmkp)?;
        if let (Some(segments), Some(segments_bm)) = (&mut filled.segments, segments_bm) {
            segments.push(segments_bm)?;
        }
        Ok(())
    }

    /// The cached keys, `[batch, len, n_kv_heads, d_head]`, a view; `None` while the cache is empty.
    ///
    /// # Errors
    /// [`Error::Torch`].
    pub fn keys(&self) -> Result<Option<Tensor>> {
        self.filled.as_ref().map(|filled| filled.keys.view()).transpose()
    }

    /// The cached values, as [`KvCache::keys`].
    ///
    /// # Errors
    /// [`Error::Torch`].
    pub fn values(&self) -> Result<Option<Tensor>> {
        self.filled.as_ref().map(|filled| filled.values.view()).transpose()
    }

    /// The segment ids, `[batch, len]`, a view; `None` while the cache is empty or where tokens came without.
    ///
    /// # Errors
    /// [`Error::Torch`].
    pub fn segments(&self) -> Result<Option<Tensor>> {
        self.filled.as_ref().and_then(|filled| filled.segments.as_ref()).map(Buffer::view).transpose()
    }

    /// The positions of the cached tokens; `None` while the cache is empty.
    pub fn positions(&self) -> Option<&Positions> {
        self.filled.as_ref().map(|filled| &filled.positions)
    }

    /// The position of the latest token.
    pub fn last_position(&self) -> Option<i64> {
        self.positions().and_then(|positions| positions.host().last().copied())
    }

    /// Number of cached tokens.
    pub fn len(&self) -> usize {
        self.positions().map_or(0, Positions::len)
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.filled.is_none()
    }

    /// Tokens that fit before the next growth.
    pub fn capacity(&self) -> usize {
        self.filled.as_ref().map_or(0, |filled| filled.keys.capacity() as usize)
    }

    /// Memory held, in bytes, room for later tokens included.
    pub fn n_bytes(&self) -> u64 {
        let Some(filled) = &self.filled else { return 0 };
        let segments = filled.segments.as_ref().map_or(0, Buffer::n_bytes);
        filled.keys.n_bytes() + filled.values.n_bytes() + segments
    }

    /// Forgets all tokens and frees their memory.
    pub fn clear(&mut self) {
        self.filled = None;
    }
}

/// A tensor that grows along axis 1, in amortised constant time a token.
#[derive(Debug)]
struct Buffer {
    storage: Tensor,
    len: i64,
}

impl Buffer {
    fn new(tokens: &Tensor) -> Result<Self> {
        let mut buffer = Self { storage: room(tokens, MIN_CAPACITY.max(tokens.size()[1]))?, len: 0 };
        buffer.push(tokens)?;
        Ok(buffer)
    }

    fn view(&self) -> Result<Tensor> {
        Ok(self.storage.f_narrow(1, 0, self.len)?)
    }

    fn capacity(&self) -> i64 {
        self.storage.size()[1]
    }

    fn n_bytes(&self) -> u64 {
        self.storage.numel() as u64 * self.storage.kind().elt_size_in_bytes() as u64
    }

    /// Makes room for `extra` more tokens.
    fn reserve(&mut self, extra: i64) -> Result<()> {
        let wanted = self.len + extra;
        if wanted <= self.capacity() {
            return Ok(());
        }
        let grown = room(&self.storage, wanted.max(2 * self.capacity()))?;
        tch::no_grad(|| -> Result<()> { Ok(grown.f_narrow(1, 0, self.len)?.f_copy_(&self.view()?)?) })?;
        self.storage = grown;
        Ok(())
    }

    /// Copies tokens into room that is there.
    fn push(&mut self, tokens: &Tensor) -> Result<()> {
        let n_new = tokens.size()[1];
        tch::no_grad(|| -> Result<()> { Ok(self.storage.f_narrow(1, self.len, n_new)?.f_copy_(tokens)?) })?;
        self.len += n_new;
        Ok(())
    }
}

/// An unwritten tensor like `tokens`, with `capacity` tokens.
fn room(tokens: &Tensor, capacity: i64) -> Result<Tensor> {
    let mut size = tokens.size();
    size[1] = capacity;
    Ok(Tensor::f_empty(size, (tokens.kind(), tokens.device()))?)
}
