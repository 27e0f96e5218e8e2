//! A corpus, a vocabulary and small runs, shared by all tests of this program.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Steps of a small run.
pub const STEPS: u64 = 40;

/// What a finished process left.
#[derive(Debug)]
pub struct Out {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The `flowhn` program with arguments, in the shared directory, on one thread, which is the fastest for models this small, and without a GPU.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flowhn"));
    command.args(args).current_dir(dir()).stdin(Stdio::null());
    command.env("OMP_NUM_THREADS", "1").env("RAYON_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
    command
}

/// Runs the program to its end.
pub fn flowhn(args: &[&str]) -> Out {
    finish(command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Waits for a process whose output is piped.
pub fn finish(child: Child) -> Out {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Out { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

impl Out {
    /// The standard output of a process that did what it was told.
    #[track_caller]
    pub fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// The one JSON value on the standard output.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that the process failed with exit code 1, nothing on standard output, and one line that holds all of `words`.
    #[track_caller]
    pub fn refused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{self:?}");
        assert!(self.stderr.ends_with(&format!("{}\n", errors[0])), "the error is the last line: {self:?}");
        for word in words {
            assert!(errors[0].contains(word), "`{word}` is missing in: {}", errors[0]);
        }
    }
}

/// The root of the repository.
pub fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The shared directory: `micro.toml`, `train.jsonl`, `valid.jsonl`, `tokenizer.json`, and `other.json`, another tokenizer.
pub fn dir() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(make_dir);
    &DIR
}

/// The configuration of small runs; give each its own `--run-dir`.
const MICRO: &str = r#"
[model]
vocab_size = 320
d_model = 32
d_ff = 48
n_layers = 2
seq_len = 64
attn = { n_heads = 2, n_kv_heads = 1, rope = true }
ssm = { d_state = 4, d_inner = 40, dt_rank = 3 }
split = { policy = "cyclic_split", chunk_len = 8, first_blocks = ["ssm_all"] }
[data]
train = ["train.jsonl"]
valid = ["valid.jsonl"]
tokenizer = "tokenizer.json"
cache_dir = "cache"
[train]
steps = 40
batch_size = 4
grad_accum = 2
lr = 5e-3
eval_every = 15
log_every = 2
checkpoint_every = 3
keep_last = 3
sample_prompt = "the fox"
"#;

fn make_dir() -> PathBuf {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // What dead test processes left.
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = name.strip_prefix("cli-")
            && !Path::new("/proc").join(pid).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let dir = base.join(format!("cli-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("micro.toml"), MICRO).unwrap();
    fs::write(dir.join("train.jsonl"), documents(0, 160)).unwrap();
    fs::write(dir.join("valid.jsonl"), documents(160, 176)).unwrap();
    for (name, vocab_size) in [("tokenizer.json", "300"), ("other.json", "280")] {
        let args = ["data", "tokenizer", "--input", "train.jsonl", "--vocab-size", vocab_size, "--out", name];
        let output = Command::new(env!("CARGO_BIN_EXE_flowhn")).args(args).current_dir(&dir).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).starts_with(&format!("{name}: {vocab_size} entries")));
    }
    dir
}

/// Lines of made-up, regular text that a small model learns from at once.
fn documents(start: usize, end: usize) -> String {
    let (who, what) = (["the fox", "a crow", "one owl", "my cat"], ["sees", "hears", "follows"]);
    (start..end).fold(String::new(), |mut out, i| {
        let text: Vec<String> = (0..6)
            .map(|j| format!("{} {} number {}.", who[(i + j) % 4], what[(i * j) % 3], (i * 7 + j) % 10))
            .collect();
        writeln!(out, "{{\"text\": \"{}\"}}", text.join(" ")).unwrap();
        out
    })
}

/// A small run that was left alone, in `whole/`.
pub fn whole() -> &'static Ending {
    static WHOLE: LazyLock<Ending> = LazyLock::new(|| {
        flowhn(&["train", "-c", "micro.toml", "--run-dir", "whole"]).done();
        Ending::of("whole")
    });
    &WHOLE
}

/// What must be the same however often a run was interrupted.
#[derive(Debug, PartialEq)]
pub struct Ending {
    model: Vec<u8>,
    optimizer: Vec<u8>,
    metrics: Vec<Value>,
    validation: Vec<Value>,
    summary: Value,
}

impl Ending {
    /// The ending of the run in a directory of the shared one.
    #[track_caller]
    pub fn of(run: &str) -> Self {
        let run = dir().join(run);
        let last = run.join(format!("checkpoints/step-{STEPS}"));
        let mut summary: Value = serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap();
        let timed = ["seconds", "tokens_per_s", "train_tokens_per_s", "mfu", "matmul_flops_per_s", "max_memory_bytes"];
        timed.iter().for_each(|key| drop(summary.as_object_mut().unwrap().remove(*key).unwrap()));
        Self {
            model: fs::read(last.join("model.safetensors")).unwrap(),
            optimizer: fs::read(last.join("optimizer.safetensors")).unwrap(),
            metrics: lines(&run.join("metrics.jsonl"), &["step", "tokens", "loss", "lr", "grad_norm"]),
            validation: lines(&run.join("validation.jsonl"), &["step", "tokens", "val_loss", "val_bits_per_byte"]),
            summary,
        }
    }

    /// Compares with the run that was left alone.
    #[track_caller]
    pub fn is_whole(&self) {
        let want = whole();
        assert_eq!(self.metrics, want.metrics, "metrics.jsonl");
        assert_eq!(self.metrics.len() as u64, STEPS, "every step is logged once");
        assert_eq!(self.validation, want.validation, "validation.jsonl");
        assert!(self.model == want.model, "model.safetensors differs");
        assert!(self.optimizer == want.optimizer, "optimizer.safetensors differs");
        assert_eq!(self.summary, want.summary, "summary.json");
    }
}

fn lines(path: &Path, keys: &[&str]) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let pick = |line: &str| {
        let object: Value = serde_json::from_str(line).unwrap();
        keys.iter().map(|key| object[*key].clone()).collect()
    };
    text.lines().map(pick).collect()
}

/// Copies a directory of the shared one.
pub fn copy(from: &str, to: &str) -> PathBuf {
    fn walk(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            match entry.file_type().unwrap().is_dir() {
                true => walk(&entry.path(), &target),
                false => drop(fs::copy(entry.path(), target).unwrap()),
            }
        }
    }
    let target = dir().join(to);
    walk(&dir().join(from), &target);
    target
}

/// Looks until `seen` says yes or the process has ended; whether it said yes in time.
pub fn wait_for(child: &mut Child, pause: Duration, mut seen: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(120) {
        if seen() {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(pause);
    }
    panic!("nothing happened for two minutes");
}
