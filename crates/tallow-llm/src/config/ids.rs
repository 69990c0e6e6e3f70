//! The ids of `<bos>`, `<eos>` and padding.
//! Invariant: every id returned is below the vocabulary's size; the eos written when training comes first.
//! Absent on purpose: the tokenizer's own idea of them; see `tokenizer.rs`.

use serde_json::Value;

use super::{Family, ModelConfig};
use crate::error::Result;
use crate::json::{Fields, brief};

pub(super) fn bos(f: &Fields, family: Family, vocab: usize) -> Result<Option<u32>> {
    if !f.map.contains_key("bos_token_id") {
        // The class defaults of transformers.
        let default = match family {
            Family::Llama | Family::Mistral => Some(1),
            Family::Qwen2 => None,
        };
        return Ok(default.filter(|&id| (id as usize) < vocab));
    }
    f.get("bos_token_id")
        .map(|v| id(f, "bos_token_id", v, vocab))
        .transpose()
}

/// One id, a list, or null (no end). Where the key is absent the class default of transformers holds.
pub(super) fn eos(f: &Fields, family: Family, vocab: usize) -> Result<Vec<u32>> {
    if !f.map.contains_key("eos_token_id") {
        let default = match family {
            Family::Llama | Family::Mistral => Some(2),
            Family::Qwen2 => None,
        };
        return Ok(default
            .filter(|&id| (id as usize) < vocab)
            .into_iter()
            .collect());
    }
    ids(f, "eos_token_id", vocab)
}

/// Padding is never computed with, so an id outside the vocabulary (-1 in old files) means none.
pub(super) fn pad(f: &Fields, vocab: usize) -> Option<u32> {
    let id = f.get("pad_token_id")?.as_u64()?;
    (id < vocab as u64).then_some(id as u32)
}

/// `generation_config.json` may know more ends of a text (a chat model has two). They come after the ones of
/// `config.json`, or replace them where `config.json` does not speak of any.
pub(super) fn add_generation_eos(
    config: &mut ModelConfig,
    main: &Fields,
    generation: &Fields,
) -> Result<()> {
    let more = ids(generation, "eos_token_id", config.vocab)?;
    if !more.is_empty() && main.get("eos_token_id").is_none() {
        config.eos.clear();
    }
    for id in more {
        if !config.eos.contains(&id) {
            config.eos.push(id);
        }
    }
    Ok(())
}

fn ids(f: &Fields, key: &str, vocab: usize) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    let one = match f.get(key) {
        None => return Ok(found),
        Some(Value::Array(many)) => many.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    for value in one {
        let id = id(f, key, value, vocab)?;
        if !found.contains(&id) {
            found.push(id);
        }
    }
    Ok(found)
}

fn id(f: &Fields, key: &str, value: &Value, vocab: usize) -> Result<u32> {
    match value.as_u64() {
        Some(id) if id < vocab as u64 => Ok(id as u32),
        _ => Err(f.bad(key, format!("ids below vocab_size ({vocab})"), brief(value))),
    }
}
