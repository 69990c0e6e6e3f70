//! Which files a run reads: several with weights, or a folder with `train.jsonl` and its siblings.
//! Absent on purpose: reading them.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result, quote};

/// The files of a data folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    /// `train.jsonl`.
    pub train: PathBuf,
    /// `valid.jsonl`, where it is there.
    pub valid: Option<PathBuf>,
    /// `test.jsonl`, where it is there.
    pub test: Option<PathBuf>,
}

impl Folder {
    /// The files in `dir`; `None` if it is no folder.
    ///
    /// # Errors
    /// A folder without `train.jsonl`.
    pub fn find(dir: &Path) -> Result<Option<Self>> {
        if !dir.is_dir() {
            return Ok(None);
        }
        let there = |name: &str| Some(dir.join(name)).filter(|p| p.is_file());
        match there("train.jsonl") {
            Some(train) => Ok(Some(Self {
                train,
                valid: there("valid.jsonl"),
                test: there("test.jsonl"),
            })),
            None => Err(Error::MissingFile {
                path: dir.join("train.jsonl"),
                hint: "a data folder holds train.jsonl and perhaps valid.jsonl and test.jsonl"
                    .to_owned(),
            }),
        }
    }
}

/// A file and the share of the examples that come from it: `a.jsonl=0.7`, or a path alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// The file.
    pub path: PathBuf,
    /// Its share, relative to the others; `None`: each example as often as it is there.
    pub weight: Option<f64>,
}

impl Weighted {
    /// A file without a weight.
    pub fn plain(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            weight: None,
        }
    }

    /// Files that go together: all with weights or none, each file once.
    ///
    /// # Errors
    /// Otherwise.
    pub fn check(all: &[Self]) -> Result<()> {
        let bad = |want: &'static str, got: String| {
            Err(Error::Setting {
                name: "data",
                want,
                got,
            })
        };
        if all.is_empty() {
            return bad("at least one file", "none".to_owned());
        }
        let weighted = all.iter().filter(|w| w.weight.is_some()).count();
        if weighted != 0 && weighted != all.len() {
            let got = format!("{weighted} of {} with one", all.len());
            return bad(
                "a weight for each file, as in a.jsonl=0.7, or for none",
                got,
            );
        }
        for (i, one) in all.iter().enumerate() {
            if all[..i].iter().any(|o| o.path == one.path) {
                let got = quote(&one.path.display().to_string());
                return bad("each file once", format!("{got} twice"));
            }
        }
        Ok(())
    }
}

impl FromStr for Weighted {
    type Err = Error;

    /// A number above 0 behind the last `=` is a weight; any other `=` belongs to the name.
    fn from_str(text: &str) -> Result<Self> {
        let Some((path, number)) = text.rsplit_once('=') else {
            return Ok(Self::plain(text));
        };
        match number.parse::<f64>() {
            Ok(w) if w.is_finite() && w > 0.0 && !path.is_empty() => Ok(Self {
                path: path.into(),
                weight: Some(w),
            }),
            Ok(_) => Err(Error::Setting {
                name: "data",
                want: "a weight above 0",
                got: quote(text),
            }),
            Err(_) => Ok(Self::plain(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_behind_the_last_equals_sign() {
        let read = |text: &str| text.parse::<Weighted>().map(|w| (w.path, w.weight));
        assert_eq!(read("a.jsonl").unwrap(), ("a.jsonl".into(), None));
        assert_eq!(
            read("a=b.jsonl=0.7").unwrap(),
            ("a=b.jsonl".into(), Some(0.7))
        );
        assert_eq!(read("a=b.jsonl").unwrap(), ("a=b.jsonl".into(), None));
        for text in ["a=0", "a=-1", "a=inf", "=2"] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.starts_with("data: want a weight above 0, got \""));
        }
    }

    #[test]
    fn files_go_together_or_are_refused() {
        let all = |texts: &[&str]| {
            let all: Vec<Weighted> = texts.iter().map(|t| t.parse().unwrap()).collect();
            Weighted::check(&all).map_err(|e| e.to_string())
        };
        assert!(all(&["a", "b"]).is_ok() && all(&["a=1", "b=2"]).is_ok());
        assert!(all(&["a=1", "b"]).unwrap_err().contains("1 of 2 with one"));
        assert!(all(&["a", "a"]).unwrap_err().contains("\"a\" twice"));
        assert!(all(&[]).unwrap_err().contains("at least one file"));
    }

    #[test]
    fn a_folder_needs_its_training_file() {
        let dir = tempfile::tempdir().unwrap();
        let text = Folder::find(dir.path()).unwrap_err().to_string();
        assert!(
            text.contains("train.jsonl does not exist; a data folder holds"),
            "{text}"
        );
        std::fs::write(dir.path().join("train.jsonl"), "").unwrap();
        std::fs::write(dir.path().join("test.jsonl"), "").unwrap();
        let found = Folder::find(dir.path()).unwrap().unwrap();
        assert!(found.test.is_some() && found.valid.is_none());
        assert_eq!(Folder::find(&found.train).unwrap(), None);
    }
}
