//! Which tokens of a sequence a branch reads.

use std::ops::Range;
use std::sync::Arc;

use tch::{Device, Tensor};

use flowhn_torch::{Error, Result, cpu};

/// The tokens of one branch: sorted, disjoint spans of `0..seq_len`, on the host, with their positions on the device.
///
/// Made once per plan; nothing is computed from it on the device later.
#[derive(Debug)]
pub struct Route {
    seq_len: usize,
    /// Not empty, and no two of them touch.
    spans: Arc<[Range<usize>]>,
    positions: Arc<[i64]>,
    index_n: Tensor,
}

impl Clone for Route {
    /// Another handle of the same route.
    fn clone(&self) -> Self {
        Self {
            seq_len: self.seq_len,
            spans: Arc::clone(&self.spans),
            positions: Arc::clone(&self.positions),
            index_n: self.index_n.shallow_clone(),
        }
    }
}

impl Route {
    /// A route over the tokens of `spans`; empty spans are dropped, touching ones joined.
    ///
    /// ```
    /// use flowhn_fuse::Route;
    /// use tch::Device;
    /// let route = Route::new(6, &[0..1, 4..6], Device::Cpu)?;
    /// assert_eq!(route.positions(), [0, 4, 5]);
    /// assert!(!route.is_single_span());
    /// # Ok::<(), flowhn_fuse::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the spans are sorted, disjoint and inside `0..seq_len`; [`Error::Torch`] if the device
    /// refuses the index.
    pub fn new(seq_len: usize, spans: &[Range<usize>], device: Device) -> Result<Self> {
        let mut joined: Vec<Range<usize>> = Vec::with_capacity(spans.len());
        let mut end = 0;
        for span in spans {
            if span.start < end || span.end < span.start || span.end > seq_len {
                let message =
                    format!("span {span:?} is not inside {end}..{seq_len}, where the spans before it leave off");
                return Err(Error::invalid("route", message));
            }
            end = span.end;
            match joined.last_mut() {
                _ if span.is_empty() => {}
                Some(last) if last.end == span.start => last.end = span.end,
                _ => joined.push(span.clone()),
            }
        }
        let positions: Vec<i64> = joined.iter().flat_map(|span| span.start as i64..span.end as i64).collect();
        let index_n = cpu::from_slice(&[positions.len() as i64], &positions)?.f_to_device(device)?;
        Ok(Self { seq_len, spans: joined.into(), positions: positions.into(), index_n })
    }

    /// The route of a branch that reads every token.
    ///
    /// # Errors
    /// [`Error::Torch`] if the device refuses the index.
    pub fn all(seq_len: usize, device: Device) -> Result<Self> {
        Self::new(seq_len, std::slice::from_ref(&(0..seq_len)), device)
    }

    /// The route of a branch that reads no token.
    ///
    /// # Errors
    /// [`Error::Torch`] if the device refuses the index.
    pub fn none(seq_len: usize, device: Device) -> Result<Self> {
        Self::new(seq_len, &[], device)
    }

    /// Number of tokens that the branch reads.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether the branch reads no token.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Whether the branch reads every token.
    pub fn is_all(&self) -> bool {
        self.len() == self.seq_len
    }

    /// Whether the branch's tokens are neighbours, so that gathering them is a view. True of an empty route.
    pub fn is_single_span(&self) -> bool {
        self.spans.len() <= 1
    }

    /// Length of the sequence that the route is about.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The spans, sorted; none is empty and no two touch.
    pub fn spans(&self) -> &[Range<usize>] {
        &self.spans
    }

    /// The tokens' indices in the sequence, sorted.
    pub fn positions(&self) -> &[i64] {
        &self.positions
    }

    /// [`Route::positions`] on the device: `[n]`, i64.
    pub fn positions_tensor(&self) -> &Tensor {
        &self.index_n
    }

    /// Where the route's tensor lives.
    pub fn device(&self) -> Device {
        self.index_n.device()
    }

    /// Whether each token of the sequence belongs to exactly one of the two routes.
    pub fn partitions_with(&self, other: &Self) -> bool {
        // Two routes of the right total length that never overlap leave no token out.
        self.seq_len == other.seq_len && self.len() + other.len() == self.seq_len && !self.overlaps(other)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (mut mine, mut theirs) = (self.spans.iter().peekable(), other.spans.iter().peekable());
        while let (Some(a), Some(b)) = (mine.peek(), theirs.peek()) {
            if a.end <= b.start {
                mine.next();
            } else if b.end <= a.start {
                theirs.next();
            } else {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of one span is what is meant")]
mod tests {
    use super::*;

    fn route(seq_len: usize, spans: &[Range<usize>]) -> Route {
        Route::new(seq_len, spans, Device::Cpu).unwrap()
    }

    #[test]
    fn spans_are_joined_and_counted() {
        let joined = route(8, &[0..2, 2..2, 2..4, 6..8]);
        assert_eq!(joined.spans(), [0..4, 6..8]);
        assert_eq!(joined.positions(), [0, 1, 2, 3, 6, 7]);
        assert_eq!(Vec::<i64>::try_from(joined.positions_tensor()).unwrap(), joined.positions());
        assert!(!joined.is_single_span() && !joined.is_all() && !joined.is_empty());
        assert!(route(8, &[0..3, 3..8]).is_all());
        assert!(Route::none(8, Device::Cpu).unwrap().is_empty());
        // A sequence without tokens: nothing to read is also everything.
        let nothing = Route::all(0, Device::Cpu).unwrap();
        assert!(nothing.is_empty() && nothing.is_all());
    }

    #[test]
    fn bad_spans_are_refused() {
        #[expect(clippy::reversed_empty_ranges, reason = "this is one of the mistakes")]
        let mistakes = [vec![2..4, 3..5], vec![4..6, 0..2], vec![0..9], vec![5..4]];
        for spans in mistakes {
            let message = Route::new(8, &spans, Device::Cpu).unwrap_err().to_string();
            assert!(message.starts_with("route: span"), "{message}");
        }
    }

    #[test]
    fn partition_means_each_token_once() {
        let attn = route(6, &[1..3, 5..6]);
        assert!(attn.partitions_with(&route(6, &[0..1, 3..5])));
        assert!(!attn.partitions_with(&route(6, &[0..2, 3..4])), "token 1 twice, token 4 never");
        assert!(!attn.partitions_with(&route(6, &[0..1, 3..4])), "token 4 never");
        assert!(!attn.partitions_with(&route(7, &[0..1, 3..5, 6..7])), "another sequence");
        assert!(route(6, &[0..6]).partitions_with(&route(6, &[])));
        assert!(!route(6, &[0..6]).partitions_with(&route(6, &[0..6])));
    }
}
