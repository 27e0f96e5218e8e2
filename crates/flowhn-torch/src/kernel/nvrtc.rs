//! From source to machine code, with or without a GPU.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nvrtc::{result, sys};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::{Defines, KernelSource, cache};
use crate::{Error, Result};

/// The headers that every kernel may include.
const HEADERS: [(&str, &str); 8] = [
    ("flowhn.cuh", include_str!("../../kernels/flowhn.cuh")),
    ("fp8.cuh", include_str!("../../kernels/fp8.cuh")),
    ("fp8_rows.cuh", include_str!("../../kernels/fp8_rows.cuh")),
    ("fp8_tile.cuh", include_str!("../../kernels/fp8_tile.cuh")),
    ("norm.cuh", include_str!("../../kernels/norm.cuh")),
    ("ptx.cuh", include_str!("../../kernels/ptx.cuh")),
    ("rows.cuh", include_str!("../../kernels/rows.cuh")),
    ("smem.cuh", include_str!("../../kernels/smem.cuh")),
];

/// Machine code of one variant.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The cubin.
    pub cubin: Vec<u8>,
    /// What each entry takes of a multiprocessor.
    pub entries: Vec<EntryResources>,
}

/// What one entry takes of a multiprocessor, as the assembler reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryResources {
    /// The entry's name.
    pub entry: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Local memory of a thread, in bytes.
    pub stack_bytes: u32,
    /// Bytes that a thread spills, stores and loads together, with those of functions that the entry calls.
    pub spill_bytes: u32,
    /// Whether the assembler makes Hopper's asynchronous products wait for one another, for want of registers.
    pub waits_for_products: bool,
}

/// Compiles a source for an architecture such as `sm_90a`. No GPU is needed.
///
/// # Errors
/// [`Error::Kernel`] with the compiler's messages, or if NVRTC is not installed beside libtorch.
pub fn compile(source: &KernelSource, defines: Defines, arch: &str) -> Result<Compiled> {
    let program = Program::new(source)?;
    let log = program.compile(&options(defines, arch))?;
    Ok(Compiled { cubin: program.cubin()?, entries: resources(&log) })
}

/// The machine code of a variant, from the disk cache where it is there.
pub(super) fn cubin(source: &KernelSource, defines: Defines, arch: &str) -> Result<Vec<u8>> {
    let headers: String = HEADERS.iter().chain(source.headers).map(|(_, text)| *text).collect();
    let key = format!("{}\0{headers}\0{:?}\0{:?}", source.text, options(defines, arch), version()?);
    let file = cache::file(source.name, arch, &key);
    if let Some(cubin) = file.as_deref().and_then(cache::read) {
        return Ok(cubin);
    }
    let compiled = compile(source, defines, arch)?;
    if let Some(file) = file {
        cache::write(&file, &compiled.cubin);
    }
    Ok(compiled.cubin)
}

fn options(defines: Defines, arch: &str) -> Vec<String> {
    // With a cache of its own, beside ours, the compiler would say nothing of what it has assembled before.
    let fixed = [
        "--std=c++17",
        "-default-device",
        "--extra-device-vectorization",
        "--ptxas-options=-v",
        "-lineinfo",
        "--no-cache",
    ];
    let mut options = vec![format!("--gpu-architecture={arch}")];
    options.extend(fixed.map(str::to_owned));
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

/// Version of NVRTC.
fn version() -> Result<(i32, i32)> {
    load()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is loaded; both are places for one int.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|error| unnamed(error.to_string()))?;
    Ok((major, minor))
}

/// Loads NVRTC by its full path, once. Later lookups by name, those of cudarc and of NVRTC for its builtins, find what is loaded.
fn load() -> Result<()> {
    static OUTCOME: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    OUTCOME.get_or_init(try_load).clone().map_err(unnamed)
}

fn try_load() -> std::result::Result<(), String> {
    let mut tried = Vec::new();
    for folder in library_folders() {
        let (builtins, nvrtc) = (folder.join("libnvrtc-builtins.so.13.0"), folder.join("libnvrtc.so.13"));
        if !nvrtc.exists() {
            tried.push(folder.display().to_string());
            continue;
        }
        // Builtins of another minor version are found by NVRTC itself, from its own folder.
        for path in [builtins, nvrtc].iter().filter(|path| path.exists()) {
            // SAFETY: these are NVIDIA's libraries; their initialisers only set up the library itself.
            let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
            // Kept for the life of the process.
            std::mem::forget(library.map_err(|error| format!("{} does not load: {error}", path.display()))?);
        }
        return Ok(());
    }
    // SAFETY: only looks whether the dynamic linker finds the library by its name.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(format!(
            "libnvrtc.so.13 is not there: looked in {} and the linker's path; install a CUDA 13 build of PyTorch \
             (`cargo xtask setup` does), or the CUDA toolkit",
            tried.join(", ")
        )),
    }
}

/// Beside libtorch, where pip puts NVIDIA's libraries, then the toolkit.
fn library_folders() -> Vec<PathBuf> {
    let wheel = crate::torch_lib_dir().ok().and_then(|lib| lib.canonicalize().ok());
    let wheel = wheel.map(|lib| lib.join("../../nvidia/cu13/lib"));
    let toolkit = std::env::var("CUDA_HOME").unwrap_or_else(|_| "/usr/local/cuda".into());
    wheel.into_iter().chain([PathBuf::from(toolkit).join("lib64")]).collect()
}

fn unnamed(message: String) -> Error {
    Error::Kernel { kernel: "NVRTC".to_owned(), message }
}

/// A program of NVRTC, destroyed when dropped.
struct Program<'a> {
    handle: sys::nvrtcProgram,
    source: &'a KernelSource,
}

impl<'a> Program<'a> {
    fn new(source: &'a KernelSource) -> Result<Self> {
        load()?;
        let c_string = |text: &str| CString::new(text).map_err(|_| unnamed("a source contains a NUL byte".to_owned()));
        let (text, name) = (c_string(source.text)?, c_string(source.name)?);
        let (names, texts): (Vec<&str>, Vec<&str>) = HEADERS.iter().chain(source.headers).copied().unzip();
        let names = names.into_iter().map(c_string).collect::<Result<Vec<_>>>()?;
        let texts = texts.into_iter().map(c_string).collect::<Result<Vec<_>>>()?;
        let pointers = |strings: &[CString]| -> Vec<*const c_char> { strings.iter().map(|s| s.as_ptr()).collect() };
        let (name_ptrs, text_ptrs) = (pointers(&names), pointers(&texts));
        let mut handle = std::ptr::null_mut();
        // SAFETY: NVRTC copies the strings, which live to the end of this function; the arrays have the length given.
        unsafe {
            sys::nvrtcCreateProgram(
                &mut handle,
                text.as_ptr(),
                name.as_ptr(),
                names.len() as i32,
                text_ptrs.as_ptr(),
                name_ptrs.as_ptr(),
            )
        }
        .result()
        .map_err(|error| unnamed(error.to_string()))?;
        Ok(Self { handle, source })
    }

    /// Compiles and returns the log, which holds the assembler's report.
    fn compile(&self, options: &[String]) -> Result<String> {
        // SAFETY: the handle is that of a living program.
        let (outcome, log) = unsafe {
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            (result::compile_program(self.handle, &options), result::get_program_log(self.handle))
        };
        let log = log.unwrap_or_default();
        // SAFETY: NVRTC ends its log in NUL; an empty vector is not read.
        let log = if log.is_empty() { "".into() } else { unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy() };
        match outcome {
            Ok(()) => Ok(log.into_owned()),
            Err(error) => {
                let message = format!("does not compile with {options:?}: {error}\n{}", log.trim_end());
                Err(Error::Kernel { kernel: self.source.name.to_owned(), message })
            }
        }
    }

    fn cubin(&self) -> Result<Vec<u8>> {
        let fail = |error: result::NvrtcError| unnamed(error.to_string());
        let mut n_bytes = 0;
        // SAFETY: the handle is that of a compiled program; the buffer has the size that NVRTC asked for.
        unsafe {
            sys::nvrtcGetCUBINSize(self.handle, &mut n_bytes).result().map_err(fail)?;
            let mut cubin = vec![0u8; n_bytes];
            sys::nvrtcGetCUBIN(self.handle, cubin.as_mut_ptr().cast()).result().map_err(fail)?;
            Ok(cubin)
        }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used afterwards. A failure leaves a program behind and nothing else.
        let _ = unsafe { result::destroy_program(self.handle) };
    }
}

/// Reads the assembler's report.
fn resources(log: &str) -> Vec<EntryResources> {
    let mut entries: Vec<EntryResources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let entry = rest.split('\'').next().unwrap_or_default().to_owned();
            entries.push(EntryResources { entry, ..EntryResources::default() });
        }
        let Some(current) = entries.last_mut() else { continue };
        let before = |unit: &str| -> u32 {
            let number = line.split(unit).next().and_then(|text| text.split_whitespace().last());
            number.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        if line.contains("bytes stack frame") {
            // Functions that an entry calls are told of behind it, each for itself.
            current.stack_bytes = current.stack_bytes.max(before(" bytes stack frame"));
            current.spill_bytes += before(" bytes spill stores") + before(" bytes spill loads");
        }
        if line.contains("Used ") && line.contains(" registers") {
            current.registers = before(" registers");
            if line.contains(" bytes smem") {
                current.shared_bytes = before(" bytes smem");
            }
        }
    }
    for line in log.lines().filter(|line| line.contains("wgmma.mma_async instructions are serialized")) {
        for entry in &mut entries {
            entry.waits_for_products |= line.contains(&format!("'{}'", entry.entry));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::ARCHITECTURES;

    const SCALE: KernelSource = KernelSource {
        name: "scale.cu",
        text: r#"
#include "flowhn.cuh"
#include "one.cuh"
typedef DtypeOf<X_KIND>::type X;
extern "C" __global__ void scale(const X* x, X* y, int n, float factor) {
    __shared__ float unused[32];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unused[threadIdx.x % 32] = factor * ONE;
    __syncthreads();
    if (i < n) y[i] = from_f32<X>(to_f32(x[i]) * unused[0]);
}
"#,
        headers: &[("one.cuh", "#define ONE 1\n")],
    };

    #[test]
    fn kernels_compile_for_every_architecture_without_a_gpu() {
        for arch in ARCHITECTURES {
            for kind in [0, 1] {
                let compiled = compile(&SCALE, &[("X_KIND", kind)], arch).unwrap();
                assert!(compiled.cubin.starts_with(b"\x7fELF"));
                let [entry] = compiled.entries.as_slice() else { panic!("{:?}", compiled.entries) };
                assert_eq!((entry.entry.as_str(), entry.spill_bytes, entry.shared_bytes), ("scale", 0, 128));
                assert!((1..64).contains(&entry.registers), "{entry:?}");
            }
        }
    }

    #[test]
    fn the_compilers_message_names_file_and_line() {
        let broken = KernelSource { name: "broken.cu", text: "__global__ void f() {\n  nothing();\n}\n", headers: &[] };
        let message = compile(&broken, &[], "sm_90a").unwrap_err().to_string();
        assert!(message.contains("broken.cu(2)") && message.contains("nothing"), "{message}");
        let message = compile(&SCALE, &[("X_KIND", 0)], "sm_9").unwrap_err().to_string();
        assert!(message.contains("sm_9"), "{message}");
    }

    #[test]
    fn the_assemblers_report_is_read() {
        let log = "ptxas info    : Compiling entry function 'a' for 'sm_90a'\nptxas info    : Function properties for a\n\
                   ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
                   ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n\
                   ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
                   register resources for the wgmma pipeline in the function 'a'\n\
                   ptxas info    : Function properties for _Z6helperv\n\
                   ptxas         .     0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n";
        let want = EntryResources {
            entry: "a".into(),
            registers: 40,
            shared_bytes: 128,
            stack_bytes: 8,
            spill_bytes: 36,
            waits_for_products: true,
        };
        assert_eq!(resources(log), [want]);
    }
}
