//! The checks that run on any device, here on the CPU.

use flowhn_torch::testing::run_on_cpu;
use flowhn_train::selftest::cases;

#[test]
fn every_case_passes_on_the_cpu() {
    run_on_cpu(&cases());
}
