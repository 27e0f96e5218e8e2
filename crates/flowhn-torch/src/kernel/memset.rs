//! Small memsets of a captured graph, turned into kernels.
//!
//! libtorch's matrix products and its attention clear a few words of their workspace first. As a memset node that costs a step some
//! 5 us, most of it between the nodes; a kernel of one block that writes the same bytes follows and is followed like any other.
#![cfg_attr(not(flowhn_cuda), allow(dead_code))]

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUgraph, CUgraphNode};

use super::{Kernel, KernelSource, KernelSpec, driver};
use crate::{Error, Result};

static MEMSET: KernelSource =
    KernelSource { name: "memset.cu", text: include_str!("../../kernels/memset.cu"), headers: &[] };

pub(crate) const KERNELS: KernelSpec = KernelSpec { source: &MEMSET, variants: &[&[]] };

/// Sets elements: where, to what, the bytes of one, how many.
pub(crate) const SET_MEMORY: Kernel = Kernel { source: &MEMSET, entry: "set_memory", defines: &[] };

/// More elements than these are left to the driver, whose memset uses the whole device.
const MAX_ELEMENTS: usize = 4096;
pub(crate) const THREADS: u32 = 128;

/// Puts kernels in place of the small memsets of a graph that is not instantiated yet, and returns how many.
///
/// # Errors
/// [`Error::Kernel`] if the driver refuses to change the graph.
///
/// # Safety
/// `graph` is a live graph of the current context, and nobody else uses it meanwhile.
pub(crate) unsafe fn memsets_to_kernels(graph: CUgraph) -> Result<usize> {
    let mut n_replaced = 0;
    // SAFETY: the caller's promise; every node is one of the graph's.
    unsafe {
        for node in nodes(graph)? {
            if let Some(memset) = small_memset(node)? {
                replace(graph, node, &memset)?;
                n_replaced += 1;
            }
        }
    }
    Ok(n_replaced)
}

fn checked(outcome: sys::CUresult) -> Result<()> {
    outcome.result().map_err(|error| driver::refused(&SET_MEMORY, &error))
}

unsafe fn nodes(graph: CUgraph) -> Result<Vec<CUgraphNode>> {
    let mut n = 0;
    // SAFETY: without a place for nodes the driver writes their number; then there is room for as many.
    unsafe {
        checked(sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut n))?;
        let mut nodes = vec![ptr::null_mut(); n];
        checked(sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut n))?;
        Ok(nodes)
    }
}

/// What a node sets, if it is a memset of one short row.
unsafe fn small_memset(node: CUgraphNode) -> Result<Option<sys::CUDA_MEMSET_NODE_PARAMS>> {
    let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    // SAFETY: the node is alive; both are places for what is asked.
    unsafe { checked(sys::cuGraphNodeGetType(node, &mut kind))? };
    if kind != sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET {
        return Ok(None);
    }
    let mut memset = sys::CUDA_MEMSET_NODE_PARAMS { dst: 0, pitch: 0, value: 0, elementSize: 0, width: 0, height: 0 };
    // SAFETY: as above, and the node is a memset.
    unsafe { checked(sys::cuGraphMemsetNodeGetParams(node, &mut memset))? };
    Ok((memset.height == 1 && memset.width <= MAX_ELEMENTS).then_some(memset))
}

unsafe fn replace(graph: CUgraph, node: CUgraphNode, memset: &sys::CUDA_MEMSET_NODE_PARAMS) -> Result<()> {
    // SAFETY: the node is one of the graph's; the kernel takes a pointer and three words of 4 bytes, which the driver copies.
    unsafe {
        let before = neighbours(node, sys::cuGraphNodeGetDependencies_v2)?;
        let after = neighbours(node, sys::cuGraphNodeGetDependentNodes_v2)?;
        let (function, context) = driver::resident(&SET_MEMORY, current_device()?)?;
        let (mut to, mut value) = (memset.dst, memset.value);
        let (mut element_bytes, mut n) = (memset.elementSize, memset.width as u32);
        let mut arguments: [*mut c_void; 4] = [
            ptr::from_mut(&mut to).cast(),
            ptr::from_mut(&mut value).cast(),
            ptr::from_mut(&mut element_bytes).cast(),
            ptr::from_mut(&mut n).cast(),
        ];
        let launch = sys::CUDA_KERNEL_NODE_PARAMS {
            func: function,
            gridDimX: 1,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: arguments.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: context,
        };
        let mut kernel = ptr::null_mut();
        checked(sys::cuGraphAddKernelNode_v2(&mut kernel, graph, before.as_ptr(), before.len(), &launch))?;
        let from = vec![kernel; after.len()];
        checked(sys::cuGraphAddDependencies_v2(graph, from.as_ptr(), after.as_ptr(), ptr::null(), after.len()))?;
        checked(sys::cuGraphDestroyNode(node))
    }
}

type Neighbours = unsafe fn(CUgraphNode, *mut CUgraphNode, *mut sys::CUgraphEdgeData, *mut usize) -> sys::CUresult;

/// The nodes before or after one. The edges of a memset are plain: only kernels start their followers early.
unsafe fn neighbours(node: CUgraphNode, ask: Neighbours) -> Result<Vec<CUgraphNode>> {
    let mut n = 0;
    // SAFETY: without places the driver writes the number; then there is room for as many nodes and edges.
    unsafe {
        checked(ask(node, ptr::null_mut(), ptr::null_mut(), &mut n))?;
        let mut nodes = vec![ptr::null_mut(); n];
        let mut edges = vec![std::mem::zeroed::<sys::CUgraphEdgeData>(); n];
        checked(ask(node, nodes.as_mut_ptr(), edges.as_mut_ptr(), &mut n))?;
        Ok(nodes)
    }
}

/// The device of the current context.
fn current_device() -> Result<usize> {
    let mut device = 0;
    // SAFETY: a place for one number.
    checked(unsafe { sys::cuCtxGetDevice(&mut device) })?;
    usize::try_from(device).map_err(|_| Error::invalid("graph", format!("the driver names device {device}")))
}
