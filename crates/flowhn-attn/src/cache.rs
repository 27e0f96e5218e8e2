//! Keys and values of the positions that attention has read.

// b batch, m cached tokens, k key heads, p d_head

use tch::{Device, Kind, Tensor};

use flowhn_torch::{Error, Result, check, cpu};

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
    n_moves: usize,
}

/// What a cache knows from its first tokens on.
#[derive(Debug)]
struct Filled {
    keys: Buffer,
    values: Buffer,
    segments: Option<Buffer>,
    positions: Positions,
    counted: Option<Counted>,
}

/// What kernels that take a step read and advance: the device's own knowledge of the cache.
#[derive(Debug)]
pub(crate) struct Counted {
    /// The number of cached tokens, and 0: `[2]`, i32.
    pub count: Tensor,
    /// Their positions: `[capacity]`, i64.
    pub positions: Tensor,
    /// How many tokens the device knows of.
    len: usize,
}

/// A cache with room for the token of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepRoom<'a> {
    /// `[batch, capacity, n_kv_heads, d_head]`.
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    pub counted: &'a Counted,
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
            check::kind(OP, "segments_bm", segments_bm, &[Kind::Int64])?;
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
                counted: None,
            });
            self.n_moves += 1;
            return Ok(());
        };

        let cached = filled.keys.view()?;
        check::shape(OP, "k_bmkp", k_bmkp, &[cached.size()[0], m, cached.size()[2], cached.size()[3]])?;
        check::kind(OP, "k_bmkp", k_bmkp, &[cached.kind()])?;
        check::device(OP, "k_bmkp", k_bmkp, cached.device())?;
        if filled.segments.is_some() != segments_bm.is_some() {
            return Err(Error::invalid(OP, "segments must come with all tokens of a cache or with none"));
        }
        self.n_moves += usize::from(filled.keys.reserve(m)?);
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

    /// Makes room for one more token and lets the device know what is cached. A step that a CUDA graph holds has to find the cache
    /// where it was when it was captured: [`KvCache::n_moves`].
    pub(crate) fn make_room(&mut self, size_bkp: [i64; 3], kind: Kind, device: Device) -> Result<()> {
        let [batch, n_kv_heads, d_head] = size_bkp;
        if self.filled.is_none() {
            let buffer = || Buffer::empty(&[batch, MIN_CAPACITY, n_kv_heads, d_head], kind, device);
            let (keys, values, positions) = (buffer()?, buffer()?, Positions::new(&[], device)?);
            self.filled = Some(Filled { keys, values, segments: None, positions, counted: None });
            self.n_moves += 1;
        }
        let Some(filled) = &mut self.filled else { return Ok(()) };
        let have = filled.keys.storage.size();
        if filled.segments.is_some() || [have[0], have[2], have[3]] != size_bkp || filled.keys.storage.kind() != kind {
            let message =
                format!("a step of {size_bkp:?} in {kind:?} does not fit a cache of {have:?}, or that has documents");
            return Err(Error::invalid("kv_cache", message));
        }
        self.n_moves += usize::from(filled.keys.reserve(1)?);
        filled.values.reserve(1)?;
        self.n_moves += usize::from(filled.count_on_device(device)?);
        Ok(())
    }

    /// The cache as a step on the device finds it.
    pub(crate) fn step_room(&self) -> Result<StepRoom<'_>> {
        let room = self.filled.as_ref().and_then(|filled| {
            let counted = filled.counted.as_ref().filter(|counted| counted.len == filled.positions.len())?;
            Some(StepRoom { keys: &filled.keys.storage, values: &filled.values.storage, counted })
        });
        room.ok_or_else(|| Error::invalid("kv_cache", "a step finds no room: it has to be made before"))
    }

    /// Tells the host that a kernel puts the token at `position` into the room that was made.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such room or the position is not later than all before.
    pub fn count_step(&mut self, position: i64) -> Result<()> {
        let _ = self.step_room()?;
        let Some(filled) = &mut self.filled else { return Ok(()) };
        filled.positions.extend(&[position])?;
        filled.keys.len += 1;
        filled.values.len += 1;
        if let Some(counted) = &mut filled.counted {
            counted.len += 1;
        }
        Ok(())
    }

    /// Writes NaN where no token is.
    #[cfg(feature = "selftest")]
    pub(crate) fn poison(&self) -> Result<()> {
        for buffer in self.filled.iter().flat_map(|filled| [&filled.keys, &filled.values]) {
            let _ = buffer.storage.f_narrow(1, buffer.len, buffer.capacity() - buffer.len)?.f_fill_(f64::NAN)?;
        }
        Ok(())
    }

    /// How often the cache has been given other memory.
    pub fn n_moves(&self) -> usize {
        self.n_moves
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
        self.len() == 0
    }

    /// Tokens that fit before the next growth.
    pub fn capacity(&self) -> usize {
        self.filled.as_ref().map_or(0, |filled| filled.keys.capacity() as usize)
    }

    /// Memory held, in bytes, room for later tokens included.
    pub fn n_bytes(&self) -> u64 {
        let Some(filled) = &self.filled else { return 0 };
        let segments = filled.segments.as_ref().map_or(0, Buffer::n_bytes);
        let counted =
            filled.counted.as_ref().map_or(0, |counted| n_bytes(&counted.count) + n_bytes(&counted.positions));
        filled.keys.n_bytes() + filled.values.n_bytes() + segments + counted
    }

    /// Forgets all tokens and frees their memory.
    pub fn clear(&mut self) {
        self.filled = None;
        self.n_moves += 1;
    }
}

impl Filled {
    /// Brings the device's knowledge up to date; whether it lies elsewhere now. Steps keep it so by themselves.
    fn count_on_device(&mut self, device: Device) -> Result<bool> {
        let (len, capacity) = (self.positions.len(), self.keys.capacity());
        let had_room = self.counted.as_ref().is_some_and(|counted| counted.positions.size()[0] == capacity);
        if had_room && self.counted.as_ref().is_some_and(|counted| counted.len == len) {
            return Ok(false);
        }
        if i32::try_from(capacity).is_err() {
            let message = format!("room for {capacity} tokens is more than a step counts; split the sequence");
            return Err(Error::invalid("kv_cache", message));
        }
        if !had_room {
            self.counted = Some(Counted {
                count: Tensor::f_zeros([2], (Kind::Int, device))?,
                positions: Tensor::f_zeros([capacity], (Kind::Int64, device))?,
                len: 0,
            });
        }
        if let Some(counted) = &mut self.counted {
            let positions = cpu::from_slice(&[len as i64], self.positions.host())?;
            counted.positions.f_narrow(0, 0, len as i64)?.f_copy_(&positions)?;
            counted.count.f_copy_(&cpu::from_slice(&[2], &[len as i32, 0])?)?;
            counted.len = len;
        }
        Ok(!had_room)
    }
}

/// Bytes of a tensor's elements.
fn n_bytes(tensor: &Tensor) -> u64 {
    tensor.numel() as u64 * tensor.kind().elt_size_in_bytes() as u64
}

/// A tensor that grows along axis 1, in amortised constant time a token.
#[derive(Debug)]
struct Buffer {
    storage: Tensor,
    len: i64,
}

impl Buffer {
    fn new(tokens: &Tensor) -> Result<Self> {
        let mut size = tokens.size();
        size[1] = size[1].max(MIN_CAPACITY);
        let mut buffer = Self::empty(&size, tokens.kind(), tokens.device())?;
        buffer.push(tokens)?;
        Ok(buffer)
    }

    /// A buffer of unwritten tokens, of this size with room on axis 1.
    fn empty(size: &[i64], kind: Kind, device: Device) -> Result<Self> {
        Ok(Self { storage: Tensor::f_empty(size, (kind, device))?, len: 0 })
    }

    fn view(&self) -> Result<Tensor> {
        Ok(self.storage.f_narrow(1, 0, self.len)?)
    }

    fn capacity(&self) -> i64 {
        self.storage.size()[1]
    }

    fn n_bytes(&self) -> u64 {
        n_bytes(&self.storage)
    }

    /// Makes room for `extra` more tokens; whether the buffer lies elsewhere now.
    fn reserve(&mut self, extra: i64) -> Result<bool> {
        let wanted = self.len + extra;
        if wanted <= self.capacity() {
            return Ok(false);
        }
        let mut size = self.storage.size();
        size[1] = wanted.max(2 * self.capacity());
        let grown = Self::empty(&size, self.storage.kind(), self.storage.device())?;
        tch::no_grad(|| -> Result<()> { Ok(grown.storage.f_narrow(1, 0, self.len)?.f_copy_(&self.view()?)?) })?;
        self.storage = grown.storage;
        Ok(true)
    }

    /// Copies tokens into room that is there.
    fn push(&mut self, tokens: &Tensor) -> Result<()> {
        let n_new = tokens.size()[1];
        tch::no_grad(|| -> Result<()> { Ok(self.storage.f_narrow(1, self.len, n_new)?.f_copy_(tokens)?) })?;
        self.len += n_new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_counts_what_the_host_counts() {
        let (size, options) = ([2, 1, 4], (Kind::Float, Device::Cpu));
        let mut cache = KvCache::new();
        assert!(cache.step_room().is_err() && cache.count_step(0).is_err(), "there is no room yet");
        let mut moves = Vec::new();
        for position in (0..130).map(|i| 2 * i) {
            cache.make_room(size, options.0, options.1).unwrap();
            assert_eq!(cache.step_room().unwrap().counted.positions.size()[0], cache.capacity() as i64);
            moves.push(cache.n_moves());
            cache.count_step(position).unwrap();
        }
        assert!(cache.count_step(258).is_err(), "positions increase");
        assert_eq!((cache.len(), cache.last_position(), cache.capacity()), (130, Some(258), 256));
        moves.dedup();
        assert_eq!(moves.len(), 3, "memory moves at 64 and 128 tokens: {moves:?}");

        // Tokens that did not come by steps are told to the device, in place.
        let tokens = Tensor::zeros([2, 3, 1, 4], options);
        cache.append(&tokens, &tokens, &[300, 301, 305], None).unwrap();
        assert!(cache.step_room().is_err(), "the device does not know of them yet");
        let (n_moves, place) = (cache.n_moves(), cache.keys().unwrap().unwrap().data_ptr());
        cache.make_room(size, options.0, options.1).unwrap();
        let counted = cache.step_room().unwrap().counted;
        assert_eq!(Vec::<i32>::try_from(&counted.count).unwrap(), [133, 0]);
        assert_eq!(Vec::<i64>::try_from(counted.positions.narrow(0, 128, 5)).unwrap(), [256, 258, 300, 301, 305]);
        assert_eq!((cache.n_moves(), cache.keys().unwrap().unwrap().data_ptr()), (n_moves, place));
        assert_eq!(cache.n_bytes(), 2 * 256 * 2 * 4 * 4 + 8 + 8 * 256);
    }

    #[test]
    fn steps_that_do_not_fit_the_cache_are_refused() {
        let mut cache = KvCache::new();
        cache.make_room([2, 1, 4], Kind::Float, Device::Cpu).unwrap();
        assert!(cache.is_empty());
        for (size, kind) in [([1, 1, 4], Kind::Float), ([2, 1, 8], Kind::Float), ([2, 1, 4], Kind::BFloat16)] {
            assert!(cache.make_room(size, kind, Device::Cpu).unwrap_err().to_string().contains("does not fit"));
        }
        let (token, segment) = (
            Tensor::zeros([2, 1, 1, 4], (Kind::Float, Device::Cpu)),
            Tensor::zeros([2, 1], (Kind::Int64, Device::Cpu)),
        );
        let mut cache = KvCache::new();
        cache.append(&token, &token, &[0], Some(&segment)).unwrap();
        assert!(cache.make_room([2, 1, 4], Kind::Float, Device::Cpu).is_err(), "documents");
    }
}
