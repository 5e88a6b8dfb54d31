//! `fuzz::targets::pipeline_layout` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::check("pipeline_layout", input);
});
