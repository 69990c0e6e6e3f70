//! Reports read back, show what they must, and never a figure that is none.

use super::*;
use crate::measure::{Figures, Reason, Verdict};
use crate::probe::{Bandwidth, Bound, Floor, Peak};
use crate::stats::Summary;
use crate::work::{Check, Judge};

/// One valid row, `scale` times as slow, and one that is not.
pub(crate) fn report(scale: f64) -> Report {
    let samples = |s: f64| {
        Summary::of(
            (0..9)
                .map(|i| s * scale * (1.0 + 0.01 * f64::from(i)))
                .collect(),
        )
    };
    let floor = Floor {
        seconds: 5e-6,
        bytes: 1 << 18,
        flops: 1e6,
        bound: Bound::Bandwidth,
    };
    let figures = Figures {
        built: samples(1e-6).unwrap(),
        queued: None,
        not_executed: samples(0.5e-6),
        waited: samples(10e-6).unwrap(),
        in_plan: samples(8e-6),
        no_plan: None,
        check: Check {
            worst: 0.25,
            compared: 10,
            of: 20,
            by: Judge::Oracle,
            at: None,
        },
        growth: 4.0,
    };
    let valid = Row {
        engine: "tallow".into(),
        floor: floor.clone(),
        verdict: Verdict::Valid(Box::new(figures)),
        memory: None,
    };
    let invalid = Row {
        engine: "liar <b>".into(),
        floor,
        verdict: Verdict::Invalid(Reason::Poisoned),
        memory: None,
    };
    let bandwidth = [(16 << 10, 200e9), (1 << 20, 100e9), (256 << 20, 20e9)];
    Report {
        format: FORMAT,
        tallow: "0.1.0".into(),
        peers: vec![],
        missing: vec![("mlx".into(), "not installed: pip install mlx".into())],
        command: "tallow bench seed".into(),
        unix_s: 1_700_000_000,
        machine: Machine {
            processor: "a processor".into(),
            isa: "avx512".into(),
            device: None,
            logical: 2,
            system: "x86_64-linux".into(),
            load: Some(0.0),
        },
        threads: 1,
        dtype: "f32".into(),
        settings: Settings::QUICK,
        probe: Probe {
            bandwidth: bandwidth
                .map(|(bytes, bytes_per_s)| Bandwidth {
                    threads: 1,
                    bytes,
                    bytes_per_s,
                    by: None,
                })
                .to_vec(),
            peak: vec![Peak {
                threads: 1,
                dtype: "f32".into(),
                flops: 1e11,
                by: None,
            }],
        },
        groups: vec![Group {
            suite: "seed".into(),
            name: "softmax 4x16x1024".into(),
            tokens: Some(10),
            rows: vec![valid, invalid],
            revised: vec![],
            rounds: Rounds::default(),
        }],
        stopped: false,
    }
}

#[test]
fn a_report_reads_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.json");
    let r = report(1.0);
    std::fs::write(&path, r.json().unwrap()).unwrap();
    assert_eq!(Report::read(&path).unwrap(), r);
    for (text, why) in [
        ("{", "not JSON"),
        ("{}", "no `format`"),
        ("{\"format\":99}", "format 99"),
        ("{\"format\":1}", "missing field"),
    ] {
        std::fs::write(&path, text).unwrap();
        let e = Report::read(&path).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    }
    assert!(Report::read(&dir.path().join("none")).is_err());
}

#[test]
fn a_table_shows_figures_and_reasons() {
    let r = report(1.0);
    let text = table::group(&r.groups[0]).join("\n");
    assert!(text.contains("10.4 µs") && text.contains("2.08"), "{text}");
    assert!(text.contains("INVALID: nothing was written"), "{text}");
    assert!(text.contains("NOT EXECUTED"), "{text}");
    assert!(text.contains("961538 tokens/s"), "{text}");
    assert_eq!(r.invalid(), 1);
    assert!(
        table::head(&r)
            .join("\n")
            .contains("mlx takes no part: not installed")
    );
    let mut busy = r.clone();
    busy.machine.load = Some(1.9);
    assert!(!table::head(&r).join("\n").contains("OTHERS"));
    assert!(table::head(&busy).join("\n").contains("OTHERS ARE AT WORK"));
}

#[test]
fn a_page_is_one_file_and_names_are_only_text_in_it() {
    let page = html::page(&report(1.0)).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    assert!(!page.contains("liar <b>") && page.contains("liar &lt;b&gt;"));
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        let without = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!without.contains(outside), "{outside}");
    }
    // The samples are in it, and read back.
    let from = page.find("<script type=\"application/json\"").unwrap();
    let json = page[from..].split_once('>').unwrap().1;
    let json = json
        .split_once("</script>")
        .unwrap()
        .0
        .replace("\\u003c", "<");
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report(1.0));
}

#[test]
fn floors_that_were_revised_are_told() {
    let mut r = report(1.0);
    r.groups[0].revised = vec![Revised::Under {
        engine: "<liar>".into(),
        was: 0.5,
        now: 0.95,
    }];
    r.groups[0].rounds = Rounds {
        again: 3,
        disturbed: 2,
    };
    r.probe.peak[0].by = Some("seed: <liar>".into());
    let text = table::group(&r.groups[0]).join("\n");
    let told = "probed again: <liar> was at 0.50 floors, is at 0.95";
    assert!(text.contains(told), "{text}");
    let page = html::page(&r).unwrap();
    assert!(page.contains(&told.replace("<liar>", "&lt;liar&gt;")));
    assert!(page.contains("<small>seed: &lt;liar&gt;</small>"));
    let told = "just before or behind them: 3; kept all the same: 2, TRUST THEM LESS";
    assert!(text.contains(told) && page.contains(told), "{text}");
}

#[test]
fn ratios_are_to_the_first_row() {
    let mut r = report(1.0);
    let slow = report(3.0).groups[0].rows[0].clone();
    r.groups[0].rows.push(slow);
    let g = &r.groups[0];
    assert!(g.ratio(0).is_none() && g.ratio(1).is_none());
    assert!((g.ratio(2).unwrap().middle - 3.0).abs() < 1e-9);
    assert_eq!(g.floor_ratio(2), Some(1.0));
}
