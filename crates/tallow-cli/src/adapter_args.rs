//! What `train` can vary about the adapter beyond rank, alpha and targets.
//! Invariant: a setting that the model or another setting contradicts is refused before anything is trained.
//! Absent on purpose: rank, alpha and targets, which other verbs have too.
use crate::out;
use anyhow::{Result, anyhow};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::fmt;
use tallow::{
    Session,
    llm::{Adapter, AdapterConfig, Init, ModelConfig, Targets},
};

/// Variants of the adapter.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct AdapterArgs {
    /// DoRA: also train the magnitude of each row of the adapted weights.
    #[arg(long)]
    dora: bool,
    /// While training, drop each input of an adapter with this probability.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// Adapt these layers only, counted from 0: "8-15", or "0,2,8-15".
    #[arg(long, value_name = "RANGE", value_parser = layers)]
    layers: Option<Layers>,
    /// Another rank for modules whose path ends like this (a regular expression): q_proj=16. May be repeated; the
    /// first that matches counts.
    #[arg(long, value_name = "NAME=N", value_parser = pattern::<usize>)]
    rank_pattern: Vec<(String, usize)>,
    /// Another alpha, likewise.
    #[arg(long, value_name = "NAME=X", value_parser = pattern::<f64>)]
    alpha_pattern: Vec<(String, f64)>,
    /// LoRA+: B learns this many times as fast as A.
    #[arg(long, value_name = "RATIO")]
    loraplus: Option<f64>,
    /// How the adapter starts: uniform, or pissa (from the weights' largest singular values; saved as plain LoRA
    /// of twice the rank).
    #[arg(long, value_name = "HOW", default_value = "uniform")]
    init: Start,
}

/// A list of layers.
#[derive(Clone, Debug, PartialEq)]
struct Layers(Vec<usize>);

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&all.join(","))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Start {
    Uniform,
    Pissa,
}

impl AdapterArgs {
    /// Puts the settings into a configuration for an adapter of this model.
    pub(crate) fn apply(&self, config: &mut AdapterConfig, model: &ModelConfig) -> Result<()> {
        if !(0.0..1.0).contains(&self.dropout) {
            let got = self.dropout;
            return Err(anyhow!(
                "--dropout: want a number from 0 to below 1, got {got}"
            ));
        }
        if let Some((name, _)) = self.rank_pattern.iter().find(|p| p.1 == 0 || p.1 > 1 << 16) {
            return Err(anyhow!(
                "--rank-pattern {name}: want a rank from 1 to 65536"
            ));
        }
        if let Some((name, _)) = self.alpha_pattern.iter().find(|p| !p.1.is_finite()) {
            return Err(anyhow!("--alpha-pattern {name}: want a number"));
        }
        config.use_dora = self.dora;
        config.dropout = self.dropout;
        config.rank_pattern.clone_from(&self.rank_pattern);
        config.alpha_pattern.clone_from(&self.alpha_pattern);
        config.init = match self.init {
            Start::Uniform => Init::Uniform,
            Start::Pissa => Init::Pissa,
        };
        if let Some(layers) = &self.layers {
            choose_layers(layers, config, model)?;
        }
        if let Some(pattern) = config.unused_patterns(&model.adaptable())?.first() {
            return Err(anyhow!(
                "--rank-pattern or --alpha-pattern: no adapted module's path ends in {pattern:?}"
            ));
        }
        // PiSSA refuses such a rank.
        let warnings = match self.init {
            Start::Uniform => config.rank_warnings(&model.adaptable())?,
            Start::Pissa => vec![],
        };
        if let Some(first) = warnings.first() {
            let more = match warnings.len() - 1 {
                0 => String::new(),
                n => format!(" (and {n} more modules)"),
            };
            out::warn(format!("{first}{more}"));
        }
        Ok(())
    }

    /// The adapter with learning rates of its own, where they were asked for.
    pub(crate) fn paced(&self, session: &Session, adapter: Adapter) -> Result<Adapter> {
        Ok(match self.loraplus {
            Some(ratio) => adapter.with_b_rate(session, ratio)?,
            None => adapter,
        })
    }

    /// The part of the settings file, by the names of the options.
    pub(crate) fn notes(&self) -> Vec<(&'static str, Value)> {
        let pairs = |all: Vec<String>| json!(all);
        let ranks = self.rank_pattern.iter().map(|(k, v)| format!("{k}={v}"));
        let alphas = self.alpha_pattern.iter().map(|(k, v)| format!("{k}={v}"));
        vec![
            ("dora", json!(self.dora)),
            ("dropout", json!(self.dropout)),
            ("layers", json!(self.layers.as_ref().map(Layers::to_string))),
            ("rank_pattern", pairs(ranks.collect())),
            ("alpha_pattern", pairs(alphas.collect())),
            ("loraplus", json!(self.loraplus)),
            (
                "init",
                json!(match self.init {
                    Start::Uniform => "uniform",
                    Start::Pissa => "pissa",
                }),
            ),
        ]
    }
}

fn choose_layers(layers: &Layers, config: &mut AdapterConfig, model: &ModelConfig) -> Result<()> {
    let last = model.layers - 1;
    if let Some(l) = layers.0.iter().find(|l| **l > last) {
        return Err(anyhow!(
            "--layers: there is no layer {l}; the model's layers are 0 to {last}"
        ));
    }
    match &config.targets {
        Targets::Names(_) => {}
        // PEFT, too, takes layers only beside names.
        Targets::AllLinear => {
            let ends = model.projections().into_keys();
            let mut names: Vec<String> = ends
                .filter_map(|m| m.rsplit('.').next().map(str::to_owned))
                .collect();
            names.sort();
            names.dedup();
            config.targets = Targets::Names(names);
        }
        Targets::Regex(_) => {
            return Err(anyhow!(
                "--layers: want names or all-linear as --targets, got a pattern; put the layers into it"
            ));
        }
    }
    config.layers = Some(layers.0.clone());
    Ok(())
}

fn layers(text: &str) -> Result<Layers, String> {
    let bad = || format!("want layers like 8-15 or 0,2,8-15, got {text:?}");
    let number = |s: &str| s.trim().parse::<usize>().ok().filter(|n| *n < 1 << 16);
    let mut all = vec![];
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        match (number(from), number(to)) {
            (Some(from), Some(to)) if from <= to => all.extend(from..=to),
            _ => return Err(bad()),
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(Layers(all))
}

fn pattern<T: std::str::FromStr>(text: &str) -> Result<(String, T), String> {
    let split = text.rsplit_once('=');
    let parsed = split.and_then(|(name, value)| Some((name.trim(), value.trim().parse().ok()?)));
    match parsed {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value)),
        _ => Err(format!("want NAME=NUMBER, got {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_numbers_and_ranges() {
        let of = |text| layers(text).map(|l| l.0);
        assert_eq!(of("8-10"), Ok(vec![8, 9, 10]));
        assert_eq!(of("3,0, 2-4"), Ok(vec![0, 2, 3, 4]));
        for bad in ["", "4-2", "a", "1-", "-3", "99999999"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_end_in_a_number() {
        assert_eq!(pattern("q_proj=16"), Ok(("q_proj".to_owned(), 16)));
        assert_eq!(pattern("(a=b)=0.5"), Ok(("(a=b)".to_owned(), 0.5)));
        for bad in ["q_proj", "=3", "q_proj=", "q_proj=x"] {
            assert!(pattern::<usize>(bad).is_err(), "{bad}");
        }
    }
}
