//! Folds an adapter into its base model: a Hugging Face folder with the same files, the adapted weights replaced.
//! Invariant: sums are made in f64 and rounded once to the type each weight is stored in; every other byte of a
//! tensor is copied; the folder appears whole under its name or not at all.
//! Absent on purpose: a model in memory. Files are mapped and written row by row, so size does not matter.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};
use tallow_core::element::{to_bf16, to_f16};

use crate::config::{EMBEDDING, HEAD, ModelConfig, Projection};
use crate::error::{Error, Result, io_error, quote};
use crate::files::{self, Staged};
use crate::peft::{self, LoraModule, turned};
use crate::weights::{StoredDtype, TensorView, Weights};

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// Weights that the adapter changed.
    pub modules: usize,
    /// Files with weights, in order.
    pub shards: Vec<String>,
    /// Other files, copied as they are.
    pub copied: Vec<String>,
    /// The embedding was also the output projection, and the adapter is on one of them: now there are two weights.
    pub untied: bool,
    /// Bytes of all tensors.
    pub tensor_bytes: usize,
    /// What deserves a word to the user, though it worked.
    pub warnings: Vec<String>,
}

/// Files that hold weights in formats that would still be those of the base.
const OTHER_WEIGHTS: [&str; 9] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "h5",
    "msgpack",
    "onnx",
    "gguf",
    "ckpt",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const HEAD_WEIGHT: &str = "lm_head.weight";
const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
const NEW_FOLDER: &str = "give the name of a folder that does not exist yet";

/// A tensor of the merged model.
struct Entry<'a> {
    name: String,
    from: &'a TensorView,
    module: Option<LoraModule>,
}

/// Writes the model in `base` with the adapter in `adapter` folded in to the new folder `out`: `W + scale·B·A` for
/// each adapted projection, with DoRA its rows scaled to their magnitudes. Shards keep their names; configuration
/// and tokenizer are copied. A tied embedding becomes two weights where the adapter is on it or on the output
/// projection. `shard` is told the name of each weight file before it is written.
///
/// # Errors
/// A base or an adapter that cannot be read or do not fit, a folder that exists, no space, a result that its type
/// cannot hold. Nothing is left behind then.
pub fn merge(
    base: &Path,
    adapter: &Path,
    out: &Path,
    shard: &mut dyn FnMut(&str),
) -> Result<Merged> {
    let config = ModelConfig::read(base)?;
    let weights = Weights::open(base, &config)?;
    let adapter = peft::Adapter::read(adapter, &config.adaptable())?;
    let outside = |m: &LoraModule| m.module == HEAD || m.module == EMBEDDING;
    let untied = config.tied && adapter.modules.iter().any(outside);
    let modules = adapter.modules.len();
    check_new(out)?;
    let shards = entries(&weights, adapter.modules, untied)?;
    let folder = staging(out)?;
    for (name, tensors) in &shards {
        shard(name);
        write_shard(&folder.path().join(name), tensors)?;
    }
    let copied = copy_rest(base, folder.path(), shards.contains_key(SINGLE))?;
    if untied {
        untie(folder.path(), &shards)?;
    }
    // An empty folder may be in the way; anything else was refused before.
    if out.exists() {
        fs::remove_dir(out).map_err(io_error("replace the folder", out, NEW_FOLDER))?;
    }
    fs::rename(folder.path(), out).map_err(io_error("write the folder", out, NEW_FOLDER))?;
    // It has another name now: there is nothing to delete.
    let _ = folder.keep();
    let all = shards.values().flatten();
    Ok(Merged {
        modules,
        tensor_bytes: all.map(|e| e.from.bytes.len()).sum(),
        shards: shards.into_keys().collect(),
        copied,
        untied,
        warnings: adapter.warnings,
    })
}

/// How far two sets of scores over the same tokens are apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drift {
    /// Largest difference of a logit.
    pub max_logit: f64,
    /// Mean over the positions of `KL(want || got)`, in nats.
    pub mean_kl: f64,
    /// Positions compared.
    pub positions: usize,
}

/// Compares `got` with `want`, both `[t, vocab]`. NaN on either side gives NaN.
pub fn drift(want: &[f32], got: &[f32], vocab: usize) -> Drift {
    let (mut max_logit, mut kl, mut positions) = (0.0_f64, 0.0, 0);
    for (w, g) in want.chunks(vocab).zip(got.chunks(vocab)) {
        let (log_w, log_g) = (log_softmax(w), log_softmax(g));
        kl += log_w
            .iter()
            .zip(&log_g)
            .map(|(a, b)| a.exp() * (a - b))
            .sum::<f64>();
        for (a, b) in w.iter().zip(g) {
            let d = (f64::from(*a) - f64::from(*b)).abs();
            if d > max_logit || d.is_nan() {
                max_logit = d;
            }
        }
        positions += 1;
    }
    Drift {
        max_logit,
        mean_kl: kl / f64::from(positions.max(1)),
        positions: positions as usize,
    }
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let most = row
        .iter()
        .fold(f64::NEG_INFINITY, |m, v| m.max(f64::from(*v)));
    let sum: f64 = row.iter().map(|v| (f64::from(*v) - most).exp()).sum();
    row.iter()
        .map(|v| f64::from(*v) - most - sum.ln())
        .collect()
}

fn check_new(out: &Path) -> Result<()> {
    let taken = |what: &str| {
        let cause = io::Error::new(io::ErrorKind::AlreadyExists, what.to_owned());
        Err(io_error("write the folder", out, NEW_FOLDER)(cause))
    };
    match fs::read_dir(out) {
        Ok(mut inside) => match inside.next() {
            None => Ok(()),
            Some(_) => taken("it exists and is not empty"),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => taken("it exists and is not a folder"),
    }
}

/// A folder beside `out` that disappears unless it is kept.
fn staging(out: &Path) -> Result<tempfile::TempDir> {
    let parent = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let fail = || io_error("create a folder in", parent, "choose another output folder");
    fs::create_dir_all(parent).map_err(fail())?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tallow-merge-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // The umask applies, so the folder gets the rights of any other new folder.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent).map_err(fail())
}

/// The tensors of each file, in the order in which they lie there, each with what is folded into it.
fn entries(
    weights: &Weights,
    modules: Vec<LoraModule>,
    untied: bool,
) -> Result<BTreeMap<String, Vec<Entry<'_>>>> {
    let mut modules: BTreeMap<String, LoraModule> = modules
        .into_iter()
        .map(|m| (format!("{}.weight", m.module), m))
        .collect();
    let mut shards: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
    for t in weights.iter() {
        // A tied model's copy of its embedding is made anew.
        if untied && t.name == HEAD_WEIGHT {
            continue;
        }
        let name = t.file.file_name().and_then(|n| n.to_str());
        let name = name.ok_or_else(|| Error::Index {
            path: t.file.to_path_buf(),
            problem: "its name is not text".to_owned(),
        })?;
        let shard = shards.entry(name.to_owned()).or_default();
        let is_embedding = t.name == EMBEDDING_WEIGHT;
        let found = modules.remove(&t.name);
        shard.push(Entry {
            name: t.name.clone(),
            from: t,
            module: match is_embedding {
                true => found.map(by_token),
                false => found,
            },
        });
        if untied && is_embedding {
            shard.push(Entry {
                name: HEAD_WEIGHT.to_owned(),
                from: t,
                module: modules.remove(HEAD_WEIGHT),
            });
        }
    }
    for tensors in shards.values_mut() {
        tensors.sort_by_key(|e| e.from.bytes.start);
    }
    Ok(shards)
}

/// An adapter on the embedding as one on its table `[vocab, c]`: a token's row gains `scale·B·A[:, token]`.
fn by_token(m: LoraModule) -> LoraModule {
    let Projection { n, k } = m.projection;
    LoraModule {
        projection: Projection { n: k, k: n },
        a: turned(&m.b, m.rank),
        b: turned(&m.a, k),
        ..m
    }
}

/// Says in the copied configuration and index that the output projection is a weight of its own.
fn untie(folder: &Path, shards: &BTreeMap<String, Vec<Entry>>) -> Result<()> {
    let rewrite = |name: &str, change: &dyn Fn(&mut Map<String, Value>)| -> Result<()> {
        let path = folder.join(name);
        let (mut map, _) = crate::json::read_object(&path, "give a whole model folder")?;
        change(&mut map);
        let text = format!("{:#}\n", Value::Object(map));
        files::write_atomic(&path, |w| w.write_all(text.as_bytes()))
    };
    rewrite("config.json", &|map| {
        map.insert("tie_word_embeddings".to_owned(), false.into());
    })?;
    if !folder.join(INDEX).exists() {
        return Ok(());
    }
    let sizes = shards.values().flatten().map(|e| e.from.bytes.len());
    let total: usize = sizes.sum();
    let holds = |all: &&Vec<Entry>| all.iter().any(|e| e.name == HEAD_WEIGHT);
    let file = shards.iter().find(|(_, all)| holds(all)).map(|s| s.0);
    rewrite(INDEX, &|map| {
        if let (Some(Value::Object(names)), Some(file)) = (map.get_mut("weight_map"), file) {
            names.insert(HEAD_WEIGHT.to_owned(), json!(file));
        }
        if let Some(Value::Object(about)) = map.get_mut("metadata") {
            about.insert("total_size".to_owned(), json!(total));
        }
    })
}

fn write_shard(path: &Path, tensors: &[Entry]) -> Result<()> {
    let mut failed = None;
    let written = Staged::write(path, |w| {
        w.write_all(&header(tensors))?;
        for t in tensors {
            match &t.module {
                None => w.write_all(t.from.as_bytes())?,
                Some(m) => {
                    if let Err(e) = write_merged(w, t.from, m)? {
                        failed = Some(e);
                        return Err(io::Error::other("stopped"));
                    }
                }
            }
        }
        Ok(())
    });
    match failed {
        Some(e) => Err(e),
        None => written?.commit(),
    }
}

/// Length and JSON of a safetensors file, padded so that the data begins at a multiple of 8.
fn header(tensors: &[Entry]) -> Vec<u8> {
    let mut all = Map::new();
    all.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut at = 0;
    for t in tensors {
        let end = at + t.from.bytes.len();
        let info = json!({
            "dtype": t.from.dtype.to_string(),
            "shape": t.from.shape,
            "data_offsets": [at, end],
        });
        all.insert(t.name.clone(), info);
        at = end;
    }
    let mut text = Value::Object(all).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// Writes `W + scale·B·A`, row by row. The inner error: a result that is not finite.
fn write_merged(w: &mut dyn Write, t: &TensorView, m: &LoraModule) -> io::Result<Result<()>> {
    let Projection { n, k } = m.projection;
    let bytes = t.as_bytes();
    let width = bytes.len() / n;
    let (mut row, mut out) = (vec![0.0_f64; k], Vec::with_capacity(width));
    for j in 0..n {
        read_row(t.dtype, &bytes[j * width..(j + 1) * width], &mut row);
        add_branch(&mut row, m, j);
        out.clear();
        push_row(t.dtype, &row, &mut out);
        if let Some(i) = row.iter().position(|v| !fits(t.dtype, *v)) {
            return Ok(Err(Error::NotFinite {
                path: t.file.to_path_buf(),
                name: quote(&format!("{}, merged and stored as {}", t.name, t.dtype)),
                value: rounded(t.dtype, row[i]),
                index: j * k + i,
            }));
        }
        w.write_all(&out)?;
    }
    Ok(Ok(()))
}

/// Adds row `j` of `scale·B·A` to `row`, and scales it to its magnitude where there is one.
fn add_branch(row: &mut [f64], m: &LoraModule, j: usize) {
    let b = &m.b[j * m.rank..(j + 1) * m.rank];
    for (b, a) in b.iter().zip(m.a.chunks(row.len())) {
        let factor = f64::from(m.scale) * f64::from(*b);
        if factor != 0.0 {
            row.iter_mut()
                .zip(a)
                .for_each(|(r, a)| *r += factor * f64::from(*a));
        }
    }
    if let Some(magnitude) = &m.magnitude {
        let norm = row.iter().map(|r| r * r).sum::<f64>().sqrt();
        // A row of zeros stays one.
        let factor = f64::from(magnitude[j]) / norm.max(f64::MIN_POSITIVE);
        row.iter_mut().for_each(|r| *r *= factor);
    }
}

fn read_row(dtype: StoredDtype, bytes: &[u8], row: &mut [f64]) {
    let values = row.iter_mut();
    match dtype {
        StoredDtype::BF16 => {
            let (each, _) = bytes.as_chunks();
            values
                .zip(each)
                .for_each(|(r, b)| *r = bf16::from_le_bytes(*b).to_f64());
        }
        StoredDtype::F16 => {
            let (each, _) = bytes.as_chunks();
            values
                .zip(each)
                .for_each(|(r, b)| *r = f16::from_le_bytes(*b).to_f64());
        }
        // `Weights::check` lets nothing else through.
        _ => {
            let (each, _) = bytes.as_chunks();
            values
                .zip(each)
                .for_each(|(r, b)| *r = f64::from(f32::from_le_bytes(*b)));
        }
    }
}

fn push_row(dtype: StoredDtype, row: &[f64], out: &mut Vec<u8>) {
    match dtype {
        StoredDtype::BF16 => out.extend(row.iter().flat_map(|v| to_bf16(*v).to_le_bytes())),
        StoredDtype::F16 => out.extend(row.iter().flat_map(|v| to_f16(*v).to_le_bytes())),
        _ => out.extend(row.iter().flat_map(|v| (*v as f32).to_le_bytes())),
    }
}

fn rounded(dtype: StoredDtype, v: f64) -> f32 {
    match dtype {
        StoredDtype::BF16 => to_bf16(v).to_f32(),
        StoredDtype::F16 => to_f16(v).to_f32(),
        _ => v as f32,
    }
}

fn fits(dtype: StoredDtype, v: f64) -> bool {
    rounded(dtype, v).is_finite()
}

/// Copies what is not weights: configuration, tokenizer, template, licence. Folders and hidden files stay behind.
fn copy_rest(base: &Path, to: &Path, single: bool) -> Result<Vec<String>> {
    let fail = || {
        io_error(
            "copy the files of",
            base,
            "check the path and its permissions",
        )
    };
    let mut copied = Vec::new();
    for entry in fs::read_dir(base).map_err(fail())? {
        let path: PathBuf = entry.map_err(fail())?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let old_index = name.ends_with(".index.json") && (single || name != INDEX);
        let skipped = name.starts_with('.') || OTHER_WEIGHTS.contains(&ending) || old_index;
        if skipped || !path.is_file() {
            continue;
        }
        let mut from = files::open(&path, "check the path")?;
        files::write_atomic(&to.join(name), |w| io::copy(&mut from, w).map(|_| ()))?;
        copied.push(name.to_owned());
    }
    copied.sort();
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_zero_for_equal_scores_and_nan_for_nan() {
        let a = [1.0, 2.0, 3.0, -1.0, 0.0, 5.0];
        let same = drift(&a, &a, 3);
        assert_eq!(
            (same.max_logit, same.mean_kl, same.positions),
            (0.0, 0.0, 2)
        );
        // A constant added to a row moves logits and no probability.
        let moved: Vec<f32> = a.iter().map(|v| v + 0.5).collect();
        let d = drift(&a, &moved, 3);
        assert!(
            (d.max_logit - 0.5).abs() < 1e-6 && d.mean_kl.abs() < 1e-7,
            "{d:?}"
        );
        // Two tokens at odds 1:1 against 3:1: ln(2/sqrt(3)).
        let d = drift(&[0.0, 0.0], &[3.0_f32.ln(), 0.0], 2);
        assert!(
            (d.mean_kl - (2.0 / 3.0_f64.sqrt()).ln()).abs() < 1e-6,
            "{d:?}"
        );
        let d = drift(&[0.0, f32::NAN], &[0.0, 0.0], 2);
        assert!(d.max_logit.is_nan() && d.mean_kl.is_nan());
    }
}
