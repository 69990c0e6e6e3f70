//! libFuzzer over the reader `checkpoint`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("checkpoint", data));
