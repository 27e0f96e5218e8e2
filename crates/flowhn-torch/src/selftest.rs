//! Checks of streams, events, memory, graphs and functions that run on any device.

use crate::testing::Case;

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
