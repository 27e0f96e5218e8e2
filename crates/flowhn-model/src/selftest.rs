//! Checks of whole models that run on any device.

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
