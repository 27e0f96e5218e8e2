//! Models of Hugging Face's `transformers` as configurations of ours: what a `config.json` says, and back.
//!
//! | `model_type` | ours | where it is defined |
//! |---|---|---|
//! | `llama` | flow blocks, `attn_all`, rotary | Touvron et al., arXiv 2302.13971; `modeling_llama.py` |
//! | `mamba` | flow blocks, `ssm_all`, Mamba-1, no MLP | Gu and Dao, arXiv 2312.00752; `modeling_mamba.py` |
//! | `mamba2` | flow blocks, `ssm_all`, Mamba-2, no MLP | Dao and Gu, arXiv 2405.21060; `modeling_mamba2.py` |
//! | `jamba` | flow blocks, `attn_all` and `ssm_all` by turns, Mamba-1 with inner norms, no positions | Lieber et al., arXiv 2403.19887; `modeling_jamba.py` |
//! | `falcon_h1` | flow blocks, `no_split`, one norm before both branches, rotary, Mamba-2, the sum of the two | Zuo et al., arXiv 2507.22448; `modeling_falcon_h1.py` |
//!
//! File names are those of transformers 4.57.

mod falcon_h1;
mod keys;
mod read;
mod write;

pub(crate) use falcon_h1::FINAL_NORM;
pub use read::{HfModel, max_position, read_config};
pub use write::{warnings, write_config};
