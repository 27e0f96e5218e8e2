use std::path::Path;

/// Receives what the data path is doing; a closure over `&Event` is one, and `&()` ignores everything.
///
/// Events come from one thread, in order, a few times a second at most.
pub trait Progress: Sync {
    /// Called for each event.
    fn report(&self, event: &Event<'_>);
}

impl<F: Fn(&Event<'_>) + Sync> Progress for F {
    fn report(&self, event: &Event<'_>) {
        self(event);
    }
}

impl Progress for () {
    fn report(&self, _event: &Event<'_>) {}
}

/// One step of making token shards out of text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The shard of a source was in the cache and is sound.
    Cached {
        /// The text file.
        source: &'a Path,
        /// Its shard.
        shard: &'a Path,
        /// Tokens in it.
        n_tokens: u64,
    },
    /// Another process is building this shard; we wait for it.
    Waiting {
        /// The text file.
        source: &'a Path,
    },
    /// The cached shard is unusable and is built again.
    Rebuilding {
        /// The text file.
        source: &'a Path,
        /// The shard that is replaced.
        shard: &'a Path,
        /// What was wrong, a sentence for the user.
        reason: String,
    },
    /// Tokenisation goes on.
    Tokenizing {
        /// The text file.
        source: &'a Path,
        /// Bytes of the source read so far (compressed bytes where it is compressed).
        bytes_read: u64,
        /// Bytes of the source.
        bytes_total: u64,
        /// Documents written.
        n_documents: u64,
        /// Tokens written.
        n_tokens: u64,
    },
    /// A shard was built and put in its place.
    Built {
        /// The text file.
        source: &'a Path,
        /// Its shard.
        shard: &'a Path,
        /// Documents in it.
        n_documents: u64,
        /// Documents left out because they held only white space.
        n_empty: u64,
        /// Tokens in it.
        n_tokens: u64,
        /// UTF-8 bytes of its text.
        text_bytes: u64,
    },
}
