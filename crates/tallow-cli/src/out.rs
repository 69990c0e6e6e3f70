//! What is written to stdout: results, and nothing else. Progress and warnings go to stderr.
//! Invariant: a closed pipe is an error that ends the process quietly, never a panic.
use anyhow::Result;
use serde_json::Value;
use std::fmt::Display;
use std::io::{self, Write as _};

/// Writes a line.
pub(crate) fn line(text: impl Display) -> Result<()> {
    Ok(writeln!(io::stdout().lock(), "{text}")?)
}

/// Writes text at once, without an end of line.
pub(crate) fn piece(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes one JSON document.
pub(crate) fn json(value: &Value) -> Result<()> {
    line(value)
}

/// Writes a warning to stderr.
pub(crate) fn warn(text: impl Display) {
    // Nobody can be told that telling failed.
    let _ = writeln!(io::stderr().lock(), "warning: {text}");
}

/// Is this the error of a reader that has gone?
pub(crate) fn is_closed(e: &anyhow::Error) -> bool {
    let io = e.downcast_ref::<io::Error>();
    io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// 12345678 as "11.8 MiB".
pub(crate) fn bytes(n: usize) -> String {
    let n = n as f64;
    match n {
        _ if n < 1024.0 => format!("{n:.0} B"),
        _ if n < 1024.0 * 1024.0 => format!("{:.1} KiB", n / 1024.0),
        _ if n < 1024.0 * 1024.0 * 1024.0 => format!("{:.1} MiB", n / 1024.0 / 1024.0),
        _ => format!("{:.2} GiB", n / 1024.0 / 1024.0 / 1024.0),
    }
}

/// Seconds as "12.3 µs", "4.56 ms" or "7.89 s".
pub(crate) fn seconds(s: f64) -> String {
    match s {
        _ if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        _ if s < 1.0 => format!("{:.2} ms", s * 1e3),
        _ => format!("{s:.2} s"),
    }
}

/// A count with its thousands apart: "1 234 567".
pub(crate) fn count(n: impl Into<u128>) -> String {
    let digits = n.into().to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(12_345_678), "11.8 MiB");
        assert_eq!(seconds(0.000_012_34), "12.3 µs");
        assert_eq!(seconds(7.891), "7.89 s");
        assert_eq!(
            [1_u32, 999, 1000, 1_234_567].map(count),
            ["1", "999", "1 000", "1 234 567"]
        );
    }
}
