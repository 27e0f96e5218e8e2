//! Compiles the C++ shim against the libtorch that torch-sys uses.
//!
//! The torch wheel is enough: CUDA headers come from the nvidia wheels that pip puts beside it. Those wheels lack two pieces
//! that host code includes (`crt/host_defines.h`, `nv/target`); where a CUDA toolkit does not supply them, `shim/cuda_stub` does.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rustc-check-cfg=cfg(flowhn_cuda)");

    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys reports the libtorch it links"));
    let include = lib.join("../include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .pic(true)
        .std("c++17")
        .warnings(false)
        .flag("-D_GLIBCXX_USE_CXX11_ABI=1")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .files([
            "shim/error.cpp",
            "shim/autograd.cpp",
            "shim/cpu.cpp",
            "shim/device.cpp",
            "shim/observe.cpp",
            "shim/op.cpp",
            "shim/write.cpp",
        ]);

    let cuda = if lib.join("libtorch_cuda.so").exists() { cuda_include(&lib) } else { None };
    if let Some(cuda) = &cuda {
        if !cuda.join("crt/host_defines.h").exists() {
            build.include("shim/cuda_stub");
        }
        build.include(cuda);
        if cuda.join("cccl/nv/target").exists() {
            build.include(cuda.join("cccl"));
        }
        build.file("shim/graph.cpp");
        println!("cargo:rustc-cfg=flowhn_cuda");
    }
    build.compile("flowhn_shim");

    println!("cargo:rustc-link-search=native={}", lib.display());
    if cuda.is_some() {
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
    }
    for name in ["torch_cpu", "torch", "c10"] {
        println!("cargo:rustc-link-lib={name}");
    }
}

/// The folder that holds `cuda_runtime_api.h`: the nvidia wheel beside torch, or a toolkit.
fn cuda_include(lib: &Path) -> Option<PathBuf> {
    let toolkit = env::var("CUDA_HOME").unwrap_or_else(|_| "/usr/local/cuda".into());
    // `.libtorch` may be a link, so resolve it before walking up to site-packages.
    let site = lib.canonicalize().ok()?.join("../..");
    [site.join("nvidia/cu13/include"), Path::new(&toolkit).join("include")]
        .into_iter()
        .find(|folder| folder.join("cuda_runtime_api.h").exists())
}
