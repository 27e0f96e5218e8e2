//! The command line as its users meet it: whole processes on small runs.
//!
//! All tests are one program, so that the corpus, the vocabulary and the uninterrupted run are made once.

mod bench;
mod contract;
mod interrupted;
mod refused;
mod rows;
mod selftest;
mod speeds;
mod tasks;
mod tiny;
mod trained;
