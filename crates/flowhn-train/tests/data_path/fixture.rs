//! Small texts, a small tokenizer, and data sets made of them.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use flowhn_train::data::{
    Dataset, Encoded, PrepareOptions, ReadOptions, Shard, ShardMeta, ShardWriter, Tokenizer, prepare, train_tokenizer,
};
use tempfile::TempDir;

/// The tokenizer that ships with the repository.
pub static SHIPPED: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(&tiny("tokenizer.json")).unwrap());

/// A file of the shipped tiny corpus.
pub fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tiny").join(name)
}

pub fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

pub fn write(dir: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Documents with a word of their own each, so that no two are equal.
pub fn texts(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("Document {i} tells of é and 🙂.\n\n{}", "It has words. ".repeat(1 + i * 7 % 13))).collect()
}

pub fn jsonl(texts: &[String]) -> String {
    texts.iter().map(|text| format!("{}\n", serde_json::json!({ "text": text }))).collect()
}

pub fn options(dir: &TempDir) -> PrepareOptions {
    PrepareOptions { cache_dir: dir.path().join("cache"), read: ReadOptions::default() }
}

/// A data set of some texts; it lives as long as the directory.
pub fn dataset(dir: &TempDir, texts: &[String]) -> Dataset {
    let path = write(dir, "texts.jsonl", jsonl(texts));
    prepare(&[path], &SHIPPED, &options(dir), &()).unwrap()
}

/// Another tokenizer than the shipped one.
pub fn other_tokenizer(dir: &TempDir) -> Tokenizer {
    let text = write(dir, "other.txt", "another text, another tokenizer, another fingerprint");
    let path = dir.path().join("other.json");
    train_tokenizer(&[text], 270, &path, &ReadOptions::default()).unwrap();
    Tokenizer::load(&path).unwrap()
}

/// Tokens without a tokenizer: each document is ids with one byte each.
pub fn synthetic(dir: &TempDir, name: &str, vocab_size: u32, documents: &[Vec<u32>]) -> Shard {
    let path = dir.path().join(name);
    let meta = ShardMeta { vocab_size, eot_id: 0, tokenizer: SHIPPED.fingerprint() };
    let mut writer = ShardWriter::create(&path, meta).unwrap();
    for (idx, ids) in documents.iter().enumerate() {
        let encoded = Encoded { ids: ids.clone(), byte_lens: vec![1; ids.len()] };
        let hash = (idx as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ ids.len() as u64;
        writer.push(&encoded, ids.len() as u64, hash, idx as u64 + 1).unwrap();
    }
    writer.finish().unwrap();
    Shard::open(&path).unwrap()
}

/// The stream that documents should make: end-of-text before each, and one at the end.
pub fn stream(documents: &[Vec<u32>]) -> Vec<i64> {
    let mut stream: Vec<i64> =
        documents.iter().flat_map(|ids| std::iter::once(0).chain(ids.iter().map(|&id| i64::from(id)))).collect();
    stream.push(0);
    stream
}
