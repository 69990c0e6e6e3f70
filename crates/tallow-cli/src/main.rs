//! The binary `tallow`.
fn main() {}
