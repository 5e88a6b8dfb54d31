//! `fuzz::targets::index_json` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::check("index_json", input);
});
