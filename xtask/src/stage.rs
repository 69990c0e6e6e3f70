//! The stages of CI, in order: what each is called and what it runs.
//! Invariant: a check that cannot run here says so in its line; nothing is skipped in silence.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::tidy;

/// One stage of CI.
pub(crate) struct Stage {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    /// Does the work; returns a remark for the stage's line, possibly empty.
    pub(crate) run: fn() -> Result<String>,
}

/// All stages, cheap ones first where the order is free.
pub(crate) const STAGES: &[Stage] = &[
    Stage {
        name: "fmt",
        what: "rustfmt on the workspace",
        run: fmt,
    },
    Stage {
        name: "clippy",
        what: "clippy on every target, warnings denied",
        run: clippy,
    },
    Stage {
        name: "tidy",
        what: "house rules that no other tool knows",
        run: tidy::check,
    },
    Stage {
        name: "test",
        what: "cargo test --workspace",
        run: || cargo("test --workspace", &[]),
    },
    Stage {
        name: "doc",
        what: "rustdoc, warnings denied",
        run: || {
            cargo(
                "doc --workspace --no-deps",
                &[("RUSTDOCFLAGS", "-D warnings")],
            )
        },
    },
    Stage {
        name: "neon",
        what: "type-checks the CPU kernels for aarch64, where its standard library is installed",
        run: neon,
    },
    Stage {
        name: "deny",
        what: "licences, duplicate and banned crates, sources, advisories",
        run: deny,
    },
    Stage {
        name: "typos",
        what: "spelling",
        run: typos,
    },
];

fn fmt() -> Result<String> {
    cargo("fmt --all --check", &[])
}

fn clippy() -> Result<String> {
    cargo("clippy --workspace --all-targets -- -D warnings", &[])
}

/// The NEON paths compile for no other processor.
fn neon() -> Result<String> {
    const TARGET: &str = "aarch64-unknown-linux-gnu";
    let found = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .context("cannot run rustc")?;
    let libraries = String::from_utf8_lossy(&found.stdout);
    if !Path::new(libraries.trim()).is_dir() {
        return Ok(format!("NEON NOT checked: rustup target add {TARGET}"));
    }
    cargo(
        "check -p tallow-cpu --target aarch64-unknown-linux-gnu",
        &[],
    )
}

/// Licences, bans and sources need no network. Advisories need a database from outside: where it cannot be had, the
/// stage's line says that they were not checked.
fn deny() -> Result<String> {
    let version = Command::new("cargo-deny")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if version.is_err() {
        bail!("cargo-deny is not installed: cargo install --locked cargo-deny");
    }
    cargo(
        "deny --workspace check --hide-inclusion-graph licenses bans sources",
        &[],
    )?;
    let fetched = Command::new("cargo")
        .args(["deny", "--log-level", "off", "fetch", "db"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("cannot run cargo deny fetch")?;
    if !fetched.success() {
        return Ok("advisories NOT checked: their database cannot be fetched from here".to_owned());
    }
    cargo("deny --workspace check --disable-fetch advisories", &[])?;
    Ok("advisories checked".to_owned())
}

fn typos() -> Result<String> {
    let status = Command::new("typos").stdin(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(String::new()),
        Ok(_) => bail!("typos found misspellings; true words go into typos.toml"),
        Err(_) => bail!("typos is not installed: cargo install --locked typos-cli"),
    }
}

/// Runs `cargo` with the words of `line` and fails when it does.
fn cargo(line: &str, env: &[(&str, &str)]) -> Result<String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(line.split_whitespace())
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run cargo {line}"))?;
    if !status.success() {
        bail!("cargo {line}: {status}");
    }
    Ok(String::new())
}
