//! `tallow bench` and `tallow explain --shape` from outside. Their figures are the machine's; what is tested is that every row is
//! judged, that reports read back, and that nonsense is refused. A row may be INVALID on a busy machine: that is exit code 1.

use super::{refused::refused, tallow, text};
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

/// Every row has figures with a passed check, or a reason. Engines by task.
fn rows(report: &Value) -> Vec<(String, String)> {
    let mut all = vec![];
    for group in report["groups"].as_array().unwrap() {
        for row in group["rows"].as_array().unwrap() {
            let valid = &row["verdict"]["valid"];
            match valid.is_object() {
                true => {
                    assert!(valid["waited"]["median"].as_f64().unwrap() > 0.0);
                    assert!(valid["check"]["worst"].as_f64().unwrap() <= 1.0, "{row}");
                }
                false => assert!(!row["verdict"]["invalid"].is_null(), "{row}"),
            }
            let name = |v: &Value| v.as_str().unwrap().to_owned();
            all.push((name(&group["name"]), name(&row["engine"])));
        }
    }
    all
}

#[test]
fn a_run_is_written_as_json_and_html_and_compared_with_itself() {
    let dir = tempfile::tempdir().unwrap();
    let [json, html] = ["r.json", "r.html"].map(|n| dir.path().join(n).display().to_string());
    let out = tallow(&[
        "bench",
        "layers",
        "--quick",
        "--threads",
        "1",
        "--json",
        &json,
        "--html",
        &html,
    ]);
    assert!(
        matches!(out.status.code(), Some(0 | 1)),
        "{}",
        text(&out.stderr)
    );
    let table = text(&out.stdout);
    assert!(
        table.contains("this machine reaches") && table.contains("AdamW"),
        "{table}"
    );
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["stopped"], false);
    let found = rows(&report);
    assert!(
        found.len() >= 8 && found.iter().all(|r| r.1 == "tallow"),
        "{found:?}"
    );
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("Roofline") && page.contains("AdamW"));
    let out = tallow(&["bench", "compare", &json, &json]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let said = text(&out.stdout);
    assert!(
        !said.contains("faster") && !said.contains("slower"),
        "{said}"
    );
}

#[test]
#[cfg(unix)]
fn a_run_that_is_interrupted_leaves_what_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("r.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_tallow"))
        .args(["bench", "layers", "--quick", "--threads", "1", "--json"])
        .arg(&json)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    // The second task begins when the first is done.
    assert!(said.any(|l| l.unwrap().starts_with("2/")));
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    let rest: Vec<String> = said.map(Result::unwrap).collect();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130), "{rest:?}");
    let last = rest.last().unwrap();
    assert!(
        last.starts_with("interrupted: ") && last.ends_with("tasks were measured"),
        "{last}"
    );
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["stopped"], true);
    let found = rows(&report);
    assert!((1..8).contains(&found.len()), "{found:?}");
    // Each of them is on the screen as well.
    let table = text(&out.stdout);
    assert!(
        found.iter().all(|(task, _)| table.contains(task)),
        "{table}"
    );
}

#[test]
fn a_product_is_explained_by_all_its_kernels() {
    let out = tallow(&[
        "explain",
        "--shape",
        "8x16 @ 16x8",
        "--json",
        "--threads",
        "1",
    ]);
    assert!(
        matches!(out.status.code(), Some(0 | 1)),
        "{}",
        text(&out.stderr)
    );
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    let all = found["candidates"].as_array().unwrap();
    assert_eq!(all.iter().filter(|c| c["chosen"] == true).count(), 1);
    for c in all {
        assert!(c["waited_s"].is_number() != c["invalid"].is_string(), "{c}");
    }
}

#[test]
fn nonsense_is_refused() {
    refused(
        &["bench", "speed"],
        &["seed, layers, tax, train, decode, sweep or busy"],
    );
    refused(&["bench", "--only", "abacus"], &["abacus", "--only"]);
    for wrong in ["8", "0x16", "8x", "8x16x2"] {
        refused(&["bench", "train", "--batch", wrong], &["--batch", "8x512"]);
    }
    refused(&["bench", "--against", "abacus"], &["abacus", "--against"]);
    refused(&["bench", "--shape", "70b", "train"], &["70b", "8b"]);
    refused(&["bench", "compare", "a.json"], &["AFTER"]);
    refused(
        &["bench", "compare", "none.json", "none.json"],
        &["none.json"],
    );
    refused(
        &["bench", "decode", "--model", "/nowhere"],
        &["/nowhere/config.json"],
    );
    // Before anything is measured, not behind it.
    refused(
        &["bench", "--json", "/nowhere/r.json"],
        &["/nowhere", "--json"],
    );
    refused(&["bench", "--html", "/tmp"], &["/tmp", "--html"]);
    #[cfg(target_os = "linux")]
    refused(
        &["bench", "--json", "/proc/r.json"],
        &["/proc/r.json", "can be written to"],
    );
    refused(
        &["explain", "--shape", "128x512 @ 511x8"],
        &["128x512 @ 511x8", "MxK @ KxN"],
    );
    refused(
        &["explain", "--shape", "1x1 @ 1x1", "--model", "x"],
        &["--model"],
    );
    refused(&["explain", "forward"], &["--model"]);
}
