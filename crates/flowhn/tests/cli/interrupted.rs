//! However a run is interrupted, resuming it ends where an undisturbed run ends, to the last bit.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::bench::{Ending, Out, command, copy, dir, finish, flowhn, repo, wait_for, whole};

/// Starts or resumes the small run in a directory.
fn sitting(run: &str, resume: bool) -> Child {
    sitting_with(run, resume, &[])
}

/// The same with more arguments.
fn sitting_with(run: &str, resume: bool, more: &[&str]) -> Child {
    let mut command = command(&["train", "-c", "micro.toml", "--run-dir", run]);
    command.args(more);
    if resume {
        command.arg("--resume");
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Kills a process with SIGKILL; whether it was still alive.
fn kill(mut child: Child) -> bool {
    let alive = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    alive
}

/// Resumes a run and lets it end; one that was killed before it had anything to keep starts again.
fn let_end(run: &str) -> Out {
    finish(sitting(run, dir().join(run).join("config.toml").exists()))
}

fn half_written(run: &Path) -> bool {
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(".step-"))
}

#[test]
fn killed_while_a_checkpoint_is_written() {
    whole();
    let run = dir().join("killed-saving");
    let (mut kills, mut caught) = (0, 0);
    // Each sitting dies at the first checkpoint that is seen to begin, most of them before it is complete. With one after each
    // step there are many chances; how often a run saves has no part in what it computes.
    while kills < 12 && (kills < 2 || caught < 1) {
        let resume = run.join("config.toml").exists();
        let mut child = sitting_with("killed-saving", resume, &["--set", "train.checkpoint_every=1"]);
        // What the sitting before left must be cleared away first, or it would be taken for this one's.
        let cleared = !half_written(&run) || wait_for(&mut child, Duration::ZERO, || !half_written(&run));
        assert!(cleared, "a half-written checkpoint is cleared away at the start");
        assert!(
            wait_for(&mut child, Duration::ZERO, || half_written(&run)),
            "the run ended without being caught saving"
        );
        kills += u32::from(kill(child));
        caught += u32::from(half_written(&run));
    }
    assert!(kills >= 2 && caught >= 1, "{kills} kills, {caught} of them in the middle of a checkpoint");
    let_end("killed-saving").done();
    assert!(!half_written(&run));
    Ending::of("killed-saving").is_whole();
}

#[test]
fn killed_at_any_moment() {
    whole();
    // How long the steps take here and now.
    let start = Instant::now();
    let mut child = sitting("timed", false);
    wait_for(&mut child, Duration::from_millis(1), || dir().join("timed/metrics.jsonl").exists());
    let before_s = start.elapsed().as_secs_f64();
    finish(child).done();
    let steps_s = start.elapsed().as_secs_f64() - before_s;

    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let run = dir().join("killed");
    let mut kills = 0;
    for _ in 0..5 {
        let metrics = run.join("metrics.jsonl");
        let mut child = sitting("killed", run.join("config.toml").exists());
        let before = fs::metadata(&metrics).and_then(|meta| meta.modified()).ok();
        // The log is opened, and cut back to the checkpoint, right before the first step.
        let opened = || fs::metadata(&metrics).and_then(|meta| meta.modified()).ok() != before;
        wait_for(&mut child, Duration::from_millis(1), opened);
        let share = f64::from(rng.next_u32()) / f64::from(u32::MAX);
        std::thread::sleep(Duration::from_secs_f64(share * steps_s / 6.));
        kills += u32::from(kill(child));
    }
    assert!(kills >= 2, "only {kills} sittings were killed before they ended");
    let_end("killed").done();
    Ending::of("killed").is_whole();
}

#[test]
fn ctrl_c_saves_and_tells_the_command_that_resumes() {
    whole();
    let run = dir().join("stopped");
    let mut child = sitting("stopped", false);
    let stepping = || fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= 4);
    assert!(wait_for(&mut child, Duration::from_millis(1), stepping));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = finish(child);
    assert_eq!(out.code, Some(130), "{out:?}");
    assert!(out.stderr.contains("interrupted: finishing this step"), "{out:?}");

    let stopped = out.stderr.lines().find_map(|line| line.strip_prefix("stopped after step ")).expect("it says where");
    let step: u64 = stopped.split(' ').next().unwrap().parse().unwrap();
    assert!(run.join(format!("checkpoints/step-{step}/state.json")).exists(), "{out:?}");
    let n_lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines().count() as u64;
    assert_eq!(n_lines, step, "the steps up to the checkpoint are logged");

    let resume = out.stderr.lines().find_map(|line| line.strip_prefix("resume with: ")).expect("it says how");
    assert!(resume.ends_with(" --device cpu --resume"), "where it computed: {resume}");
    let mut shell = Command::new("sh");
    // With a GPU in sight, if there is one: the command is to name the device.
    shell.args(["-c", resume]).current_dir(dir()).env("OMP_NUM_THREADS", "1").env("RAYON_NUM_THREADS", "1");
    let out = finish(shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    assert!(out.stderr.contains(&format!("resuming after step {step}")), "{out:?}");
    out.done();
    Ending::of("stopped").is_whole();
}

#[test]
fn ended_amid_operators_it_ends_cleanly() {
    let told = dir().join("ended.txt");
    for delay in [0, 150, 300, 450] {
        let out = dir().join(format!("ended-{delay}")).display().to_string();
        let mut command =
            command(&["bench", "paper", "--device", "cpu", "--size", "tiny", "--rows", "no_split", "--out", &out]);
        // As many threads as there are, so that some are inside of libtorch.
        command.current_dir(repo()).env_remove("OMP_NUM_THREADS").env_remove("RAYON_NUM_THREADS");
        let mut child = command.stdout(Stdio::null()).stderr(fs::File::create(&told).unwrap()).spawn().unwrap();
        let timing = || fs::read_to_string(&told).is_ok_and(|text| text.contains("timing"));
        assert!(wait_for(&mut child, Duration::from_millis(1), timing));
        std::thread::sleep(Duration::from_millis(delay));
        assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
        let (status, told) = (child.wait().unwrap(), fs::read_to_string(&told).unwrap());
        assert_eq!(status.code(), Some(130), "{delay}: {told}");
        assert!(told.ends_with("interrupted before the first step; nothing to save\n"), "{delay}: {told}");
    }
}

#[test]
fn damaged_checkpoints_are_passed_over() {
    whole();
    let run = copy("whole", "damaged");
    let newest = run.join("checkpoints/step-40/model.safetensors");
    let bytes = fs::read(&newest).unwrap();
    fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    fs::write(run.join("checkpoints/step-39/state.json"), "{\"epoch\": 3}").unwrap();
    let out = flowhn(&["train", "-c", "micro.toml", "--run-dir", "damaged", "--resume"]);
    for want in ["step-40", "model.safetensors has", "step-39", "not a FlowHN checkpoint", "resuming after step 36"] {
        assert!(out.stderr.contains(want), "`{want}` is missing in {out:?}");
    }
    assert_eq!(out.stderr.matches("warning: ").count(), 2, "{out:?}");
    out.done();
    Ending::of("damaged").is_whole();
}

#[test]
fn a_finished_run_has_nothing_to_resume() {
    whole();
    copy("whole", "finished");
    // The run's directory is enough.
    let out = flowhn(&["train", "--run-dir", "finished", "--resume", "--json"]);
    assert!(out.stderr.contains("all 40 steps are done; there is nothing to resume"), "{out:?}");
    assert_eq!(out.json()["steps"], 40);
    out.done();
    Ending::of("finished").is_whole();
}
