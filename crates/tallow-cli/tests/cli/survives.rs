//! Training runs that are killed, interrupted or out of disk, and go on.
//! Invariant: whatever happens, a run that is resumed ends with the losses and the bytes of one left alone.
use super::{names, text, tiny, valid};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// How often a run is killed.
const KILLS: u64 = 20;

/// Options of a small run of `steps` steps.
fn options(out: &Path, steps: &str, more: &[&str]) -> Vec<String> {
    let (tiny, valid, out) = (tiny(), valid(), out.display().to_string());
    let base = [
        "train",
        "--model",
        &tiny,
        "--data",
        &valid,
        "--out",
        &out,
        "--steps",
        steps,
        "--batch",
        "1",
        "--accumulate",
        "2",
        "--seq-len",
        "24",
        "--rank",
        "2",
        "--lr",
        "1e-2",
        "--threads",
        "1",
    ];
    base.iter().chain(more).map(|s| (*s).to_owned()).collect()
}

fn tallow(args: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tallow"));
    command.args(args).stdin(Stdio::null());
    command.env("TALLOW_NO_TUNE", "1");
    command
}

fn spawn(args: &[String]) -> Child {
    let piped = tallow(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    piped.unwrap()
}

fn json(args: &[String]) -> Value {
    let out = tallow(args).arg("--json").output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn adapter(out: &Path) -> Vec<u8> {
    fs::read(out.join("adapter_model.safetensors")).unwrap()
}

/// Pseudo-random numbers, the same in every run of the test.
fn next(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// The newest checkpoint of a run.
fn newest(out: &Path) -> u64 {
    let step = |n: &String| n.strip_prefix("step-")?.parse().ok();
    let all = names(&out.join("checkpoints"));
    all.iter().filter_map(step).max().unwrap_or(0)
}

#[test]
fn killed_twenty_times_it_ends_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let calm = dir.path().join("calm");
    let start = Instant::now();
    let valid = valid();
    let more = ["--valid", &valid, "--eval-every", "45", "--save-every", "1"];
    let want = json(&options(&calm, "90", &more));
    let a_step = start.elapsed() / 90;

    let out = dir.path().join("killed");
    let args = options(&out, "90", &[&more[..], &["--resume"]].concat());
    let (mut random, mut landed) = (7, 0);
    for _ in 0..KILLS {
        let from = newest(&out);
        let quiet = || Stdio::null();
        let mut child = tallow(&args)
            .stdout(quiet())
            .stderr(quiet())
            .spawn()
            .unwrap();
        // After up to two further checkpoints, and then anywhere in the next two steps: while a step is computed,
        // while a file is written, while a folder is renamed; or before there is anything.
        let until = from + next(&mut random) % 3;
        while newest(&out) < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        let share = next(&mut random) as f64 / (1_u64 << 31) as f64;
        std::thread::sleep(a_step.mul_f64(2.0 * share));
        // SIGKILL.
        child.kill().unwrap();
        landed += u64::from(child.wait().unwrap().code().is_none());
    }
    assert!(
        landed >= KILLS / 2,
        "{landed} of {KILLS} runs were still going"
    );
    let got = json(&args);
    assert!(got["resumed_from"].as_u64().is_some_and(|n| n > 0), "{got}");
    assert_eq!(got["losses"], want["losses"]);
    assert_eq!(got["valid_loss"], want["valid_loss"]);
    assert_eq!(adapter(&out), adapter(&calm));
    let kept = names(&out.join("checkpoints"));
    assert!(kept.iter().all(|n| n.starts_with("step-")), "{kept:?}");
}

/// Sends a signal once a run is under way; its exit code and what it said.
fn signalled(args: &[String], signal: &str) -> (Option<i32>, Vec<String>) {
    let mut child = spawn(args);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|l| l.unwrap().starts_with("step 1/")));
    let pid = child.id().to_string();
    let sent = Command::new("kill").args([signal, &pid]).status().unwrap();
    assert!(sent.success());
    let rest = lines.map(Result::unwrap).collect();
    (child.wait().unwrap().code(), rest)
}

#[test]
fn signals_save_a_checkpoint_and_say_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let out = dir.path().join(signal);
        let (got, rest) = signalled(&options(&out, "100000", &[]), signal);
        assert_eq!(got, Some(code), "{rest:?}");
        let last = rest.last().unwrap();
        assert!(
            last.starts_with("interrupted: stopped after step "),
            "{last}"
        );
        assert!(
            last.ends_with("the same command with --resume goes on from there"),
            "{last}"
        );
        let step = last.split(' ').nth(4).unwrap().parse::<u64>().unwrap();
        let kept = ["checkpoints", "metrics.jsonl", "tensorboard", "train.yaml"];
        assert_eq!(names(&out), kept);
        assert_eq!(names(&out.join("checkpoints")), [format!("step-{step:06}")]);
        let steps = (step + 3).to_string();
        let done = json(&options(&out, &steps, &["--resume"]));
        assert_eq!(done["resumed_from"], step);
        assert_eq!(done["losses"].as_array().unwrap().len() as u64, step + 3);
    }
    // Without checkpoints there is nothing to save, and it is said.
    let out = dir.path().join("none");
    let (got, rest) = signalled(&options(&out, "100000", &["--save-every", "0"]), "-INT");
    assert_eq!(got, Some(130));
    let last = rest.last().unwrap();
    assert!(last.ends_with("; nothing was saved"), "{last}");
    let kept = ["metrics.jsonl", "tensorboard", "train.yaml"];
    assert_eq!(names(&out), kept);
}

#[test]
fn a_second_signal_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // A step of seconds, so that the first signal is still being waited for.
    let args = options(&out, "10", &["--memory", "64GiB"]);
    let mut args: Vec<String> = args.into_iter().filter(|a| a != "24").collect();
    let at = args.iter().position(|a| a == "--seq-len").unwrap();
    args.insert(at + 1, "512".into());
    let at = args.iter().position(|a| a == "--accumulate").unwrap();
    args[at + 1] = "64".into();
    let mut child = spawn(&args);
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("steps of") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0);
    }
    let pid = child.id().to_string();
    std::thread::sleep(Duration::from_millis(200));
    for _ in 0..2 {
        Command::new("kill").args(["-INT", &pid]).status().unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("interrupted"), "{rest}");
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_whole() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let first = json(&options(
        &out,
        "4",
        &["--save-every", "2", "--keep-last", "9"],
    ));
    assert_eq!(first["steps"], 4);
    // A limit on file sizes is as good as a full disk; the signal it sends is ignored, as for a full disk none comes.
    let limited = |blocks: &str, args: &[String]| -> Output {
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_tallow")]);
        command.env("TALLOW_NO_TUNE", "1");
        command.args(args).stdin(Stdio::null()).output().unwrap()
    };
    let args = options(
        &out,
        "8",
        &["--save-every", "2", "--keep-last", "9", "--resume"],
    );
    let stopped = limited("16", &args);
    let err = text(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(2), "{err}");
    let last = err.lines().last().unwrap();
    assert!(
        last.starts_with("error: the checkpoint of step 6 was not saved: cannot write "),
        "{last}"
    );
    assert!(
        last.contains("the last good checkpoint is ") && last.ends_with("step-000004"),
        "{last}"
    );
    assert_eq!(
        names(&out.join("checkpoints")),
        ["step-000002", "step-000004"]
    );
    let done = json(&args);
    assert_eq!(
        (&done["resumed_from"], &done["steps"]),
        (&4.into(), &8.into())
    );
    let calm = dir.path().join("calm");
    let want = json(&options(&calm, "8", &[]));
    // The schedule of the first four steps was one of four steps, so only they differ from a run of eight.
    assert_eq!(want["losses"][0], done["losses"][0]);
}

#[test]
fn a_file_of_settings_repeats_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let more = [
        "--optimizer",
        "lion",
        "--clip",
        "0",
        "--targets",
        "q_proj,v_proj",
        "--warmup",
        "2",
    ];
    let want = json(&options(&first, "5", &more));
    let settings = first.join("train.yaml").display().to_string();
    let other = second.display().to_string();
    let args = ["train", "--config", &settings, "--out", &other].map(str::to_owned);
    let got = json(&args);
    assert_eq!(got["losses"], want["losses"]);
    assert_eq!(adapter(&first), adapter(&second));
    let yaml = |dir: &Path| {
        let text = fs::read_to_string(dir.join("train.yaml")).unwrap();
        let keep = |l: &&str| !l.starts_with("out: ");
        text.lines()
            .filter(keep)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(yaml(&first), yaml(&second));
    // What is typed wins, and the folder of a run is not overwritten by chance.
    let same = ["train", "--config", &settings, "--steps", "3"].map(str::to_owned);
    let refused = tallow(&same).output().unwrap();
    let err = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        err.contains("holds a run of 5 steps; go on with --resume"),
        "{err}"
    );
    let third = dir.path().join("third").display().to_string();
    let args = ["train", "--config", &settings, "--out", &third, "--steps=3"].map(str::to_owned);
    assert_eq!(json(&args)["steps"], 3);
}
