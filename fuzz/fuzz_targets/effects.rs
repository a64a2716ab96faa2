#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| waltide_fuzz::effects(data));
