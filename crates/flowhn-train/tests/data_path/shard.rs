use std::path::PathBuf;

use flowhn_train::data::{Encoded, Error, Shard, ShardMeta, ShardProblem, ShardWriter};
use proptest::prelude::*;
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

use crate::fixture::{SHIPPED, dir, synthetic};

// Offsets of the header's fields, written down a second time so that a change of the format cannot pass unnoticed.
const AT_VERSION: usize = 8;
const AT_PAYLOAD_CHECKSUM: usize = 72;
const AT_HEADER_CHECKSUM: usize = 120;
const HEADER_BYTES: usize = 128;

fn documents() -> impl Strategy<Value = Vec<Vec<(u32, u32)>>> {
    let byte_len = prop_oneof![8 => 0u32..6, 1 => 250u32..260, 1 => Just(70_000u32)];
    prop::collection::vec(prop::collection::vec((0u32..300, byte_len), 0..20), 1..12)
}

proptest! {
    #[test]
    fn what_is_written_is_read(documents in documents(), wide in any::<bool>(), from in 0.0..1.0, to in 0.0..1.0) {
        let dir = dir();
        let path = dir.path().join("a.tokens");
        let vocab_size = if wide { 65_537 } else { 65_536 };
        let scale = if wide { 218 } else { 217 };
        let meta = ShardMeta { vocab_size, eot_id: 299, tokenizer: SHIPPED.fingerprint() };
        let mut writer = ShardWriter::create(&path, meta).unwrap();
        let (mut ids, mut bytes) = (Vec::new(), Vec::new());
        for (idx, document) in documents.iter().enumerate() {
            let encoded = Encoded {
                ids: document.iter().map(|&(id, _)| id * scale).collect(),
                byte_lens: document.iter().map(|&(_, n)| n).collect(),
            };
            // Text that became no token is charged to the end-of-text.
            let extra = if document.is_empty() { 300 } else { 0 };
            let text_bytes = extra + encoded.byte_lens.iter().map(|&n| u64::from(n)).sum::<u64>();
            writer.push(&encoded, text_bytes, idx as u64 * 3, idx as u64 + 10).unwrap();
            ids.push(299);
            ids.extend(encoded.ids.iter().map(|&id| i64::from(id)));
            bytes.push(extra);
            bytes.extend(encoded.byte_lens.iter().map(|&n| u64::from(n)));
        }
        writer.finish().unwrap();

        let shard = Shard::open(&path).unwrap();
        prop_assert_eq!(shard.meta(), meta);
        prop_assert_eq!(shard.token_width(), if wide { 4 } else { 2 });
        prop_assert_eq!((shard.n_tokens(), shard.n_documents()), (ids.len() as u64, documents.len() as u64));
        prop_assert_eq!(shard.text_bytes(), bytes.iter().sum::<u64>());
        let mut read = Vec::new();
        shard.tokens(0..shard.n_tokens(), &mut read);
        prop_assert_eq!(&read, &ids);

        let (from, to) = ((from * ids.len() as f64) as usize, (to * ids.len() as f64) as usize);
        let range = from.min(to)..from.max(to);
        read.clear();
        shard.tokens(range.start as u64..range.end as u64, &mut read);
        prop_assert_eq!(&read, &ids[range.clone()]);
        prop_assert_eq!(shard.bytes_behind(range.start as u64..range.end as u64), bytes[range].iter().sum::<u64>());

        let mut start = 0;
        for (idx, document) in (0u64..).zip(&documents) {
            let entry = shard.document(idx);
            prop_assert_eq!((entry.start, entry.text_hash, entry.line), (start, idx * 3, idx + 10));
            for position in start..start + 1 + document.len() as u64 {
                prop_assert_eq!(shard.document_at(position), idx);
            }
            start += 1 + document.len() as u64;
        }
    }
}

fn small(dir: &TempDir) -> (PathBuf, Vec<u8>) {
    let path = dir.path().join("small.tokens");
    drop(synthetic(dir, "small.tokens", 100, &[vec![5, 6, 7], vec![], vec![99]]));
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

fn open_with(path: &PathBuf, bytes: &[u8]) -> Error {
    std::fs::write(path, bytes).unwrap();
    let error = Shard::open(path).err().unwrap();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert!(error.to_string().contains("delete"), "{error}");
    error
}

/// Makes both checksums right again, as a foreign program with the same format would.
fn seal(bytes: &mut [u8]) {
    let payload = xxh3_64(&bytes[HEADER_BYTES..]);
    bytes[AT_PAYLOAD_CHECKSUM..AT_PAYLOAD_CHECKSUM + 8].copy_from_slice(&payload.to_le_bytes());
    let header = xxh3_64(&bytes[..AT_HEADER_CHECKSUM]);
    bytes[AT_HEADER_CHECKSUM..HEADER_BYTES].copy_from_slice(&header.to_le_bytes());
}

#[test]
fn every_truncation_is_noticed() {
    let dir = dir();
    let (path, bytes) = small(&dir);
    for len in 0..bytes.len() {
        let error = open_with(&path, &bytes[..len]);
        assert!(matches!(&error, Error::Shard { problem: ShardProblem::Length { .. }, .. }), "{len}: {error}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(open_with(&path, &longer), Error::Shard { problem: ShardProblem::Length { .. }, .. }));
}

#[test]
fn every_changed_byte_is_noticed() {
    let dir = dir();
    let (path, bytes) = small(&dir);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        let error = open_with(&path, &changed);
        let Error::Shard { problem, .. } = &error else { panic!("{at}: {error}") };
        let expected = match at {
            0..8 => *problem == ShardProblem::Magic,
            8..12 => matches!(problem, ShardProblem::Version { .. }),
            12..HEADER_BYTES => matches!(problem, ShardProblem::Header(_)),
            _ => matches!(problem, ShardProblem::Checksum { .. }),
        };
        assert!(expected, "{at}: {error}");
    }
}

#[test]
fn later_versions_are_refused_by_number() {
    let dir = dir();
    let (path, mut bytes) = small(&dir);
    bytes[AT_VERSION] = 2;
    seal(&mut bytes);
    let error = open_with(&path, &bytes);
    assert!(error.to_string().contains("format version 2, this build reads 1"), "{error}");
}

#[test]
fn ids_outside_the_vocabulary_are_refused_by_position() {
    let dir = dir();
    let (path, mut bytes) = small(&dir);
    // Token 3 is the last of the first document; each takes two bytes.
    bytes[HEADER_BYTES + 6..HEADER_BYTES + 8].copy_from_slice(&100u16.to_le_bytes());
    seal(&mut bytes);
    let error = open_with(&path, &bytes);
    assert!(matches!(error, Error::TokenOutOfRange { position: 3, id: 100, vocab_size: 100, .. }), "{error}");
}

#[test]
fn an_index_that_contradicts_the_tokens_is_refused() {
    let dir = dir();
    let (path, bytes) = small(&dir);
    let index = bytes.len() - 3 * 32;
    for (at, value, document) in [(index, 1u64, 0), (index + 32, 0, 1), (index + 64, 7, 2), (index + 64, 4, 2)] {
        let mut changed = bytes.clone();
        changed[at..at + 8].copy_from_slice(&value.to_le_bytes());
        seal(&mut changed);
        let error = open_with(&path, &changed);
        let Error::Shard { problem, .. } = &error else { panic!("{error}") };
        assert_eq!(*problem, ShardProblem::Index(document));
    }
    let mut changed = bytes.clone();
    changed[index + 8] += 1;
    seal(&mut changed);
    let error = open_with(&path, &changed);
    assert!(
        matches!(error, Error::Shard { problem: ShardProblem::TextBytes { expected: 4, found: 5 }, .. }),
        "{error}"
    );
}

#[test]
fn what_is_no_shard_is_refused() {
    let dir = dir();
    let missing = Shard::open(&dir.path().join("none.tokens")).err().unwrap();
    assert!(matches!(missing, Error::Missing { .. }), "{missing}");
    assert!(matches!(Shard::open(dir.path()).err().unwrap(), Error::NotAFile { .. }));
    let path = dir.path().join("text.tokens");
    let text = "{\"text\": \"not a shard\"}\n".repeat(20);
    assert!(matches!(open_with(&path, text.as_bytes()), Error::Shard { problem: ShardProblem::Magic, .. }));
}

#[test]
fn the_writer_refuses_nonsense_and_leaves_nothing_behind() {
    let dir = dir();
    let path = dir.path().join("a.tokens");
    let meta = ShardMeta { vocab_size: 10, eot_id: 0, tokenizer: SHIPPED.fingerprint() };
    assert!(ShardWriter::create(&path, ShardMeta { eot_id: 10, ..meta }).is_err());
    let mut writer = ShardWriter::create(&path, meta).unwrap();
    let document = Encoded { ids: vec![3, 10], byte_lens: vec![1, 1] };
    assert!(matches!(writer.push(&document, 2, 0, 1), Err(Error::TokenOutOfRange { position: 2, id: 10, .. })));
    let document = Encoded { ids: vec![3], byte_lens: vec![2] };
    assert!(matches!(writer.push(&document, 1, 0, 1), Err(Error::Setting { .. })));
    assert!(matches!(writer.finish(), Err(Error::NoDocuments { .. })));

    let mut writer = ShardWriter::create(&path, meta).unwrap();
    writer.push(&document, 2, 0, 1).unwrap();
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
