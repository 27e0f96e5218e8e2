use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flowhn_train::data::{
    Dataset, Error, Event, PrepareOptions, ReadOptions, Result, SHARD_EXTENSION, Tokenizer, prepare,
};
use tempfile::TempDir;

use crate::fixture::{SHIPPED, dir, jsonl, options, other_tokenizer, texts, tiny, write};

/// Prepares and tells what happened: "cached", "rebuilding: why", "built" and so on.
fn run(files: &[PathBuf], tokenizer: &Tokenizer, options: &PrepareOptions) -> (Result<Dataset>, Vec<String>) {
    let log = Mutex::new(Vec::new());
    let progress = |event: &Event<'_>| {
        log.lock().unwrap().push(match event {
            Event::Cached { .. } => "cached".to_owned(),
            Event::Waiting { .. } => "waiting".to_owned(),
            Event::Rebuilding { reason, .. } => format!("rebuilding: {reason}"),
            Event::Tokenizing { .. } => "tokenizing".to_owned(),
            Event::Built { .. } => "built".to_owned(),
            other => panic!("{other:?}"),
        });
    };
    let result = prepare(files, tokenizer, options, &progress);
    (result, log.into_inner().unwrap())
}

fn shards(options: &PrepareOptions) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(&options.cache_dir) else { return Vec::new() };
    let mut shards: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    shards.retain(|path| path.extension().is_some_and(|ending| ending == SHARD_EXTENSION));
    shards.sort();
    shards
}

fn leftovers(dir: &Path) -> usize {
    std::fs::read_dir(dir)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "tmp"))
        .count()
}

fn source(dir: &TempDir, n: usize) -> Vec<PathBuf> {
    vec![write(dir, "source.jsonl", jsonl(&texts(n)))]
}

#[test]
fn a_shard_is_built_once_and_holds_the_text() {
    let dir = dir();
    let (files, options) = (source(&dir, 30), options(&dir));
    let (first, log) = run(&files, &SHIPPED, &options);
    assert_eq!(log, ["tokenizing", "built"]);
    let (first, (second, log)) = (first.unwrap(), run(&files, &SHIPPED, &options));
    assert_eq!(log, ["cached"]);
    assert_eq!(first.fingerprint(), second.unwrap().fingerprint());

    let texts = texts(30);
    assert_eq!(first.n_documents(), 30);
    assert_eq!(first.text_bytes(), texts.iter().map(|text| text.len() as u64).sum::<u64>());
    let mut ids = Vec::new();
    first.tokens(0..first.n_tokens() + 1, &mut ids).unwrap();
    let ids: Vec<u32> = ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect();
    let read: Vec<_> = ids.split(|&id| id == 0).filter(|d| !d.is_empty()).map(|d| SHIPPED.decode(d).unwrap()).collect();
    assert_eq!(read, texts);
}

#[test]
fn the_key_follows_contents_reader_and_tokenizer() {
    let dir = dir();
    let options = options(&dir);
    let files = source(&dir, 5);
    run(&files, &SHIPPED, &options).0.unwrap();
    // Another name or a later time does not matter, as the contents are the same.
    let same = write(&dir, "source.copy.jsonl", std::fs::read(&files[0]).unwrap());
    run(std::slice::from_ref(&same), &SHIPPED, &options).0.unwrap();
    std::fs::remove_file(&files[0]).unwrap();
    assert_eq!(run(&source(&dir, 5), &SHIPPED, &options).1, ["cached"]);
    let n = shards(&options).len();

    assert_eq!(run(&source(&dir, 6), &SHIPPED, &options).1, ["tokenizing", "built"]);
    assert_eq!(run(&files, &other_tokenizer(&dir), &options).1, ["tokenizing", "built"]);
    let as_text = write(&dir, "source.txt", std::fs::read(&files[0]).unwrap());
    assert_eq!(run(&[as_text], &SHIPPED, &options).1, ["tokenizing", "built"]);
    assert_eq!(shards(&options).len(), n + 3);
    assert_eq!(run(&files, &SHIPPED, &options).1, ["cached"]);
}

#[test]
fn threads_do_not_change_a_byte() {
    let bytes = [1, 2, 5].map(|n_threads| {
        let dir = dir();
        let options = options(&dir);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        let long = "A long text that is cut into pieces, then put together. ".repeat(12_000);
        let files = vec![tiny("valid.jsonl"), write(&dir, "long.txt", long)];
        pool.install(|| run(&files, &SHIPPED, &options).0.unwrap());
        shards(&options).iter().map(|path| std::fs::read(path).unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(bytes[0].len(), 2);
    assert!(bytes[0] == bytes[1] && bytes[0] == bytes[2]);
}

#[test]
fn many_rounds_keep_the_order() {
    let dir = dir();
    // More documents than a round takes.
    let texts: Vec<_> = (0..9000).map(|i| format!("{i}")).collect();
    let files = [write(&dir, "many.jsonl", jsonl(&texts))];
    let (dataset, log) = run(&files, &SHIPPED, &options(&dir));
    assert_eq!(log, ["tokenizing", "tokenizing", "tokenizing", "built"]);
    let dataset = dataset.unwrap();
    let lines: Vec<_> = dataset.documents(0..dataset.n_tokens()).iter().map(|document| document.line).collect();
    assert_eq!(lines, (1..=9000).collect::<Vec<_>>());
}

#[test]
fn a_damaged_cached_shard_is_rebuilt_and_said_so() {
    let dir = dir();
    let (files, options) = (source(&dir, 8), options(&dir));
    run(&files, &SHIPPED, &options).0.unwrap();
    let [shard] = &shards(&options)[..] else { panic!() };
    let whole = std::fs::read(shard).unwrap();
    for (damaged, reason) in
        [(whole[..whole.len() - 9].to_vec(), "bytes long"), (vec![], "bytes long"), (vec![b'x'; 500], "magic")]
    {
        std::fs::write(shard, &damaged).unwrap();
        let (result, log) = run(&files, &SHIPPED, &options);
        result.unwrap();
        assert!(log[0].starts_with("rebuilding: ") && log[0].contains(reason), "{log:?}");
        assert_eq!(log[1..], ["tokenizing", "built"]);
        assert!(std::fs::read(shard).unwrap() == whole);
    }
}

#[test]
fn a_listed_shard_is_used_and_a_damaged_one_refused() {
    let dir = dir();
    let (files, options) = (source(&dir, 8), options(&dir));
    let built = run(&files, &SHIPPED, &options).0.unwrap();
    let listed = vec![dir.path().join("mine.tokens")];
    std::fs::copy(&shards(&options)[0], &listed[0]).unwrap();
    let (used, log) = run(&listed, &SHIPPED, &options);
    assert_eq!((used.unwrap().fingerprint(), log.len()), (built.fingerprint(), 0));

    let error = run(&listed, &other_tokenizer(&dir), &options).0.unwrap_err();
    assert!(matches!(error, Error::TokenizerMismatch { .. }), "{error}");
    assert!(error.to_string().contains("mine.tokens"), "{error}");

    let bytes = std::fs::read(&listed[0]).unwrap();
    std::fs::write(&listed[0], &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(run(&listed, &SHIPPED, &options).0, Err(Error::Shard { .. })));
    std::fs::remove_file(&listed[0]).unwrap();
    assert!(matches!(run(&listed, &SHIPPED, &options).0, Err(Error::Missing { .. })));
}

#[test]
fn all_files_are_looked_at_before_any_is_tokenised() {
    let dir = dir();
    let (mut files, options) = (source(&dir, 8), options(&dir));
    files.push(dir.path().join("missing.txt"));
    let (result, log) = run(&files, &SHIPPED, &options);
    assert!(matches!(result, Err(Error::Missing { .. })));
    assert!(log.is_empty() && shards(&options).is_empty());
    assert!(matches!(run(&[], &SHIPPED, &options).0, Err(Error::NoFiles)));
}

#[test]
fn an_error_in_a_file_leaves_no_shard() {
    let dir = dir();
    let options = options(&dir);
    let files = [write(&dir, "bad.jsonl", jsonl(&texts(5000)) + "{\"text\": 1}\n")];
    let (result, _) = run(&files, &SHIPPED, &options);
    assert!(matches!(result, Err(Error::NoText { line: 5001, .. })));
    assert!(shards(&options).is_empty());
    assert_eq!(leftovers(&options.cache_dir), 0);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let dir = dir();
    let cache_dir = write(&dir, "file", "in the way").join("cache");
    let options = PrepareOptions { cache_dir, read: ReadOptions::default() };
    let error = run(&source(&dir, 3), &SHIPPED, &options).0.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(error.to_string().contains("file/cache: cannot create the directory"), "{error}");
}

#[test]
fn a_source_that_changes_meanwhile_is_refused() {
    let dir = dir();
    let (files, options) = (source(&dir, 8), options(&dir));
    let grow = |event: &Event<'_>| {
        if let Event::Tokenizing { source, .. } = event {
            let longer = std::fs::read_to_string(source).unwrap() + "{\"text\": \"late\"}\n";
            std::fs::write(source, longer).unwrap();
        }
    };
    assert!(matches!(prepare(&files, &SHIPPED, &options, &grow), Err(Error::SourceChanged { .. })));
    assert!(shards(&options).is_empty());
    assert_eq!(prepare(&files, &SHIPPED, &options, &()).unwrap().n_documents(), 9);
}

#[test]
fn whoever_comes_second_waits_and_then_uses_the_shard() {
    let dir = dir();
    let (files, options) = (source(&dir, 8), options(&dir));
    let (waiting, someone_waits) = std::sync::mpsc::channel();
    let (waiting, someone_waits) = (Mutex::new(waiting), Mutex::new(someone_waits));
    let second_progress = |event: &Event<'_>| match event {
        Event::Waiting { .. } => waiting.lock().unwrap().send(()).unwrap(),
        Event::Cached { .. } => {}
        other => panic!("the second built it too: {other:?}"),
    };
    std::thread::scope(|scope| {
        let second = Mutex::new(None);
        // The first starts the second in the middle of its work, and goes on once the second waits for it.
        let first_progress = |event: &Event<'_>| {
            if let Event::Tokenizing { .. } = event {
                let thread = scope.spawn(|| prepare(&files, &SHIPPED, &options, &second_progress).unwrap());
                *second.lock().unwrap() = Some(thread);
                someone_waits.lock().unwrap().recv_timeout(Duration::from_secs(60)).unwrap();
            }
        };
        let first = prepare(&files, &SHIPPED, &options, &first_progress).unwrap();
        let second = second.into_inner().unwrap().unwrap().join().unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
    });
    assert_eq!(shards(&options).len(), 1);
}

const CHILD_DIR: &str = "FLOWHN_TEST_KILLED_BUILD";

/// Run by the test below in a process of its own, which is killed.
#[test]
#[ignore = "only the test that kills it runs it"]
fn killed_build_child() {
    let dir = PathBuf::from(std::env::var_os(CHILD_DIR).unwrap());
    let options = PrepareOptions { cache_dir: dir.join("cache"), read: ReadOptions::default() };
    let progress = |event: &Event<'_>| {
        if let Event::Tokenizing { .. } = event {
            std::fs::write(dir.join("half"), "").unwrap();
            std::thread::sleep(Duration::from_secs(600));
        }
    };
    let _ = prepare(&[dir.join("source.jsonl")], &SHIPPED, &options, &progress);
}

#[test]
fn a_killed_build_leaves_no_shard_and_no_lock() {
    let dir = dir();
    let (files, options) = (source(&dir, 200), options(&dir));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cache::killed_build_child", "--ignored"])
        .env(CHILD_DIR, dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while !dir.path().join("half").exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "the child never got half-way");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(shards(&options).is_empty());
    assert_eq!(leftovers(&options.cache_dir), 1);

    let (result, log) = run(&files, &SHIPPED, &options);
    assert_eq!(result.unwrap().n_documents(), 200);
    assert_eq!(log, ["tokenizing", "built"]);
    assert_eq!(leftovers(&options.cache_dir), 0);
}
