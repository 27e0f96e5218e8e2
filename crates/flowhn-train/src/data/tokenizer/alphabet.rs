//! The alphabet of byte-level BPE: each of the 256 bytes has a printable character of its own.

use std::sync::LazyLock;

/// The bytes that a token spells, or `None` where it uses a character outside the alphabet.
pub(super) fn bytes_of(token: &str) -> Option<Vec<u8>> {
    token.chars().map(|c| BYTE_OF.get(c as usize).copied().flatten()).collect()
}

/// Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on, in order.
static BYTE_OF: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x100 + 68];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if own { usize::from(byte) } else { next };
        next += usize::from(!own);
        table[code] = Some(byte);
    }
    table
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_library_and_covers_each_byte_once() {
        let mut seen = [false; 256];
        for c in tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet() {
            let bytes = bytes_of(&c.to_string()).unwrap();
            assert_eq!(bytes.len(), 1);
            assert!(!std::mem::replace(&mut seen[usize::from(bytes[0])], true));
        }
        assert!(seen.iter().all(|&seen| seen));
        assert_eq!(bytes_of("Ġthe").unwrap(), b" the");
        assert_eq!(bytes_of("a b"), None);
        assert_eq!(bytes_of("日"), None);
    }
}
