//! Small crates outside the workspace, each using one of ours as a stranger would: from its documentation alone.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cargo::{cargo, output, run};
use crate::fail::{Fail, Result};
use crate::repo::Repo;

/// One such crate.
struct Outside {
    name: &'static str,
    libtorch: Libtorch,
}

/// Whether a crate may touch libtorch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Libtorch {
    Needed,
    Forbidden,
}

const OUTSIDE: &[Outside] = &[
    Outside { name: "split-only", libtorch: Libtorch::Forbidden },
    Outside { name: "ssm-only", libtorch: Libtorch::Needed },
];

/// Crates that stand for libtorch in a dependency tree.
const TENSOR_CRATES: [&str; 3] = ["tch", "torch-sys", "flowhn-torch"];

/// Builds and tests each of them.
pub fn check(repo: &Repo) -> Result<()> {
    for outside in OUTSIDE {
        let dir = repo.path("ci/outside").join(outside.name);
        // The versions of the workspace, so that what was built for it serves here too. Cargo drops the rest.
        let lock = dir.join("Cargo.lock");
        fs::copy(repo.path("Cargo.lock"), &lock)
            .map_err(|error| Fail::io(format_args!("write {}", lock.display()), &error))?;

        if outside.libtorch == Libtorch::Forbidden {
            let tree = output(here(repo, &dir, outside.libtorch).args([
                "tree",
                "--prefix",
                "none",
                "--edges",
                "normal,build,dev",
            ]))?;
            if let Some(name) = tensor_crate(&tree) {
                return Err(Fail::new(format!("{} depends on {name}", outside.name))
                    .help(format!("`cargo tree --invert {name}` in {} shows through whom", dir.display())));
            }
        }
        run(here(repo, &dir, outside.libtorch).args(["fmt", "--check"]))?;
        run(here(repo, &dir, outside.libtorch).arg("test"))?;
    }
    Ok(())
}

/// Cargo in that crate, in the build directory of the workspace.
fn here(repo: &Repo, dir: &Path, libtorch: Libtorch) -> Command {
    let mut command = cargo(repo);
    command.current_dir(dir).env("CARGO_TARGET_DIR", repo.target());
    if libtorch == Libtorch::Forbidden {
        command.env("LIBTORCH", "/nonexistent").env_remove("LD_LIBRARY_PATH");
    }
    command
}

fn tensor_crate(tree: &str) -> Option<&'static str> {
    let names: Vec<_> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    TENSOR_CRATES.into_iter().find(|name| names.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_crate_is_found_anywhere_in_the_tree() {
        let clean = "split-only v0.0.0 (/checkout/torch-sys)\nflowhn-split v0.1.0\nserde v1.0.229 (*)\n";
        assert_eq!(tensor_crate(clean), None);
        assert_eq!(tensor_crate(&format!("{clean}torch-sys v0.24.0\n")), Some("torch-sys"));
        assert_eq!(tensor_crate(&format!("{clean}tch v0.24.0 (*)\n")), Some("tch"));
    }
}
