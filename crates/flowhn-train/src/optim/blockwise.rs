//! Block-wise quantisation to 8 bits (Dettmers et al., "8-bit optimizers via block-wise quantization", sections 2 and 3), and the maps
//! between codes and numbers.
//!
//! A block's largest magnitude is kept as f32 and everything is divided by it. What is left, in -1..1 or 0..1, takes the nearest of 256
//! numbers of a dynamic tree: seven decades, `10^(i-7)..10^(i-6)`, of which decade `i` has `2^i` equally wide parts (`2^(i+1)` without
//! signs) with a number in the middle of each, beside 0 and 1. Large magnitudes are told apart finely and small ones over seven orders.

use std::cmp::Ordering;

/// Elements that share a factor.
pub(super) const BLOCK: usize = 256;

/// Numbers with equal leading bits, seven of them behind the point, from 2^-23 to 1.
const N_CELLS: usize = 23 * 128 + 1;

/// The numbers of one map's codes.
#[derive(Debug)]
pub(super) struct Codes {
    /// Ascending.
    values: Vec<f32>,
    /// The code of 0.
    zero: u8,
    /// Between code `zero + k` and the next: the least number that takes the upper one.
    mids: Vec<f32>,
}

impl Codes {
    /// The map for numbers in -1..1.
    pub fn signed() -> Self {
        Self::new(1, true)
    }

    /// The map for numbers in 0..1.
    pub fn unsigned() -> Self {
        Self::new(2, false)
    }

    /// A map with `n_lowest` numbers in its lowest decade.
    fn new(n_lowest: usize, is_signed: bool) -> Self {
        let mut levels = vec![0.];
        for decade in 0..7 {
            let n = n_lowest << decade;
            let middle = |k: usize| 0.1 + 0.9 * (k as f64 + 0.5) / n as f64;
            levels.extend((0..n).map(|k| (middle(k) * 10f64.powi(decade - 6)) as f32));
        }
        levels.push(1.);
        let mids = levels.windows(2).map(|pair| ((f64::from(pair[0]) + f64::from(pair[1])) / 2.) as f32).collect();
        // 1 has no negative.
        let n_negative = if is_signed { levels.len() - 2 } else { 0 };
        let negative = levels[1..=n_negative].iter().rev().map(|level| -level);
        Self { values: negative.chain(levels.iter().copied()).collect(), zero: n_negative as u8, mids }
    }

    /// The code of 0.
    pub fn zero(&self) -> u8 {
        self.zero
    }

    /// The number of a code.
    fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The numbers of a block of codes.
    pub fn decode(&self, codes: &[u8], absmax: f32, block: &mut [f32]) {
        block.iter_mut().zip(codes).for_each(|(x, &code)| *x = self.value(code) * absmax);
    }

    /// Writes the codes of a block and returns its largest magnitude. Without signs, what is above 0 stays above 0. A block with a number
    /// that is not finite has none that is, when it is decoded.
    pub fn encode(&self, block: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = absmax(block);
        let inverse = inverse_of(absmax);
        let least = |x: f32| u8::from(self.zero == 0 && x > 0.);
        codes.iter_mut().zip(block).for_each(|(code, &x)| *code = self.nearest(x, inverse).max(least(x)));
        absmax
    }

    /// The code nearest to `x * inverse`, the one of the larger magnitude from the middle on; the outermost for NaN.
    fn nearest(&self, x: f32, inverse: f32) -> u8 {
        let level = self.level((x * inverse).abs());
        // -1 takes the number above it.
        if x < 0. { self.zero - level.min(self.zero) } else { self.zero + level }
    }

    /// The number of middles up to `x`, which is not negative; all for NaN.
    fn level(&self, x: f32) -> u8 {
        self.mids.partition_point(|mid| x.partial_cmp(mid) != Some(Ordering::Less)) as u8
    }

    /// For each cell the level of its lower end, and above eight bits the lower 16 bits from which on its numbers have the next one. No cell
    /// has two middles, which makes the level of a number a matter of one look-up.
    fn cells(&self) -> [u32; N_CELLS] {
        let first = 2f32.powi(-23).to_bits() >> 16;
        std::array::from_fn(|idx| {
            let upper_bits = first + idx as u32;
            let level = self.level(f32::from_bits(upper_bits << 16));
            let middle = self.mids.get(usize::from(level)).map(|middle| middle.to_bits());
            let from = middle.filter(|bits| bits >> 16 == upper_bits).map_or(1 << 16, |bits| bits & 0xffff);
            from << 8 | u32::from(level)
        })
    }
}

/// Both maps as the kernels read them, `Maps` of `adamw_state.cuh`.
pub(super) fn maps_bytes() -> Vec<u8> {
    let (signed, unsigned) = (Codes::signed(), Codes::unsigned());
    let values = [&signed.values[..], &unsigned.values].concat().into_iter().flat_map(f32::to_le_bytes);
    let cells = [signed.cells(), unsigned.cells()].concat().into_iter().flat_map(u32::to_le_bytes);
    let mut bytes: Vec<u8> = values.chain(cells).collect();
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    bytes
}

/// The largest magnitude; NaN where there is one.
fn absmax(block: &[f32]) -> f32 {
    f32::from_bits(block.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

/// What multiplies a block to bring it into -1..1; 0 where there is nothing but zeros and what has no reciprocal.
fn inverse_of(absmax: f32) -> f32 {
    if absmax < f32::MIN_POSITIVE { 0. } else { 1. / absmax }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_nearest() {
        for codes in [Codes::signed(), Codes::unsigned()] {
            assert_eq!(codes.values.len(), 256);
            assert!(codes.values.is_sorted_by(|a, b| a < b));
            assert!((0..=255).all(|code| codes.nearest(codes.value(code), 1.) == code));
            assert_eq!((codes.value(codes.zero()), codes.value(255)), (0., 1.));
        }
        assert_eq!(Codes::signed().nearest(-1., 1.), 0);
    }

    #[test]
    fn no_cell_has_two_middles() {
        for codes in [Codes::signed(), Codes::unsigned()] {
            let cells = codes.cells().map(|cell| cell & 255);
            assert!(cells.windows(2).all(|pair| pair[1] - pair[0] <= 1));
            assert_eq!((cells[0], cells[N_CELLS - 1]), (0, u32::from(255 - codes.zero())));
        }
    }

    /// As `nearest_level` of `adamw_state.cuh`.
    #[test]
    fn a_cell_tells_the_level_of_each_of_its_numbers() {
        for codes in [Codes::signed(), Codes::unsigned()] {
            let cells = codes.cells();
            let first = 2f32.powi(-23).to_bits() >> 16;
            let at = |bits: u32| {
                let cell = cells[(bits >> 16).saturating_sub(first).min(N_CELLS as u32 - 1) as usize];
                (cell & 255) + u32::from(bits & 0xffff >= cell >> 8)
            };
            let around = |x: f32| [x.to_bits().saturating_sub(1), x.to_bits(), x.to_bits() + 1];
            let middles = codes.mids.iter().flat_map(|&middle| around(middle));
            let ends = (0..N_CELLS as u32).flat_map(|cell| around(f32::from_bits((first + cell) << 16)));
            let numbers = middles.chain(ends).chain([0, 1, 1 << 22]).filter(|&bits| f32::from_bits(bits) <= 1.);
            for bits in numbers {
                assert_eq!(at(bits), u32::from(codes.level(f32::from_bits(bits))), "{}", f32::from_bits(bits));
            }
        }
    }

    #[test]
    fn the_maps_have_the_size_that_the_kernels_read() {
        let size = 4 * 2 * (256 + N_CELLS);
        assert_eq!(maps_bytes().len(), size.next_multiple_of(16));
    }

    #[test]
    fn what_is_not_finite_has_the_outermost_codes_and_stays_so() {
        let block = [f32::NEG_INFINITY, -1., 0., 1., f32::INFINITY, f32::NAN];
        for (n, largest, want) in
            [(5, f32::INFINITY, vec![0, 127, 127, 127, 255]), (6, f32::NAN, vec![0, 0, 255, 255, 255, 255])]
        {
            let (mut codes, mut decoded) = (vec![0; n], vec![0.; n]);
            let absmax = Codes::signed().encode(&block[..n], &mut codes);
            assert_eq!((absmax.to_bits(), &codes), (largest.to_bits(), &want));
            Codes::signed().decode(&codes, absmax, &mut decoded);
            assert!(decoded.iter().all(|x| !x.is_finite()), "{decoded:?}");
        }
        let mut codes = [0; 3];
        Codes::unsigned().encode(&[0., 1., f32::INFINITY], &mut codes);
        assert_eq!(codes, [0, 1, 255]);
    }

    #[test]
    fn magnitudes_order_nan_above_infinity() {
        assert_eq!(absmax(&[1., -3., 0.]), 3.);
        assert_eq!(absmax(&[f32::NEG_INFINITY, 1.]), f32::INFINITY);
        assert!(absmax(&[f32::NAN, f32::INFINITY]).is_nan());
        assert_eq!((inverse_of(0.), inverse_of(4.), inverse_of(f32::INFINITY)), (0., 0.25, 0.));
        assert!(inverse_of(f32::NAN).is_nan() && inverse_of(f32::MIN_POSITIVE).is_finite());
    }
}
