//! Checks of rotary embedding and attention that run on any device.

mod attention;

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    attention::cases()
}
