//! `tallow tune` and the table it fills.
use super::*;

fn tuned(cache: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tallow"))
        .args(args)
        .env("TALLOW_CACHE", cache)
        .env_remove("TALLOW_NO_TUNE")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn what_is_measured_once_is_read_by_every_verb() {
    let dir = TempDir::new().unwrap();
    let model = tiny();
    let tune = [
        "tune", "--model", &model, "--tokens", "16", "--batch", "1", "--json",
    ];
    let out = tuned(dir.path(), &tune);
    let err = text(&out.stderr);
    assert!(out.status.success(), "{err}");
    assert!(
        err.contains("5/5 training step of 1 x 16 tokens") && err.contains("kept in "),
        "{err}"
    );
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    let contested = said["contested"].as_array().unwrap();
    assert!(!contested.is_empty() && said["alone"].as_u64().unwrap() > 0);
    for c in contested {
        assert!(c["why"].as_str().unwrap().starts_with("measured: "), "{c}");
    }
    let path = fs::read_dir(dir.path().join("kernels"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let table = fs::read(&path).unwrap();

    // Read, not measured again.
    let explain = [
        "explain", "train", "--model", &model, "--tokens", "16", "--batch", "1",
    ];
    let out = tuned(dir.path(), &explain);
    assert!(out.status.success() && !text(&out.stderr).contains("measured"));
    assert!(text(&out.stdout).contains("measured: "));
    assert_eq!(fs::read(&path).unwrap(), table);
    // Another shape: measured on first use, in one line.
    let other = [
        "explain", "train", "--model", &model, "--tokens", "24", "--batch", "1",
    ];
    let err = text(&tuned(dir.path(), &other).stderr);
    assert_eq!(
        err.lines().filter(|l| l.starts_with("measured ")).count(),
        1,
        "{err}"
    );
    assert_ne!(fs::read(&path).unwrap(), table);

    // Broken: one line, and no harm.
    fs::write(&path, &table[..table.len() / 2]).unwrap();
    let out = tuned(dir.path(), &explain);
    let err = text(&out.stderr);
    assert!(
        out.status.success() && err.contains("measured anew"),
        "{err}"
    );
    // Forbidden: not even read.
    fs::write(&path, b"nonsense").unwrap();
    let mut still = explain.to_vec();
    still.push("--no-tune");
    let out = tuned(dir.path(), &still);
    assert_eq!(text(&out.stderr), "");
    assert!(text(&out.stdout).contains("lowest estimate of 2"));
    assert_eq!(fs::read(&path).unwrap(), b"nonsense");
}

#[test]
fn a_table_that_cannot_be_kept_costs_nothing_else() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let out = tuned(&file, &["tune", "--shape", "5x24 @ 24x16", "--rank", "2"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let model = tiny();
    let explain = [
        "explain", "train", "--model", &model, "--tokens", "16", "--batch", "1",
    ];
    let out = tuned(&file, &explain);
    let err = text(&out.stderr);
    assert!(out.status.success() && err.contains("not kept: "), "{err}");
    for bad in [
        &["tune", "--no-tune"][..],
        &["tune", "--shape", "nonsense"],
        &["tune", "--tokens", "0"],
        &["tune", "--adapters", "0"],
        &["tune", "--shape", "1x1 @ 1x1", "--tokens", "4"],
    ] {
        let out = tuned(dir.path(), bad);
        assert_eq!(out.status.code(), Some(2), "{bad:?}");
        assert!(text(&out.stderr).starts_with("error: "), "{bad:?}");
    }
}
