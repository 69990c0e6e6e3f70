//! Weights in safetensors files: mapped, never copied, checked by name, shape and type before use.
//! Invariant: a [`TensorView`]'s bytes lie inside its file and match its shape and type.
//! Absent on purpose: pickle files (`pytorch_model.bin`), which can run code; GGUF; names without `model.`.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{SafeTensorError, SafeTensors};

pub use safetensors::Dtype as StoredDtype;

use crate::config::ModelConfig;
use crate::error::{Error, Result, list, quote};
use crate::{files, json};

const HINT: &str = "give a Hugging Face model folder, with config.json and model.safetensors";

/// One tensor in a mapped file; cheap to clone.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// Its name in the file.
    pub name: String,
    /// How its elements are stored.
    pub dtype: StoredDtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// The file it lies in.
    pub file: Arc<Path>,
    /// Its bytes, counted from the start of the file. Not necessarily aligned.
    pub bytes: Range<usize>,
    map: Arc<Mmap>,
}

impl TensorView {
    /// The stored bytes, little-endian, row-major.
    pub fn as_bytes(&self) -> &[u8] {
        &self.map[self.bytes.clone()]
    }

    /// Number of elements.
    pub fn elems(&self) -> usize {
        self.shape.iter().product()
    }

    /// A copy in f32, from f32, bf16, f16 or f64. For small tensors; kernels read large ones from the bytes.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let b = self.as_bytes();
        Ok(match self.dtype {
            StoredDtype::F32 => elements(b, f32::from_le_bytes),
            StoredDtype::BF16 => elements(b, |e| bf16::from_le_bytes(e).to_f32()),
            StoredDtype::F16 => elements(b, |e| f16::from_le_bytes(e).to_f32()),
            StoredDtype::F64 => elements(b, |e| f64::from_le_bytes(e) as f32),
            _ => return Err(self.wrong_type("F32, BF16, F16 or F64")),
        })
    }

    /// A copy in i64, from i64 or i32: token ids.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        let b = self.as_bytes();
        Ok(match self.dtype {
            StoredDtype::I64 => elements(b, i64::from_le_bytes),
            StoredDtype::I32 => elements(b, |e| i64::from(i32::from_le_bytes(e))),
            _ => return Err(self.wrong_type("I64 or I32")),
        })
    }

    pub(crate) fn wrong_type(&self, want: &'static str) -> Error {
        Error::TensorType {
            path: self.file.to_path_buf(),
            name: quote(&self.name),
            got: self.dtype.to_string(),
            want,
        }
    }

    pub(crate) fn wrong_shape(&self, want: Vec<usize>) -> Error {
        Error::TensorShape {
            path: self.file.to_path_buf(),
            name: quote(&self.name),
            want,
            got: self.shape.clone(),
        }
    }
}

fn elements<const N: usize, T>(bytes: &[u8], one: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (whole, _) = bytes.as_chunks::<N>();
    whole.iter().map(|e| one(*e)).collect()
}

/// A named collection of tensors, from one file or from many.
#[derive(Clone, Debug)]
pub struct Weights {
    path: PathBuf,
    tensors: BTreeMap<String, TensorView>,
}

impl Weights {
    /// Opens the weights of a model folder (`model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists) and checks them against the configuration.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let weights = Self::open_unchecked(dir)?;
        weights.check(config)?;
        Ok(weights)
    }

    /// Opens the weights of a model folder, whatever tensors they hold.
    pub fn open_unchecked(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if !single.exists() && index.exists() {
            return open_shards(dir, &index);
        }
        if !single.exists() && dir.join("pytorch_model.bin").exists() {
            return Err(Error::Unsupported {
                path: dir.join("pytorch_model.bin"),
                what: "a pickle file, which can run code when it is read,".to_owned(),
                hint: "save the model as safetensors (transformers: save_pretrained)".to_owned(),
            });
        }
        Self::open_file(&single)
    }

    /// Opens one safetensors file, whatever tensors it holds.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open_file_hinted(path, HINT)
    }

    pub(crate) fn open_file_hinted(path: &Path, hint: &str) -> Result<Self> {
        let map = files::map(path, hint)?;
        let fail = |e| Error::Safetensors {
            path: path.to_path_buf(),
            problem: describe(&e),
        };
        let (header_bytes, header) = SafeTensors::read_metadata(&map).map_err(fail)?;
        let start = header_bytes + size_of::<u64>();
        let file: Arc<Path> = path.into();
        let mut tensors = BTreeMap::new();
        for (name, info) in header.tensors() {
            let (from, to) = info.data_offsets;
            let view = TensorView {
                name: name.clone(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                file: Arc::clone(&file),
                bytes: start + from..start + to,
                map: Arc::clone(&map),
            };
            tensors.insert(name, view);
        }
        Ok(Self {
            path: path.to_path_buf(),
            tensors,
        })
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Result<&TensorView> {
        self.tensors
            .get(name)
            .ok_or_else(|| self.missing(&[name.to_owned()]))
    }

    /// The tensor of that name, where there is one.
    pub fn find(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(name)
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = &TensorView> {
        self.tensors.values()
    }

    /// The file or folder these came from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> usize {
        self.iter().map(|t| t.bytes.len()).sum()
    }

    /// Every tensor the configuration calls for is there, in its shape, as f32, bf16 or f16; none is left over.
    /// Ignored: rotary `inv_freq` buffers, and `lm_head.weight` of a tied model.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let expected: BTreeMap<String, Vec<usize>> = expected(config).into_iter().collect();
        let missing: Vec<String> = expected
            .keys()
            .filter(|name| !self.tensors.contains_key(*name))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Err(self.missing(&missing));
        }
        let known = |name: &str| {
            expected.contains_key(name)
                || name.ends_with(".rotary_emb.inv_freq")
                || (config.tied && name == "lm_head.weight")
        };
        let extra: Vec<&String> = self.tensors.keys().filter(|n| !known(n)).collect();
        if !extra.is_empty() {
            return Err(Error::Tensors {
                path: self.path.clone(),
                count: extra.len(),
                problem: "tensors that do not belong to this architecture",
                names: list(extra.iter().map(|n| quote(n))),
                hint: "use the config.json that belongs to these weights",
            });
        }
        for (name, want) in expected {
            let tensor = self.get(&name)?;
            if tensor.shape != want {
                return Err(tensor.wrong_shape(want));
            }
            match tensor.dtype {
                StoredDtype::F32 | StoredDtype::BF16 | StoredDtype::F16 => {}
                _ => return Err(tensor.wrong_type("F32, BF16 or F16")),
            }
        }
        Ok(())
    }

    fn missing(&self, names: &[String]) -> Error {
        Error::Tensors {
            path: self.path.clone(),
            count: names.len(),
            problem: "missing tensors",
            names: list(names.iter().map(|n| quote(n))),
            hint: "download the weights again, or use the config.json that belongs to them",
        }
    }
}

/// Every tensor a model of this configuration has, with its shape, in the order of computation.
pub fn expected(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    const ORDER: [&str; 7] = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let projections = config.projections();
    let mut all = vec![(
        "model.embed_tokens.weight".to_owned(),
        vec![config.vocab, config.hidden],
    )];
    for layer in 0..config.layers {
        let at = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            all.push((format!("{at}.{norm}.weight"), vec![config.hidden]));
        }
        for name in ORDER {
            let module = format!("{at}.{name}");
            let size = projections[&module];
            all.push((format!("{module}.weight"), vec![size.n, size.k]));
            if config.has_bias(name) {
                all.push((format!("{module}.bias"), vec![size.n]));
            }
        }
    }
    all.push(("model.norm.weight".to_owned(), vec![config.hidden]));
    if !config.tied {
        all.push((
            "lm_head.weight".to_owned(),
            vec![config.vocab, config.hidden],
        ));
    }
    all
}

fn open_shards(dir: &Path, index: &Path) -> Result<Weights> {
    let fail = |problem: String| Error::Index {
        path: index.to_path_buf(),
        problem,
    };
    let (object, _) = json::read_object(index, HINT)?;
    let map = object
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| fail("no object `weight_map` in it".to_owned()))?;
    let mut shards: BTreeMap<&str, Weights> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| {
            fail(format!(
                "the file of tensor {} is not a string",
                quote(tensor)
            ))
        })?;
        if !is_plain_name(file) {
            return Err(fail(format!(
                "{} is not a plain file name, so it is not opened",
                quote(file)
            )));
        }
        if !shards.contains_key(file) {
            let hint = "a shard is missing: download the checkpoint again";
            shards.insert(file, Weights::open_file_hinted(&dir.join(file), hint)?);
        }
        if !shards[file].tensors.contains_key(tensor) {
            return Err(fail(format!(
                "tensor {} is not in {}",
                quote(tensor),
                quote(file)
            )));
        }
    }
    let mut tensors = BTreeMap::new();
    for shard in shards.into_values() {
        for (name, tensor) in shard.tensors {
            let file = map.get(&name).and_then(|f| f.as_str());
            if file.is_none_or(|f| tensor.file.ends_with(f)) {
                tensors.insert(name, tensor);
            }
        }
    }
    Ok(Weights {
        path: dir.to_path_buf(),
        tensors,
    })
}

/// True for a name that cannot leave its folder, on any operating system.
fn is_plain_name(file: &str) -> bool {
    file.ends_with(".safetensors")
        && !file.starts_with('.')
        && !file.contains(['/', '\\', ':', '\0'])
}

fn describe(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall => "it is shorter than its first eight bytes".to_owned(),
        SafeTensorError::HeaderTooLarge => "its header claims more than 100 MB".to_owned(),
        SafeTensorError::InvalidHeaderLength => "its header is longer than the file".to_owned(),
        SafeTensorError::InvalidHeader(_) => "its header is not text".to_owned(),
        SafeTensorError::InvalidHeaderDeserialization(e) => {
            format!("its header is not valid: {}", quote(&e.to_string()))
        }
        SafeTensorError::InvalidOffset(name) => {
            format!(
                "the bytes of tensor {} overlap others or leave a gap",
                quote(name)
            )
        }
        SafeTensorError::TensorInvalidInfo => {
            "a tensor's bytes do not match its shape and type".to_owned()
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            "it is shorter or longer than its header says (truncated?)".to_owned()
        }
        SafeTensorError::ValidationOverflow => "a tensor's size overflows".to_owned(),
        other => quote(&other.to_string()),
    }
}
