//! Checks of scans and convolutions that run on any device.

mod conv;
mod long;
mod scan;
mod ssd;
mod steps;
mod unread_state;

use flowhn_torch::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = conv::cases();
    cases.extend(scan::cases());
    cases.extend(ssd::cases());
    cases.extend(unread_state::cases());
    cases.extend(long::cases());
    cases.extend(steps::cases());
    cases
}
