//! The `flowhn` command line.
fn main() {}
