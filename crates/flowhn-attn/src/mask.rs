//! Who may see whom.

// b batch, n queries, m keys

use std::borrow::Cow;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use flowhn_torch::{Error, Result, check};

use crate::Positions;

/// How queries and keys stand to each other in time.
#[derive(Clone, Copy, Debug)]
pub enum Order<'a> {
    /// The queries are the keys: query `i` sees keys `0..=i`.
    Causal,
    /// The queries are the last of the keys, as when decoding: query `i` of `n` sees the first `m - n + i + 1` of `m` keys.
    CausalTail,
    /// A query sees the keys at its own position and before it.
    Positions {
        /// Positions of the queries.
        q: &'a Positions,
        /// Positions of the keys.
        k: &'a Positions,
    },
}

/// Which keys each query sees: those of an [`Order`], within its own document, within a sliding window.
///
/// ```
/// use flowhn_attn::Mask;
/// use tch::Tensor;
/// let segments_bn = Tensor::from_slice(&[0i64, 0, 1, 1, 1]).view([1, 5]);
/// let mask = Mask::causal().with_segments(&segments_bn, &segments_bn).with_window(2);
/// # let _ = mask;
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    order: Order<'a>,
    segments: Option<(&'a Tensor, &'a Tensor)>,
    documents: Option<&'a Tensor>,
    window: Option<usize>,
    n_sinks: usize,
}

/// Positions of the queries and of the keys.
type HostPositions<'a> = (Cow<'a, [i64]>, Cow<'a, [i64]>);

impl<'a> Mask<'a> {
    /// A mask of this order alone.
    pub fn new(order: Order<'a>) -> Self {
        Self { order, segments: None, documents: None, window: None, n_sinks: 0 }
    }

    /// [`Order::Causal`].
    pub fn causal() -> Self {
        Self::new(Order::Causal)
    }

    /// [`Order::CausalTail`].
    pub fn causal_tail() -> Self {
        Self::new(Order::CausalTail)
    }

    /// [`Order::Positions`].
    pub fn positions(q: &'a Positions, k: &'a Positions) -> Self {
        Self::new(Order::Positions { q, k })
    }

    /// A query also sees only keys with its own segment id: `[batch, n]` and `[batch, m]`, i64, on the device of the keys.
    #[must_use]
    pub fn with_segments(self, q_segments_bn: &'a Tensor, k_segments_bm: &'a Tensor) -> Self {
        Self { segments: Some((q_segments_bn, k_segments_bm)), documents: None, ..self }
    }

    /// As [`Mask::with_segments`], where the queries are the keys and the ids never decrease along a sequence, as those of documents in a
    /// pack: our kernels then read no keys of other documents, nor a mask. A token whose id is less than the one before it gets NaN from them.
    #[must_use]
    pub fn with_documents(self, segments_bn: &'a Tensor) -> Self {
        Self { segments: Some((segments_bn, segments_bn)), documents: Some(segments_bn), ..self }
    }

    /// A query also sees only keys less than `window` positions before it; 1 leaves a query its own position.
    #[must_use]
    pub fn with_window(self, window: usize) -> Self {
        Self { window: Some(window), ..self }
    }

    /// With a window, a query also sees the keys before it at positions below `n_sinks`.
    #[must_use]
    pub fn with_sinks(self, n_sinks: usize) -> Self {
        Self { n_sinks, ..self }
    }

    /// What the mask comes to for `n` queries and `m` keys, both not 0, as far as the host can say, in a pattern that `takes` names.
    pub(crate) fn resolve(&self, op: &'static str, sizes: [i64; 3], device: Device, takes: Takes) -> Result<Visible> {
        let [batch, n, m] = sizes;
        let window = self.checked_window(op)?;
        self.check_segments(op, sizes, device)?;
        let (q, k) = self.host_positions(op, n, m)?;
        let (first, last) = (q[0], q[q.len() - 1]);
        // Positions increase, so the keys that any query sees are neighbours, but for those that every query sees.
        let start = match window.filter(|_| self.n_sinks == 0) {
            Some(window) => k.partition_point(|&key| key <= first - window),
            None => 0,
        };
        let end = k.partition_point(|&key| key <= last);
        if start >= end {
            return Ok(Visible { keys: start..start, pattern: Pattern::All, sees_itself: false });
        }
        let keys = start..end;
        let window_is_idle = window.is_none_or(|window| last - k[start] < window);
        let window = window.filter(|_| !window_is_idle);
        let is_causal = *q == k[keys.clone()];
        // Without gaps, so many positions are so many keys.
        let slides = self.n_sinks == 0 && is_causal && last - first == n - 1;
        let has_spans = is_causal
            && keys.len() == k.len()
            && (window.is_none() || slides)
            && (self.segments.is_none() || self.documents.is_some());
        let pattern = match (self.segments, window) {
            (None, None) if k[end - 1] <= first => Pattern::All,
            (None, None) if is_causal => Pattern::Causal,
            _ if takes.spans && has_spans => {
                Pattern::Spans { segments_bn: self.documents.map(Tensor::shallow_clone), window }
            }
            (None, Some(window)) if takes.windows && slides => Pattern::Window(window),
            _ => Pattern::Dense(self.dense(batch, n, m, &keys, window, device)?),
        };
        let sees_itself = q.iter().all(|position| k.binary_search(position).is_ok());
        Ok(Visible { keys, pattern, sees_itself })
    }

    fn checked_window(&self, op: &'static str) -> Result<Option<i64>> {
        match self.window {
            Some(0) => Err(Error::invalid(op, "a window of 0 positions shows nothing; use 1 or more, or no window")),
            // A window past any position is no window.
            Some(window) => Ok(i64::try_from(window).ok().filter(|&window| window < i64::MAX / 2)),
            None => Ok(None),
        }
    }

    fn check_segments(&self, op: &'static str, [batch, n, m]: [i64; 3], device: Device) -> Result<()> {
        let Some((q_segments, k_segments)) = self.segments else { return Ok(()) };
        for (arg, segments, len) in [("q_segments_bn", q_segments, n), ("k_segments_bm", k_segments, m)] {
            check::shape(op, arg, segments, &[batch, len])?;
            check::kind(op, arg, segments, &[Kind::Int64])?;
            check::device(op, arg, segments, device)?;
        }
        Ok(())
    }

    /// Positions of queries and keys, with the keys' indices in place of positions where the order has none.
    fn host_positions(&self, op: &'static str, n: i64, m: i64) -> Result<HostPositions<'a>> {
        match self.order {
            Order::Causal if n != m => {
                Err(Error::invalid(op, format!("{n} queries and {m} keys; a causal mask needs as many of either")))
            }
            Order::CausalTail if n > m => {
                Err(Error::invalid(op, format!("{n} queries cannot be the last of {m} keys")))
            }
            Order::Causal | Order::CausalTail => Ok(((m - n..m).collect(), (0..m).collect())),
            Order::Positions { q, k } => {
                for (what, positions, len) in [("queries", q, n), ("keys", k, m)] {
                    if positions.len() as i64 != len {
                        let message = format!("{} positions for {len} {what}", positions.len());
                        return Err(Error::invalid(op, message));
                    }
                }
                Ok((Cow::Borrowed(q.host()), Cow::Borrowed(k.host())))
            }
        }
    }

    /// The mask spelled out on the device, for the keys that are visible at all.
    fn dense(
        &self,
        batch: i64,
        n: i64,
        m: i64,
        keys: &Range<usize>,
        window: Option<i64>,
        device: Device,
    ) -> Result<Tensor> {
        let (q_n, k_m) = match self.order {
            Order::Causal | Order::CausalTail => {
                let count = |from: i64| Tensor::f_arange_start(from, m, (Kind::Int64, device));
                (count(m - n)?, count(0)?)
            }
            Order::Positions { q, k } => (q.tensor()?, k.tensor()?),
        };
        let (start, len) = (keys.start as i64, keys.len() as i64);
        let (q_n1, k_1m) = (q_n.f_unsqueeze(1)?, k_m.f_narrow(0, start, len)?.f_unsqueeze(0)?);
        let mut seen_nm = k_1m.f_le_tensor(&q_n1)?;
        if let Some(window) = window {
            let near_nm = k_1m.f_gt_tensor(&q_n1.f_sub_scalar(window)?)?;
            let near_nm = near_nm.f_logical_or(&k_1m.f_lt(self.n_sinks as i64)?)?;
            seen_nm = seen_nm.f_logical_and(&near_nm)?;
        }
        let Some((q_segments_bn, k_segments_bm)) = self.segments else {
            return Ok(seen_nm.f_view([1, 1, n, len])?);
        };
        let k_segments_bm = k_segments_bm.f_narrow(1, start, len)?;
        let same_bnm = q_segments_bn.f_unsqueeze(2)?.f_eq_tensor(&k_segments_bm.f_unsqueeze(1)?)?;
        Ok(same_bnm.f_logical_and(&seen_nm)?.f_view([batch, 1, n, len])?)
    }
}

/// The patterns that an operator takes beside all keys, causal ones and masks that are spelled out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Takes {
    /// [`Pattern::Window`].
    pub windows: bool,
    /// [`Pattern::Spans`].
    pub spans: bool,
}

/// What a mask comes to.
#[derive(Debug)]
pub(crate) struct Visible {
    /// The keys that some query may see; the others need not be read.
    pub keys: Range<usize>,
    /// Which of those keys each query sees.
    pub pattern: Pattern,
    /// Whether every query is among the keys and so sees at least itself.
    pub sees_itself: bool,
}

#[derive(Debug)]
pub(crate) enum Pattern {
    /// All of them.
    All,
    /// Query `i` the keys up to `i`.
    Causal,
    /// Query `i` the last so many keys up to `i`.
    Window(i64),
    /// Of all keys query `i` those up to `i` that are of the same document and among the last so many.
    Spans {
        /// The ids of documents, if there are any: i64, `[batch, n]`, never decreasing.
        segments_bn: Option<Tensor>,
        /// How many, if not all.
        window: Option<i64>,
    },
    /// Those with `true`: bool, `[batch or 1, 1, n, keys]`.
    Dense(Tensor),
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Takes = Takes { windows: true, spans: true };
    const WINDOWS: Takes = Takes { windows: true, spans: false };

    fn told(mask: &Mask, n: i64, takes: Takes) -> String {
        match mask.resolve("test", [1, n, n], Device::Cpu, takes).unwrap().pattern {
            Pattern::All => "all".to_owned(),
            Pattern::Causal => "causal".to_owned(),
            Pattern::Window(window) => format!("window {window}"),
            Pattern::Spans { segments_bn, window } => format!("spans {} {window:?}", segments_bn.is_some()),
            Pattern::Dense(_) => "dense".to_owned(),
        }
    }

    #[test]
    fn patterns_are_chosen_as_far_as_the_operator_takes_them() {
        let ids = Tensor::from_slice(&[0i64, 0, 1, 1, 1, 2]).view([1, 6]);
        let (plain, documents) = (Mask::causal(), Mask::causal().with_documents(&ids));
        for (mask, spans, windows) in [
            (plain, "causal", "causal"),
            (plain.with_window(6), "causal", "causal"),
            (plain.with_window(3), "spans false Some(3)", "window 3"),
            (plain.with_window(3).with_sinks(1), "dense", "dense"),
            (documents, "spans true None", "dense"),
            (documents.with_window(9), "spans true None", "dense"),
            (documents.with_window(2), "spans true Some(2)", "dense"),
            (documents.with_window(2).with_sinks(1), "dense", "dense"),
            // Ids that need not rise.
            (plain.with_segments(&ids, &ids), "dense", "dense"),
        ] {
            assert_eq!((told(&mask, 6, ALL).as_str(), told(&mask, 6, WINDOWS).as_str()), (spans, windows), "{mask:?}");
        }
        assert_eq!(told(&plain, 1, ALL), "all");
    }

    #[test]
    fn positions_with_gaps_are_no_spans_under_a_window() {
        let positions = Positions::new(&[0, 1, 3, 4, 6, 7], Device::Cpu).unwrap();
        let mask = Mask::positions(&positions, &positions);
        assert_eq!(told(&mask, 6, ALL), "causal");
        assert_eq!(told(&mask.with_window(3), 6, ALL), "dense");
        let ids = Tensor::zeros([1, 6], (Kind::Int64, Device::Cpu));
        assert_eq!(told(&mask.with_documents(&ids), 6, ALL), "spans true None");
    }
}
