//! Checks of normalisation, SwiGLU, the product of one token, the embedding and the loss that run on any device.

mod embedding;
mod fp8;
mod fp8_place;
mod head;
mod linear;
mod norm;
mod swiglu;

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = embedding::cases();
    cases.extend(fp8::cases());
    cases.extend(fp8_place::cases());
    cases.extend(head::cases());
    cases.extend(linear::cases());
    cases.extend(norm::cases());
    cases.extend(swiglu::cases());
    cases
}
