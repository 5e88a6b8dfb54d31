//! `fuzz::targets::torch_dist_metadata` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::check("torch_dist_metadata", input);
});
