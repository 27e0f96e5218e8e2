//! The whole configuration file.

mod common;

use common::Bench;
use flowhn_train::RunConfig;
use flowhn_train::schedule::Schedule;

const MODEL: &str = "[model]\nvocab_size = 64\nd_model = 16\nd_ff = 24\nn_layers = 2\nseq_len = 32\n\
                     [model.attn]\nn_heads = 2\n";

fn read(text: &str) -> Result<RunConfig, String> {
    RunConfig::from_table(format!("{MODEL}{text}").parse().unwrap()).map_err(|error| error.to_string())
}

#[test]
fn the_checked_form_is_complete_and_reads_back_the_same() {
    let bench = Bench::new();
    for sets in
        [&[][..], &["train.lr=0.1", "train.eps=1e-300", "data.valid_frac=0", "train.schedule=wsd", "train.seed=7"]]
    {
        let config = bench.config("whole", sets);
        let text = config.to_toml().unwrap();
        let again = RunConfig::from_table(text.parse().unwrap()).unwrap();
        assert_eq!(again, config);
        assert_eq!(again.to_toml().unwrap(), text);
        assert_eq!(config.first_difference(&text.parse().unwrap()).unwrap(), None);
    }
    let text = bench.config("whole", &[]).to_toml().unwrap();
    for key in ["weight_decay", "cycle", "d_head", "reset_documents", "keep_last", "dir"] {
        assert!(text.contains(key), "{key} is written out\n{text}");
    }
}

#[test]
fn a_model_alone_is_enough_and_the_rest_has_defaults() {
    let config = read("").unwrap();
    assert_eq!((config.train.steps, config.train.schedule), (1000, Schedule::Cosine));
    assert!(config.data.reset_documents);
}

#[test]
fn the_run_is_named_after_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.toml");
    std::fs::write(&path, MODEL).unwrap();
    assert_eq!(RunConfig::load(&path, &[]).unwrap().run.dir, std::path::Path::new("runs/small"));
    let set = ["run.dir=/tmp/x".to_owned()];
    assert_eq!(RunConfig::load(&path, &set).unwrap().run.dir, std::path::Path::new("/tmp/x"));
}

#[test]
fn unknown_keys_get_the_nearest_valid_one_in_every_section() {
    for (text, want) in [
        ("[train]\nstep = 3", "did you mean `steps`"),
        ("[data]\ntrian = []", "did you mean `train`"),
        ("[run]\ndirectory = \"x\"", "did you mean `dir`"),
        ("[trian]\nsteps = 3", "did you mean `train`"),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn impossible_values_are_refused_by_name() {
    for (text, key) in [
        ("[train]\nsteps = 0", "train.steps = 0"),
        ("[train]\nbatch_size = 0", "train.batch_size = 0"),
        ("[train]\ngrad_accum = 0", "train.grad_accum = 0"),
        ("[train]\nlog_every = 0", "train.log_every = 0"),
        ("[train]\nlr = 0.0", "train.lr = 0"),
        ("[train]\nlr = inf", "train.lr = inf"),
        ("[train]\nlr = nan", "train.lr = NaN"),
        ("[train]\nbeta1 = 1.0", "train.beta1 = 1"),
        ("[train]\nbeta2 = -0.1", "train.beta2 = -0.1"),
        ("[train]\neps = 0.0", "train.eps = 0"),
        ("[train]\nweight_decay = -1.0", "train.weight_decay = -1"),
        ("[train]\nclip_norm = -1.0", "train.clip_norm = -1"),
        ("[train]\nwarmup_frac = 1.5", "train.warmup_frac = 1.5"),
        ("[train]\nmin_lr_frac = nan", "train.min_lr_frac = NaN"),
        ("[train]\ndecay_frac = 2", "train.decay_frac = 2"),
        ("[data]\nvalid_frac = 1.0", "data.valid_frac = 1"),
        ("[data]\nvalid = [\"v.txt\"]\nvalid_frac = 0.1", "data.valid_frac = 0.1"),
        ("[train]\ndtype = \"fp16\"", "train.dtype"),
        ("[train]\nlinears = \"fp8\"", "train.linears = fp8"),
        ("[train]\ngrads = \"bf16\"", "train.grads = bf16: they come from bf16 activations"),
        ("[train]\nlogits_mib = 0", "train.logits_mib = 0: it must be in 1..=2048"),
        ("[train]\nlogits_mib = 4096", "train.logits_mib = 4096: it must be in 1..=2048"),
        ("[train]\ndtype = \"bf16\"\ngrads = \"bf16\"\ngrad_accum = 2", "train.grads = bf16: sums over micro-batches"),
        ("[train]\nsteps = -4", "train.steps"),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(key), "{text}: {error}");
    }
}

#[test]
fn rounding_of_shares_to_steps() {
    let config =
        read("[train]\nsteps = 25\nwarmup_frac = 0.1\ndecay_frac = 0.5\nlr = 2.0\nmin_lr_frac = 0.25").unwrap();
    let lr = config.train.learning_rate();
    assert_eq!((lr.warmup_steps, lr.decay_steps, lr.peak, lr.min_lr), (3, 13, 2., 0.5));
}
