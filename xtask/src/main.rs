//! Everything CI runs, one command: `cargo xtask ci`.
fn main() {}
