//! `fuzz::targets::distcp_item` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::check("distcp_item", input);
});
