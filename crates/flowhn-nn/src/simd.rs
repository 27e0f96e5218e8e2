//! Scalar functions that the compiler turns into vector code, and the run-time choice of the vector instructions.
//!
//! Everything here is branch-free and `#[inline(always)]`, so a plain loop over a slice becomes AVX2 or AVX-512 code
//! when it runs inside [`dispatch`]. Sums keep a fixed number of partial sums and add them in a fixed order: a result
//! depends neither on the number of threads nor on the width of the machine's vectors.
//!
//! ```
//! use flowhn_nn::simd::{Real, dispatch};
//! let mut x = vec![-1f32, 0., 1.];
//! dispatch(
//!     #[inline(always)]
//!     || x.iter_mut().for_each(|x| *x = x.silu()),
//! );
//! assert!((x[2] - 0.731_058_6).abs() < 1e-6);
//! ```

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};
use std::sync::OnceLock;

use flowhn_torch::cpu::Element;
use half::bf16;
use pulp::Arch;

/// Runs `f`, compiled once for every instruction set that may be there, with the best one that is.
///
/// Write the closure as `#[inline(always)] || …` in the argument itself: a closure that is not inlined keeps the
/// baseline instructions. For the same reason work that rayon hands to other threads needs a `dispatch` inside each
/// task.
#[inline(always)]
pub fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    ARCH.get_or_init(Arch::new).dispatch(f)
}

/// A floating-point type that kernels compute in: f32 with vectorisable functions, f64 with those of `std`.
pub trait Real:
    Element
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Negative infinity, where a running maximum starts.
    const NEG_INFINITY: Self;

    /// The nearest value of this type.
    fn from_f64(value: f64) -> Self;

    /// The same value in f64.
    fn to_f64(self) -> f64;

    /// `self * factor + term`, rounded once.
    fn mul_add(self, factor: Self, term: Self) -> Self;

    /// The square root.
    fn sqrt(self) -> Self;

    /// The absolute value.
    fn abs(self) -> Self;

    /// `e^self`.
    fn exp(self) -> Self;

    /// The natural logarithm. Not vectorised: for once-a-row use.
    fn ln(self) -> Self;

    /// `ln(1 + self)`, accurate near 0.
    fn ln_1p(self) -> Self;

    /// The larger one; `self` where the other is NaN.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// `1 / (1 + e^-self)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        self.sigmoid_pair().0
    }

    /// `sigmoid(self)` and `1 - sigmoid(self)`, both with full relative accuracy.
    #[inline(always)]
    fn sigmoid_pair(self) -> (Self, Self) {
        let tail = (-self.abs()).exp();
        let big = Self::ONE / (Self::ONE + tail);
        let small = tail * big;
        if self >= Self::ZERO { (big, small) } else { (small, big) }
    }

    /// `self * sigmoid(self)`, also called swish.
    #[inline(always)]
    fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// `silu(self)` and its derivative `sigmoid (1 + self (1 - sigmoid))`.
    #[inline(always)]
    fn silu_and_derivative(self) -> (Self, Self) {
        let (sigmoid, rest) = self.sigmoid_pair();
        (self * sigmoid, sigmoid * self.mul_add(rest, Self::ONE))
    }

    /// `ln(1 + e^self)`; its derivative is [`Real::sigmoid`].
    #[inline(always)]
    fn softplus(self) -> Self {
        (-self.abs()).exp().ln_1p() + Self::ZERO.larger(self)
    }
}

impl Real for f32 {
    const ZERO: Self = 0.;
    const ONE: Self = 1.;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as Self
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.abs()
    }

    #[inline(always)]
    fn exp(self) -> Self {
        exp_f32(self)
    }

    #[inline(always)]
    fn ln(self) -> Self {
        self.ln()
    }

    #[inline(always)]
    fn ln_1p(self) -> Self {
        ln_1p_f32(self)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.;
    const ONE: Self = 1.;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.abs()
    }

    #[inline(always)]
    fn exp(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn ln(self) -> Self {
        self.ln()
    }

    #[inline(always)]
    fn ln_1p(self) -> Self {
        self.ln_1p()
    }
}

/// An element type of activations: f32 and f64 as they are, bf16 computed in f32.
pub trait Storage: Element {
    /// The type that kernels compute in.
    type Acc: Real;

    /// The same value in the type of computation.
    fn widen(self) -> Self::Acc;

    /// The nearest element, ties to even.
    fn narrow(value: Self::Acc) -> Self;
}

impl Storage for f32 {
    type Acc = Self;

    #[inline(always)]
    fn widen(self) -> Self {
        self
    }

    #[inline(always)]
    fn narrow(value: Self) -> Self {
        value
    }
}

impl Storage for f64 {
    type Acc = Self;

    #[inline(always)]
    fn widen(self) -> Self {
        self
    }

    #[inline(always)]
    fn narrow(value: Self) -> Self {
        value
    }
}

impl Storage for bf16 {
    type Acc = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding could carry a NaN's payload into infinity.
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

/// Partial sums or maxima kept side by side: four AVX-512 registers of f32, enough to hide the latency of an addition.
const LANES: usize = 64;

/// `sum_i term(x_i)`.
#[inline(always)]
pub fn sum<T: Copy, R: Real>(x: &[T], term: impl Fn(T) -> R) -> R {
    let (body, tail) = x.as_chunks::<LANES>();
    let mut lanes = [R::ZERO; LANES];
    for chunk in body {
        for i in 0..LANES {
            lanes[i] += term(chunk[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += term(x);
    }
    halve(lanes, |a, b| a + b)
}

/// `sum_i term(x_i, y_i, z_i)`.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn sum3<T: Copy, U: Copy, V: Copy, R: Real>(x: &[T], y: &[U], z: &[V], term: impl Fn(T, U, V) -> R) -> R {
    sum4(
        x,
        y,
        z,
        x,
        #[inline(always)]
        |x, y, z, _| term(x, y, z),
    )
}

/// `sum_i term(x_i, y_i, z_i, w_i)`.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn sum4<T: Copy, U: Copy, V: Copy, W: Copy, R: Real>(
    x: &[T],
    y: &[U],
    z: &[V],
    w: &[W],
    term: impl Fn(T, U, V, W) -> R,
) -> R {
    assert!(x.len() == y.len() && x.len() == z.len() && x.len() == w.len(), "sums run over slices of one length");
    let ((x_body, x_tail), (y_body, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let ((z_body, z_tail), (w_body, w_tail)) = (z.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    let mut lanes = [R::ZERO; LANES];
    for (((x, y), z), w) in x_body.iter().zip(y_body).zip(z_body).zip(w_body) {
        for i in 0..LANES {
            lanes[i] += term(x[i], y[i], z[i], w[i]);
        }
    }
    for i in 0..x_tail.len() {
        lanes[i] += term(x_tail[i], y_tail[i], z_tail[i], w_tail[i]);
    }
    halve(lanes, |a, b| a + b)
}

/// Writes `y_i = f(x_i)` and returns `sum_i f(x_i)`.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn map_sum<T: Copy, R: Real>(x: &[T], y: &mut [R], f: impl Fn(T) -> R) -> R {
    assert_eq!(x.len(), y.len(), "a map writes as many elements as it reads");
    let ((x_body, x_tail), (y_body, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
    let mut lanes = [R::ZERO; LANES];
    for (x, y) in x_body.iter().zip(y_body) {
        for i in 0..LANES {
            y[i] = f(x[i]);
            lanes[i] += y[i];
        }
    }
    for (lane, (&x, y)) in lanes.iter_mut().zip(x_tail.iter().zip(y_tail)) {
        *y = f(x);
        *lane += *y;
    }
    halve(lanes, |a, b| a + b)
}

/// The largest element, passing over NaN; negative infinity for an empty slice.
#[inline(always)]
pub fn max<T: Storage>(x: &[T]) -> T::Acc {
    let (body, tail) = x.as_chunks::<LANES>();
    let mut lanes = [T::Acc::NEG_INFINITY; LANES];
    for chunk in body {
        for i in 0..LANES {
            lanes[i] = lanes[i].larger(chunk[i].widen());
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = lane.larger(x.widen());
    }
    halve(lanes, Real::larger)
}

/// Combines the lanes pairwise, the upper half into the lower.
#[inline(always)]
fn halve<R: Real>(mut lanes: [R; LANES], combine: impl Fn(R, R) -> R) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
const LN_2_HI: f32 = 355. / 512.;
const LN_2_LO: f32 = -2.121_944_4e-4;

/// `e^x` within 1 ulp of the exact value, also for subnormal results; 0 and infinity where f32 ends, NaN for NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln(2) / 2`, and `e^r` by its Taylor series to `r^7`, whose remainder is under 0.1 ulp.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for the fraction, so the sum's low bits are the rounded integer.
    const ROUND: f32 = 12_582_912.;
    // Beyond these ends the result is infinity or 0 already. Written as selections so that NaN stays NaN.
    let x = if x > 89. { 89. } else { x };
    let x = if x < -104. { -104. } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let exponent = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let r = n.mul_add(-LN_2_LO, n.mul_add(-LN_2_HI, x));
    let series = (1f32 / 5040.)
        .mul_add(r, 1. / 720.)
        .mul_add(r, 1. / 120.)
        .mul_add(r, 1. / 24.)
        .mul_add(r, 1. / 6.)
        .mul_add(r, 0.5)
        .mul_add(r, 1.)
        .mul_add(r, 1.);
    // Two factors, since 2^n alone can leave the range of normal numbers.
    let half = exponent >> 1;
    series * power_of_two(half) * power_of_two(exponent.wrapping_sub(half))
}

/// `2^n` for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `ln(1 + x)` within 2 ulp; negative infinity at -1, NaN below.
///
/// `1 + x = 2^n (1 + f)` with `1 + f` in [sqrt(1/2), sqrt(2)], and `ln(1 + f) = 2 artanh(f / (2 + f))` by its series.
/// What the rounding of `1 + x` lost comes back as a correction of first order.
#[inline(always)]
pub fn ln_1p_f32(x: f32) -> f32 {
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    let sum = 1. + x;
    let offset = sum.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let exponent = (offset as i32) >> 23;
    let mantissa = f32::from_bits((offset & 0x007f_ffff).wrapping_add(SQRT_HALF_BITS));
    // With exponent 0 the sum is not needed: x itself is the exact f.
    let f = if exponent == 0 { x } else { mantissa - 1. };
    let lost = if x < 1. { x - (sum - 1.) } else { 1. - (sum - x) };
    let correction = if exponent == 0 { 0. } else { lost / sum };

    let s = f / (2. + f);
    let z = s * s;
    let series = (2f32 / 9.).mul_add(z, 2. / 7.).mul_add(z, 2. / 5.).mul_add(z, 2. / 3.) * z;
    let half_square = 0.5 * f * f;
    let n = exponent as f32;
    let low = n.mul_add(LN_2_LO, correction);
    let result = n.mul_add(LN_2_HI, s.mul_add(half_square + series, low) - half_square + f);

    let result = if x == f32::INFINITY { x } else { result };
    let outside = if x == -1. { f32::NEG_INFINITY } else { f32::NAN };
    if x > -1. { result } else { outside }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `step`-th f32 between two positive values, with both signs.
    fn sweep(low: f32, high: f32, step: usize) -> impl Iterator<Item = f32> {
        (low.to_bits()..=high.to_bits()).step_by(step).flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
    }

    /// Distance in units of the last place of the exact value.
    fn ulps(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        let magnitude = nearest.abs().clamp(f32::MIN_POSITIVE, f32::MAX);
        let ulp = f64::from(magnitude) - f64::from(magnitude.next_down());
        if got == nearest { 0. } else { (f64::from(got) - want).abs() / ulp }
    }

    fn assert_within(name: &str, limit: f64, x: f32, got: f32, want: f64) {
        let error = ulps(got, want);
        assert!(error <= limit, "{name}({x:e}) = {got:e}, want {want:e}: {error:.2} ulp");
    }

    #[test]
    fn exp_is_within_an_ulp_over_the_whole_range() {
        for x in sweep(1e-9, 104., 1009) {
            assert_within("exp", 1.01, x, exp_f32(x), f64::from(x).exp());
        }
    }

    #[test]
    fn exp_is_right_at_the_ends() {
        assert_eq!(exp_f32(0.), 1.);
        assert_eq!(exp_f32(-0.), 1.);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.);
        assert_eq!(exp_f32(88.8), f32::INFINITY);
        assert_eq!(exp_f32(f32::MAX), f32::INFINITY);
        assert_eq!(exp_f32(-104.), 0.);
        assert_eq!(exp_f32(-1e30), 0.);
        assert_eq!(exp_f32(-103.), 1.4e-45);
        assert!(exp_f32(88.72).is_finite());
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn ln_1p_is_within_two_ulp() {
        for x in sweep(1e-30, 0.999_999, 997).chain(sweep(1., f32::MAX, 997).filter(|x| *x > 0.)) {
            assert_within("ln_1p", 2., x, ln_1p_f32(x), f64::from(x).ln_1p());
        }
        assert_eq!(ln_1p_f32(0.), 0.);
        assert_eq!(ln_1p_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(ln_1p_f32(-1.), f32::NEG_INFINITY);
        assert!(ln_1p_f32(-1.5).is_nan());
        assert!(ln_1p_f32(f32::NAN).is_nan());
    }

    #[test]
    fn activations_agree_with_f64() {
        for x in sweep(1e-6, 80., 2003) {
            let wide = f64::from(x);
            assert_within("sigmoid", 4., x, x.sigmoid(), wide.sigmoid());
            assert_within("1 - sigmoid", 4., x, x.sigmoid_pair().1, (-wide).sigmoid());
            assert_within("softplus", 4., x, x.softplus(), wide.softplus());
            assert_within("silu", 4., x, x.silu(), wide.silu());
            let (value, slope) = x.silu_and_derivative();
            assert_eq!(value, x.silu());
            // The derivative crosses zero near -1.28, so its error is judged on the scale of its largest value.
            assert!((f64::from(slope) - wide.silu_and_derivative().1).abs() < 3e-7, "silu'({x})");
        }
    }

    #[test]
    fn activations_of_large_arguments_are_their_limits() {
        assert_eq!((1e4f32.softplus(), (-1e4f32).softplus()), (1e4, 0.));
        assert_eq!((1e4f32.sigmoid(), (-1e4f32).sigmoid()), (1., 0.));
        assert_eq!((1e4f32.silu_and_derivative(), (-1e4f32).silu_and_derivative()), ((1e4, 1.), (-0., 0.)));
        assert!(f32::NAN.softplus().is_nan() && f32::NAN.silu().is_nan() && f32::NAN.sigmoid().is_nan());
    }

    #[test]
    fn f64_activations_agree_with_their_definitions() {
        for x in [-30f64, -2., -0.3, 0., 0.7, 3., 30.] {
            assert!((x.sigmoid() - 1. / (1. + (-x).exp())).abs() < 1e-15);
            assert!((x.softplus() - (1. + x.exp()).ln()).abs() < 1e-14 * x.abs().max(1.));
            let step = 1e-6;
            let quotient = ((x + step).silu() - (x - step).silu()) / (2. * step);
            assert!((x.silu_and_derivative().1 - quotient).abs() < 1e-8);
        }
    }

    #[test]
    fn bf16_rounds_like_the_half_crate() {
        for x in sweep(1e-40, f32::MAX, 4099).chain([0., f32::INFINITY, f32::NEG_INFINITY]) {
            let got = bf16::narrow(x);
            assert_eq!(got.to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
            assert_eq!(got.widen(), got.to_f32());
        }
        assert!(bf16::narrow(f32::NAN).widen().is_nan());
        assert!(bf16::narrow(f32::from_bits(0x7f80_0001)).widen().is_nan());
    }

    #[test]
    fn reductions_cover_every_length() {
        for len in [0usize, 1, 63, 64, 65, 127, 200] {
            let x: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin()).collect();
            let exact: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let squares = dispatch(
                #[inline(always)]
                || (sum(&x, |x| x * x), sum4(&x, &x, &x, &x, |x, _, _, y| x * y)),
            );
            assert!((f64::from(squares.0) - exact).abs() < 1e-5 * exact.max(1.), "{len}");
            assert_eq!(squares.0, squares.1);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut doubled = vec![0f32; len];
            let total = map_sum(&x, &mut doubled, |x| 2. * x);
            assert!((f64::from(total) - 2. * x.iter().map(|&x| f64::from(x)).sum::<f64>()).abs() < 1e-5);
            assert!(doubled.iter().zip(&x).all(|(y, x)| *y == 2. * x));
        }
    }

    #[test]
    fn max_passes_over_nan() {
        let mut x = vec![f32::NAN; 70];
        assert_eq!(max(&x), f32::NEG_INFINITY);
        x[67] = 3.;
        assert_eq!(max(&x), 3.);
    }
}
