//! Checks of rotary embedding and attention that run on any device.

mod attention;
mod rotary;

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = attention::cases();
    cases.extend(rotary::cases());
    cases
}
