//! libFuzzer over the reader `safetensors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("safetensors", data));
