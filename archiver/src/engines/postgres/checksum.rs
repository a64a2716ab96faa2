//! The checksums that a backup_manifest gives to files.

use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};

/// What a file's bytes must add up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checksum {
    algorithm: Algorithm,
    value: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Crc32c,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

const ALGORITHMS: [(&str, Algorithm, usize); 5] = [
    ("CRC32C", Algorithm::Crc32c, 4),
    ("SHA224", Algorithm::Sha224, 28),
    ("SHA256", Algorithm::Sha256, 32),
    ("SHA384", Algorithm::Sha384, 48),
    ("SHA512", Algorithm::Sha512, 64),
];

impl Checksum {
    /// Reads an algorithm's name and a value in hexadecimal.
    pub(super) fn parse(algorithm: &str, value: &str) -> Option<Self> {
        let (_, algorithm, length) = ALGORITHMS.iter().find(|(name, _, _)| *name == algorithm)?;
        let value = parse_hex(value).filter(|value| value.len() == *length)?;
        Some(Self { algorithm: *algorithm, value })
    }

    /// The algorithm's name.
    pub(super) fn algorithm(&self) -> &'static str {
        ALGORITHMS.iter().find(|(_, a, _)| *a == self.algorithm).map_or("", |(name, _, _)| name)
    }

    /// What computes it.
    pub(super) fn hasher(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Crc32c => Hasher::Crc32c(0),
            Algorithm::Sha224 => Hasher::Sha224(Sha224::new()),
            Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            Algorithm::Sha384 => Hasher::Sha384(Sha384::new()),
            Algorithm::Sha512 => Hasher::Sha512(Sha512::new()),
        }
    }

    /// Whether the bytes that went through `hasher` are these; else what was found and expected, in hexadecimal.
    pub(super) fn compare(&self, hasher: Hasher) -> Result<(), (String, String)> {
        let found = hasher.finish();
        if found == self.value { Ok(()) } else { Err((to_hex(&found), to_hex(&self.value))) }
    }
}

/// Takes a file's bytes, in order.
#[derive(Debug)]
pub(super) enum Hasher {
    Crc32c(u32),
    Sha224(Sha224),
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            Self::Sha224(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha384(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> Vec<u8> {
        match self {
            // PostgreSQL prints the number's bytes as they lie in its memory.
            Self::Crc32c(crc) => crc.to_le_bytes().to_vec(),
            Self::Sha224(hasher) => hasher.finalize().to_vec(),
            Self::Sha256(hasher) => hasher.finalize().to_vec(),
            Self::Sha384(hasher) => hasher.finalize().to_vec(),
            Self::Sha512(hasher) => hasher.finalize().to_vec(),
        }
    }
}

/// Bytes out of hexadecimal digits.
pub(super) fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2))?;
    digits.chunks_exact(2).map(|pair| Some(pair.first()? << 4 | pair.last()?)).collect()
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_algorithm_knows_the_three_letters() {
        for (algorithm, value) in [
            // CRC-32C("abc") is 364b3fb7.
            ("CRC32C", "b73f4b36"),
            ("SHA224", "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            ("SHA256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                "SHA384",
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                "SHA512",
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ] {
            let checksum = Checksum::parse(algorithm, value).unwrap();
            assert_eq!(checksum.algorithm(), algorithm);
            let mut hasher = checksum.hasher();
            hasher.update(b"a");
            hasher.update(b"bc");
            assert_eq!(checksum.compare(hasher), Ok(()), "{algorithm}");
            let (_, expected) = checksum.compare(checksum.hasher()).unwrap_err();
            assert_eq!(expected, value);
        }
        for (algorithm, value) in
            [("MD5", "00"), ("CRC32C", "b73f4b"), ("CRC32C", "b73f4bxx"), ("CRC32C", "b73f4b361")]
        {
            assert_eq!(Checksum::parse(algorithm, value), None);
        }
    }
}
