//! `fuzz::targets::common_pt` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::check("common_pt", input);
});
