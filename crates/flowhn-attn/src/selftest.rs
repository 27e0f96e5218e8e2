//! Checks of rotary embedding, attention and steps of decoding that run on any device.

mod attention;
mod decode;
mod long;
mod rotary;

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = attention::cases();
    cases.extend(rotary::cases());
    cases.extend(decode::cases());
    cases.extend(long::cases());
    cases
}
