//! `fuzz::targets::safetensors_header` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::check("safetensors_header", input);
});
