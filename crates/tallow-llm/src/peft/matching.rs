//! Which projections an adapter is on, and with which rank and scale: PEFT's rules.
//! Invariant: a selection is sorted, and every module in it is a projection of the base model.
//! Absent on purpose: Python's regex dialect beyond what `fancy-regex` reads; such a pattern is refused.

use fancy_regex::Regex;

use super::LoraModule;
use super::config::{AdapterConfig, Targets};
use crate::config::{EMBEDDING, HEAD, Projections};
use crate::error::{Error, Result, list, quote};

/// Modules outside the layers, which "all-linear" leaves out, as PEFT does.
const OUTSIDE: [&str; 2] = [HEAD, EMBEDDING];

impl AdapterConfig {
    /// The modules of `base` this adapter is on, sorted. An empty selection is an error.
    pub fn select(&self, base: &Projections) -> Result<Vec<String>> {
        let targets = Selector::new(self, "target_modules", &self.targets)?;
        let exclude = match &self.exclude {
            Some(e) => Some(Selector::new(self, "exclude_modules", e)?),
            None => None,
        };
        let layers = self.layer_patterns()?;
        let excluded = |module: &str| match &exclude {
            Some(e) => e.matches(self, module).map(|m| m != Match::No),
            None => Ok(false),
        };
        let mut selected = Vec::new();
        for module in base.keys() {
            let on = match targets.matches(self, module)? {
                _ if self.targets == Targets::AllLinear && OUTSIDE.contains(&&**module) => false,
                Match::No => false,
                // PEFT looks at the layer's number only where the end of a path matched.
                Match::End => self.in_layers(&layers, module)?,
                Match::Whole => true,
            };
            if on && !excluded(module)? {
                selected.push(module.clone());
            }
        }
        if selected.is_empty() {
            return Err(Error::NoTargets {
                path: self.path.clone(),
                targets: match &self.targets {
                    Targets::Names(names) => list(names.iter().map(|n| quote(n))),
                    Targets::AllLinear => "all-linear".to_owned(),
                    Targets::Regex(pattern) => quote(pattern),
                },
                example: base
                    .keys()
                    .find(|m| !OUTSIDE.contains(&&***m))
                    .cloned()
                    .unwrap_or_default(),
            });
        }
        Ok(selected)
    }

    /// Patterns of ranks and alphas that no selected module of `base` matches: most likely mistakes.
    pub fn unused_patterns(&self, base: &Projections) -> Result<Vec<String>> {
        let selected = self.select(base)?;
        let ranks = self.overrides("rank_pattern", &self.rank_pattern)?;
        let alphas = self.overrides("alpha_pattern", &self.alpha_pattern)?;
        let names = self.rank_pattern.iter().map(|p| &p.0);
        let names = names.chain(self.alpha_pattern.iter().map(|p| &p.0));
        let ranks = ranks.compiled.into_iter().map(|c| c.0);
        let compiled = ranks.chain(alphas.compiled.into_iter().map(|c| c.0));
        let mut unused = Vec::new();
        for (name, regex) in names.zip(compiled) {
            let mut used = false;
            for module in &selected {
                used |= self.is_match("rank_pattern", &regex, module)?;
            }
            if !used {
                unused.push(name.clone());
            }
        }
        Ok(unused)
    }

    /// Modules whose rank is above the smaller side of their projection, each in a sentence.
    ///
    /// # Errors
    /// Targets that match nothing.
    pub fn rank_warnings(&self, base: &Projections) -> Result<Vec<String>> {
        let all = self.resolve(base)?;
        Ok(all.iter().filter_map(super::rank_warning).collect())
    }

    /// The selection with ranks and scales, and with tensors still empty.
    pub(super) fn resolve(&self, base: &Projections) -> Result<Vec<LoraModule>> {
        let ranks = self.overrides("rank_pattern", &self.rank_pattern)?;
        let alphas = self.overrides("alpha_pattern", &self.alpha_pattern)?;
        let mut modules = Vec::new();
        for module in self.select(base)? {
            let rank = self.first_match(&ranks, &module)?.unwrap_or(self.rank);
            let alpha = self.first_match(&alphas, &module)?.unwrap_or(self.alpha);
            modules.push(LoraModule {
                projection: base[&module],
                scale: self.scale(rank, alpha)?,
                module,
                rank,
                a: Vec::new(),
                b: Vec::new(),
                magnitude: None,
            });
        }
        Ok(modules)
    }

    /// Computed in f64 and rounded once.
    fn scale(&self, rank: usize, alpha: f64) -> Result<f32> {
        let bad = |name, want, got: String| Err(Error::Setting { name, want, got });
        if rank == 0 {
            return bad("rank", "a whole number above 0", rank.to_string());
        }
        let below = match self.use_rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        let scale = (alpha / below) as f32;
        match scale.is_finite() {
            true => Ok(scale),
            false => bad("alpha", "a number whose scale fits f32", alpha.to_string()),
        }
    }

    /// The patterns of one key, compiled. Each matches as `re.match(rf"(.*\.)?({key})$", module)`.
    fn overrides<'a, T>(
        &self,
        key: &'static str,
        patterns: &'a [(String, T)],
    ) -> Result<Overrides<'a, T>> {
        let one = |(pattern, value): &'a (String, T)| {
            let regex = self.compile(key, pattern, &format!(r"\A(.*\.)?({pattern})\z"))?;
            Ok((regex, value))
        };
        let compiled = patterns.iter().map(one).collect::<Result<_>>()?;
        Ok(Overrides { key, compiled })
    }

    fn first_match<T: Copy>(&self, patterns: &Overrides<'_, T>, module: &str) -> Result<Option<T>> {
        for (regex, value) in &patterns.compiled {
            if self.is_match(patterns.key, regex, module)? {
                return Ok(Some(**value));
            }
        }
        Ok(None)
    }

    fn layer_patterns(&self) -> Result<Vec<Regex>> {
        let key = "layers_pattern";
        if self.layers_pattern.is_empty() {
            let any = r"\A.*?\.[^.]*\.(?P<idx>\d+)\.";
            return Ok(vec![self.compile(key, any, any)?]);
        }
        let one = |pattern: &String| {
            let full = format!(r"\A(?:.*?\.)?(?:{pattern})\.(?P<idx>\d+)\.");
            self.compile(key, pattern, &full)
        };
        self.layers_pattern.iter().map(one).collect()
    }

    fn in_layers(&self, patterns: &[Regex], module: &str) -> Result<bool> {
        let Some(layers) = &self.layers else {
            return Ok(true);
        };
        for regex in patterns {
            let found = regex
                .captures(module)
                .map_err(|e| self.bad_pattern("layers_pattern", regex.as_str(), &e))?;
            if let Some(index) = found.as_ref().and_then(|c| c.name("idx")) {
                let index: Option<usize> = index.as_str().parse().ok();
                return Ok(index.is_some_and(|i| layers.contains(&i)));
            }
        }
        Ok(false)
    }

    fn compile(&self, key: &'static str, pattern: &str, full: &str) -> Result<Regex> {
        // Compiled by itself first: a stray bracket must not pair with one of the frame's.
        Regex::new(pattern)
            .and_then(|_| Regex::new(full))
            .map_err(|e| self.bad_pattern(key, pattern, &e))
    }

    fn is_match(&self, key: &'static str, regex: &Regex, module: &str) -> Result<bool> {
        regex
            .is_match(module)
            .map_err(|e| self.bad_pattern(key, regex.as_str(), &e))
    }

    fn bad_pattern(&self, key: &'static str, pattern: &str, e: &fancy_regex::Error) -> Error {
        let problem = e.to_string();
        Error::Pattern {
            path: self.path.clone(),
            key,
            pattern: quote(pattern),
            problem: quote(problem.lines().last().unwrap_or("not a pattern")),
        }
    }
}

/// How a module path was matched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    No,
    End,
    Whole,
}

/// `rank_pattern` or `alpha_pattern`, compiled.
struct Overrides<'a, T> {
    key: &'static str,
    compiled: Vec<(Regex, &'a T)>,
}

enum Selector<'a> {
    Names(&'a [String]),
    All,
    Regex(&'static str, Regex),
}

impl<'a> Selector<'a> {
    fn new(config: &AdapterConfig, key: &'static str, targets: &'a Targets) -> Result<Self> {
        Ok(match targets {
            Targets::Names(names) => Self::Names(names),
            Targets::AllLinear => Self::All,
            Targets::Regex(pattern) => Self::Regex(
                key,
                config.compile(key, pattern, &format!(r"\A(?:{pattern})\z"))?,
            ),
        })
    }

    fn matches(&self, config: &AdapterConfig, module: &str) -> Result<Match> {
        Ok(match self {
            Self::All => Match::Whole,
            Self::Regex(key, regex) => match config.is_match(key, regex, module)? {
                true => Match::Whole,
                false => Match::No,
            },
            Self::Names(names) => {
                let end = |name: &String| {
                    let rest = module.strip_suffix(name.as_str());
                    rest.is_some_and(|r| r.ends_with('.'))
                };
                if names.iter().any(|n| n == module) {
                    Match::Whole
                } else if names.iter().any(end) {
                    Match::End
                } else {
                    Match::No
                }
            }
        })
    }
}
