//! Stop strings over streamed text.
//! Invariant: no part of a stop string is ever given out, however the text is cut into pieces.
//! Absent on purpose: matching on token ids; a stop string may begin in the middle of a token.

/// Watches streamed text and holds back what may become a stop string.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Empty stop strings are ignored: they would stop everything.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece and returns what can be shown of it and of what was held back.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s)).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let free = self.held.len() - self.possible_start();
        let rest = self.held.split_off(free);
        std::mem::replace(&mut self.held, rest)
    }

    /// True once a stop string came; nothing follows.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text ended without a stop string: returns what was still held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest end of `held` that begins a stop string.
    fn possible_start(&self) -> usize {
        let longest = |stop: &String| {
            let most = self.held.len().min(stop.len().saturating_sub(1));
            let fits = |n: &usize| self.held.as_bytes().ends_with(&stop.as_bytes()[..*n]);
            (1..=most)
                .rev()
                .find(|n| stop.is_char_boundary(*n) && fits(n))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let mut watch = StopStrings::new(stops.iter().map(|s| (*s).to_owned()));
        let shown = pieces.iter().map(|p| watch.push(p)).collect();
        let rest = watch.finish();
        (shown, rest, watch.stopped())
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_shown() {
        let (shown, rest, stopped) = run(&["\nQ:"], &["A: 1\n", "Q", ": 2"]);
        assert_eq!(
            (shown.concat().as_str(), rest.as_str(), stopped),
            ("A: 1", "", true)
        );
    }

    #[test]
    fn a_false_start_is_given_back() {
        let (shown, rest, stopped) = run(&["abc"], &["xab", "d", "ab"]);
        assert_eq!(shown, ["x", "abd", ""]);
        assert_eq!((rest.as_str(), stopped), ("ab", false));
    }

    #[test]
    fn the_earliest_of_several_wins_and_empty_ones_do_nothing() {
        let (shown, _, stopped) = run(&["", "b", "ab"], &["xaby"]);
        assert_eq!((shown.concat().as_str(), stopped), ("x", true));
        assert_eq!(run(&[""], &["x"]).0, ["x"]);
    }

    #[test]
    fn repeating_starts_are_held_exactly() {
        let (shown, rest, stopped) = run(&["aab"], &["a", "a", "a", "b"]);
        assert_eq!(
            (shown.concat().as_str(), rest.as_str(), stopped),
            ("a", "", true)
        );
    }
}
