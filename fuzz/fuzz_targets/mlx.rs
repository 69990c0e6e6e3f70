//! libFuzzer over the reader `mlx`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("mlx", data));
