//! Bytes that a block moves: where norms and elementwise work count.
//!
//! Each operation reads its inputs and writes its outputs once; weights are read once. Scores,
//! probabilities and the scan's states stay on the chip. It is the traffic of one forward pass in
//! which matrix products, norms, convolution, scan, attention, activation and residual additions
//! are an operation each.

use serde::{Deserialize, Serialize};

use crate::shape::product;
use crate::{AttnShape, BlockForm, BlockPlan, BlockShape, Branch, Bridge, GateNorm, Join, MlpShape, Sharing, SsmShape};

/// The element in which activations and weights are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// 4 bytes.
    #[default]
    Fp32,
    /// 2 bytes.
    Bf16,
}

impl Element {
    /// Bytes of an element.
    pub fn size_bytes(self) -> u64 {
        match self {
            Element::Fp32 => 4,
            Element::Bf16 => 2,
        }
    }
}

/// Bytes moved by the parts of a block in one forward pass over one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockBytes {
    /// Attention, in a released block with its MLP.
    pub attn: u64,
    /// The SSM, likewise.
    pub ssm: u64,
    /// Gather, merge, joining matrices and residual.
    pub fuse: u64,
    /// The shared MLP of a flow block.
    pub mlp: u64,
    /// The sum.
    pub total: u64,
}

impl BlockShape {
    /// Bytes moved in one forward pass over one sequence routed by `plan`. A branch without tokens
    /// moves nothing, not even its weights.
    pub fn bytes(&self, sharing: Sharing, plan: &BlockPlan, element: Element) -> BlockBytes {
        let seq_len = plan.seq_len();
        let n_attn = plan.tokens(Branch::Attn);
        let n_ssm = plan.tokens(Branch::Ssm);
        let params = self.params(sharing);
        let size = element.size_bytes();
        let released = self.form == BlockForm::Released;
        // The released branches add their own residuals: two reads and a write for the mixer.
        let own = |n: usize| {
            if released { 3 * product(&[n, self.d_model]) + self.mlp.activations(self.d_model, n) } else { 0 }
        };
        let branch = |n: usize, params: u64, activations: u64| match n {
            0 => 0,
            _ => size * (params + activations + own(n)),
        };
        let n_kv = if self.attn.bridge == Bridge::Kv { seq_len } else { n_attn };
        let attn = self.attn.activations(self.d_model, n_attn, n_kv);
        let ssm = self.ssm.activations(self.d_model, n_ssm) + self.own_gate(n_ssm) - self.shared_norm(sharing, n_ssm);
        let attn = branch(n_attn, params.attn, attn);
        let ssm = branch(n_ssm, params.ssm, ssm);
        let fuse = size * (params.fuse + self.fuse_activations(sharing, seq_len));
        let mlp = match self.form {
            BlockForm::Released => 0,
            BlockForm::Flow(_) => size * (params.mlp + self.mlp.activations(self.d_model, seq_len)),
        };
        BlockBytes { attn, ssm, fuse, mlp, total: attn + ssm + fuse + mlp }
    }

    /// What a norm of its own before the gate reads and writes: elsewhere gate and norm are one operation.
    fn own_gate(&self, n_ssm: usize) -> u64 {
        match (self.ssm, self.options.gate_norm) {
            (SsmShape::Mamba2 { d_inner, .. }, GateNorm::BeforeGate) => product(&[2, n_ssm, d_inner]),
            _ => 0,
        }
    }

    /// What the state-space branch's norm reads and writes, where attention's on the same tokens serves both.
    fn shared_norm(&self, sharing: Sharing, n_ssm: usize) -> u64 {
        let served = sharing == Sharing::Parallel && self.shares_norm(sharing);
        if served { product(&[2, n_ssm, self.d_model]) } else { 0 }
    }

    fn fuse_activations(&self, sharing: Sharing, seq_len: usize) -> u64 {
        let fuse = self.fuse(sharing);
        // In units of d_model elements a token. A split gathers what each branch reads and merges
        // what it wrote; a sum of two reads both and writes one.
        let routed = match (sharing, fuse.join) {
            (Sharing::Split, _) => 4,
            (Sharing::Parallel, Join::Plain | Join::Gates { .. }) => 3,
            (Sharing::Parallel | Sharing::AttnOnly | Sharing::SsmOnly, _) => 0,
        };
        let joined = match fuse.join {
            Join::Plain => 0,
            Join::Proj { n_inputs } => n_inputs + 1,
            // The matrix reads and writes; the product reads two and writes one.
            Join::Gates { n_passed } => 5 * n_passed,
        };
        // The residual; then norm, projection and residual of the released block.
        let added = if fuse.final_proj { 3 + 2 + 2 + 3 } else { 3 };
        product(&[seq_len, self.d_model, routed + joined + added])
    }
}

impl AttnShape {
    /// Elements read and written: norm, projections, attention.
    fn activations(&self, d_model: usize, n_attn: usize, n_kv: usize) -> u64 {
        let (d_q, d_kv) = (self.d_q(), self.d_kv());
        // Queries: q projection, attention's read and write, o projection. Keys and values:
        // norm, one read of the input, the projections' writes, attention's reads.
        product(&[n_attn, 2 * d_model + 4 * d_q]) + product(&[n_kv, 3 * d_model + 4 * d_kv])
    }
}

impl SsmShape {
    /// Elements read and written: norm, projections, convolution, scan and what surrounds it.
    fn activations(&self, d_model: usize, n_ssm: usize) -> u64 {
        let matrices: usize = self.matrices(d_model).iter().map(|&(k, n)| k + n).sum();
        let around = match *self {
            SsmShape::Mamba1 { d_inner, d_state, dt_rank, inner_norms, .. } => {
                let norms = if inner_norms { 2 * (dt_rank + 2 * d_state) } else { 0 };
                // The scan reads u, dt, z, B and C and writes y, gated.
                norms + 4 * d_inner + 2 * d_state
            }
            SsmShape::Mamba2 { d_inner, d_state, d_head, n_groups, .. } => {
                // The scan reads x, dt, B and C and writes y; the gated norm reads y and z.
                2 * d_inner + d_inner / d_head.max(1) + 2 * n_groups * d_state + 3 * d_inner
            }
        };
        product(&[n_ssm, 2 * d_model + matrices + 2 * self.conv_channels() + around])
    }
}

impl MlpShape {
    /// Elements read and written: norm, gate and up, SwiGLU, down, residual.
    fn activations(&self, d_model: usize, n_tokens: usize) -> u64 {
        match self.d_ff {
            0 => 0,
            d_ff => product(&[n_tokens, 7 * d_model + 6 * d_ff]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::{mamba2, released_135m};
    use crate::{Fusion, Owner};

    #[test]
    fn traffic_is_weights_once_and_activations_by_the_token() {
        let block = released_135m();
        let bytes = |n| {
            let plan = BlockPlan::from_runs([(n, Owner::Ssm), (n, Owner::Attn)]).unwrap();
            block.bytes(Sharing::Split, &plan, Element::Fp32)
        };
        let (one, two, three) = (bytes(1), bytes(2), bytes(3));
        let parts: [fn(&BlockBytes) -> u64; 4] = [|b| b.attn, |b| b.ssm, |b| b.fuse, |b| b.total];
        for part in parts {
            assert_eq!(part(&three) - part(&two), part(&two) - part(&one));
        }
        let params = block.params(Sharing::Split);
        assert_eq!(2 * one.attn - two.attn, 4 * params.attn);
        assert_eq!(2 * one.ssm - two.ssm, 4 * params.ssm);
        assert_eq!(2 * one.fuse - two.fuse, 4 * params.fuse);
    }

    #[test]
    fn half_the_element_moves_half_the_bytes() {
        let plan = BlockPlan::uniform(5, Owner::Both).unwrap();
        let bytes = |element| released_135m().bytes(Sharing::Parallel, &plan, element).total;
        assert_eq!(bytes(Element::Fp32), 2 * bytes(Element::Bf16));
    }

    #[test]
    fn a_shared_norm_reads_and_writes_once() {
        let mut block = released_135m();
        block.form = BlockForm::Flow(Fusion::None);
        let plan = BlockPlan::uniform(5, Owner::Both).unwrap();
        let apart = block.bytes(Sharing::Parallel, &plan, Element::Fp32).total;
        block.options.shared_norm = true;
        let shared = block.bytes(Sharing::Parallel, &plan, Element::Fp32).total;
        assert_eq!(apart - shared, 4 * 768 * (2 * 5 + 1));
        block.ssm = mamba2(1536);
        let fused = block.bytes(Sharing::Parallel, &plan, Element::Fp32).total;
        block.options.gate_norm = GateNorm::BeforeGate;
        assert_eq!(block.bytes(Sharing::Parallel, &plan, Element::Fp32).total - fused, 4 * 2 * 5 * 1536);
    }

    #[test]
    fn an_idle_branch_moves_nothing() {
        let plan = BlockPlan::uniform(5, Owner::Ssm).unwrap();
        let bytes = released_135m().bytes(Sharing::Split, &plan, Element::Fp32);
        assert_eq!(bytes.attn, 0);
        assert!(bytes.ssm > 0);
    }
}
