//! What was measured and on what: versions from the lock file this binary was built with, the machine from the system.
//! Absent on purpose: settings; every engine runs with its own defaults.

/// Peers whose version belongs in a report.
pub const PEERS: [&str; 5] = ["tallow", "candle-core", "candle-nn", "gemm", "faer"];

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

/// One line naming every engine's version, one naming the machine.
#[must_use]
pub fn line() -> String {
    let peers: Vec<String> = PEERS
        .iter()
        .map(|name| format!("{name} {}", locked(name).join("/")))
        .collect();
    format!("{}\n{}", peers.join(", "), machine())
}

/// The processor's name, its cores, the threads a process may use.
#[must_use]
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, name)| name.trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{model}, {} cores, {threads} threads",
        num_cpus::get_physical()
    )
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
