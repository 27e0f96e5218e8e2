//! Where the repository and its build directory are.

use std::env;
use std::path::{Path, PathBuf};

use crate::fail::{Fail, Result};

/// The checkout that xtask works on.
#[derive(Debug, Clone)]
pub struct Repo {
    root: PathBuf,
    target: PathBuf,
}

impl Repo {
    /// The checkout that holds this xtask.
    ///
    /// `cargo run` says at run time where the package is, which stays right when the checkout has been moved
    /// since the build. The build directory is the one this program was built into, whatever chose it.
    pub fn locate() -> Result<Self> {
        let package =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = package.parent().filter(|root| root.is_dir()).map(Path::to_path_buf);
        let root = root.ok_or_else(|| {
            Fail::new(format!("{} is no package inside a checkout", package.display()))
                .help("run it as `cargo xtask` inside the repository")
        })?;
        let target = env::current_exe()
            .ok()
            .and_then(|exe| Some(exe.parent()?.parent()?.to_path_buf()))
            .unwrap_or_else(|| root.join("target"));
        Ok(Self { root, target })
    }

    /// A checkout at `root` with the default build directory.
    #[cfg(test)]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self { target: root.join("target"), root }
    }

    /// The top of the checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path inside the checkout.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.root.join(inside)
    }

    /// Cargo's build directory.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The link that every build and every binary finds libtorch by.
    pub fn libtorch_link(&self) -> PathBuf {
        self.path(".libtorch")
    }

    /// The Python environment that `setup` makes when the machine has no fitting PyTorch.
    pub fn venv(&self) -> PathBuf {
        self.path(".venv")
    }
}
