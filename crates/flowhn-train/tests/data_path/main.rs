//! The data path through its public interface: good input, bad input, damage, concurrency, resumption.

mod cache;
mod fixture;
mod loader;
mod pack;
mod read;
mod shard;
mod tokenizer;
mod valid;
