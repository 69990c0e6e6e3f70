//! Rules for one Rust file, checked on its tokens: words in comments and strings do not count, words in macros do.
//! Absent on purpose: a syntax tree. Tokens are enough, and survive code that does not compile yet.

use std::str::FromStr;

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

use super::Findings;

const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 60;
/// Where `unsafe` may stand: crates that talk to a device, the one file that maps weights into memory, and a test's
/// counting allocator.
const UNSAFE_PLACES: [&str; 6] = [
    "crates/tallow-cpu/",
    "crates/tallow-cuda/",
    "crates/tallow-wgpu/",
    "crates/tallow-llm/src/files.rs",
    // A peer without a safe interface, compiled under a feature only.
    "crates/tallow-bench/src/peer/gemm.rs",
    // An allocator that counts.
    "crates/tallow/tests/replay.rs",
];

/// Adds what is wrong or remarkable in the file at `path` to `found`.
pub(super) fn check(path: &str, text: &str, found: &mut Findings) {
    if !text.starts_with("//!") {
        found.failures.push(format!(
            "{path}:1: want a first line `//! what this file is, its invariant, what is absent on purpose`"
        ));
    }
    let lines = text.lines().count();
    if lines > MAX_FILE_LINES {
        found.notes.push(format!(
            "{path}: {lines} lines; {MAX_FILE_LINES} are plenty"
        ));
    }
    match TokenStream::from_str(text) {
        Ok(tokens) => {
            let may_be_unsafe = UNSAFE_PLACES.iter().any(|place| path.starts_with(place));
            Walk {
                path,
                may_be_unsafe,
                found,
            }
            .stream(tokens);
        }
        Err(error) => found.failures.push(format!("{path}: not Rust: {error}")),
    }
}

struct Walk<'a> {
    path: &'a str,
    may_be_unsafe: bool,
    found: &'a mut Findings,
}

impl Walk<'_> {
    fn stream(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for (i, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Ident(word) => {
                    let line = word.span().start().line;
                    self.word(&word.to_string(), line, &tokens[i + 1..]);
                }
                TokenTree::Group(group) => {
                    if group.delimiter() == Delimiter::Bracket && is_attribute(&tokens[..i]) {
                        self.attribute(group);
                    }
                    self.stream(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    fn word(&mut self, word: &str, line: usize, rest: &[TokenTree]) {
        match word {
            "todo" | "unimplemented" if is_punct(rest.first(), '!') => {
                self.fail(
                    line,
                    &format!("`{word}!` is unfinished work; finish it or leave it out"),
                );
            }
            "unsafe" if !self.may_be_unsafe => {
                self.fail(
                    line,
                    "`unsafe` outside a backend crate; put it behind a safe function there",
                );
            }
            "fn" => self.function(line, rest),
            _ => {}
        }
    }

    /// `rest` follows the word `fn`. A function pointer's type has no name and is no function.
    fn function(&mut self, line: usize, rest: &[TokenTree]) {
        let Some(TokenTree::Ident(name)) = rest.first() else {
            return;
        };
        let body = rest
            .iter()
            .take_while(|t| !is_punct(Some(t), ';'))
            .find_map(|t| match t {
                TokenTree::Group(g) if g.delimiter() == Delimiter::Brace => Some(g),
                _ => None,
            });
        let Some(body) = body else { return };
        let lines = body.span_close().end().line + 1 - line;
        if lines > MAX_FUNCTION_LINES {
            self.found.notes.push(format!(
                "{}:{line}: `{name}` has {lines} lines; {MAX_FUNCTION_LINES} are plenty",
                self.path
            ));
        }
    }

    /// `group` is what stands in the brackets of `#[...]`.
    fn attribute(&mut self, group: &Group) {
        let line = group.span_open().start().line;
        let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
        if matches!(tokens.first(), Some(TokenTree::Ident(word)) if word == "ignore") {
            self.fail(line, "`#[ignore]`: a test that does not run proves nothing");
        }
        if has_bare_allow(&tokens) {
            self.fail(
                line,
                "bare `allow`; write `#[expect(lint, reason = \"...\")]`",
            );
        }
    }

    fn fail(&mut self, line: usize, message: &str) {
        self.found
            .failures
            .push(format!("{}:{line}: {message}", self.path));
    }
}

/// Whether `before` ends in `#` or `#!`.
fn is_attribute(before: &[TokenTree]) -> bool {
    match before {
        [.., a, b] if is_punct(Some(b), '!') => is_punct(Some(a), '#'),
        [.., b] => is_punct(Some(b), '#'),
        [] => false,
    }
}

/// Whether `allow(...)` stands in an attribute, or in a `cfg_attr`, without a reason.
fn has_bare_allow(tokens: &[TokenTree]) -> bool {
    tokens
        .iter()
        .enumerate()
        .any(|(i, token)| match (token, tokens.get(i + 1)) {
            (TokenTree::Ident(word), Some(TokenTree::Group(lints))) if word == "allow" => !lints
                .stream()
                .into_iter()
                .any(|t| matches!(t, TokenTree::Ident(word) if word == "reason")),
            (TokenTree::Group(inner), _) => {
                has_bare_allow(&inner.stream().into_iter().collect::<Vec<_>>())
            }
            _ => false,
        })
}

fn is_punct(token: Option<&TokenTree>, want: char) -> bool {
    matches!(token, Some(TokenTree::Punct(p)) if p.as_char() == want)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(path: &str, body: &str) -> Vec<String> {
        let mut found = Findings::default();
        check(path, &format!("//! A file.\n{body}"), &mut found);
        found.failures
    }

    #[test]
    fn a_header_is_wanted() {
        let mut found = Findings::default();
        check("a.rs", "fn f() {}", &mut found);
        assert_eq!(found.failures.len(), 1);
        assert!(failures("a.rs", "fn f() {}").is_empty());
    }

    #[test]
    fn unfinished_work_is_found_at_its_line() {
        for (body, line) in [
            ("fn f() { todo!() }", 2),
            ("\nfn f() { unimplemented!() }", 3),
            ("macro_rules! m { () => { todo!() } }", 2),
            ("#[test]\n#[ignore = \"slow\"]\nfn f() {}", 3),
            ("#[allow(dead_code)]\nfn f() {}", 2),
            ("#![allow(dead_code)]", 2),
            ("#[cfg_attr(test, allow(dead_code))]\nfn f() {}", 2),
        ] {
            let found = failures("a.rs", body);
            assert_eq!(found.len(), 1, "{body}: {found:?}");
            assert!(found[0].starts_with(&format!("a.rs:{line}:")), "{found:?}");
        }
    }

    #[test]
    fn words_in_comments_and_strings_do_not_count() {
        let body = "// todo!() unsafe #[ignore]\nfn f() -> &'static str { \"todo!() unsafe #[allow(x)]\" }\nfn todo() {}";
        assert!(failures("a.rs", body).is_empty());
        assert!(
            failures(
                "a.rs",
                "#[allow(dead_code, reason = \"only on Windows\")]\nfn f() {}"
            )
            .is_empty()
        );
    }

    #[test]
    fn unsafe_belongs_to_backends() {
        let body = "fn f(p: *const u8) -> u8 { unsafe { *p } }";
        assert_eq!(failures("crates/tallow-core/src/a.rs", body).len(), 1);
        assert_eq!(failures("crates/tallow-llm/src/a.rs", body).len(), 1);
        assert!(failures("crates/tallow-llm/src/files.rs", body).is_empty());
        assert!(failures("crates/tallow-cpu/src/a.rs", body).is_empty());
    }

    #[test]
    fn long_functions_and_files_are_notes() {
        let filler = "    g();\n".repeat(60);
        let mut found = Findings::default();
        let text = format!(
            "//! A file.\nfn long(h: fn()) {{\n{filler}}}\nfn short() {{}}\n{}",
            "\n".repeat(500)
        );
        check("a.rs", &text, &mut found);
        assert!(found.failures.is_empty());
        assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
        assert!(
            found.notes[1].contains("`long` has 62 lines"),
            "{:?}",
            found.notes
        );
    }
}
