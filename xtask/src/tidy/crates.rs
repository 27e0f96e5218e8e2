//! Rules about our crates as a whole.

use std::collections::BTreeSet;

use super::{Finding, Tree};

/// Our crates and those of ours that each may depend on.
const EDGES: &[(&str, &[&str])] = &[
    ("flowhn-split", &[]),
    ("flowhn-trace", &[]),
    ("flowhn-replay", &["flowhn-trace"]),
    ("flowhn-torch", &["flowhn-trace"]),
    ("flowhn-nn", &["flowhn-torch"]),
    ("flowhn-ssm", &["flowhn-nn", "flowhn-torch"]),
    ("flowhn-attn", &["flowhn-nn", "flowhn-torch"]),
    ("flowhn-fuse", &["flowhn-nn", "flowhn-torch"]),
    ("flowhn-model", &["flowhn-split", "flowhn-ssm", "flowhn-attn", "flowhn-fuse", "flowhn-nn", "flowhn-torch"]),
    (
        "flowhn-train",
        &["flowhn-model", "flowhn-split", "flowhn-ssm", "flowhn-attn", "flowhn-fuse", "flowhn-nn", "flowhn-torch"],
    ),
    (
        "flowhn",
        &[
            "flowhn-train",
            "flowhn-model",
            "flowhn-split",
            "flowhn-ssm",
            "flowhn-attn",
            "flowhn-fuse",
            "flowhn-nn",
            "flowhn-torch",
        ],
    ),
];

/// The crates that call libtorch and the CUDA driver, may hold unsafe code for it, and so cannot forbid it.
const UNSAFE_HOMES: [&str; 2] = ["flowhn-torch", "flowhn-replay"];

/// Lines of text that an introduction has at the very least.
const README_LINES: usize = 3;

/// Whether a crate may hold unsafe code.
pub fn is_unsafe_home(name: &str) -> bool {
    UNSAFE_HOMES.contains(&name)
}

/// Each crate introduces itself, and denies what all deny.
pub fn manners(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in names(tree) {
        let dir = format!("crates/{name}");
        let readme = format!("{dir}/README.md");
        if tree.file(&readme).is_none_or(|file| n_text_lines(&file.text) < README_LINES) {
            findings.push(Finding::new(readme, 0, "missing, or little more than a title"));
        }
        for root in [format!("{dir}/src/lib.rs"), format!("{dir}/src/main.rs")] {
            let Some(file) = tree.file(&root) else {
                continue;
            };
            let mut wanted = vec!["#![deny(missing_docs)]"];
            if !is_unsafe_home(name) {
                wanted.push("#![forbid(unsafe_code)]");
            }
            // A program has no public items to document.
            let is_program = root.ends_with("main.rs");
            let missing = wanted.iter().filter(|line| !(is_program && line.contains("missing_docs")));
            for line in missing.filter(|line| !file.text.lines().any(|have| have.trim() == **line)) {
                findings.push(Finding::new(&root, 0, format!("lacks {line}")));
            }
        }
    }
    findings
}

/// Dependences point down the list only, and siblings never meet.
pub fn one_way(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in names(tree) {
        let path = format!("crates/{name}/Cargo.toml");
        let Some((_, allowed)) = EDGES.iter().find(|(crate_name, _)| *crate_name == name) else {
            findings.push(Finding::new(path, 0, "a crate without a place in the order (xtask/src/tidy/crates.rs)"));
            continue;
        };
        let manifest = tree.file(&path).map_or("", |file| file.text.as_str());
        for (line, dependency) in ours_in(manifest, "dependencies") {
            if !allowed.contains(&dependency) {
                findings.push(Finding::new(&path, line, format!("{name} must not depend on {dependency}")));
            }
        }
    }
    if let Some(xtask) = tree.file("xtask/Cargo.toml") {
        for section in ["dependencies", "dev-dependencies"] {
            let edges = ours_in(&xtask.text, section).into_iter();
            findings.extend(
                edges.map(|(line, name)| Finding::new(&xtask.path, line, format!("xtask must not depend on {name}"))),
            );
        }
    }
    findings
}

fn n_text_lines(markdown: &str) -> usize {
    markdown.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).count()
}

/// Names of the crates, from their manifests' places.
fn names(tree: &Tree) -> BTreeSet<&str> {
    let manifests = tree.files.iter().filter_map(|file| file.path.strip_prefix("crates/")?.strip_suffix("/Cargo.toml"));
    manifests.filter(|name| !name.contains('/')).collect()
}

/// Lines of a manifest's section that name a crate of ours.
fn ours_in<'a>(manifest: &'a str, wanted: &str) -> Vec<(usize, &'a str)> {
    let mut section = "";
    let mut found = Vec::new();
    for (idx, line) in manifest.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = header;
        } else if section == wanted && line.starts_with("flowhn") {
            let end = line.find(|c: char| !(c == '-' || c.is_alphanumeric())).unwrap_or(line.len());
            found.push((idx + 1, &line[..end]));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_do_not_meet_and_arrows_do_not_turn() {
        let tree = Tree::of(&[
            (
                "crates/flowhn-ssm/Cargo.toml",
                "[dependencies]\nflowhn-nn.workspace = true\nflowhn-attn.workspace = true\n",
            ),
            ("crates/flowhn-split/Cargo.toml", "[dev-dependencies]\nflowhn-model = { path = \"../x\" }\n"),
            ("crates/flowhn-new/Cargo.toml", ""),
            ("xtask/Cargo.toml", "[dependencies]\nflowhn-split.workspace = true\n"),
        ]);
        let found: Vec<_> = one_way(&tree).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "crates/flowhn-new/Cargo.toml: a crate without a place in the order (xtask/src/tidy/crates.rs)",
                "crates/flowhn-ssm/Cargo.toml:3: flowhn-ssm must not depend on flowhn-attn",
                "xtask/Cargo.toml:2: xtask must not depend on flowhn-split",
            ]
        );
    }

    #[test]
    fn every_crate_has_manners() {
        let good = "//! Docs.\n#![forbid(unsafe_code)]\n#![deny(missing_docs)]\n";
        let readme = "# A crate\n\nWhat it is.\nWhat it does.\n\nHow to use it.\n";
        let tree = Tree::of(&[
            ("crates/flowhn-nn/Cargo.toml", ""),
            ("crates/flowhn-nn/README.md", readme),
            ("crates/flowhn-nn/src/lib.rs", good),
            ("crates/flowhn-torch/Cargo.toml", ""),
            ("crates/flowhn-torch/README.md", readme),
            ("crates/flowhn-torch/src/lib.rs", "#![deny(missing_docs)]"),
            ("crates/flowhn-ssm/Cargo.toml", ""),
            ("crates/flowhn-ssm/README.md", "# flowhn-ssm\n\nScans.\n"),
            ("crates/flowhn-ssm/src/lib.rs", "// #![forbid(unsafe_code)]\n#![deny(missing_docs)]"),
        ]);
        let found: Vec<_> = manners(&tree).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "crates/flowhn-ssm/README.md: missing, or little more than a title",
                "crates/flowhn-ssm/src/lib.rs: lacks #![forbid(unsafe_code)]"
            ]
        );
    }
}
