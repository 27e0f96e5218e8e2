use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::Xxh3;

/// A 128-bit hash that identifies a tokenizer or a data set; prints and parses as 32 hexadecimal digits.
///
/// It tells accidental differences apart and is no defence against forgery.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub(super) [u8; 16]);

impl Fingerprint {
    /// Of nothing: a model that came without tokenizer or text.
    pub(crate) const NONE: Self = Self([0; 16]);

    /// Hashes bytes.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        let mut hasher = Xxh3::new();
        hasher.update(bytes);
        Self::finish(&hasher)
    }

    pub(super) fn finish(hasher: &Xxh3) -> Self {
        Fingerprint(hasher.digest128().to_le_bytes())
    }

    /// Hashes a JSON value by its meaning: white space and the order of keys do not matter.
    pub(super) fn update_json(hasher: &mut Xxh3, value: &serde_json::Value) {
        use serde_json::Value;
        let mut sized = |tag: u8, len: usize| {
            hasher.update(&[tag]);
            hasher.update(&(len as u64).to_le_bytes());
        };
        match value {
            Value::Null => sized(b'0', 0),
            Value::Bool(b) => sized(b'b', usize::from(*b)),
            Value::Number(n) => {
                let n = n.to_string();
                sized(b'n', n.len());
                hasher.update(n.as_bytes());
            }
            Value::String(s) => {
                sized(b's', s.len());
                hasher.update(s.as_bytes());
            }
            Value::Array(items) => {
                sized(b'a', items.len());
                for item in items {
                    Self::update_json(hasher, item);
                }
            }
            Value::Object(map) => {
                sized(b'o', map.len());
                let mut entries: Vec<_> = map.iter().collect();
                entries.sort_unstable_by_key(|(key, _)| *key);
                for (key, item) in entries {
                    hasher.update(&(key.len() as u64).to_le_bytes());
                    hasher.update(key.as_bytes());
                    Self::update_json(hasher, item);
                }
            }
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "a fingerprint is 32 hexadecimal digits";
        if text.len() != 32 || !text.is_ascii() {
            return Err(WANTED);
        }
        let mut bytes = [0; 16];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| WANTED)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| WANTED)?;
        }
        Ok(Fingerprint(bytes))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Fingerprint {
        let mut hasher = Xxh3::new();
        Fingerprint::update_json(&mut hasher, &serde_json::from_str(json).unwrap());
        Fingerprint::finish(&hasher)
    }

    #[test]
    fn meaning_counts_and_layout_does_not() {
        let base = of(r#"{"a": [1, "x"], "b": null}"#);
        assert_eq!(base, of("{\"b\":null,\n\"a\":[1,\"x\"]}"));
        for other in [r#"{"a": ["x", 1], "b": null}"#, r#"{"a": [1, "x"]}"#, r#"{"a": [1, "x"], "b": 0}"#, "[[],[]]"] {
            assert_ne!(base, of(other), "{other}");
        }
        assert_ne!(of("[[1],[]]"), of("[[],[1]]"));
    }

    #[test]
    fn prints_and_parses() {
        let print = of("{}");
        assert_eq!(print.to_string().parse(), Ok(print));
        assert_eq!(serde_json::from_str::<Fingerprint>(&serde_json::to_string(&print).unwrap()).unwrap(), print);
        for bad in ["", "00", "zz000000000000000000000000000000", "é0000000000000000000000000000000"] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
