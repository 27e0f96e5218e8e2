use std::collections::BTreeMap;

use flowhn_train::data::{
    Dataset, Error, IGNORE_TARGET, PrepareOptions, ReadOptions, Score, Unigram, ValidationSet, prepare,
};
use proptest::prelude::*;

use crate::fixture::{SHIPPED, dir, stream, synthetic, texts, tiny};

proptest! {
    #[test]
    fn every_target_counts_once_and_bytes_are_exact(
        documents in prop::collection::vec(prop::collection::vec(1u32..50, 0..12), 1..15),
        seq_len in 1usize..20,
        batch_size in 1usize..5,
        max_windows in prop::option::of(1u64..6),
    ) {
        let dir = dir();
        let shard = synthetic(&dir, "a.tokens", 50, &documents);
        let dataset = Dataset::new(vec![(shard, "a".into())]).unwrap();
        let stream = stream(&documents);
        let n = stream.len() - 1;
        let valid = ValidationSet::new(&dataset, seq_len, batch_size, max_windows).unwrap();
        let n_expected = max_windows.map_or(n, |w| n.min(w as usize * seq_len));
        prop_assert_eq!(valid.seq_len(), seq_len.min(n));
        prop_assert_eq!(valid.n_targets() as usize, n_expected);
        let (mut targets, mut n_targets, mut text_bytes, mut n_batches) = (Vec::new(), 0, 0, 0);
        for batch in valid.batches() {
            let batch = batch.unwrap();
            prop_assert!(batch.batch_size <= batch_size);
            prop_assert_eq!(batch.inputs.len(), batch.batch_size * valid.seq_len());
            prop_assert_eq!(batch.targets.len(), batch.inputs.len());
            prop_assert_eq!(batch.segments.len(), batch.inputs.len());
            for (idx, row) in batch.rows.iter().enumerate() {
                let start = row.start as usize;
                let span = idx * valid.seq_len()..(idx + 1) * valid.seq_len();
                prop_assert_eq!(&batch.inputs[span.clone()], &stream[start..start + valid.seq_len()]);
                for (offset, &target) in batch.targets[span].iter().enumerate() {
                    prop_assert!(target == IGNORE_TARGET || target == stream[start + offset + 1]);
                }
            }
            targets.extend(batch.targets.into_iter().filter(|&id| id != IGNORE_TARGET));
            n_targets += batch.n_targets;
            text_bytes += batch.text_bytes;
            n_batches += 1;
        }
        prop_assert_eq!(&targets[..], &stream[1..n_expected + 1]);
        prop_assert_eq!(n_targets as usize, n_expected);
        prop_assert_eq!(n_batches, valid.n_batches());
        let bytes = targets.iter().filter(|&&id| id != 0).count() as u64;
        prop_assert_eq!((text_bytes, valid.text_bytes()), (bytes, bytes));
    }

    #[test]
    fn bytes_of_real_text_are_its_size(picks in prop::collection::vec("[a-zé🙂日 .\n]{1,60}", 1..6), seq_len in 1usize..30) {
        prop_assume!(picks.iter().all(|text| !text.trim().is_empty()));
        let dir = dir();
        let dataset = crate::fixture::dataset(&dir, &picks);
        let valid = ValidationSet::new(&dataset, seq_len, 2, None).unwrap();
        let bytes: u64 = valid.batches().map(|batch| batch.unwrap().text_bytes).sum();
        prop_assert_eq!(bytes, picks.iter().map(|text| text.len() as u64).sum::<u64>());
    }
}

#[test]
fn sizes_of_nothing_are_refused() {
    let dir = dir();
    let dataset = crate::fixture::dataset(&dir, &texts(2));
    for (seq_len, batch_size, max_windows) in [(0, 1, None), (1, 0, None), (1, 1, Some(0))] {
        let result = ValidationSet::new(&dataset, seq_len, batch_size, max_windows);
        assert!(matches!(result, Err(Error::Setting { .. })));
    }
}

#[test]
fn unigram_scores_what_a_hand_would() {
    let dir = dir();
    let train = synthetic(&dir, "train.tokens", 4, &[vec![1, 1, 2], vec![1]]);
    let valid = synthetic(&dir, "valid.tokens", 4, &[vec![1, 3]]);
    let train = Dataset::new(vec![(train, "t".into())]).unwrap();
    let valid = Dataset::new(vec![(valid, "v".into())]).unwrap();
    // Targets of training: 1 1 2 eot 1 eot. Counts plus one: eot 3, one 4, two 2, three 1; together 6 + 4.
    let unigram = Unigram::fit(&train, 4).unwrap();
    for (id, weight) in [3.0f64, 4.0, 2.0, 1.0].into_iter().enumerate() {
        assert!((unigram.nats(id as i64) - (10.0 / weight).ln()).abs() < 1e-12);
    }
    // Targets of validation: 1 3 eot, and two bytes.
    let expected = (10.0f64 / 4.0).ln() + 10.0f64.ln() + (10.0f64 / 3.0).ln();
    for seq_len in [1, 2, 3, 100] {
        let set = ValidationSet::new(&valid, seq_len, 2, None).unwrap();
        let score = unigram.score(&set).unwrap();
        assert_eq!((score.n_targets, score.text_bytes), (3, 2));
        assert!((score.nats - expected).abs() < 1e-12);
        assert!((score.nats_per_token() - expected / 3.0).abs() < 1e-12);
        assert!((score.bits_per_byte() - expected / std::f64::consts::LN_2 / 2.0).abs() < 1e-12);
    }
    // A larger model spreads the same counts over more entries.
    assert!(Unigram::fit(&train, 8).unwrap().nats(1) > unigram.nats(1));
    assert!(matches!(Unigram::fit(&train, 3), Err(Error::DataVocab { data: 4, model: 3 })));
    assert!(Score::default().nats_per_token().is_nan());
}

#[test]
fn the_shipped_corpus_has_a_plausible_baseline() {
    let dir = dir();
    let options = PrepareOptions { cache_dir: dir.path().to_owned(), read: ReadOptions::default() };
    let train = prepare(&[tiny("train.jsonl")], &SHIPPED, &options, &()).unwrap();
    let valid = prepare(&[tiny("valid.jsonl")], &SHIPPED, &options, &()).unwrap();
    assert_eq!((train.n_documents(), valid.n_documents()), (491, 62));
    assert_eq!((train.text_bytes(), valid.text_bytes()), (2_505_856, 253_693));
    let set = ValidationSet::new(&valid, 256, 8, None).unwrap();
    let score = Unigram::fit(&train, SHIPPED.vocab_size()).unwrap().score(&set).unwrap();
    assert_eq!((score.n_targets, score.text_bytes), (valid.n_tokens(), valid.text_bytes()));
    // The entropy of the validation tokens themselves bounds any unigram model from below.
    let mut counts = BTreeMap::<i64, f64>::new();
    set.batches()
        .flat_map(|batch| batch.unwrap().targets)
        .filter(|&id| id >= 0)
        .for_each(|id| *counts.entry(id).or_default() += 1.0);
    let n = score.n_targets as f64;
    let entropy: f64 = counts.values().map(|count| -(count / n) * (count / n).ln()).sum();
    assert!(score.nats_per_token() > entropy && score.nats_per_token() < entropy + 0.5, "{score:?} {entropy}");
    assert!((2.8..3.3).contains(&score.bits_per_byte()), "{}", score.bits_per_byte());
}
