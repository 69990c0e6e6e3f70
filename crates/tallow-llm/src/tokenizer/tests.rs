//! The built-in tokenizer (byte-level), variants of it that add special tokens themselves, and a small
//! sentencepiece-like one with byte fallback.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::test_files::{golden, message, object, tiny};

fn config() -> ModelConfig {
    ModelConfig::read(&tiny()).unwrap()
}

fn built_in() -> Tokenizer {
    Tokenizer::open(&tiny()).unwrap()
}

/// The built-in tokenizer after a change, and `tokenizer_config.json` where given.
fn changed(change: impl FnOnce(&mut Value), about: Option<Value>) -> TempDir {
    let mut json = Value::Object(object(&tiny().join("tokenizer.json")));
    change(&mut json);
    folder(&json, about)
}

fn folder(tokenizer: &Value, about: Option<Value>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    if let Some(about) = about {
        fs::write(dir.path().join("tokenizer_config.json"), about.to_string()).unwrap();
    }
    dir
}

/// A post-processor that puts `before` and `after` around a text.
fn template(before: Option<&str>, after: Option<&str>) -> Value {
    let special = |t: &str| json!({"SpecialToken": {"id": t, "type_id": 0}});
    let ids = json!({
        "<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]},
        "<|eos|>": {"id": "<|eos|>", "ids": [1], "tokens": ["<|eos|>"]},
    });
    let mut single = Vec::new();
    single.extend(before.map(special));
    single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
    single.extend(after.map(special));
    let pair =
        json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids})
}

/// Like Llama 2: spaces are "▁", unknown characters become bytes, the first space is dropped when decoding.
fn sentencepiece() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut pieces = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    pieces.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    pieces.extend(["▁", "a", "b", "▁a", "ab", "<", ">", "/", "s"].map(str::to_owned));
    for (id, piece) in pieces.iter().enumerate() {
        vocab.insert(piece.clone(), id.into());
    }
    let special = |id: u32, t: &str| {
        json!({"id": id, "content": t, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "a"], ["a", "b"]]},
    })
}

#[test]
fn special_tokens_in_data_are_text() {
    let t = built_in();
    assert_eq!(t.token_id("<|eos|>"), Some(1));
    let ids = t.encode_text("a<|eos|><|bos|> b<|pad|>").unwrap();
    assert!(ids.iter().all(|&id| id > 2), "{ids:?}");
    assert_eq!(t.decode(&ids).unwrap(), "a<|eos|><|bos|> b<|pad|>");
    let ids = t.encode_line("<|eos|>", &config()).unwrap();
    let inner = &ids[1..ids.len() - 1];
    assert!(ids[0] == 0 && ids[ids.len() - 1] == 1 && inner.iter().all(|&id| id > 2));

    let dir = folder(&sentencepiece(), None);
    let ids = Tokenizer::open(dir.path())
        .unwrap()
        .encode_text("a</s><s>")
        .unwrap();
    assert!(ids.iter().all(|&id| id > 2), "{ids:?}");
}

#[test]
fn a_line_has_one_bos_and_one_eos_whoever_adds_them() {
    let plain = built_in().encode_text("Thou art").unwrap();
    let want = [&[0], plain.as_slice(), &[1]].concat();
    for (before, after) in [(false, false), (true, false), (false, true), (true, true)] {
        let around = template(before.then_some("<|bos|>"), after.then_some("<|eos|>"));
        let dir = changed(|t| t["post_processor"] = around, None);
        let t = Tokenizer::open(dir.path()).unwrap();
        assert_eq!(t.encode_line("Thou art", &config()).unwrap(), want);
        assert_eq!(
            t.encode_prompt("Thou art", &config()).unwrap(),
            want[..want.len() - 1]
        );
        assert_eq!(t.encode_text("Thou art").unwrap(), plain);
        assert_eq!(t.encode_line("", &config()).unwrap(), [0, 1]);
    }
}

#[test]
fn a_model_without_bos_or_eos_gets_none() {
    let t = built_in();
    let plain = t.encode_text("art").unwrap();
    let mut c = config();
    c.bos = None;
    c.eos = vec![5, 1];
    assert_eq!(
        t.encode_line("art", &c).unwrap(),
        [plain.as_slice(), &[5]].concat()
    );
    c.eos.clear();
    assert_eq!(t.encode_line("art", &c).unwrap(), plain);
    // Qwen2 has a bos_token_id in config.json and "bos_token": null beside its tokenizer.
    let dir = changed(|_| (), Some(json!({"bos_token": null})));
    let t = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(t.encode_prompt("art", &config()).unwrap(), plain);
    let dir = changed(|_| (), Some(json!({"model_max_length": 3})));
    let t = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(t.encode_prompt("art", &config()).unwrap()[0], 0);
}

#[test]
fn a_second_eos_of_the_list_counts_as_the_end() {
    let dir = changed(
        |t| t["post_processor"] = template(None, Some("<|eos|>")),
        None,
    );
    let t = Tokenizer::open(dir.path()).unwrap();
    let mut c = config();
    c.eos = vec![7, 1];
    assert_eq!(t.encode_line("art", &c).unwrap().last(), Some(&1));
}

#[test]
fn nothing_is_cut_or_padded() {
    let dir = changed(
        |t| {
            t["truncation"] = json!({"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
            t["padding"] = json!({"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"});
        },
        None,
    );
    let text = "one two three four five six";
    let want = built_in().encode_line(text, &config()).unwrap();
    let t = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(t.encode_line(text, &config()).unwrap(), want);
}

/// The pieces a stream gives for some ids, after a prompt, and what comes at the end.
fn stream(t: &Tokenizer, prompt: &[u32], ids: &[u32]) -> (Vec<String>, String) {
    let mut stream = t.decode_stream().after(prompt).unwrap();
    let pieces = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    (pieces, stream.finish().unwrap())
}

#[test]
fn a_character_over_several_tokens_comes_whole() {
    let t = built_in();
    let ids = t.encode_text("é🙂x").unwrap();
    assert!(ids.len() > 5, "the characters should be split: {ids:?}");
    let (pieces, rest) = stream(&t, &[], &ids);
    let shown: Vec<&String> = pieces.iter().filter(|p| !p.is_empty()).collect();
    assert_eq!(shown, ["é", "🙂", "x"]);
    assert_eq!(rest, "");
    // Cut in the middle, the end is shown as broken.
    let (pieces, rest) = stream(&t, &[], &ids[..ids.len() - 2]);
    assert_eq!((pieces.concat().as_str(), rest.as_str()), ("é", "\u{fffd}"));
}

#[test]
fn sentencepiece_spaces_and_bytes_come_as_in_the_whole_text() {
    let dir = folder(&sentencepiece(), None);
    let t = Tokenizer::open(dir.path()).unwrap();
    let text = "a ab é🙂 a";
    let ids = t.encode_text(text).unwrap();
    assert_eq!(t.decode(&ids).unwrap(), text);
    let (pieces, rest) = stream(&t, &[], &ids);
    assert_eq!(pieces.concat() + &rest, text);
    assert!(pieces.contains(&"🙂".to_owned()), "{pieces:?}");
    // A continuation keeps its first space; without a prompt it has none.
    let a = t.token_id("▁a").unwrap();
    assert_eq!(stream(&t, &[a], &[a, a]).0, [" a", " a"]);
    assert_eq!(stream(&t, &[], &[a, a]).0, ["a", " a"]);
    // A special token between words costs no space.
    assert_eq!(stream(&t, &[], &[a, 2, a, 2, 2, a]).0.concat(), "a a a");
}

#[test]
fn endless_broken_bytes_are_not_held_for_ever() {
    let dir = folder(&sentencepiece(), None);
    let t = Tokenizer::open(dir.path()).unwrap();
    let byte = t.token_id("<0xFF>").unwrap();
    let (pieces, rest) = stream(&t, &[], &[byte; 40]);
    assert!(pieces[20..].iter().any(|p| !p.is_empty()));
    assert_eq!(pieces.concat() + &rest, "\u{fffd}".repeat(40));
}

#[test]
fn unusable_tokenizers_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let got = message(dir.path(), Tokenizer::open(dir.path()));
    assert!(
        got.starts_with("tokenizer.json does not exist; give a model folder with a fast tokenizer"),
        "{got}"
    );
    for text in ["", "{}", "[1", "{\"version\":\"1.0\"}", "\u{0}"] {
        fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let got = message(dir.path(), Tokenizer::open(dir.path()));
        assert!(
            got.starts_with("tokenizer.json: not a usable tokenizer: "),
            "{got}"
        );
        assert!(got.ends_with("; download the file again"), "{got}");
    }
    // A tokenizer with more tokens than the model.
    let small = ModelConfig::read(&golden("llama")).unwrap();
    let got = message(
        &tiny(),
        built_in().encode_prompt("The quick brown fox", &small),
    );
    assert!(
        got.contains("but the model has only 320 (vocab_size); use the tokenizer"),
        "{got}"
    );
}
