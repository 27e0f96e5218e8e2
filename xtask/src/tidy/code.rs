//! Rules about source code. They look at code alone: comments and string literals are blanked first.

use super::crates::is_unsafe_home;
use super::{Finding, SourceFile, Tree};

/// Past this many lines a file usually holds two ideas.
const MAX_LINES: usize = 600;

/// `unsafe` as a word of code, outside its homes.
pub fn no_unsafe(tree: &Tree) -> Vec<Finding> {
    let at_home = |path: &str| {
        path.strip_prefix("crates/").and_then(|path| path.split_once('/')).is_some_and(|(name, _)| is_unsafe_home(name))
    };
    let files = tree.with_extension(&["rs"]).filter(|file| !at_home(&file.path));
    files.flat_map(|file| find_words(file, &["unsafe"])).collect()
}

/// Macros that stand for code yet to be written, or for a look at a value in passing.
pub fn no_leftovers(tree: &Tree) -> Vec<Finding> {
    tree.with_extension(&["rs"]).flat_map(|file| find_words(file, &["todo!", "unimplemented!", "dbg!"])).collect()
}

/// Files that have grown past one idea.
pub fn short_files(tree: &Tree) -> Vec<Finding> {
    let files = tree.with_extension(&["rs", "cu", "cuh", "cpp", "h"]);
    let lengths = files.map(|file| (file, file.text.lines().count()));
    lengths
        .filter(|(_, n_lines)| *n_lines > MAX_LINES)
        .map(|(file, n_lines)| Finding::new(&file.path, 0, format!("{n_lines} lines")))
        .collect()
}

fn find_words(file: &SourceFile, words: &[&str]) -> Vec<Finding> {
    let code = code_only(&file.text);
    let mut findings = Vec::new();
    for (line_idx, line) in code.lines().enumerate() {
        for word in words.iter().filter(|word| has_word(line, word)) {
            findings.push(Finding::new(&file.path, line_idx + 1, format!("`{word}`")));
        }
    }
    findings
}

fn has_word(line: &str, word: &str) -> bool {
    let in_word = |c: char| c == '_' || c.is_alphanumeric();
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_some_and(in_word);
        let after = line[at + word.len()..].chars().next().is_some_and(in_word);
        // After a macro's `!` anything may follow.
        !before && (!after || word.ends_with('!'))
    })
}

/// Rust source with every comment and literal turned into spaces, line by line in its old place.
fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let in_word = code.chars().next_back().is_some_and(|c| c == '_' || c.is_alphanumeric());
        let len = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment_len(rest),
            '"' => quoted_len(rest, '"'),
            '\'' => char_literal_len(rest),
            'r' | 'b' | 'c' if !in_word => raw_string_len(rest),
            _ => 0,
        };
        if len == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..len].chars().map(|c| if c == '\n' { c } else { ' ' }));
            rest = &rest[len..];
        }
    }
    code
}

/// Length of a block comment, with the comments nested in it.
fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// Length of a literal up to its closing quote, backslashes minded.
fn quoted_len(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

/// Length of a character literal; 0 for the quote of a lifetime.
fn char_literal_len(rest: &str) -> usize {
    let mut chars = rest.chars().skip(1);
    match (chars.next(), chars.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted_len(rest, '\''),
        _ => 0,
    }
}

/// Length of a raw string with its prefix; 0 for anything else that starts with those letters.
fn raw_string_len(rest: &str) -> usize {
    let Some(after_r) = ["r", "br", "cr"].iter().find_map(|prefix| rest.strip_prefix(prefix)) else {
        return 0;
    };
    let hashes = after_r.len() - after_r.trim_start_matches('#').len();
    let Some(body) = after_r[hashes..].strip_prefix('"') else {
        return 0;
    };
    let close = format!("\"{}", "#".repeat(hashes));
    let opened = rest.len() - body.len();
    body.find(&close).map_or(rest.len(), |at| opened + at + close.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_with_unsafe(source: &str) -> Vec<usize> {
        let tree = Tree::of(&[("crates/flowhn-ssm/src/lib.rs", source)]);
        no_unsafe(&tree).into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn unsafe_counts_only_as_code() {
        let innocent = r####"
#![forbid(unsafe_code)]
// unsafe in a comment, /* and in
/* an unsafe /* nested */ unsafe comment */
const A: &str = "unsafe \" unsafe";
const B: &str = r#"unsafe " unsafe"#;
const C: &[u8] = br"unsafe\";
const D: [char; 3] = ['"', '\'', 'u'];
fn lifetime<'unsafe_not>(x: &'unsafe_not str) -> &'unsafe_not str { x }
"####;
        assert_eq!(lines_with_unsafe(innocent), [0_usize; 0]);
        assert_eq!(
            lines_with_unsafe("fn f() {}\nunsafe fn g() {}\nfn h<'a>(c: char) { c == '\"'; unsafe {} }"),
            [2, 3]
        );
        assert_eq!(lines_with_unsafe("const R: &str = r\"x\"; unsafe impl Send for R {}"), [1]);
    }

    #[test]
    fn unsafe_is_at_home_where_foreign_libraries_are_called() {
        let tree = Tree::of(&[
            ("crates/flowhn-torch/src/ffi.rs", "unsafe {}"),
            ("crates/flowhn-replay/src/driver.rs", "unsafe {}"),
            ("crates/flowhn-replay-more/src/lib.rs", "unsafe {}"),
            ("benches/src/lib.rs", "unsafe {}"),
        ]);
        let found: Vec<_> = no_unsafe(&tree).into_iter().map(|finding| finding.path).collect();
        assert_eq!(found, ["crates/flowhn-replay-more/src/lib.rs", "benches/src/lib.rs"]);
    }

    #[test]
    fn leftovers_are_found_in_code() {
        let tree =
            Tree::of(&[("a.rs", "fn f() { todo!(\"later\") }\n// dbg!(x)\nfn g() { my_dbg!(x); std::dbg!(x) }")]);
        let found: Vec<_> = no_leftovers(&tree).into_iter().map(|finding| (finding.line, finding.message)).collect();
        assert_eq!(found, [(1, "`todo!`".to_owned()), (3, "`dbg!`".to_owned())]);
    }

    #[test]
    fn long_files_are_found() {
        let long = "\n".repeat(MAX_LINES + 1);
        let tree = Tree::of(&[("a.rs", &long), ("b.rs", &long[1..]), ("data.jsonl", &long)]);
        assert_eq!(short_files(&tree), [Finding::new("a.rs", 0, "601 lines")]);
    }
}
