//! Hostile files that have a name, each given to every reader of its kind.
//! Absent on purpose: lines of data (`data.rs`, `data/example.rs`), and headers of weights (`weights/tests.rs`).

use super::*;
use tallow_llm::chat::ChatTemplate;
use tallow_llm::mlx;

/// What a reader says of a folder in which one file was replaced; nothing where it reads on.
type Reader = fn(&Path) -> Option<Error>;

/// Every reader of JSON, the file it reads, and the folder that is sound but for it.
fn readers() -> Vec<(&'static str, PathBuf, Reader)> {
    let (model, adapter) = (golden("llama"), golden("llama/adapter"));
    let tiny = root().join("assets/tiny");
    let config: Reader = |d| ModelConfig::read(d).err();
    let tokenizer: Reader = |d| Tokenizer::open(d).err();
    let peft: Reader = |d| {
        let base = ModelConfig::read(&golden("llama")).unwrap().projections();
        Adapter::read(d, &base).err()
    };
    let shards: Reader = |d| Weights::open_unchecked(d).err();
    vec![
        ("config.json", model.clone(), config),
        ("generation_config.json", model.clone(), config),
        ("tokenizer.json", tiny.clone(), tokenizer),
        ("tokenizer_config.json", tiny, tokenizer),
        ("adapter_config.json", adapter.clone(), peft),
        ("adapter_model.safetensors", adapter.clone(), peft),
        ("adapter_config.json", adapter, |d| mlx::read(d, None).err()),
        (
            "model.safetensors.index.json",
            golden("other/qwen3"),
            shards,
        ),
        ("model.safetensors", model, shards),
    ]
}

/// A copy of a folder's files.
fn copy(from: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

/// All readers refuse this content, in a line that names the file.
fn all_refuse(content: &[u8], except: &[&str]) {
    for (name, sound, read) in readers() {
        if except.contains(&name) {
            continue;
        }
        let dir = copy(&sound);
        fs::write(dir.path().join(name), content).unwrap();
        let error = read(dir.path()).unwrap_or_else(|| panic!("{name} was read"));
        assert!(is_good(dir.path(), &error), "{error}");
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
}

#[test]
fn empty_files_are_refused_by_every_reader() {
    all_refuse(b"", &[]);
}

#[test]
fn invalid_utf_8_is_refused_by_every_reader() {
    all_refuse(b"{\"a\": \"\xff\xfe\"}", &[]);
}

#[test]
fn json_nested_10_000_deep_is_refused_by_every_reader() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!(
            "{{\"a\": {}1{}}}",
            open.repeat(10_000),
            close.repeat(10_000)
        );
        all_refuse(deep.as_bytes(), &[]);
    }
    // The same as the header of tensors.
    let header = format!("{{\"a\":{}", "[".repeat(10_000));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deep.safetensors");
    fs::write(&file, bytes).unwrap();
    let text = Weights::open_file(&file).unwrap_err().to_string();
    assert!(text.contains("its header is not valid"), "{text}");
}

#[test]
fn paths_inside_files_are_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    // What would be read instead of the folder's own is no tokenizer, no template, no model.
    let trap = outside.path().join("trap.json");
    fs::write(&trap, "not for you").unwrap();
    let trap = trap.display().to_string();
    let up = "../".repeat(20) + trap.trim_start_matches('/');
    for path in [&trap, &up] {
        let dir = copy(&root().join("assets/tiny"));
        let about = json!({
            "tokenizer_file": path, "vocab_file": path, "merges_file": path,
            "name_or_path": path, "auto_map": {"AutoTokenizer": path},
        });
        fs::write(dir.path().join("tokenizer_config.json"), about.to_string()).unwrap();
        let tokenizer = Tokenizer::open(dir.path()).unwrap();
        let own = Tokenizer::open(&root().join("assets/tiny")).unwrap();
        let ids = |t: &Tokenizer| t.encode_text("SELECT name").unwrap();
        assert_eq!(ids(&tokenizer), ids(&own));
        let text = format!("{{% include '{path}' %}}");
        let included =
            ChatTemplate::from_text(&tokenizer, &text).and_then(|t| t.render(&[], None, false));
        let said = included.unwrap_err().to_string();
        assert!(!said.contains("not for you"), "{said}");

        let dir = copy(&golden("llama"));
        let mut config = object(&dir.path().join("config.json"));
        config.insert("_name_or_path".into(), json!(path));
        config.insert("auto_map".into(), json!({"AutoConfig": path}));
        fs::write(dir.path().join("config.json"), json!(config).to_string()).unwrap();
        ModelConfig::read(dir.path()).unwrap();

        let dir = copy(&golden("llama/adapter"));
        let mut config = object(&dir.path().join("adapter_config.json"));
        config.insert("base_model_name_or_path".into(), json!(path));
        fs::write(
            dir.path().join("adapter_config.json"),
            json!(config).to_string(),
        )
        .unwrap();
        let base = ModelConfig::read(&golden("llama")).unwrap().projections();
        Adapter::read(dir.path(), &base).unwrap();
    }
}
