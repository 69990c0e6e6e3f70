//! What may depend on what, inside the workspace.
//! Invariant: arrows point down. A crate without a row is refused, so a new crate states its place here first.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A crate, what it may depend on, and what else its tests and benches may use.
struct Layer {
    name: &'static str,
    needs: &'static [&'static str],
    tests_need: &'static [&'static str],
}

/// From the bottom up. `tallow-cli` stands on everything, `xtask` on nothing.
const LAYERS: &[Layer] = &[
    Layer {
        name: "tallow-core",
        needs: &[],
        tests_need: &[],
    },
    Layer {
        name: "tallow-cpu",
        needs: &["tallow-core"],
        tests_need: &["tallow-conformance"],
    },
    Layer {
        name: "tallow-cuda",
        needs: &["tallow-core"],
        tests_need: &["tallow-conformance"],
    },
    Layer {
        name: "tallow-wgpu",
        needs: &["tallow-core"],
        tests_need: &["tallow-conformance"],
    },
    Layer {
        name: "tallow-tune",
        needs: &["tallow-core"],
        tests_need: &["tallow-cpu"],
    },
    Layer {
        name: "tallow-conformance",
        needs: &["tallow-core"],
        tests_need: &["tallow-cpu"],
    },
    Layer {
        name: "tallow-llm",
        needs: &["tallow-core"],
        tests_need: &["tallow-cpu"],
    },
    Layer {
        name: "tallow-train",
        needs: &["tallow-core", "tallow-llm"],
        tests_need: &["tallow-cpu"],
    },
    Layer {
        name: "tallow-fuzz",
        needs: &["tallow-llm", "tallow-train"],
        tests_need: &[],
    },
    Layer {
        name: "tallow",
        needs: &[
            "tallow-core",
            "tallow-cpu",
            "tallow-cuda",
            "tallow-llm",
            "tallow-train",
            "tallow-tune",
            "tallow-wgpu",
        ],
        tests_need: &[],
    },
    Layer {
        name: "tallow-bench",
        needs: &["tallow"],
        tests_need: &[],
    },
    Layer {
        name: "tallow-cli",
        needs: &[
            "tallow",
            "tallow-bench",
            "tallow-core",
            "tallow-cpu",
            "tallow-llm",
            "tallow-train",
        ],
        tests_need: &["tallow-conformance"],
    },
    Layer {
        name: "xtask",
        needs: &[],
        tests_need: &[],
    },
];

/// A crate of the workspace depends on another one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Arrow {
    from: String,
    to: String,
    only_tests: bool,
}

/// Crates of the workspace and the arrows between them.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    crates: Vec<String>,
    arrows: Vec<Arrow>,
}

/// Reads the workspace in the current directory from `cargo metadata`.
pub(super) fn workspace() -> Result<Workspace> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    parse(&serde_json::from_slice(&output.stdout).context("cargo metadata: not JSON")?)
}

fn parse(metadata: &Value) -> Result<Workspace> {
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata: want `packages`")?;
    let name = |v: &Value| v["name"].as_str().unwrap_or_default().to_owned();
    let crates: Vec<String> = packages.iter().map(&name).collect();
    let mut arrows = Vec::new();
    for package in packages {
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if crates.contains(&name(dependency)) {
                arrows.push(Arrow {
                    from: name(package),
                    to: name(dependency),
                    only_tests: dependency["kind"] == "dev",
                });
            }
        }
    }
    Ok(Workspace { crates, arrows })
}

/// What breaks the table.
pub(super) fn check(workspace: &Workspace) -> Vec<String> {
    let row = |name: &str| LAYERS.iter().find(|layer| layer.name == name);
    let strangers = workspace
        .crates
        .iter()
        .filter(|name| row(name).is_none())
        .map(|name| {
            format!("{name}: no row in xtask/src/tidy/layers.rs says what it may depend on")
        });
    let upward = workspace.arrows.iter().filter_map(|arrow| {
        let layer = row(&arrow.from)?;
        let to = arrow.to.as_str();
        let fine = layer.needs.contains(&to) || arrow.only_tests && layer.tests_need.contains(&to);
        let whose = if arrow.only_tests {
            "its tests depend"
        } else {
            "depends"
        };
        (!fine).then(|| {
            format!(
                "{}: {whose} on {to}; it may on {:?}",
                arrow.from, layer.needs
            )
        })
    });
    strangers.chain(upward).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn checked(from: &str, to: &str, kind: Value) -> Vec<String> {
        let metadata = json!({"packages": [
            {"name": from, "dependencies": [{"name": to, "kind": kind}, {"name": "serde", "kind": null}]},
            {"name": to, "dependencies": []},
        ]});
        check(&parse(&metadata).unwrap())
    }

    #[test]
    fn arrows_point_down() {
        assert!(checked("tallow-cpu", "tallow-core", Value::Null).is_empty());
        assert_eq!(checked("tallow-core", "tallow-cpu", Value::Null).len(), 1);
        assert_eq!(checked("tallow-core", "tallow-cpu", json!("dev")).len(), 1);
        assert_eq!(checked("tallow-llm", "tallow-cpu", Value::Null).len(), 1);
        assert_eq!(checked("tallow-llm", "tallow-cpu", json!("build")).len(), 1);
    }

    #[test]
    fn tests_may_use_a_device() {
        assert!(checked("tallow-llm", "tallow-cpu", json!("dev")).is_empty());
        assert!(checked("tallow-conformance", "tallow-cpu", json!("dev")).is_empty());
    }

    #[test]
    fn a_crate_without_a_row_is_refused() {
        let failures = checked("tallow-new", "tallow-core", Value::Null);
        assert_eq!(failures.len(), 1);
        assert!(failures[0].starts_with("tallow-new:"));
    }
}
