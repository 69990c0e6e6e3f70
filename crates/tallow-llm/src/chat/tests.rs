//! Chat templates against what transformers renders, and masks against what the assistant said.
//! Absent on purpose: templates of real models; the goldens have their constructs.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::data::Chat;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&root().join("assets/tiny")).unwrap()
}

fn goldens() -> Value {
    let path = root().join("tests/goldens/chat/cases.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn chats_are_rendered_as_transformers_renders_them() {
    let (goldens, tokenizer) = (goldens(), tokenizer());
    let mut refused = 0;
    for (i, case) in list(&goldens["cases"]).iter().enumerate() {
        let name = text(&case["template"]);
        let template = text(&goldens["templates"][name]);
        let template = ChatTemplate::from_text(&tokenizer, template).unwrap();
        let tools = Some(&case["tools"]).filter(|t| !t.is_null());
        let prompt = case["add_generation_prompt"] == true;
        let got = template.render(list(&case["messages"]), tools, prompt);
        match case.get("rendered") {
            Some(want) => assert_eq!(got.unwrap(), text(want), "case {i}, {name}"),
            None => {
                let (got, why) = (got.unwrap_err().to_string(), text(&case["refused"]));
                let start: String = why.chars().take(60).collect();
                assert!(got.contains(&start), "case {i}, {name}: {got}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 6);
}

/// The text of what counts, run by run.
fn answers(tokenizer: &Tokenizer, ids: &[u32], counted: &[bool]) -> Vec<String> {
    assert_eq!(ids.len(), counted.len());
    let mut runs: Vec<Vec<u32>> = vec![];
    let mut before = false;
    for (id, c) in ids.iter().zip(counted) {
        if *c && !before {
            runs.push(vec![]);
        }
        if *c && let Some(run) = runs.last_mut() {
            run.push(*id);
        }
        before = *c;
    }
    let special = |id: u32| tokenizer.special_tokens().into_iter().find(|t| t.1 == id);
    let read = |run: &Vec<u32>| -> String {
        let (mut out, mut plain) = (String::new(), vec![]);
        for id in run {
            match special(*id) {
                None => plain.push(*id),
                Some((text, _)) => {
                    out += &tokenizer.decode(&std::mem::take(&mut plain)).unwrap();
                    out += &text;
                }
            }
        }
        out + &tokenizer.decode(&plain).unwrap()
    };
    runs.iter().map(read).collect()
}

#[test]
fn generation_blocks_say_what_counts() {
    let (goldens, tokenizer) = (goldens(), tokenizer());
    let mut seen = 0;
    for case in list(&goldens["cases"]) {
        // In the other marked template words before and after an answer share tokens with it.
        if case["template"] != "marked" {
            continue;
        }
        let template = text(&goldens["templates"]["marked"]);
        let template = ChatTemplate::from_text(&tokenizer, template).unwrap();
        let chat = Chat {
            messages: list(&case["messages"]).to_vec(),
            tools: Some(&case["tools"]).filter(|t| !t.is_null()).cloned(),
            given: 0,
        };
        let (ids, counted) = template.ids_and_answers(&chat).unwrap();
        let want: Vec<&str> = list(&case["assistant"]).iter().map(text).collect();
        assert_eq!(answers(&tokenizer, &ids, &counted), want);
        assert_eq!(ids, template.ids(&chat.messages, None, false).unwrap());
        seen += want.len();
        // Given messages are no answers.
        let rest = Chat { given: 2, ..chat };
        let (same, counted) = template.ids_and_answers(&rest).unwrap();
        assert_eq!(same, ids);
        let given = list(&case["messages"])
            .iter()
            .take(2)
            .filter(|m| m["role"] == "assistant")
            .count();
        assert_eq!(
            answers(&tokenizer, &ids, &counted),
            want[given.min(want.len())..]
        );
    }
    assert!(seen > 4);
}

const CHATML: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}";

fn chat(pairs: &[(&str, &str)]) -> Chat {
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    Chat {
        messages: pairs.iter().map(message).collect(),
        tools: None,
        given: 0,
    }
}

#[test]
fn without_blocks_an_answer_is_what_a_turn_adds() {
    let tokenizer = tokenizer();
    let template = ChatTemplate::from_text(&tokenizer, CHATML).unwrap();
    let chat = chat(&[
        ("user", "how many?"),
        ("assistant", "seven"),
        ("user", "sure?"),
        ("assistant", "yes"),
    ]);
    let (ids, counted) = template.ids_and_answers(&chat).unwrap();
    let got = answers(&tokenizer, &ids, &counted);
    assert_eq!(got, ["seven<|eos|>\n", "yes<|eos|>\n"]);
    let late = Chat { given: 2, ..chat };
    let (ids, counted) = template.ids_and_answers(&late).unwrap();
    assert_eq!(answers(&tokenizer, &ids, &counted), ["yes<|eos|>\n"]);
}

#[test]
fn a_template_whose_turns_change_the_past_is_refused() {
    let last = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::from_text(&tokenizer(), last).unwrap();
    let chat = chat(&[("user", "a"), ("assistant", "b"), ("user", "c")]);
    let message = template.ids_and_answers(&chat).unwrap_err().to_string();
    assert!(
        message.contains("message 2 is not simply added"),
        "{message}"
    );
    assert!(
        message.ends_with("or count all tokens in the loss"),
        "{message}"
    );
}

#[test]
fn special_tokens_in_a_message_stay_text() {
    let tokenizer = tokenizer();
    let template = ChatTemplate::from_text(&tokenizer, CHATML).unwrap();
    let eos = tokenizer.token_id("<|eos|>").unwrap();
    let count = |content: &str| {
        let messages = chat(&[("user", content), ("assistant", content)]);
        let (ids, counted) = template.ids_and_answers(&messages).unwrap();
        let found = ids.iter().filter(|id| **id == eos).count();
        let counted = answers(&tokenizer, &ids, &counted);
        (found, counted, tokenizer.decode(&ids).unwrap())
    };
    let (found, counted, all) = count("say <|eos|> é<|bos|>");
    assert_eq!(found, 2);
    assert_eq!(counted, ["say <|eos|> é<|bos|><|eos|>\n"]);
    let shown = "say <|eos|> é<|bos|>";
    assert_eq!(all.matches(shown).count(), 2, "{all}");
    // The same ids for the same text, whether or not another message mentions a special token.
    let plain = chat(&[("user", "one two")]);
    let mixed = chat(&[("user", "one two"), ("user", "<|eos|>")]);
    let ids = |c: &Chat| template.ids(&c.messages, None, false).unwrap();
    assert!(ids(&mixed).starts_with(&ids(&plain)));
}

#[test]
fn templates_are_found_in_their_files() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = root().join("assets/tiny/tokenizer.json");
    std::fs::write(
        dir.path().join("tokenizer.json"),
        std::fs::read(tiny).unwrap(),
    )
    .unwrap();
    let open = |name: Option<&str>| {
        let template = ChatTemplate::open(&Tokenizer::open(dir.path()).unwrap(), name);
        template.and_then(|t| t.render(&[json!({"role": "user", "content": "x"})], None, true))
    };
    let config = |value: Value| {
        let path = dir.path().join(CONFIG);
        std::fs::write(path, value.to_string()).unwrap();
    };
    let message = open(None).unwrap_err().to_string();
    assert!(
        message.contains("chat template: this model has none; use"),
        "{message}"
    );
    config(json!({"chat_template": "one {{ bos_token }}", "bos_token": {"content": "B"}}));
    assert_eq!(open(None).unwrap(), "one B");
    assert!(open(Some("rag")).is_err());
    config(json!({"chat_template": [
        {"name": "default", "template": "d"}, {"name": "rag", "template": "r"}
    ]}));
    assert_eq!(open(None).unwrap(), "d");
    assert_eq!(open(Some("rag")).unwrap(), "r");
    let message = open(Some("x")).unwrap_err().to_string();
    assert!(
        message.contains("none is called \"x\"; there are \"default\", \"rag\""),
        "{message}"
    );
    std::fs::write(dir.path().join(FILE), "file").unwrap();
    assert_eq!(open(None).unwrap(), "file");
    assert_eq!(open(Some("rag")).unwrap(), "r");
    std::fs::write(dir.path().join(FILE), "{% if %}").unwrap();
    let message = open(None).unwrap_err().to_string();
    assert!(
        message.contains("(line 1 of it)") && !message.contains('\n'),
        "{message}"
    );
}

#[test]
fn hostile_templates_end() {
    for hostile in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('a\nb') }}",
        "{{ strftime_now('%') }}",
        "{{ messages.x.y }}",
    ] {
        let template = ChatTemplate::from_text(&tokenizer(), hostile).unwrap();
        let message = template.render(&[], None, false).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
    }
}
