use std::collections::BTreeSet;
use std::process::Command;

use flowhn_train::data::{Batch, Dataset, Error, LoaderOptions, Sampler, SamplerState, TrainLoader, Windows};
use proptest::prelude::*;

use crate::fixture::{dataset, dir, synthetic, texts};

const OPTIONS: LoaderOptions = LoaderOptions { seq_len: 16, batch_size: 3, seed: 5, prefetch: 0 };

fn small() -> (tempfile::TempDir, Dataset) {
    let dir = dir();
    let documents: Vec<Vec<u32>> = (0..20u32).map(|i| (0..i * 3 % 17).map(|j| 1 + (i + j) % 40).collect()).collect();
    let shard = synthetic(&dir, "a.tokens", 50, &documents);
    let dataset = Dataset::new(vec![(shard, "a.jsonl".into())]).unwrap();
    (dir, dataset)
}

fn take(loader: &mut TrainLoader, n: usize) -> Vec<Batch> {
    (0..n).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn each_epoch_draws_each_window_once() {
    let (_dir, dataset) = small();
    let windows = Windows::new(&dataset, 16).unwrap();
    let n = windows.n_windows();
    assert!(n > 5);
    let mut sampler = Sampler::new(&windows, 9);
    let mut orders = BTreeSet::new();
    for epoch in 0..4 {
        let order: Vec<_> = (0..n).map(|_| sampler.draw()).collect();
        assert!(order.iter().all(|&(e, _)| e == epoch));
        let order: Vec<_> = order.into_iter().map(|(_, window)| window).collect();
        assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), (0..n).collect());
        orders.insert(order);
    }
    assert_eq!(orders.len(), 4);
}

#[test]
fn batches_run_on_across_epochs_and_know_where_they_come_from() {
    let (_dir, dataset) = small();
    let mut loader = TrainLoader::new(&dataset, &OPTIONS).unwrap();
    let n = loader.windows().n_windows() as usize;
    assert_ne!(n % 3, 0);
    let batches = take(&mut loader, n);
    let rows: Vec<_> = batches.iter().flat_map(|batch| &batch.rows).collect();
    assert_eq!(rows.iter().map(|row| row.epoch).collect::<BTreeSet<_>>(), BTreeSet::from([0, 1, 2]));
    for batch in &batches {
        assert_eq!((batch.batch_size, batch.inputs.len(), batch.n_targets), (3, 48, 48));
        for (idx, (row, provenance)) in batch.rows.iter().zip(loader.provenance(batch)).enumerate() {
            let mut ids = Vec::new();
            dataset.tokens(row.start..row.start + 16, &mut ids).unwrap();
            assert_eq!(ids, batch.inputs[idx * 16..][..16]);
            assert_eq!(provenance.row, *row);
            assert_eq!(provenance.documents, dataset.documents(row.start..row.start + 17));
            let text = provenance.to_string();
            let line = provenance.documents[0].line;
            assert!(
                text.contains(&format!("window {}", row.window)) && text.contains(&format!("a.jsonl:{line}")),
                "{text}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn resuming_anywhere_gives_the_same_stream(
        before in 0usize..25,
        seed in any::<u64>(),
        prefetch in prop::sample::select(vec![0usize, 1, 4]),
        batch_size in 1usize..5,
    ) {
        let (_dir, dataset) = small();
        let options = LoaderOptions { seed, batch_size, ..OPTIONS };
        let whole = take(&mut TrainLoader::new(&dataset, &options).unwrap(), before + 10);

        let mut first = TrainLoader::new(&dataset, &LoaderOptions { prefetch, ..options }).unwrap();
        prop_assert_eq!(&take(&mut first, before)[..], &whole[..before]);
        let json = serde_json::to_string(first.state()).unwrap();
        drop(first);
        let state: SamplerState = serde_json::from_str(&json).unwrap();
        let mut second = TrainLoader::resume(&dataset, &LoaderOptions { prefetch, ..options }, &state).unwrap();
        prop_assert_eq!(second.state(), &state);
        prop_assert_eq!(&take(&mut second, 10)[..], &whole[before..]);
        // Another batch size goes on with the same windows.
        let other = LoaderOptions { batch_size: batch_size + 1, ..options };
        let batch = TrainLoader::resume(&dataset, &other, &state).unwrap().next_batch().unwrap();
        let rows: Vec<_> = whole[before..].iter().flat_map(|batch| &batch.rows).take(batch_size + 1).collect();
        prop_assert_eq!(batch.rows.iter().collect::<Vec<_>>(), rows);
    }
}

#[test]
fn a_state_of_another_run_is_refused_by_name() {
    let (_dir, dataset) = small();
    let mut loader = TrainLoader::new(&dataset, &OPTIONS).unwrap();
    loader.next_batch().unwrap();
    let state = loader.state().clone();
    let field = |dataset: &Dataset, options: LoaderOptions, state: &SamplerState| match TrainLoader::resume(
        dataset, &options, state,
    ) {
        Err(Error::StateMismatch { field, .. }) => field,
        Err(other) => panic!("{other}"),
        Ok(_) => "none",
    };
    assert_eq!(field(&dataset, OPTIONS, &state), "none");
    assert_eq!(field(&dataset, LoaderOptions { seed: 6, ..OPTIONS }, &state), "seed");
    assert_eq!(field(&dataset, LoaderOptions { seq_len: 8, ..OPTIONS }, &state), "seq_len");
    assert_eq!(field(&dataset, OPTIONS, &SamplerState { index: 10_000, ..state.clone() }), "index");
    let dir = dir();
    let text = crate::fixture::dataset(&dir, &texts(9));
    assert_eq!(field(&text, OPTIONS, &state), "data fingerprint");
    // Unknown fields are of a later version, or of something else.
    let mut json = serde_json::to_value(&state).unwrap();
    json["extra"] = 1.into();
    assert!(serde_json::from_value::<SamplerState>(json).is_err());
}

#[test]
fn sizes_of_nothing_are_refused() {
    let (_dir, dataset) = small();
    for options in [LoaderOptions { batch_size: 0, ..OPTIONS }, LoaderOptions { seq_len: 0, ..OPTIONS }] {
        assert!(matches!(TrainLoader::new(&dataset, &options), Err(Error::Setting { .. })));
    }
    assert!(matches!(
        TrainLoader::new(&dataset, &LoaderOptions { seq_len: 1 << 20, ..OPTIONS }),
        Err(Error::TooShort { .. })
    ));
}

#[test]
fn a_loader_can_be_dropped_while_its_thread_waits() {
    let (_dir, dataset) = small();
    for n in 0..3 {
        let mut loader = TrainLoader::new(&dataset, &LoaderOptions { prefetch: 2, ..OPTIONS }).unwrap();
        take(&mut loader, n);
    }
}

/// Another process writes into a mapped shard, which nobody should do; the trainer hears of it.
#[test]
#[cfg(target_os = "linux")]
fn errors_of_the_reading_thread_reach_the_trainer() {
    for prefetch in [0, 2] {
        let dir = dir();
        let dataset = dataset(&dir, &texts(40));
        let cache = dir.path().join("cache");
        let shard = std::fs::read_dir(cache)
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| p.extension().is_some_and(|e| e == "tokens"));
        let mut loader = TrainLoader::new(&dataset, &LoaderOptions { prefetch, ..OPTIONS }).unwrap();
        loader.next_batch().unwrap();
        let status = Command::new("sh")
            .args([
                "-c",
                "head -c $1 /dev/zero | tr '\\0' '\\377' | dd of=\"$0\" bs=1 seek=128 conv=notrunc 2>/dev/null",
            ])
            .arg(shard.unwrap())
            .arg((dataset.n_tokens() * 2).to_string())
            .status();
        assert!(status.unwrap().success());
        let error = (0..10).find_map(|_| loader.next_batch().err()).expect("an error within what was read ahead");
        assert!(matches!(error, Error::TokenOutOfRange { id: 65_535, vocab_size: 4096, .. }), "{error}");
        let again = loader.next_batch().unwrap_err();
        if prefetch > 0 {
            assert!(matches!(again, Error::Prefetch { .. }), "{again}");
        }
    }
}
