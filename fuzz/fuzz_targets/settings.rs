//! libFuzzer over the reader `settings`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("settings", data));
