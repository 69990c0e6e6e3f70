//! libFuzzer over the reader `adapter_weights`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("adapter_weights", data));
