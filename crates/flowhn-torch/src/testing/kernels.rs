//! Compiling kernels in tests that have no GPU.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;
use crate::kernel::{ARCHITECTURES, Defines, EntryResources, KernelSource, KernelSpec, compile};

/// The architecture that variants are tuned for.
const TUNED_ARCH: &str = "sm_90a";

/// One entry of one variant, compiled for one architecture.
#[derive(Clone, Debug)]
pub struct CompiledEntry {
    /// The architecture.
    pub arch: &'static str,
    /// The name of the source.
    pub source: &'static str,
    /// The macros of the variant.
    pub defines: Defines<'static>,
    /// What it takes of a multiprocessor.
    pub resources: EntryResources,
}

impl CompiledEntry {
    /// Whether this is the entry that `words` begins with, of a variant with the macros that follow: `"scan X_KIND=1 WARPS=4"`.
    fn is(&self, words: &str) -> bool {
        let mut words = words.split_whitespace();
        let macros: Vec<String> = self.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        words.next() == Some(self.resources.entry.as_str()) && words.all(|word| macros.iter().any(|have| have == word))
    }
}

impl fmt::Display for CompiledEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { arch, source, defines, resources } = self;
        let EntryResources { entry, registers, shared_bytes, spill_bytes, .. } = resources;
        write!(f, "{arch} {source}/{entry}")?;
        defines.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))?;
        write!(f, ": {registers} registers, {shared_bytes} bytes shared, {spill_bytes} bytes spilled")?;
        if resources.waits_for_products { f.write_str(", products one after the other") } else { Ok(()) }
    }
}

/// Compiles every variant of every kernel for the architecture that they are tuned for, and the first and the last variant of each for
/// the others, on all cores.
///
/// # Errors
/// [`crate::Error::Kernel`] with the compiler's messages.
pub fn compile_all(kernels: &[KernelSpec]) -> Result<Vec<CompiledEntry>> {
    type Job = (&'static KernelSource, Defines<'static>, &'static str);
    let mut jobs: Vec<Job> = Vec::new();
    for spec in kernels {
        for (idx, variant) in spec.variants.iter().enumerate() {
            let is_end = idx == 0 || idx + 1 == spec.variants.len();
            let archs = ARCHITECTURES.into_iter().filter(|arch| is_end || *arch == TUNED_ARCH);
            jobs.extend(archs.map(|arch| (spec.source, *variant, arch)));
        }
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let work = || {
        while let Some((source, defines, arch)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            let compiled = compile(source, defines, arch);
            let entries = compiled.map(|compiled| compiled.entries.into_iter());
            let named = entries.map(|entries| {
                entries.map(|resources| CompiledEntry { arch, source: source.name, defines, resources }).collect()
            });
            done.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(named);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let done: Vec<Result<Vec<CompiledEntry>>> = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    Ok(done.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// Compiles everything, as [`compile_all`], and sees that on the architecture it is tuned for no tuned variant spills registers or waits
/// for each asynchronous product.
/// `tuned` names entries with macros, `"scan X_KIND=1"`; each must be there.
///
/// # Panics
/// If a variant does not compile, a tuned one spills, waits, or is not there; the message holds all of them.
#[track_caller]
pub fn check_kernels(kernels: &[KernelSpec], tuned: &[&str]) {
    let entries = compile_all(kernels).unwrap_or_else(|error| panic!("{error}"));
    let mut findings = Vec::new();
    for words in tuned {
        let mut found = entries.iter().filter(|entry| entry.arch == TUNED_ARCH && entry.is(words)).peekable();
        if found.peek().is_none() {
            findings.push(format!("there is no `{words}`"));
        }
        let is_slow = |entry: &&CompiledEntry| entry.resources.spill_bytes > 0 || entry.resources.waits_for_products;
        findings.extend(found.filter(is_slow).map(ToString::to_string));
    }
    assert!(
        findings.is_empty(),
        "tuned kernels must be there and must neither spill nor wait for products:\n{}",
        findings.join("\n")
    );
}
