//! Whether there is nothing but zeros, which is asked of whole segments and of every page.

/// So many bytes are looked at together.
const STEP: usize = 64;

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (steps, rest) = bytes.as_chunks::<STEP>();
    let none = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte) == 0;
    steps.iter().all(|step| none(step)) && none(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_makes_the_difference_wherever_it_is() {
        for length in [0, 1, STEP - 1, STEP, STEP + 1, 3 * STEP + 7] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes), "{length}");
            for at in 0..length {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
