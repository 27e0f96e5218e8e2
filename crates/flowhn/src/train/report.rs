//! What a run says before it starts and when it is done.

use std::fmt::Write as _;

use flowhn_model::Fp8Projections;
use flowhn_model::config::BlockKind;
use flowhn_split::policy_per_block;
use flowhn_train::peak::device_name;
use flowhn_train::run_dir::{CHECKPOINTS, LOSS_PLOT, SUMMARY};
use flowhn_train::{RunConfig, Summary, Trainer};

use crate::units::{bytes, count, grouped, seconds, spaced};

/// What is about to happen, a line for each thing.
pub fn intent(trainer: &Trainer) -> String {
    let (config, estimate) = (trainer.config(), trainer.estimate());
    let (model, train) = (&config.model, &config.train);
    let block = match model.block {
        BlockKind::Flow => "flow",
        BlockKind::Released => "released",
    };
    let (data, valid, memory) = (trainer.train_data(), trainer.valid(), &estimate.memory);
    let accumulated = if train.grad_accum > 1 { format!(" x {}", train.grad_accum) } else { String::new() };
    let left = train.steps - trainer.step();
    let steps = match trainer.step() {
        0 => grouped(train.steps),
        _ => format!("{} more of {}", grouped(left), grouped(train.steps)),
    };
    let tokens = estimate.tokens / train.steps.max(1) * left;
    let free = estimate.available_bytes.map(|free| format!(", {} are free", bytes(free))).unwrap_or_default();
    let recomputed = match estimate.recomputed_flops_per_step {
        0 => String::new(),
        flops => format!(" and {}FLOP of recomputed blocks", spaced(count(flops as f64 * left as f64))),
    };
    let in_fp8 = match trainer.model().fp8_projections() {
        Fp8Projections { n_meant: 0, .. } => String::new(),
        Fp8Projections { n_fp8, n_meant } => format!(", {n_fp8} of {n_meant} projections in fp8,"),
    };
    let lines = [
        (
            "model",
            format!(
                "{} parameters in {} {block} blocks of width {}; {}",
                grouped(estimate.parameters),
                model.n_layers,
                model.d_model,
                policies(config),
            ),
        ),
        (
            "text",
            format!(
                "{} tokens in {} documents; {} tokens to validate on",
                grouped(data.n_tokens()),
                grouped(data.n_documents()),
                grouped(valid.n_targets()),
            ),
        ),
        (
            "run",
            format!(
                "{steps} steps of {}{accumulated} sequences of {} tokens: {} tokens, {:.2} times the text; {}{in_fp8} on {}",
                train.batch_size,
                model.seq_len,
                grouped(tokens),
                tokens as f64 / data.n_tokens().max(1) as f64,
                train.dtype,
                device_name(trainer.model().device()),
            ),
        ),
        (
            "memory",
            format!(
                "about {} ({} weights, {} gradients, {} optimiser, {} activations) beside libtorch{free}; {} of disk a \
                 checkpoint",
                bytes(memory.total_bytes),
                bytes(memory.parameters_bytes),
                bytes(memory.gradients_bytes),
                bytes(memory.optimizer_bytes),
                bytes(memory.activations_bytes),
                bytes(estimate.checkpoint_bytes),
            ),
        ),
        (
            "time",
            format!(
                "at least {}: {}FLOP{} at the measured {}FLOP/s ({}); the first steps will tell more",
                seconds(estimate.least_seconds * left as f64 / train.steps.max(1) as f64),
                spaced(count(estimate.flops_per_step as f64 * left as f64)),
                recomputed,
                spaced(count(estimate.matmul.flops_per_s)),
                estimate.matmul.name,
            ),
        ),
        ("into", trainer.run_dir().display().to_string()),
    ];
    lines.map(|(name, text)| format!("{name:<7} {text}")).join("\n")
}

/// What came out, for people.
pub fn outcome(trainer: &Trainer, summary: &Summary) -> String {
    let dir = trainer.run_dir();
    let below = 100. * (1. - summary.val_bits_per_byte / summary.unigram_bits_per_byte);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<11} {value}");
    };
    line(
        "trained",
        format!(
            "{} steps, {} tokens in {}, validations and checkpoints included ({} tokens/s)",
            grouped(summary.steps),
            grouped(summary.tokens),
            seconds(summary.seconds),
            grouped(summary.tokens_per_s as u64),
        ),
    );
    line(
        "speed",
        format!(
            "{} tokens/s in the steps, {:.1} % of the matmul rate of {}FLOP/s ({})",
            grouped(summary.train_tokens_per_s as u64),
            100. * summary.mfu,
            spaced(count(summary.matmul_flops_per_s)),
            summary.matmul_measured_on,
        ),
    );
    line("memory", format!("{} at most", bytes(summary.max_memory_bytes)));
    line("validation", format!("{:.4} nats/token, {:.4} bits/byte", summary.val_loss, summary.val_bits_per_byte));
    line(
        "unigram",
        format!(
            "{:.4} nats/token, {:.4} bits/byte on the same text; the model is {:.1} % {} it",
            summary.unigram_loss,
            summary.unigram_bits_per_byte,
            below.abs(),
            if below >= 0. { "below" } else { "above" },
        ),
    );
    let sample = match summary.sample_prompt.as_str() {
        "" => "from nothing:".to_owned(),
        prompt => format!("\"{}\" goes on:", prompt.escape_debug()),
    };
    line("sample", sample);
    for row in summary.sample.lines() {
        let _ = writeln!(text, "  | {row}");
    }
    let mut line = |name: &str, path: std::path::PathBuf| {
        let _ = writeln!(text, "{name:<11} {}", path.display());
    };
    line("run", dir.to_owned());
    line("loss plot", dir.join(LOSS_PLOT));
    line("summary", dir.join(SUMMARY));
    line("checkpoint", dir.join(CHECKPOINTS).join(format!("step-{}", summary.steps)));
    text
}

/// The policies of the blocks, neighbours that agree told together: `ssm_all, then 3 x cyclic_split (4 of 7)`.
fn policies(config: &RunConfig) -> String {
    let model = &config.model;
    let Ok(blocks) = policy_per_block(&model.first_blocks, &model.policy, model.n_layers) else { return String::new() };
    let cycle = model.split.cycle.map(|cycle| format!(" ({} of {})", cycle.attn, cycle.period)).unwrap_or_default();
    let runs = blocks.chunk_by(|a, b| a == b).map(|run| {
        let cycle = if run[0].name() == "cyclic_split" { cycle.as_str() } else { "" };
        match run.len() {
            1 => format!("{}{cycle}", run[0]),
            n => format!("{n} x {}{cycle}", run[0]),
        }
    });
    runs.collect::<Vec<_>>().join(", then ")
}
