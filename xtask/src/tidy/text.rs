//! Rules about the repository's text.

use super::{Finding, Tree};

/// Files that must be there, each with words that its right text holds.
const LICENCES: [(&str, &str); 3] = [
    ("LICENSE-MIT", "Permission is hereby granted"),
    ("LICENSE-APACHE", "Apache License"),
    ("LICENSE-DATA", "CC BY-SA 3.0"),
];

/// Directories outside the repository that exist on some machines only. Spelt apart, to stay out of their own way.
const OUTSIDE: [&str; 2] = [concat!("/", "work"), concat!("..", "/shared")];

/// The texts that our licence field and our data refer to.
pub fn licences(tree: &Tree) -> Vec<Finding> {
    let right = |path: &str, words: &str| tree.file(path).is_some_and(|file| file.text.contains(words));
    let missing = LICENCES.iter().filter(|(path, words)| !right(path, words));
    missing.map(|(path, words)| Finding::new(*path, 0, format!("missing, or without the words {words:?}"))).collect()
}

/// Paths that only exist on the machine where they were written.
pub fn no_outside_paths(tree: &Tree) -> Vec<Finding> {
    let ours = tree.files.iter().filter(|file| !file.path.starts_with("data/"));
    let lines = ours.flat_map(|file| file.text.lines().enumerate().map(move |(idx, line)| (file, idx + 1, line)));
    lines
        .flat_map(|(file, number, line)| {
            let found = OUTSIDE.iter().filter(|path| has_path(line, path));
            found.map(move |path| Finding::new(&file.path, number, format!("`{path}`")))
        })
        .collect()
}

/// True when `line` has `path` as a whole path or as the start of one.
fn has_path(line: &str, path: &str) -> bool {
    let in_name = |c: char| c == '-' || c == '_' || c == '.' || c.is_alphanumeric();
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        // A relative path may climb further; an absolute one starts where nothing stands before it.
        let starts = before.is_none_or(|c| !in_name(c) && (c != '/' || path.starts_with('.')));
        let ends = line[at + path.len()..].chars().next().is_none_or(|c| c == '.' || !in_name(c));
        starts && ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_out_of_the_repository_are_found() {
        let [absolute, relative] = OUTSIDE;
        for bad in [
            format!("cd {absolute}/main"),
            format!("`{absolute}`"),
            format!("{absolute}."),
            format!("see ../{relative}/x.md"),
            format!("\"{relative}\""),
        ] {
            assert_eq!(no_outside_paths(&Tree::of(&[("docs/a.md", &bad)])).len(), 1, "{bad}");
        }
        for good in [
            format!("{absolute}space"),
            format!("target{absolute}/x"),
            format!("{absolute}-stealing"),
            format!("{relative}_state.rs"),
        ] {
            assert_eq!(no_outside_paths(&Tree::of(&[("docs/a.md", &good)])), [], "{good}");
        }
        assert_eq!(
            no_outside_paths(&Tree::of(&[("data/tiny/train.jsonl", absolute)])),
            [],
            "the corpus says what it says"
        );
    }

    #[test]
    fn an_empty_licence_is_no_licence() {
        let all = LICENCES.map(|(path, words)| (path, words));
        assert_eq!(licences(&Tree::of(&all)), []);
        let emptied = [all[0], (all[1].0, ""), all[2]];
        let found = licences(&Tree::of(&emptied));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].path, "LICENSE-APACHE");
    }
}
