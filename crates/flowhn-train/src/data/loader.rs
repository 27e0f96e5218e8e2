use std::fmt;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use super::{Batch, Dataset, DocumentRef, Error, Result, Row, Sampler, SamplerState, Windows};

/// How training batches are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Targets of a row.
    pub seq_len: usize,
    /// Rows of a batch.
    pub batch_size: usize,
    /// The seed of the shuffles.
    pub seed: u64,
    /// Batches that a thread prepares ahead; 0 makes each batch when it is asked for.
    pub prefetch: usize,
}

/// An endless, reproducible sequence of training batches.
///
/// Each epoch draws every window once, in its own order; a batch may hold the end of one epoch and the start of the
/// next, so all batches have the same size. Reading ahead changes neither order nor state.
pub struct TrainLoader {
    windows: Windows,
    feed: Feed,
    state: SamplerState,
}

enum Feed {
    Direct(Producer),
    Ahead(Ahead),
}

/// The documents behind a row of a batch, for the report of a step that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowProvenance {
    /// Epoch, window and position.
    pub row: Row,
    /// The documents with a token in the row, its last target included.
    pub documents: Vec<DocumentRef>,
}

impl fmt::Display for RowProvenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}, window {} (token {}):", self.row.epoch, self.row.window, self.row.start)?;
        self.documents.iter().try_for_each(|document| write!(f, " {document}"))
    }
}

impl fmt::Debug for TrainLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ahead = matches!(self.feed, Feed::Ahead(_));
        f.debug_struct("TrainLoader").field("state", &self.state).field("reads_ahead", &ahead).finish_non_exhaustive()
    }
}

impl TrainLoader {
    /// Starts at the first batch.
    ///
    /// # Errors
    /// [`Error::Setting`] for a size of 0, [`Error::TooShort`].
    pub fn new(dataset: &Dataset, options: &LoaderOptions) -> Result<Self> {
        let windows = Windows::new(dataset, options.seq_len)?;
        let sampler = Sampler::new(&windows, options.seed);
        Self::with_sampler(windows, sampler, options)
    }

    /// Goes on after the batch whose state was stored.
    ///
    /// # Errors
    /// As [`TrainLoader::new`], and [`Error::StateMismatch`] where the data, `seq_len` or the seed are not those of the
    /// state. Another batch size is fine: the windows come in the same order.
    pub fn resume(dataset: &Dataset, options: &LoaderOptions, state: &SamplerState) -> Result<Self> {
        let windows = Windows::new(dataset, options.seq_len)?;
        let sampler = Sampler::resume(&windows, options.seed, state)?;
        Self::with_sampler(windows, sampler, options)
    }

    fn with_sampler(windows: Windows, sampler: Sampler, options: &LoaderOptions) -> Result<Self> {
        if options.batch_size == 0 {
            return Err(Error::Setting { name: "batch_size", value: "0".to_owned(), expected: "at least 1" });
        }
        let state = sampler.state().clone();
        let producer = Producer { windows: windows.clone(), sampler, batch_size: options.batch_size };
        let feed = match options.prefetch {
            0 => Feed::Direct(producer),
            n => Feed::Ahead(Ahead::start(producer, n)?),
        };
        Ok(TrainLoader { windows, feed, state })
    }

    /// The next batch.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] where a shard was changed under us; [`Error::Prefetch`] once the reading thread is
    /// gone, which it is after its first error.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let (batch, state) = match &mut self.feed {
            Feed::Direct(producer) => producer.produce()?,
            Feed::Ahead(ahead) => ahead.receive()?,
        };
        self.state = state;
        Ok(batch)
    }

    /// The state after the last batch that [`next_batch`](TrainLoader::next_batch) returned, whatever was read ahead.
    pub fn state(&self) -> &SamplerState {
        &self.state
    }

    /// The windows that batches are drawn from.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// The documents behind each row of a batch.
    pub fn provenance(&self, batch: &Batch) -> Vec<RowProvenance> {
        let span = batch.seq_len as u64 + 1;
        let documents = |row: &Row| self.windows.dataset().documents(row.start..row.start + span);
        batch.rows.iter().map(|row| RowProvenance { row: *row, documents: documents(row) }).collect()
    }
}

struct Producer {
    windows: Windows,
    sampler: Sampler,
    batch_size: usize,
}

impl Producer {
    fn produce(&mut self) -> Result<(Batch, SamplerState)> {
        let drawn: Vec<_> = (0..self.batch_size).map(|_| self.sampler.draw()).collect();
        Ok((self.windows.batch(&drawn)?, self.sampler.state().clone()))
    }
}

/// A thread that makes batches until nobody takes them any more.
struct Ahead {
    /// `None` only while dropping.
    receiver: Option<Receiver<Result<(Batch, SamplerState)>>>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    fn start(mut producer: Producer, n_ahead: usize) -> Result<Self> {
        let (sender, receiver) = sync_channel(n_ahead);
        let run = move || {
            loop {
                let made = producer.produce();
                let failed = made.is_err();
                // Sending fails when the loader is gone, and then there is nobody left to tell.
                if sender.send(made).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("flowhn-data".to_owned())
            .spawn(run)
            .map_err(|e| Error::Prefetch { message: format!("it could not be started: {e}") })?;
        Ok(Ahead { receiver: Some(receiver), thread: Some(thread) })
    }

    fn receive(&mut self) -> Result<(Batch, SamplerState)> {
        match self.receiver.as_ref().map(Receiver::recv) {
            Some(Ok(made)) => made,
            _ => Err(Error::Prefetch { message: self.last_words() }),
        }
    }

    fn last_words(&mut self) -> String {
        let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) else {
            return "an earlier error ended it".to_owned();
        };
        match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
            (Some(text), _) => format!("it panicked: {text}"),
            (_, Some(text)) => format!("it panicked: {text}"),
            _ => "it panicked".to_owned(),
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Closing the channel wakes a thread that waits for room in it.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
