//! Checks of scans and convolutions that run on any device.

mod scan;
mod ssd;

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = scan::cases();
    cases.extend(ssd::cases());
    cases
}
