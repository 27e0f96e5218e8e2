//! The checks of `flowhn selftest`, on the CPU.

#[test]
fn checks_pass_on_the_cpu() {
    flowhn_torch::testing::run_on_cpu(&flowhn_fuse::selftest::cases());
}
