//! libFuzzer over the reader `adapter_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("adapter_config", data));
