//! Nothing leaks: every function is dropped once, with the tensors it saved, whatever became of its graph.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use common::{custom, leaf, values};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, catch};
use tch::{Device, Kind, Tensor};

const N_GRAPHS: usize = 10_000;

/// What becomes of a graph.
#[derive(Clone, Copy, Debug)]
enum Fate {
    ForwardFails,
    ForwardPanics,
    BackwardFails,
    BackwardPanics,
    BackwardMiscounts,
    Backward,
    BackwardTwice,
    SecondOrder,
    /// No backward ever runs.
    Abandoned,
}

/// Doubles its input, and saves all kinds of tensors on the way.
struct Counted {
    fate: Fate,
    n_alive: Arc<AtomicUsize>,
    n_drops: Arc<AtomicUsize>,
}

impl Counted {
    fn new(fate: Fate, n_alive: &Arc<AtomicUsize>, n_drops: &Arc<AtomicUsize>) -> Self {
        n_alive.fetch_add(1, Ordering::SeqCst);
        Self { fate, n_alive: Arc::clone(n_alive), n_drops: Arc::clone(n_drops) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.n_alive.fetch_sub(1, Ordering::SeqCst);
        self.n_drops.fetch_add(1, Ordering::SeqCst);
    }
}

impl Function for Counted {
    const NAME: &'static str = "counted";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let x = inputs[0];
        let out = x * 2.;
        let intermediate = x + 1.;
        for tensor in [x, &out, &intermediate, &out.narrow(0, 0, 1), &intermediate.narrow(0, 0, 1), &x.narrow(0, 0, 1)]
        {
            ctx.save(tensor);
        }
        match self.fate {
            Fate::ForwardFails => Err(Error::invalid(Self::NAME, "forward fails")),
            Fate::ForwardPanics => panic!("forward panics"),
            _ => Ok(vec![out.shallow_clone(), out.view([-1, 1])]),
        }
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        assert_eq!(ctx.saved().len(), 6);
        let grad = (&grads[0] + grads[1].view_as(&grads[0])) * 2.;
        match self.fate {
            Fate::BackwardFails => Err(Error::invalid(Self::NAME, "backward fails")),
            Fate::BackwardPanics => panic!("backward panics"),
            Fate::BackwardMiscounts => Ok(vec![Some(grad), Some(grads[0].copy())]),
            _ => Ok(vec![Some(grad)]),
        }
    }
}

/// Runs one graph of two chained functions to its fate.
fn live(fate: Fate, x: &Tensor, make: &dyn Fn(Fate) -> Counted) {
    let outcome = apply(make(fate), &[x]).and_then(|first| apply(make(fate), &[&first[0]]));
    let outputs = match fate {
        Fate::ForwardFails | Fate::ForwardPanics => return assert!(outcome.is_err()),
        _ => outcome.unwrap(),
    };
    let loss = (&outputs[0] * &outputs[1].view_as(&outputs[0])).sum(Kind::Float);
    let run = |keep, create| Tensor::f_run_backward(&[&loss], &[x], keep, create);
    match fate {
        Fate::Abandoned => {}
        Fate::Backward => drop(run(false, false).unwrap()),
        Fate::BackwardTwice => {
            run(true, false).unwrap();
            run(false, false).unwrap();
        }
        Fate::SecondOrder => {
            let grad = run(true, true).unwrap().remove(0);
            Tensor::f_run_backward(&[grad.sum(Kind::Float)], &[x], false, false).unwrap_err();
        }
        _ => drop(run(false, false).unwrap_err()),
    }
}

/// Bytes of this process in memory.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux tells a process its size");
    let n_pages: usize = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("the second number");
    n_pages * 4096
}

#[test]
fn ten_thousand_graphs_leave_nothing_behind() {
    let rarer = [
        Fate::ForwardFails,
        Fate::ForwardPanics,
        Fate::BackwardFails,
        Fate::BackwardPanics,
        Fate::BackwardMiscounts,
        Fate::BackwardTwice,
        Fate::SecondOrder,
    ];
    let (n_alive, n_drops, n_made) = (Default::default(), Default::default(), AtomicUsize::new(0));
    let make = |fate| {
        n_made.fetch_add(1, Ordering::SeqCst);
        Counted::new(fate, &n_alive, &n_drops)
    };
    let x = Tensor::ones([8 << 10], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    // Half of the graphs never see a backward; every twentieth comes to an unusual end.
    let fate = |i: usize| match i % 20 {
        19 => rarer[i / 20 % rarer.len()],
        k if k % 2 == 0 => Fate::Abandoned,
        _ => Fate::Backward,
    };
    for i in 0..200 {
        live(fate(i), &x, &make);
    }
    let before = resident_bytes();
    for i in 0..N_GRAPHS {
        live(fate(i), &x, &make);
        assert_eq!(n_alive.load(Ordering::SeqCst), 0, "after graph {i}, {:?}", fate(i));
    }
    assert_eq!(n_drops.load(Ordering::SeqCst), n_made.load(Ordering::SeqCst));
    // A graph holds 32 KiB several times over; together they would be more than a gigabyte.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "the process grew by {} MiB", grown >> 20);
}

#[test]
fn a_function_goes_with_the_release_of_its_graph_not_later() {
    let (n_alive, n_drops) = Default::default();
    let x = leaf(&[1., 2.]);
    let y = apply(Counted::new(Fate::Backward, &n_alive, &n_drops), &[&x]).unwrap().remove(0);
    assert_eq!(n_alive.load(Ordering::SeqCst), 1);
    y.sum(Kind::Double).f_backward().unwrap();
    assert_eq!(n_alive.load(Ordering::SeqCst), 0, "the backward released the graph");
    assert!(y.requires_grad());
    let unrecorded = apply(Counted::new(Fate::Backward, &n_alive, &n_drops), &[&x.detach()]).unwrap();
    assert_eq!(n_alive.load(Ordering::SeqCst), 0, "nothing was recorded");
    assert!(!unrecorded[0].requires_grad());
    // Refused after the forward: a mark too many.
    let marked = custom(
        |ctx, x| {
            ctx.mark_non_differentiable(3);
            Ok(vec![x[0] * 1.])
        },
        {
            let counted = Counted::new(Fate::Backward, &n_alive, &n_drops);
            move |ctx, g| counted.backward(ctx, g)
        },
    );
    assert!(apply(marked, &[&x]).is_err());
    assert_eq!((n_alive.load(Ordering::SeqCst), n_drops.load(Ordering::SeqCst)), (0, 3));
}

#[test]
fn threads_build_and_run_graphs_at_once() {
    let (n_alive, n_drops) = Default::default();
    std::thread::scope(|scope| {
        for k in 1..=4 {
            let (n_alive, n_drops) = (&n_alive, &n_drops);
            scope.spawn(move || {
                for i in 0..200 {
                    let x = leaf(&[f64::from(k), 2.]);
                    let fate = if i % 3 == 0 { Fate::BackwardPanics } else { Fate::Backward };
                    let y = apply(Counted::new(fate, n_alive, n_drops), &[&x]).unwrap().remove(0);
                    let outcome = (&y * &y).sum(Kind::Double).f_backward();
                    assert_eq!(outcome.is_err(), i % 3 == 0);
                    if outcome.is_ok() {
                        assert_eq!(values(&x.grad()), [f64::from(8 * k), 16.]);
                    }
                }
            });
        }
    });
    assert_eq!((n_alive.load(Ordering::SeqCst), n_drops.load(Ordering::SeqCst)), (0, 800));
}

#[test]
fn a_graph_built_here_may_be_run_and_released_elsewhere() {
    let (n_alive, n_drops) = Default::default();
    let x = leaf(&[1., 2.]);
    let y = apply(Counted::new(Fate::Backward, &n_alive, &n_drops), &[&x]).unwrap().remove(0);
    let loss = y.sum(Kind::Double);
    std::thread::spawn(move || loss.f_backward().unwrap()).join().unwrap();
    assert_eq!(values(&x.grad()), [2., 2.]);
    drop(y);
    assert_eq!((n_alive.load(Ordering::SeqCst), n_drops.load(Ordering::SeqCst)), (0, 1));
}

#[test]
fn one_node_serves_several_threads_and_a_release_waits_for_the_call_under_way() {
    let x = leaf(&[1., 2.]);
    // Both backwards go through the node of `slow`; the first one to finish releases it.
    for _ in 0..20 {
        let running = Arc::new(Mutex::new(0));
        let (n_alive, n_drops) = Default::default();
        let counted = Counted::new(Fate::Backward, &n_alive, &n_drops);
        let slow = custom(
            |_, x| Ok(vec![x[0] * 2.]),
            move |_, g| {
                let mut guard = running.try_lock().expect("one call at a time");
                *guard += 1;
                std::thread::sleep(std::time::Duration::from_millis(2));
                assert_eq!(counted.n_drops.load(Ordering::SeqCst), 0, "released while running");
                Ok(vec![Some(&g[0] * 2.)])
            },
        );
        let y = apply(slow, &[&x]).unwrap().remove(0);
        let barrier = Arc::new(Barrier::new(2));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (loss, barrier) = (y.sum(Kind::Double), Arc::clone(&barrier));
                std::thread::spawn(move || {
                    barrier.wait();
                    loss.f_backward().map_err(|error| error.to_string())
                })
            })
            .collect();
        let outcomes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(outcomes.iter().any(|outcome| outcome.is_ok()), "{outcomes:?}");
        for error in outcomes.into_iter().filter_map(std::result::Result::err) {
            assert!(error.contains("second time"), "{error}");
        }
        drop(y);
        assert_eq!(n_drops.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn a_caught_panic_leaves_no_tensor_behind() {
    let before = resident_bytes();
    for _ in 0..500 {
        let outcome = catch(|| {
            let big = Tensor::ones([64 << 10], (Kind::Float, Device::Cpu));
            Ok(&big + Tensor::ones([3], (Kind::Float, Device::Cpu)))
        });
        assert!(outcome.is_err());
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "the process grew by {} MiB", grown >> 20);
}
