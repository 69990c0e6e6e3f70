//! libFuzzer over the reader `tokenizer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tallow_fuzz::run("tokenizer", data));
