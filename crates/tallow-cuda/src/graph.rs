//! A recorded plan as one graph of the card's.
//! Invariant: asking for a run costs the host about the same, however many launches the plan has.
//!
//! Each time a graph runs, the driver hands its launches to the card one by one, some 0.1 µs each. What stands in the
//! body of a conditional node is on the card already: a graph of many launches is the body of one node whose condition
//! always holds (CUDA C++ Programming Guide, "Conditional Graph Nodes").
use crate::{
    driver::{self, Card, ask},
    error::Result,
};
use cudarc::driver::{result, sys};
use std::{ptr, sync::Arc};

/// More launches than this stand in a body.
const FEW: usize = 64;
/// The first driver that knows such nodes: 12.4.
const BODIES: i32 = 12_040;

/// A plan as the card runs it.
pub(crate) struct Graph {
    card: Arc<Card>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}
// SAFETY: a handle; used by one thread at a time through `&mut` of its recording.
unsafe impl Send for Graph {}

/// A graph not yet made ready to run.
struct Draft(sys::CUgraph);

impl Graph {
    /// Turns the `launches` that `launch` asks of the stream it is given into a graph.
    pub(crate) fn record(
        card: &Arc<Card>,
        launches: usize,
        launch: impl FnOnce(sys::CUstream) -> Result<()>,
    ) -> Result<Graph> {
        card.enter()?;
        let many = launches > FEW && driver::version().is_some_and(|v| v >= BODIES);
        let draft = if many {
            let draft = Draft::new()?;
            capture(card, Some(draft.body(card)?), launch)?;
            draft
        } else {
            Draft(capture(card, None, launch)?)
        };
        // SAFETY: the graph was just made.
        let exec = unsafe { result::graph::instantiate(draft.0, sys::CUgraphInstantiate_flags(0)) };
        let graph = Graph {
            card: card.clone(),
            exec: exec.map_err(ask("making a graph"))?,
            graph: draft.keep(),
        };
        // SAFETY: graph and stream are alive.
        unsafe { result::graph::upload(graph.exec, card.stream) }
            .map_err(ask("uploading a graph"))?;
        Ok(graph)
    }
    /// Asks for one run; returns at once.
    pub(crate) fn launch(&self) -> Result<()> {
        self.card.enter()?;
        // SAFETY: the graph is alive, and its recording keeps all memory its nodes name.
        unsafe { result::graph::launch(self.exec, self.card.stream) }
            .map_err(ask("replaying a plan"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: replays are waited for; both came from the driver and are destroyed once.
            unsafe {
                let _ = result::stream::synchronize(self.card.stream);
                let _ = result::graph::exec_destroy(self.exec);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

impl Draft {
    fn new() -> Result<Self> {
        let mut graph = ptr::null_mut();
        // SAFETY: writes a handle; the flags have to be 0.
        let code = unsafe { sys::cuGraphCreate(&mut graph, 0) };
        code.result().map_err(ask("making a graph"))?;
        Ok(Draft(graph))
    }
    /// The body, still empty, of a node whose condition holds at every run.
    fn body(&self, card: &Card) -> Result<sys::CUgraph> {
        let mut handle = 0;
        let flags = sys::CU_GRAPH_COND_ASSIGN_DEFAULT;
        // SAFETY: graph and context are alive; the handle belongs to the graph.
        let code =
            unsafe { sys::cuGraphConditionalHandleCreate(&mut handle, self.0, card.ctx, 1, flags) };
        code.result().map_err(ask("making a condition"))?;
        // SAFETY: all zero is what the driver wants of the fields it reserves.
        let mut node: sys::CUgraphNodeParams = unsafe { std::mem::zeroed() };
        node.type_ = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_CONDITIONAL;
        node.__bindgen_anon_1.conditional = sys::CUDA_CONDITIONAL_NODE_PARAMS {
            handle,
            type_: sys::CUgraphConditionalNodeType::CU_GRAPH_COND_TYPE_IF,
            size: 1,
            phGraph_out: ptr::null_mut(),
            ctx: card.ctx,
        };
        let mut made = ptr::null_mut();
        let (none, no_edges) = (ptr::null(), ptr::null());
        // SAFETY: the node depends on nothing; the driver fills in its body.
        let code =
            unsafe { sys::cuGraphAddNode_v2(&mut made, self.0, none, no_edges, 0, &mut node) };
        code.result().map_err(ask("making a conditional node"))?;
        // SAFETY: the node is of that kind, and its array has the one body asked for, alive as long as the node.
        Ok(unsafe { *node.__bindgen_anon_1.conditional.phGraph_out })
    }
    fn keep(self) -> sys::CUgraph {
        let graph = self.0;
        std::mem::forget(self);
        graph
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // SAFETY: nothing was made of it.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

/// What `launch` asks of a stream, as a graph: `body` if there is one.
fn capture(
    card: &Card,
    body: Option<sys::CUgraph>,
    launch: impl FnOnce(sys::CUstream) -> Result<()>,
) -> Result<sys::CUgraph> {
    let stream = card.capture.lock().unwrap_or_else(|e| e.into_inner());
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    let (none, no_edges) = (ptr::null(), ptr::null());
    // SAFETY: body and stream are alive, the stream locked: nobody else captures on it.
    let begun = unsafe {
        match body {
            None => result::stream::begin_capture(stream.0, mode),
            Some(body) => {
                sys::cuStreamBeginCaptureToGraph(stream.0, body, none, no_edges, 0, mode).result()
            }
        }
    };
    begun.map_err(ask("starting a capture"))?;
    let launched = launch(stream.0);
    // SAFETY: as above; a capture that failed is ended all the same.
    let ended = unsafe { result::stream::end_capture(stream.0) };
    launched?;
    ended.map_err(ask("ending a capture"))
}
