use std::path::Path;
use std::sync::LazyLock;

use flowhn_train::data::{Error, ReadOptions, Tokenizer, train_tokenizer};
use proptest::prelude::*;

use crate::fixture::{SHIPPED, dir, other_tokenizer, tiny, write};

/// Lower-cases and splits at white space: loses text, and is not byte-level.
static WORDS: LazyLock<Tokenizer> = LazyLock::new(|| from_json(WORDS_JSON, "<|endoftext|>").unwrap());

const WORDS_JSON: &str = r#"{"version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": null, "added_tokens": [{"id": 3, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
    "rstrip": false, "normalized": false, "special": true}], "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "one": 1, "zwölf": 2}, "unk_token": "[UNK]"}}"#;

fn from_json(json: &str, eot: &str) -> flowhn_train::data::Result<Tokenizer> {
    Tokenizer::from_json(json.as_bytes(), Path::new("t.json"), eot)
}

#[test]
fn the_shipped_tokenizer_suits_the_shipped_corpus() {
    assert_eq!((SHIPPED.vocab_size(), SHIPPED.eot_id()), (4096, 0));
    let valid = std::fs::read_to_string(tiny("valid.jsonl")).unwrap();
    let (mut n_bytes, mut n_tokens) = (0, 0);
    for line in valid.lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = record["text"].as_str().unwrap();
        n_bytes += text.len();
        n_tokens += SHIPPED.encode(text).unwrap().len();
    }
    let bytes_per_token = n_bytes as f64 / n_tokens as f64;
    assert!(bytes_per_token > 3.2, "{bytes_per_token}");
}

proptest! {
    #[test]
    fn any_text_survives_and_its_bytes_are_shared_out(text in any::<String>()) {
        let encoded = SHIPPED.encode_with_bytes(&text).unwrap();
        prop_assert_eq!(SHIPPED.decode(&encoded.ids).unwrap(), &text[..]);
        prop_assert_eq!(encoded.byte_lens.iter().sum::<u32>() as usize, text.len());
        prop_assert!(!encoded.ids.contains(&SHIPPED.eot_id()));
        let mut at = 0;
        for (id, len) in encoded.ids.iter().zip(encoded.byte_lens) {
            let bytes = &text.as_bytes()[at..at + len as usize];
            prop_assert_eq!(SHIPPED.decode(&[*id]).unwrap(), String::from_utf8_lossy(bytes));
            at += len as usize;
        }
    }

    #[test]
    fn words_and_punctuation_survive(text in "([a-zA-Z]{1,9}|[0-9]{1,4}|[ \t\n]{1,3}|[.,'<|>é日🙂]){0,200}") {
        let ids = SHIPPED.encode(&text).unwrap();
        prop_assert_eq!(SHIPPED.decode(&ids).unwrap(), text);
    }

    #[test]
    fn a_stream_of_any_ids_decodes_like_the_whole(ids in prop::collection::vec(0u32..4096, 0..64)) {
        let mut decoder = SHIPPED.stream_decoder();
        let mut streamed = String::new();
        for &id in &ids {
            streamed += &decoder.push(id).unwrap();
        }
        streamed += &decoder.finish().unwrap();
        prop_assert_eq!(streamed, SHIPPED.decode(&ids).unwrap());
    }

    #[test]
    fn texts_are_streamed_without_broken_characters(text in "[ab é日🙂]{0,40}") {
        let mut decoder = SHIPPED.stream_decoder();
        let mut streamed = String::new();
        for id in SHIPPED.encode(&text).unwrap() {
            streamed += &decoder.push(id).unwrap();
            prop_assert!(text.starts_with(&streamed));
        }
        prop_assert_eq!(&streamed, &text);
        prop_assert_eq!(decoder.finish().unwrap(), "");
    }

    #[test]
    fn lossy_tokenizers_share_out_every_byte_too(text in "( |one|ZWÖLF|x|é|\n){0,20}") {
        let encoded = WORDS.encode_with_bytes(&text).unwrap();
        prop_assert_eq!(encoded.ids.len(), encoded.byte_lens.len());
        if !encoded.ids.is_empty() {
            prop_assert_eq!(encoded.byte_lens.iter().sum::<u32>() as usize, text.len());
        }
    }
}

#[test]
fn text_that_spells_a_special_token_is_text() {
    for text in ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>"] {
        let ids = SHIPPED.encode(text).unwrap();
        assert!(!ids.contains(&0), "{ids:?}");
        assert_eq!(SHIPPED.decode(&ids).unwrap(), text);
    }
    assert_eq!(SHIPPED.decode(&[0]).unwrap(), "");
}

#[test]
fn long_texts_get_the_tokens_of_the_whole_text() {
    // Longer than two pieces, so that it is cut, with all that could tempt a cut into the wrong place.
    let mut text = String::new();
    let words =
        ["word", "don't", " a", "  b", "\n\nC", "é", "x y", "1 2", ", and", "\u{A0}z", "end. Begin", "🙂 smile"];
    for i in 0..200_000usize {
        text.push_str(words[(i * i + i / 7) % words.len()]);
    }
    assert!(text.len() > 3 << 18);
    let library = tokenizers::Tokenizer::from_file(tiny("tokenizer.json")).unwrap();
    let whole = library.encode_fast(text.as_str(), false).unwrap();
    let encoded = SHIPPED.encode_with_bytes(&text).unwrap();
    assert!(encoded.ids == whole.get_ids());
    assert_eq!(encoded.byte_lens.iter().sum::<u32>() as usize, text.len());
}

#[test]
fn lossy_tokenizers_work_and_truncation_is_ignored() {
    let encoded = WORDS.encode_with_bytes(" One ZWÖLF one  ").unwrap();
    assert_eq!(encoded.ids, [1, 2, 1]);
    assert_eq!(encoded.byte_lens, [4, 7, 6]);
    let mut decoder = WORDS.stream_decoder();
    let streamed: String = [1, 2, 1, 3].map(|id| decoder.push(id).unwrap()).concat();
    assert_eq!(streamed + &decoder.finish().unwrap(), WORDS.decode(&[1, 2, 1]).unwrap());
}

#[test]
fn vocabularies_are_checked_by_name() {
    assert!(SHIPPED.check_vocab_size(4096).is_ok());
    assert!(SHIPPED.check_vocab_size(65_536).is_ok());
    let error = SHIPPED.check_vocab_size(4095).unwrap_err();
    assert!(matches!(error, Error::VocabTooLarge { tokenizer: 4096, model: 4095, .. }));
    assert!(error.to_string().contains("vocab_size"), "{error}");
    assert!(matches!(SHIPPED.decode(&[5, 4096]), Err(Error::UnknownToken { id: 4096, vocab_size: 4096 })));
    assert!(matches!(SHIPPED.stream_decoder().push(u32::MAX), Err(Error::UnknownToken { .. })));
}

#[test]
fn tokenizer_files_that_do_not_load_are_named() {
    let missing = Tokenizer::load(Path::new("nowhere/tokenizer.json")).err().unwrap();
    assert!(matches!(missing, Error::Missing { .. }), "{missing}");
    for bad in ["", "{", "[]", "{\"model\": {\"type\": \"Nonsense\"}}", "{\"version\": \"1.0\"}"] {
        let error = from_json(bad, "<|endoftext|>").err().unwrap();
        assert!(matches!(error, Error::Tokenizer { .. }), "{bad}: {error}");
        assert!(error.to_string().starts_with("t.json: tokenizer: "), "{error}");
    }
    let error = from_json(WORDS_JSON, "</s>").err().unwrap();
    assert!(matches!(error, Error::NoEndOfText { .. }));
    assert!(error.to_string().contains("</s>") && error.to_string().contains("<|endoftext|>"), "{error}");
    assert_eq!(from_json(WORDS_JSON, "[UNK]").unwrap().eot_id(), 0);
}

#[test]
fn fingerprints_follow_meaning() {
    let dir = dir();
    let json = std::fs::read_to_string(tiny("tokenizer.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let pretty = write(&dir, "pretty.json", serde_json::to_string_pretty(&value).unwrap());
    let pretty = Tokenizer::load(&pretty).unwrap();
    assert_eq!(pretty.fingerprint(), SHIPPED.fingerprint());
    assert!(pretty.check_fingerprint(SHIPPED.fingerprint(), "the checkpoint").is_ok());

    let other = other_tokenizer(&dir);
    let error = other.check_fingerprint(SHIPPED.fingerprint(), "the checkpoint").unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("the checkpoint was made with tokenizer"), "{message}");
    assert!(message.contains(&SHIPPED.fingerprint().to_string()) && message.contains("other.json"), "{message}");
    // The choice of end-of-text changes what a stream means.
    let unk = from_json(WORDS_JSON, "[UNK]").unwrap();
    assert_ne!(unk.fingerprint(), WORDS.fingerprint());
}

#[test]
fn training_is_deterministic_and_covers_every_byte() {
    let dir = dir();
    let train = |name: &str| {
        let out = dir.path().join(name);
        let report = train_tokenizer(&[tiny("valid.jsonl")], 600, &out, &ReadOptions::default()).unwrap();
        assert_eq!(report.vocab_size, 600);
        assert!(report.n_documents > 10 && report.text_bytes > 100_000);
        std::fs::read(&out).unwrap()
    };
    let first = train("a.json");
    assert!((0..3).all(|_| train("b.json") == first));

    let tokenizer = Tokenizer::load(&dir.path().join("a.json")).unwrap();
    assert_eq!(tokenizer.eot_id(), 0);
    // All of Latin-1 and a few longer characters need all but the bytes that UTF-8 never uses.
    let text: String = (0..0x250).filter_map(char::from_u32).chain("日本🙂".chars()).collect();
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), text);
    // No space is added: the same word has one id at the start of a text and another after a space.
    assert_ne!(tokenizer.encode("the").unwrap(), tokenizer.encode(" the").unwrap());
}

#[test]
fn the_shipped_tokenizer_is_what_training_makes() {
    let dir = dir();
    let out = dir.path().join("tokenizer.json");
    let report = train_tokenizer(&[tiny("train.jsonl")], 4096, &out, &ReadOptions::default()).unwrap();
    assert_eq!((report.n_documents, report.text_bytes), (491, 2_505_856));
    assert!(std::fs::read(out).unwrap() == std::fs::read(tiny("tokenizer.json")).unwrap());
}

#[test]
fn training_refuses_what_it_cannot_do() {
    let dir = dir();
    let out = dir.path().join("out.json");
    let text = write(&dir, "a.txt", "some text, some text");
    let options = ReadOptions::default();
    let small = train_tokenizer(std::slice::from_ref(&text), 256, &out, &options);
    assert!(matches!(small, Err(Error::VocabTooSmall { min: 257, wanted: 256 })));
    assert!(matches!(train_tokenizer(&[], 300, &out, &options), Err(Error::NoFiles)));
    let bad = write(&dir, "bad.jsonl", "{\"text\": \"fine\"}\nnot json\n");
    let broken = train_tokenizer(&[text.clone(), bad], 300, &out, &options);
    assert!(matches!(broken, Err(Error::Json { line: 2, .. })), "{broken:?}");
    assert!(!out.exists());
    // Too little text for the size: smaller than asked for, and said so.
    assert!(train_tokenizer(&[text], 5000, &out, &options).unwrap().vocab_size < 300);
    let leftovers = std::fs::read_dir(dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".tmp"));
    assert_eq!(leftovers.count(), 0);
}
