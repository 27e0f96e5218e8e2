//! Errors: `catch`, argument checks, mapped files.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flowhn_torch::{Error, MappedFile, Result, catch, check};
use tch::{Device, Kind, TchError, Tensor};

fn add_misfits() -> Tensor {
    Tensor::from_slice(&[1f32, 2.]) + Tensor::from_slice(&[1f32, 2., 3.])
}

#[test]
fn a_panic_of_tch_becomes_the_sentence_of_libtorch() {
    let Err(Error::Torch(message)) = catch(|| Ok(add_misfits())) else { panic!("another error") };
    assert_eq!(message, "The size of tensor a (2) must match the size of tensor b (3) at non-singleton dimension 0");
    let Err(Error::Torch(message)) = catch(|| Ok(Tensor::from_slice(&[1f32]).size3().unwrap())) else {
        panic!("another error")
    };
    assert_eq!(message, "expected three dims, got [1]");
    // The fallible form of the same call says the same.
    let failed: Result<Tensor> =
        Tensor::from_slice(&[1f32, 2.]).f_add(&Tensor::from_slice(&[1f32, 2., 3.])).map_err(Error::from);
    assert!(failed.unwrap_err().to_string().starts_with("libtorch: The size of tensor a (2) must match"));
    assert_eq!(Error::from(TchError::Kind("x".into())).to_string(), "libtorch: tensor kind error: x");
}

#[test]
fn other_panics_and_errors_keep_their_words() {
    let text = |outcome: Result<()>| outcome.unwrap_err().to_string();
    assert_eq!(text(catch(|| panic!("static"))), "panic: static");
    assert_eq!(text(catch(|| panic!("{}", 1 + 1))), "panic: 2");
    assert_eq!(text(catch(|| panic::panic_any(3u8))), "panic: a panic without a message");
    assert_eq!(text(catch(|| Err(Error::invalid("op", "wrong")))), "op: wrong");
    assert_eq!(catch(|| Ok(5)).unwrap(), 5);
}

#[test]
fn catches_nest() {
    let outer = catch(|| {
        let inner: Result<()> = catch(|| panic!("inner"));
        assert_eq!(inner.unwrap_err().to_string(), "panic: inner");
        let failed: Result<()> = catch(|| panic!("outer"));
        failed
    });
    assert_eq!(outer.unwrap_err().to_string(), "panic: outer");
    let rethrown: Result<()> = catch(|| {
        let _never = catch(|| Ok(add_misfits())).unwrap();
        Ok(())
    });
    assert!(rethrown.is_err());
}

#[test]
fn a_caught_panic_leaves_gradient_recording_as_it_was() {
    let recorded = || (Tensor::from_slice(&[1f32]).set_requires_grad(true) * 2.).requires_grad();
    assert!(catch(|| tch::no_grad(|| Ok(add_misfits()))).is_err());
    assert!(recorded());
    tch::no_grad(|| {
        assert!(catch(|| tch::with_grad(|| Ok(add_misfits()))).is_err());
        assert!(!recorded());
    });
    // Only a panic puts it back: what `f` does on purpose stays.
    let guard = catch(|| Ok(tch::no_grad_guard())).unwrap();
    assert!(!recorded());
    drop(guard);
    assert!(recorded());
}

#[test]
fn caught_panics_are_silent_and_others_reach_the_hook() {
    // The hook belongs to the process, so only the words of this test count.
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ear = Arc::clone(&heard);
    let n_calls = Arc::new(AtomicUsize::new(0));
    let calls = Arc::clone(&n_calls);
    // `catch` puts its hook in front of the one it finds when it is first used, which another test may have done already; a
    // process of its own starts clean.
    if std::env::var_os("FLOWHN_TEST_HOOK").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "caught_panics_are_silent_and_others_reach_the_hook", "--test-threads=1"])
            .env("FLOWHN_TEST_HOOK", "1")
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
        return;
    }
    panic::set_hook(Box::new(move |info| {
        calls.fetch_add(1, Ordering::SeqCst);
        ear.lock().unwrap().push(info.payload().downcast_ref::<&str>().copied().unwrap_or("?").to_owned());
    }));
    let silent: Result<()> = catch(|| panic!("silent"));
    assert!(silent.is_err() && n_calls.load(Ordering::SeqCst) == 0);
    assert!(panic::catch_unwind(|| panic!("loud")).is_err());
    // Silence belongs to the thread that catches.
    let elsewhere: Result<bool> = catch(|| Ok(std::thread::spawn(|| panic!("elsewhere")).join().is_err()));
    assert!(elsewhere.unwrap());
    // While a thread unwinds, `catch` still works.
    struct CatchInDrop;
    impl Drop for CatchInDrop {
        fn drop(&mut self) {
            let quiet: Result<()> = catch(|| Err(Error::invalid("drop", "quiet")));
            assert!(quiet.is_err());
        }
    }
    let unwound = panic::catch_unwind(AssertUnwindSafe(|| {
        let _guard = CatchInDrop;
        panic!("unwinding");
    }));
    assert!(unwound.is_err());
    assert_eq!(*heard.lock().unwrap(), ["loud", "elsewhere", "unwinding"]);
}

#[test]
fn checks_name_the_argument_and_what_it_should_be() {
    let x = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    let text = |outcome: Result<()>| outcome.unwrap_err().to_string();
    check::shape("op", "x", &x, &[2, 3]).unwrap();
    assert_eq!(text(check::shape("op", "x", &x, &[3, 2])), "op: x has shape [2, 3], expected [3, 2]");
    assert_eq!(check::dims::<2>("op", "x", &x, "[batch, d]").unwrap(), [2, 3]);
    let wrong = check::dims::<3>("op", "x", &x, "[batch, seq_len, d]").map(|_| ());
    assert_eq!(text(wrong), "op: x has shape [2, 3], expected [batch, seq_len, d]");
    check::kind("op", "x", &x, &[Kind::BFloat16, Kind::Float]).unwrap();
    assert_eq!(text(check::kind("op", "x", &x, &[Kind::Int, Kind::Int64])), "op: x is Float, expected Int or Int64");
    check::device("op", "x", &x, Device::Cpu).unwrap();
    let wrong = check::device("op", "x", &x, Device::Cuda(1));
    assert_eq!(text(wrong), "op: x is on Cpu, expected Cuda(1), where the other arguments are");
    // An undefined tensor is an error like any other.
    let undefined = Tensor::new();
    assert!(text(check::kind("op", "x", &undefined, &[Kind::Float])).contains("undefined"));
    assert!(text(check::device("op", "x", &undefined, Device::Cpu)).contains("undefined"));
    assert!(check::shape("op", "x", &undefined, &[2]).is_err());
}

#[test]
fn files_are_mapped_or_named_in_the_error() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    assert_eq!(&*MappedFile::open(&write("full", b"flow")).unwrap(), b"flow");
    assert_eq!(&*MappedFile::open(&write("empty", b"")).unwrap(), b"");
    let mapped = MappedFile::open(&write("gone", b"still there")).unwrap();
    std::fs::remove_file(folder.path().join("gone")).unwrap();
    assert_eq!(&mapped[6..], b"there");
    for missing in [folder.path().join("missing"), folder.path().to_owned()] {
        let error = MappedFile::open(&missing).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == missing), "{error}");
        assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
    }
}
