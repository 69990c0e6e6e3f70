//! Which versions were measured, read from the lock file this binary was built with.

/// Peers whose version belongs in a report.
pub const PEERS: [&str; 4] = ["candle-core", "candle-nn", "gemm", "faer"];

/// Versions of package `name` in the lock file, newest last; more than one where dependencies disagree.
#[must_use]
pub fn locked(name: &str) -> Vec<&'static str> {
    let lock = include_str!("../Cargo.lock");
    let header = format!("name = \"{name}\"");
    let mut found = Vec::new();
    let mut lines = lock.lines();
    while let Some(line) = lines.next() {
        if line == header {
            found.extend(lines.next().and_then(|l| l.split('"').nth(1)));
        }
    }
    found
}

/// One line naming every peer's version and the machine's threads.
#[must_use]
pub fn line() -> String {
    let peers: Vec<String> = PEERS
        .iter()
        .map(|name| format!("{name} {}", locked(name).join("/")))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads", peers.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_peer_is_locked() {
        for name in PEERS {
            assert!(
                !locked(name).is_empty(),
                "{name} is missing from Cargo.lock"
            );
        }
    }
}
