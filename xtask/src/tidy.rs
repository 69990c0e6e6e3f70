//! House rules that no other tool knows: file headers, words that mean unfinished work, where `unsafe` may stand, what
//! may depend on what, what may lie at the root.
//! Invariant: reads files that git would commit, and nothing else. Sizes are notes, never failures.

mod layers;
mod source;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Markdown that may lie at the root. Everything else goes to `docs/`.
const ROOT_MARKDOWN: [&str; 4] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
];
/// Files that must exist.
const REQUIRED: [&str; 3] = ["CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"];
const MAX_BINARY_BYTES: usize = 8 << 20;

/// What tidy found, `path:line: message` each.
#[derive(Debug, Default)]
struct Findings {
    failures: Vec<String>,
    notes: Vec<String>,
}

/// Runs all checks in the current directory.
pub(crate) fn check() -> Result<String> {
    let files = listed_files()?;
    let mut found = Findings::default();
    for path in &files {
        check_file(path, &mut found).with_context(|| format!("cannot read {path}"))?;
    }
    found.failures.extend(check_root(&files));
    found.failures.extend(layers::check(&layers::workspace()?));
    for note in &found.notes {
        println!("note: {note}");
    }
    for failure in &found.failures {
        println!("error: {failure}");
    }
    if !found.failures.is_empty() {
        bail!("tidy: {} rules broken", found.failures.len());
    }
    Ok(format!(
        "{} files, {} notes",
        files.len(),
        found.notes.len()
    ))
}

/// Tracked files, and untracked ones that git does not ignore, with `/` between folders.
fn listed_files() -> Result<Vec<String>> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .context("cannot run git ls-files")?;
    if !output.status.success() {
        bail!(
            "git ls-files: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let list = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    Ok(list
        .split_terminator('\0')
        .filter(|path| Path::new(path).is_file())
        .map(str::to_owned)
        .collect())
}

fn check_file(path: &str, found: &mut Findings) -> Result<()> {
    if path.ends_with(".rs") {
        source::check(path, &fs::read_to_string(path)?, found);
        return Ok(());
    }
    let bytes = fs::read(path)?;
    if bytes.len() > MAX_BINARY_BYTES && bytes[..8000].contains(&0) {
        let mib = bytes.len() >> 20;
        found
            .failures
            .push(format!("{path}: binary file of {mib} MiB; the most is 8"));
    }
    Ok(())
}

fn check_root(files: &[String]) -> Vec<String> {
    let stray = files
        .iter()
        .filter(|f| !f.contains('/') && f.ends_with(".md") && !ROOT_MARKDOWN.contains(&f.as_str()))
        .map(|f| format!("{f}: Markdown at the root; move it to docs/"));
    let missing = REQUIRED
        .iter()
        .filter(|required| !files.iter().any(|f| f == *required))
        .map(|required| format!("{required}: missing"));
    stray.chain(missing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_wants_its_files_and_no_others() {
        let files: Vec<String> = ["CHANGELOG.md", "LICENSE-MIT", "PLAN.md", "docs/PLAN.md"]
            .map(str::to_owned)
            .to_vec();
        let failures = check_root(&files);
        assert_eq!(failures.len(), 2, "{failures:?}");
        assert!(failures[0].starts_with("PLAN.md:"));
        assert!(failures[1].starts_with("LICENSE-APACHE:"));
    }

    #[test]
    fn only_large_binaries_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        for (bytes, failures) in [
            (vec![0; MAX_BINARY_BYTES + 1], 1),
            (vec![0; MAX_BINARY_BYTES], 0),
            (vec![b'x'; MAX_BINARY_BYTES + 1], 0),
        ] {
            fs::write(&path, bytes).unwrap();
            let mut found = Findings::default();
            check_file(path.to_str().unwrap(), &mut found).unwrap();
            assert_eq!(found.failures.len(), failures);
        }
    }
}
