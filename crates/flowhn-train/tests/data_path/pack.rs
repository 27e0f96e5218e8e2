use std::collections::BTreeMap;

use flowhn_train::data::{Dataset, Error, Windows};
use proptest::prelude::*;

use crate::fixture::{dataset, dir, stream, synthetic, texts};

fn documents() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec(prop::collection::vec(1u32..50, 0..12), 1..15)
}

/// The documents in up to three shards.
fn sharded(documents: &[Vec<u32>], n_shards: usize) -> (tempfile::TempDir, Dataset) {
    let dir = dir();
    let parts = documents.chunks(documents.len().div_ceil(n_shards)).enumerate().map(|(idx, documents)| {
        let name = format!("{idx}.tokens");
        (synthetic(&dir, &name, 50, documents), dir.path().join(format!("{idx}.jsonl")))
    });
    let dataset = Dataset::new(parts.collect()).unwrap();
    (dir, dataset)
}

proptest! {
    #[test]
    fn every_target_is_in_one_window(documents in documents(), n_shards in 1usize..4, seq_len in 1usize..20) {
        let (_dir, dataset) = sharded(&documents, n_shards);
        let stream = stream(&documents);
        prop_assert_eq!(dataset.n_tokens() as usize, stream.len() - 1);
        let windows = match Windows::new(&dataset, seq_len) {
            Ok(windows) => windows,
            Err(Error::TooShort { .. }) => {
                prop_assert!(stream.len() - 1 < seq_len);
                return Ok(());
            }
            Err(other) => panic!("{other}"),
        };
        prop_assert!((windows.n_unused() as usize) < seq_len);
        prop_assert_eq!(windows.n_windows() as usize * seq_len + windows.n_unused() as usize, stream.len() - 1);
        let all: Vec<_> = (0..windows.n_windows()).map(|window| (0, window)).collect();
        let batch = windows.batch(&all).unwrap();
        let n = all.len() * seq_len;
        prop_assert_eq!(batch.batch_size, all.len());
        prop_assert_eq!(&batch.inputs[..], &stream[..n]);
        prop_assert_eq!(&batch.targets[..], &stream[1..n + 1]);
        prop_assert_eq!(batch.n_targets as usize, n);
        // One byte a token, none for end-of-text.
        prop_assert_eq!(batch.text_bytes as usize, stream[1..n + 1].iter().filter(|&&id| id != 0).count());

        // Ids are never 0 inside these documents, so end-of-text alone tells the borders.
        for (row, ids) in batch.inputs.chunks(seq_len).enumerate() {
            let segments = &batch.segments[row * seq_len..][..seq_len];
            let mut expected = 0;
            for position in 0..seq_len {
                expected += i64::from(position > 0 && ids[position] == 0);
                prop_assert_eq!(segments[position], expected);
            }
        }
    }

    #[test]
    fn ranges_agree_with_the_stream(documents in documents(), n_shards in 1usize..4, a in 0.0..1.0, b in 0.0..1.0) {
        let (_dir, dataset) = sharded(&documents, n_shards);
        let stream = stream(&documents);
        let place = |fraction: f64| (fraction * (stream.len() + 1) as f64) as usize;
        let range = place(a).min(place(b))..place(a).max(place(b));
        let span = range.start as u64..range.end as u64;
        let mut ids = Vec::new();
        dataset.tokens(span.clone(), &mut ids).unwrap();
        prop_assert_eq!(&ids[..], &stream[range.clone()]);
        let starts: Vec<u64> =
            range.clone().filter(|&at| at < stream.len() - 1 && stream[at] == 0).map(|at| at as u64).collect();
        prop_assert_eq!(dataset.document_starts(span.clone()), starts);
        let inside = dataset.documents(span);
        let expected: BTreeMap<usize, ()> = range
            .filter(|&at| at < stream.len() - 1)
            .map(|at| (stream[..=at].iter().filter(|&&id| id == 0).count() - 1, ()))
            .collect();
        prop_assert_eq!(inside.len(), expected.len());
        let per_shard = documents.len().div_ceil(n_shards);
        for (document, idx) in inside.iter().zip(expected.keys()) {
            let name = format!("{}.jsonl", idx / per_shard);
            prop_assert!(document.source.ends_with(name));
            prop_assert_eq!((document.index, document.line), ((idx % per_shard) as u64, (idx % per_shard) as u64 + 1));
        }
    }

    #[test]
    fn a_split_parts_the_documents(documents in documents(), n_shards in 1usize..4, valid_frac in 0.05..0.95) {
        let (_dir, dataset) = sharded(&documents, n_shards);
        let Ok((train, valid)) = dataset.split(valid_frac) else { return Ok(()) };
        prop_assert_eq!(train.n_documents() + valid.n_documents(), dataset.n_documents());
        prop_assert_eq!(train.n_tokens() + valid.n_tokens(), dataset.n_tokens());
        prop_assert_eq!(train.text_bytes() + valid.text_bytes(), dataset.text_bytes());
        prop_assert_ne!(train.fingerprint(), valid.fingerprint());
        let mut both = Vec::new();
        for side in [&train, &valid] {
            let mut ids = Vec::new();
            side.tokens(0..side.n_tokens() + 1, &mut ids).unwrap();
            let origins = side.documents(0..side.n_tokens());
            prop_assert_eq!(origins.len() as u64, side.n_documents());
            // Cut at end-of-text, a side is whole documents, in order.
            let cut: Vec<&[i64]> = ids[1..ids.len() - 1].split(|&id| id == 0).collect();
            prop_assert_eq!(cut.len(), origins.len());
            both.extend(origins.into_iter().zip(cut.into_iter().map(<[i64]>::to_vec)).map(|(o, ids)| (o.source, o.index, ids)));
        }
        both.sort();
        let expected: Vec<Vec<i64>> = documents.iter().map(|ids| ids.iter().map(|&id| i64::from(id)).collect()).collect();
        prop_assert_eq!(both.into_iter().map(|(.., ids)| ids).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_document_keeps_its_side_whatever_surrounds_it() {
    let sides = |texts: &[String]| -> BTreeMap<String, bool> {
        let dir = dir();
        let (train, valid) = dataset(&dir, texts).split(0.3).unwrap();
        let of = |side: &Dataset| {
            side.documents(0..side.n_tokens()).into_iter().map(|d| d.line as usize - 1).collect::<Vec<_>>()
        };
        let mut sides = BTreeMap::new();
        for (side, name) in [(&train, false), (&valid, true)] {
            for line in of(side) {
                // Copies of a text stay together.
                assert_eq!(*sides.entry(texts[line].clone()).or_insert(name), name);
            }
        }
        sides
    };
    let texts = texts(80);
    let base = sides(&texts);
    let mut shuffled: Vec<String> = texts.iter().rev().cloned().collect();
    shuffled.extend(texts[10..30].iter().cloned());
    shuffled.push("one more".to_owned());
    let mut again = sides(&shuffled);
    again.remove("one more");
    assert_eq!(base, again);
    let n_valid = base.values().filter(|&&valid| valid).count();
    // Four standard deviations of a binomial(80, 0.3) about its mean.
    assert!((8..=40).contains(&n_valid), "{n_valid}");
}

#[test]
fn splits_that_cannot_be_are_refused() {
    let dir = dir();
    let one = dataset(&dir, &texts(1));
    assert!(matches!(one.split(0.5), Err(Error::EmptySplit { n_documents: 1, .. })));
    for bad in [0.0, 1.0, -0.1, 7.0, f64::NAN] {
        let error = one.split(bad).unwrap_err();
        assert!(error.to_string().starts_with("data.valid_frac is "), "{error}");
    }
}

#[test]
fn too_little_text_and_too_small_a_model_are_named() {
    let dir = dir();
    let little = dataset(&dir, &["short".to_owned()]);
    let error = Windows::new(&little, 1000).unwrap_err();
    assert!(matches!(error, Error::TooShort { seq_len: 1000, .. }) && error.to_string().contains("seq_len"), "{error}");
    assert!(matches!(Windows::new(&little, 0), Err(Error::Setting { .. })));
    assert!(little.check_vocab_size(4096).is_ok());
    let error = little.check_vocab_size(1024).unwrap_err();
    assert!(error.to_string().contains("set model.vocab_size to at least 4096"), "{error}");
}

#[test]
fn shards_of_two_tokenizers_do_not_mix() {
    let dir = dir();
    let one = synthetic(&dir, "one.tokens", 50, &[vec![1]]);
    let two = synthetic(&dir, "two.tokens", 51, &[vec![1]]);
    let error = Dataset::new(vec![(one, "one".into()), (two, "two".into())]).unwrap_err();
    assert!(matches!(error, Error::MixedTokenizers { .. }), "{error}");
    assert!(matches!(Dataset::new(vec![]), Err(Error::NoFiles)));
}
