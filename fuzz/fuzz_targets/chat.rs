//! libFuzzer over the reader `chat`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("chat", data));
