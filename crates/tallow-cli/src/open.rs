//! What most verbs begin with: a session, a model, its tokenizer, an adapter.
//! Absent on purpose: defaults that depend on the model.
use crate::out;
use anyhow::{Result, anyhow};
use clap::Args;
use std::path::{Path, PathBuf};
use tallow::{
    Choose, DType, OpenOptions, Role, Session,
    llm::{Adapter, AdapterConfig, ComputeDType, LoadOptions, Model, Targets, Tokenizer},
    tune,
};

/// Options of every verb.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// Where to compute: cpu, cuda:0 (or another card by number), wgpu (the first GPU of Metal, Vulkan or DX12; wgpu:1:
    /// an adapter by number), or auto: cuda:0 if it opens, else wgpu if it opens, else cpu. cuda:paper, for explain, plans as an
    /// H100 or H200 would.
    #[arg(long, global = true, default_value = "cpu", value_name = "NAME")]
    pub device: String,
    /// CPU threads [default: TALLOW_THREADS, or the physical cores].
    #[arg(long, global = true, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Choose kernels by estimates alone: measure none, and read no table of measured ones [default: TALLOW_NO_TUNE].
    #[arg(long, global = true)]
    pub no_tune: bool,
    /// Say more on stderr; twice for still more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

fn threads(text: &str) -> Result<usize, String> {
    let most = tallow::cpu::pool::MAX_THREADS;
    match text.parse() {
        Ok(n) if (1..=most).contains(&n) => Ok(n),
        _ => Err(format!("want a whole number from 1 to {most}")),
    }
}

/// Which model, computed how.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Folder of the model: config.json, tokenizer.json, model.safetensors.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Type of the weight matrices while computing: f32 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = dtype)]
    pub dtype: ComputeDType,
}

pub(crate) fn dtype(text: &str) -> Result<ComputeDType, String> {
    text.parse().map_err(|_| "want f32 or bf16".to_owned())
}

impl ModelArgs {
    /// Opens the device and loads the model.
    pub(crate) fn load(&self, global: &Global) -> Result<Model> {
        let start = std::time::Instant::now();
        let session = session(global, self.dtype)?;
        let options = LoadOptions { dtype: self.dtype };
        let model = Model::load(&session, &self.model, &options)?;
        tracing::info!(
            "{} loaded in {}: {}, {} layers, hidden {}, vocabulary {}",
            self.model.display(),
            out::seconds(start.elapsed().as_secs_f64()),
            model.config.family.model_type(),
            model.config.layers,
            model.config.hidden,
            model.config.vocab,
        );
        Ok(model)
    }

    /// As [`ModelArgs::load`], and refuses a model that the free memory cannot run.
    pub(crate) fn load_to_run(&self, global: &Global) -> Result<Model> {
        let model = self.load(global)?;
        tallow::train::memory::check_model(&model)?;
        Ok(model)
    }

    /// The tokenizer in the model's folder.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(Tokenizer::open(&self.model)?)
    }

    /// What the model is called in files of its adapters.
    pub(crate) fn name(&self) -> String {
        self.model.display().to_string()
    }
}

/// How kernels are chosen: measured, unless the command line or the environment forbids it.
fn choose(global: &Global) -> Choose {
    let forbidden = std::env::var_os("TALLOW_NO_TUNE").is_some_and(|v| !v.is_empty());
    match global.no_tune || forbidden {
        true => Choose::Estimate,
        false => Choose::Measure(tune::Options::usual(|line| eprintln!("{line}"))),
    }
}

/// A session on the device that was asked for.
pub(crate) fn session(global: &Global, dtype: ComputeDType) -> Result<Session> {
    session_that(global, dtype, choose(global))
}

/// A session whose kernels are chosen as told.
pub(crate) fn session_that(
    global: &Global,
    dtype: ComputeDType,
    choose: Choose,
) -> Result<Session> {
    let options = OpenOptions {
        device: global.device.clone(),
        threads: global.threads,
        weights: match dtype {
            ComputeDType::F32 => DType::F32,
            ComputeDType::BF16 => DType::BF16,
        },
        choose,
    };
    let session = tallow::open_with(&options)?;
    if options.device == "auto" {
        eprintln!("device: {}", session.backend().info().name);
    }
    Ok(session)
}

/// Reads an adapter to run, and passes on what deserves a word.
pub(crate) fn adapter(model: &Model, dir: Option<&Path>) -> Result<Option<Adapter>> {
    let Some(dir) = dir else {
        return Ok(None);
    };
    let (adapter, warnings) = Adapter::load(model, dir, Role::Frozen)?;
    warnings.iter().for_each(out::warn);
    tracing::info!(
        "{}: {} modules, {} parameters",
        dir.display(),
        adapter.modules().count(),
        adapter.elems(),
    );
    Ok(Some(adapter))
}

/// `all-linear`, a list of names with commas, or a regular expression.
pub(crate) fn targets(text: &str) -> Targets {
    match text {
        "all-linear" => Targets::AllLinear,
        _ if text.contains(['*', '+', '?', '|', '(', '[', '{', '\\', '^', '$']) => {
            Targets::Regex(text.to_owned())
        }
        _ => Targets::Names(text.split(',').map(|n| n.trim().to_owned()).collect()),
    }
}

/// A plain adapter's configuration.
pub(crate) fn fresh(rank: usize, alpha: Option<f64>, targets: Targets) -> Result<AdapterConfig> {
    let alpha = alpha.unwrap_or(2.0 * rank as f64);
    if rank == 0 || rank > 1 << 16 {
        return Err(anyhow!(
            "rank: want a whole number from 1 to 65536, got {rank}"
        ));
    }
    if !alpha.is_finite() {
        return Err(anyhow!("alpha: want a number, got {alpha}"));
    }
    Ok(AdapterConfig::new(rank, alpha, targets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_names_unless_they_look_like_a_pattern() {
        assert_eq!(targets("all-linear"), Targets::AllLinear);
        let names = Targets::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]);
        assert_eq!(targets("q_proj, v_proj"), names);
        let pattern = r".*layers\.0\..*q_proj";
        assert_eq!(targets(pattern), Targets::Regex(pattern.to_owned()));
    }
}
