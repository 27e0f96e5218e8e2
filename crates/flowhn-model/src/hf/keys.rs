//! The keys of a `config.json`, taken one by one, so that those left over can be named.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Keys of every configuration that say nothing of what the model computes: how to return it, how to generate, what to call it.
const HARMLESS: &[&str] = &[
    "_attn_implementation_autoset",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_position_embeddings",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// The object of a `config.json` with a note of what was read.
pub(super) struct Keys {
    map: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl Keys {
    /// Parses the text. Python writes infinities as bare words, which JSON does not have; they are read as null.
    pub fn parse(text: &str) -> Result<Self> {
        let map = serde_json::from_str(&without_infinities(text))
            .map_err(|error| Error::Input(format!("not the JSON object of a model's config.json: {error}")))?;
        Ok(Self { map, read: RefCell::default() })
    }

    /// Whether the key is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A size, or `default` where the key is absent or null.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| wrong(key, value, "a size"))
    }

    /// A size that has no default.
    pub fn size(&self, key: &str) -> Result<usize> {
        match self.map.get(key) {
            None | Some(Value::Null) => Err(Error::Input(format!("the configuration has no `{key}`"))),
            Some(_) => self.size_or(key, 0),
        }
    }

    /// A size that may be `"auto"`, which is `auto`.
    pub fn size_or_auto(&self, key: &str, auto: usize) -> Result<usize> {
        match self.get(key) {
            Some(Value::String(text)) if text == "auto" => Ok(auto),
            _ => self.size_or(key, auto),
        }
    }

    /// A number that has no default.
    pub fn number(&self, key: &str) -> Result<f64> {
        match self.map.get(key) {
            None | Some(Value::Null) => Err(Error::Input(format!("the configuration has no `{key}`"))),
            Some(_) => self.number_or(key, 0.),
        }
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| wrong(key, value, "a number"))
    }

    /// `N` numbers, one of which may stand without a list, or `default` where the key is absent or null.
    pub fn numbers_or<const N: usize>(&self, key: &str, default: [f64; N]) -> Result<[f64; N]> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let numbers: Option<Vec<f64>> = list.iter().map(Value::as_f64).collect();
        let want = if N == 1 { "a number".to_owned() } else { format!("{N} numbers") };
        numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(|| wrong(key, value, &want))
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| wrong(key, value, "true or false"))
    }

    /// The keys of an object, where there is one.
    pub fn inner(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map: map.clone(), read: RefCell::default() })),
            Some(other) => Err(wrong(key, other, "an object")),
        }
    }

    /// A size that may be absent or null.
    pub fn maybe_size(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(_) => self.size_or(key, 0).map(Some),
        }
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// Refuses a key whose value is not among those that we compute; absent and null are.
    pub fn only(&self, key: &str, supported: &[Value]) -> Result<()> {
        match self.get(key).filter(|value| !supported.contains(value)) {
            None => Ok(()),
            Some(value) => {
                let list: Vec<String> = supported.iter().map(Value::to_string).collect();
                let known = if list.is_empty() { "leaving it out".to_owned() } else { list.join(" or ") };
                Err(Error::Input(format!("`{key}` is {value}, and only {known} is supported")))
            }
        }
    }

    /// Takes keys that change nothing we compute, such as how weights start.
    pub fn ignore(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|&key| key.to_owned()));
    }

    /// Keys with a value that nothing asked for.
    pub fn left_over(&self) -> Vec<String> {
        let read = self.read.borrow();
        let unknown = self
            .map
            .iter()
            .filter(|(key, value)| !value.is_null() && !read.contains(*key) && !HARMLESS.contains(&key.as_str()));
        unknown.map(|(key, _)| key.clone()).collect()
    }
}

fn wrong(key: &str, value: &Value, want: &str) -> Error {
    Error::Input(format!("`{key}` is {value}, expected {want}"))
}

/// Replaces the bare words that Python's JSON has for numbers that are not finite.
fn without_infinities(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if !in_string
            && let Some(word) = ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| rest.starts_with(word))
        {
            out.push_str("null");
            rest = &rest[word.len()..];
            continue;
        }
        in_string ^= first == '"' && !escaped;
        escaped = first == '\\' && !escaped;
        out.push(first);
        rest = &rest[first.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_are_null_outside_of_strings() {
        let text = r#"{"a": [0.0, Infinity], "b": "Infinity \" NaN", "c": -Infinity, "d": 1}"#;
        let want = r#"{"a": [0.0, null], "b": "Infinity \" NaN", "c": null, "d": 1}"#;
        assert_eq!(without_infinities(text), want);
    }

    #[test]
    fn values_are_checked_and_leftovers_named() {
        let text = r#"{"a": 3, "b": "auto", "c": 1.5, "new_key": 1, "top_k": 50, "none": null}"#;
        let keys = Keys::parse(text).unwrap();
        assert_eq!((keys.size("a").unwrap(), keys.size_or_auto("b", 7).unwrap()), (3, 7));
        assert!(keys.size("c").unwrap_err().to_string().contains("`c` is 1.5, expected a size"));
        assert!(keys.size("absent").unwrap_err().to_string().contains("no `absent`"));
        assert_eq!(keys.maybe_size("none").unwrap(), None);
        assert_eq!(keys.left_over(), ["new_key"]);
        assert!(keys.only("a", &[1.into()]).unwrap_err().to_string().contains("`a` is 3, and only 1 is supported"));
    }
}
