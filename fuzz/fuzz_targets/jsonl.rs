//! libFuzzer over the reader `jsonl`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("jsonl", data));
