//! PostgreSQL's own compression, as page images use it: groups of a control byte and eight items, each a
//! literal byte or a reference to output already made.

/// The shortest reference; the length nibble counts from here.
const REFERENCE_BYTES_MIN: usize = 3;
/// A length nibble that says that one more length byte follows.
const LONG_REFERENCE: u8 = 0x0F;

/// Fills `out` from `src`. `None` where the two do not end together or a reference points before the start.
pub(super) fn decompress(src: &[u8], out: &mut [u8]) -> Option<()> {
    let mut input = src.iter().copied();
    let mut filled = 0usize;
    while filled < out.len() {
        let control = input.next()?;
        for item in 0..8 {
            if filled == out.len() {
                // Bits that belong to no item are never set by the compressor, but nothing reads them.
                break;
            }
            if control >> item & 1 == 0 {
                *out.get_mut(filled)? = input.next()?;
                filled = filled.checked_add(1)?;
                continue;
            }
            let (high, low) = (input.next()?, input.next()?);
            let distance = usize::from(high & 0xF0) << 4 | usize::from(low);
            let nibble = high & 0x0F;
            let extra = if nibble == LONG_REFERENCE { usize::from(input.next()?) } else { 0 };
            let len = usize::from(nibble).checked_add(REFERENCE_BYTES_MIN)?.checked_add(extra)?;
            let end = filled.checked_add(len).filter(|end| *end <= out.len())?;
            let from = filled.checked_sub(distance).filter(|_| distance > 0)?;
            copy_within_output(out, from, filled, end)?;
            filled = end;
        }
    }
    input.next().is_none().then_some(())
}

/// Repeats `out[from..]` over `out[at..end]`; the two may overlap, which repeats a pattern.
fn copy_within_output(out: &mut [u8], from: usize, at: usize, end: usize) -> Option<()> {
    let mut at = at;
    while at < end {
        // What lies between `from` and `at` is final, and doubles with each round.
        let len = end.checked_sub(at)?.min(at.checked_sub(from)?);
        let (made, rest) = out.split_at_mut_checked(at)?;
        rest.get_mut(..len)?.copy_from_slice(made.get(from..from.checked_add(len)?)?);
        at = at.checked_add(len)?;
    }
    Some(())
}

/// Compresses greedily, for tests only: enough to make every kind of item.
#[cfg(test)]
pub(super) fn compress(src: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < src.len() {
        let control = out.len();
        out.push(0);
        for item in 0..8 {
            if at >= src.len() {
                break;
            }
            let longest = (1..=at.min(4095))
                .map(|d| {
                    let len =
                        (0..src.len() - at).take(273).take_while(|i| src[at + i] == src[at + i - d]).count();
                    (len, d)
                })
                .max_by_key(|(len, d)| (*len, usize::MAX - d))
                .filter(|(len, _)| *len >= REFERENCE_BYTES_MIN);
            match longest {
                Some((len, d)) => {
                    out[control] |= 1 << item;
                    let nibble = (len - 3).min(15);
                    out.push(((d >> 8) << 4) as u8 | nibble as u8);
                    out.push(d as u8);
                    if nibble == 15 {
                        out.push((len - 18) as u8);
                    }
                    at += len;
                }
                None => {
                    out.push(src[at]);
                    at += 1;
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_compressed_comes_back_and_every_truncation_is_refused(
            src in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 1..400)
        ) {
            let packed = compress(&src);
            let mut out = vec![0; src.len()];
            prop_assert_eq!(decompress(&packed, &mut out), Some(()));
            prop_assert_eq!(&out, &src);
            for cut in 0..packed.len() {
                prop_assert_eq!(decompress(&packed[..cut], &mut out), None);
            }
        }

        #[test]
        fn any_bytes_decompress_or_are_refused(src in proptest::collection::vec(any::<u8>(), 0..300), len in 0usize..600) {
            let _ = decompress(&src, &mut vec![0; len]);
        }
    }

    #[test]
    fn a_reference_before_the_start_is_refused() {
        assert_eq!(decompress(&[0b10, b'a', 0x00, 0x02], &mut [0; 4]), None);
        let mut out = [0; 4];
        assert_eq!(decompress(&[0b10, b'a', 0x00, 0x01], &mut out), Some(()));
        assert_eq!(&out, b"aaaa");
    }
}
