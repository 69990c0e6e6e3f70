//! Feeds over files of every size: what is drawn, how full rows are, and that a state restores all of it.
//! Invariant: what a feed gives is compared with the lines of the files themselves.
//! Absent on purpose: training on it.
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tallow_llm::{ModelConfig, Tokenizer};
use tallow_train::{Batch, Drawn, Feed, FeedSettings, Limits};

const NONE: u32 = u32::MAX;
/// Nothing is read whole, and buffers hold little.
const SMALL: Limits = Limits {
    resident_bytes: 0,
    buffer_rows: 9,
    buffer_tokens: 400,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn tiny() -> (Tokenizer, ModelConfig) {
    let dir = root().join("assets/tiny");
    (
        Tokenizer::open(&dir).unwrap(),
        ModelConfig::read(&dir).unwrap(),
    )
}

/// Lines of different lengths, each saying where it stands.
fn write(dir: &Path, name: &str, lines: usize) -> PathBuf {
    let path = dir.join(name);
    let line = |i: usize| {
        let words = "word ".repeat(1 + i * 7 % 23);
        format!("{{\"text\": \"{name} {i} {words}\"}}\n")
    };
    fs::write(&path, (0..lines).map(line).collect::<String>()).unwrap();
    path
}

fn settings(paths: Vec<PathBuf>) -> FeedSettings {
    FeedSettings::new(paths, 48, 3, 5)
}

/// Every way of reading two files.
fn ways(dir: &Path) -> Vec<FeedSettings> {
    let plain = settings(vec![write(dir, "a", 31), write(dir, "b", 12)]);
    let mut all = vec![];
    for packing in [false, true] {
        for limits in [Limits::USUAL, SMALL] {
            for weights in [vec![], vec![0.7, 0.3]] {
                all.push(FeedSettings {
                    packing,
                    limits,
                    weights,
                    ..plain.clone()
                });
            }
        }
    }
    all
}

fn open(settings: &FeedSettings) -> Feed {
    let (tokenizer, config) = tiny();
    Feed::open(settings, &tokenizer, &config).unwrap()
}

fn draw(feed: &mut Feed, n: usize) -> Vec<(Drawn, Batch)> {
    let one = |_| {
        let mut batch = Batch::default();
        (feed.next(&mut batch).unwrap(), batch)
    };
    (0..n).map(one).collect()
}

/// How often each line was drawn in an epoch.
fn counts(drawn: &[(Drawn, Batch)], epoch: u64) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (d, _) in drawn.iter().filter(|d| d.0.epoch == epoch) {
        for line in &d.lines {
            let name = line.file.file_name().unwrap().display();
            *counts.entry(format!("{name}:{}", line.line)).or_default() += 1;
        }
    }
    counts
}

#[test]
fn a_state_taken_anywhere_restores_every_kind_of_feed() {
    let dir = tempfile::tempdir().unwrap();
    for settings in ways(dir.path()) {
        let mut feed = open(&settings);
        for after in 0..16 {
            // Through text, as a checkpoint does it.
            let state = feed.state().to_string();
            let state = serde_json::from_str(&state).unwrap();
            let mut again = open(&settings);
            draw(&mut again, after % 3);
            again.restore(&state).unwrap();
            let ahead = draw(&mut again, 7);
            let mut twice = open(&settings);
            twice.restore(&state).unwrap();
            assert_eq!(draw(&mut twice, 7), ahead);
            assert_eq!(draw(&mut feed, 1)[0], ahead[0], "{after} of {settings:?}");
        }
    }
}

#[test]
fn a_pass_draws_every_line_once_in_another_order_each_time() {
    let dir = tempfile::tempdir().unwrap();
    for settings in ways(dir.path())
        .into_iter()
        .filter(|s| s.weights.is_empty())
    {
        let drawn = draw(&mut open(&settings), 60);
        for epoch in 0..2 {
            let counts = counts(&drawn, epoch);
            assert_eq!(counts.len(), 43, "{settings:?}");
            assert!(counts.values().all(|n| *n == 1));
        }
        let order = |epoch: u64| -> Vec<_> {
            let of = drawn.iter().filter(|d| d.0.epoch == epoch);
            of.flat_map(|d| d.0.lines.clone()).collect()
        };
        assert_ne!(order(0), order(1));
        let stats = open(&settings).stats();
        let batches = drawn.iter().filter(|d| d.0.epoch == 0).count() as u64;
        match settings.limits == Limits::USUAL {
            true => assert_eq!(stats.batches, Some(batches)),
            false => assert_eq!(stats.batches, None),
        }
    }
}

#[test]
fn weights_decide_the_shares_of_files_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    for mut settings in ways(dir.path())
        .into_iter()
        .filter(|s| !s.weights.is_empty())
    {
        settings.weights = vec![1.0, 3.0];
        let drawn = draw(&mut open(&settings), 250);
        let lines = drawn.iter().flat_map(|d| &d.0.lines);
        let of_a = lines.clone().filter(|l| l.file.ends_with("a")).count();
        let share = of_a as f64 / lines.count() as f64;
        assert!((share - 0.25).abs() < 0.05, "{share}");
    }
}

#[test]
fn packed_rows_hold_whole_documents_that_begin_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (tokenizer, config) = tiny();
    for settings in ways(dir.path()).into_iter().filter(|s| s.packing) {
        for (drawn, batch) in draw(&mut open(&settings), 12) {
            assert!(batch.packed && [batch.b, batch.t] == [3, 48]);
            let mut lines = drawn.lines.iter();
            for row in 0..batch.b {
                let at = |i: usize| row * batch.t + i;
                let mut i = 0;
                while i < batch.t && batch.pos[at(i)] != NONE {
                    let line = lines.next().unwrap();
                    let text = fs::read_to_string(&line.file).unwrap();
                    let text = text.lines().nth(line.line as usize - 1).unwrap();
                    let text: serde_json::Value = serde_json::from_str(text).unwrap();
                    let text = text["text"].as_str().unwrap();
                    let mut ids = tokenizer.encode_line(text, &config).unwrap();
                    ids.truncate(settings.seq_len);
                    for (k, pair) in ids.windows(2).enumerate() {
                        let n = at(i + k);
                        assert_eq!((batch.ids[n], batch.targets[n]), (pair[0], pair[1]));
                        assert_eq!((batch.pos[n], batch.starts[n]), (k as u32, i as u32));
                    }
                    i += ids.len() - 1;
                }
                for n in i..batch.t {
                    assert_eq!((batch.pos[at(n)], batch.targets[at(n)]), (NONE, NONE));
                }
            }
            assert!(lines.next().is_none());
        }
    }
}

#[test]
fn wikisql_fills_more_than_95_of_100_inputs() {
    let all = [(512, Limits::USUAL), (512, SMALL), (1024, Limits::USUAL)];
    for (seq_len, limits) in all {
        let settings = FeedSettings {
            packing: true,
            limits,
            ..FeedSettings::new(
                vec![root().join("assets/wikisql/train.jsonl")],
                seq_len,
                4,
                1,
            )
        };
        let mut feed = open(&settings);
        let drawn = draw(&mut feed, 40);
        let first: Vec<_> = drawn.iter().filter(|d| d.0.epoch == 0).collect();
        let used: usize = first.iter().map(|d| d.1.inputs()).sum();
        // The rows there are; a last batch may have fewer.
        let rows = |b: &Batch| b.pos.chunks(b.t).filter(|r| r[0] != NONE).count();
        let rows: usize = first.iter().map(|d| rows(&d.1)).sum();
        let filled = used as f64 / (rows * seq_len) as f64;
        println!("{seq_len}: {filled:.4} of {rows} rows");
        assert!(filled > 0.95, "{seq_len}: {filled}");
        if let Some(stats) = feed.stats().filled {
            assert!(stats > 0.95);
        }
    }
}

#[test]
fn a_large_file_is_read_in_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let settings = FeedSettings {
        limits: SMALL,
        ..settings(vec![write(dir.path(), "a", 3000)])
    };
    let mut feed = open(&settings);
    let mut batch = Batch::default();
    for _ in 0..300 {
        feed.next(&mut batch).unwrap();
        let state = feed.state();
        let held = state["source"]["parts"][0]["buffer"].as_array().unwrap();
        assert!(held.len() <= SMALL.buffer_rows);
    }
    // Reading is not ahead of what was drawn by more than the buffer.
    let place = &feed.state()["source"]["parts"][0]["place"][1];
    assert!(place.as_u64().unwrap() <= 900 + 9, "{place}");
}

#[test]
fn a_changed_large_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a", 100);
    let settings = FeedSettings {
        limits: SMALL,
        ..settings(vec![path.clone()])
    };
    let mut feed = open(&settings);
    draw(&mut feed, 4);
    let state = feed.state();
    let text = fs::read_to_string(&path).unwrap();
    // One word of the same length, in the first line, in the middle and in the last.
    let last = text.rfind("word").unwrap();
    let middle = text.len() / 2 + text[text.len() / 2..].find("word").unwrap();
    for at in [text.find("word").unwrap(), middle, last] {
        let mut changed = text.clone();
        changed.replace_range(at..at + 4, "king");
        fs::write(&path, changed).unwrap();
        let error = open(&settings).restore(&state).unwrap_err().to_string();
        assert!(error.contains("not the data of the checkpoint"), "{error}");
    }
    fs::write(&path, &text).unwrap();
    open(&settings).restore(&state).unwrap();
    let packed = FeedSettings {
        packing: true,
        ..settings.clone()
    };
    assert!(open(&packed).restore(&state).is_err());
    let mut hostile = state.clone();
    hostile["source"]["parts"][0]["buffer"][0][1] = serde_json::json!(u64::MAX);
    assert!(open(&settings).restore(&hostile).is_err());
    hostile["source"]["parts"] = serde_json::json!([{}]);
    assert!(open(&settings).restore(&hostile).is_err());
}

#[test]
fn a_chat_that_the_template_refuses_is_named_by_its_line() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "config.json"] {
        let bytes = fs::read(root().join("assets/tiny").join(file)).unwrap();
        fs::write(dir.path().join(file), bytes).unwrap();
    }
    let template = "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}\
                    {{ m.content }} {% endfor %}";
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let (tokenizer, config) = (
        Tokenizer::open(dir.path()).unwrap(),
        ModelConfig::read(dir.path()).unwrap(),
    );
    let line = |role: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"a b c\"}}, \
             {{\"role\": \"{role}\", \"content\": \"d e f\"}}]}}\n"
        )
    };
    let path = dir.path().join("chats");
    fs::write(&path, line("assistant").repeat(2)).unwrap();
    let good = settings(vec![path.clone()]);
    let mut batch = Batch::default();
    let mut feed = Feed::open(&good, &tokenizer, &config).unwrap();
    feed.next(&mut batch).unwrap();
    assert!(batch.counted > 0 && batch.counted < batch.inputs());
    fs::write(&path, line("assistant") + &line("x")).unwrap();
    for limits in [Limits::USUAL, SMALL] {
        let bad = FeedSettings {
            limits,
            ..good.clone()
        };
        let got = Feed::open(&bad, &tokenizer, &config)
            .and_then(|mut f| f.next(&mut batch))
            .unwrap_err()
            .to_string();
        assert!(
            got.contains("chats, line 2: chat template: \"no x\""),
            "{got}"
        );
    }
}

#[test]
fn files_without_anything_to_learn_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (tokenizer, config) = tiny();
    let path = dir.path().join("a");
    // The prompt alone fills the row, so that nothing of the completion is left.
    let line = format!(
        "{{\"prompt\": \"{}\", \"completion\": \"x\"}}\n",
        "word ".repeat(90)
    );
    fs::write(&path, line.repeat(3)).unwrap();
    for limits in [Limits::USUAL, SMALL] {
        let settings = FeedSettings {
            limits,
            ..settings(vec![path.clone()])
        };
        let mut batch = Batch::default();
        let got = Feed::open(&settings, &tokenizer, &config)
            .and_then(|mut f| f.next(&mut batch))
            .unwrap_err()
            .to_string();
        assert!(got.contains("nothing to predict"), "{got}");
    }
    let weights = FeedSettings {
        weights: vec![0.5],
        ..settings(vec![path.clone(), path])
    };
    let got = Feed::open(&weights, &tokenizer, &config).map(|_| ());
    assert!(
        got.unwrap_err()
            .to_string()
            .starts_with("weights: want one above 0")
    );
}
