//! Interpreter of fused elementwise programs over blocks of lanes.
//! Invariant: an element's bits depend on its operands alone. Programs with 32-bit integers run in
//! f64, which holds them exactly; all others in f32.
//! Absent on purpose: code generation. A block of 256 lanes hides what an instruction costs to decode.
//!
//! A program is compiled once: axes that all operands allow are merged, registers share slots once
//! they are dead. A dense f32 operand is read where it lies and the last result is written where it
//! belongs; all else goes through slots of the worker's scratch.

use std::ops::Range;

use tallow_core::scalar::{Inst, ScalarOp, ScalarProgram};
use tallow_core::types::{DType, Walk};

use crate::exec::{Exec, RowKernel};
use crate::gather::{Number, with_type};
use crate::simd::Vector;

mod apply;
mod exact;

/// Lanes of a block.
const LANES: usize = 256;
/// Rows shorter than this share a block.
const SHORT: usize = 64;
/// The most axes after merging.
const MAX_AXES: usize = 8;

/// An operand: its type, and its strides along the program's shape, in elements; 0 repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Element type.
    pub dtype: DType,
    /// One stride an axis.
    pub strides: Vec<usize>,
}

/// A program compiled for a shape and operands.
#[derive(Clone, Debug)]
pub struct Elementwise {
    program: ScalarProgram,
    /// Outer rows and lanes of each.
    rows: usize,
    len: usize,
    /// Extents of the outer axes, outermost first.
    outer: Vec<usize>,
    inputs: Vec<View>,
    outputs: Vec<View>,
    /// Constants and the slots they fill.
    constants: Vec<(f32, usize)>,
    steps: Vec<Step>,
    /// Where each output's value is after the last step.
    results: Vec<Place>,
    slots: usize,
    /// 32-bit integers take part: run in f64.
    exact: bool,
    /// Steps without a vector version.
    references: usize,
}

/// A merged operand.
#[derive(Clone, Debug)]
struct View {
    dtype: DType,
    /// Strides of the outer axes and of the lanes.
    outer: Vec<usize>,
    step: usize,
}

impl View {
    /// Is it read or written in place?
    fn direct(&self) -> bool {
        self.dtype == DType::F32 && self.step == 1
    }
}

/// Where a register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Slot(usize),
    /// Input number, read in place if the block is one row.
    Input(usize),
}

/// One instruction.
#[derive(Clone, Debug)]
struct Step {
    op: ScalarOp,
    args: [Place; 3],
    slot: usize,
}

/// Pointers of one run, in the order of the operands.
#[derive(Clone, Copy)]
struct Pointers<'a> {
    inputs: &'a [*const u8],
    outputs: &'a [*mut u8],
    workspace: *mut f32,
}

impl Elementwise {
    /// Compiles `program` for `shape`.
    ///
    /// # Panics
    /// If the program does not fit the operands or has too many axes after merging: a bug in tallow.
    #[must_use]
    pub fn new(
        program: &ScalarProgram,
        shape: &[usize],
        inputs: &[Operand],
        outputs: &[Operand],
    ) -> Self {
        assert_eq!(
            (inputs.len(), outputs.len()),
            (usize::from(program.n_inputs), program.outputs.len()),
            "bug in tallow: elementwise operands do not fit the program"
        );
        let all: Vec<&Operand> = inputs.iter().chain(outputs).collect();
        let each: Vec<&[usize]> = all.iter().map(|o| &o.strides[..]).collect();
        let Walk {
            shape: extents,
            strides,
        } = Walk::over(shape, &each);
        let (len, outer) = extents.split_last().map_or((1, &[][..]), |(l, o)| (*l, o));
        assert!(
            outer.len() <= MAX_AXES,
            "bug in tallow: elementwise over more than {MAX_AXES} axes"
        );
        let view = |(operand, strides): (&&Operand, &Vec<usize>)| View {
            dtype: operand.dtype,
            outer: strides[..outer.len()].to_vec(),
            step: strides.last().copied().unwrap_or(1),
        };
        let mut views: Vec<View> = all.iter().zip(&strides).map(view).collect();
        let output_views = views.split_off(inputs.len());
        let mut compiled = Elementwise {
            program: program.clone(),
            rows: outer.iter().product(),
            len,
            outer: outer.to_vec(),
            inputs: views,
            outputs: output_views,
            constants: Vec::new(),
            steps: Vec::new(),
            results: Vec::new(),
            slots: 0,
            exact: all
                .iter()
                .any(|o| matches!(o.dtype, DType::I32 | DType::U32)),
            references: 0,
        };
        compiled.assign();
        compiled
    }

    /// The kernel's name, which tells where lanes are computed one at a time.
    #[must_use]
    pub fn name(&self) -> &'static str {
        if self.references > 0 {
            "map_blocks_reference"
        } else {
            "map_blocks"
        }
    }

    /// Scratch elements that `threads` workers need.
    #[must_use]
    pub fn workspace_elems(&self, threads: usize) -> usize {
        threads * self.worker_elems()
    }

    fn worker_elems(&self) -> usize {
        if self.exact {
            return 2 * (self.inputs.len() + self.program.insts.len()).next_multiple_of(8);
        }
        self.slots * LANES
    }

    /// Gives each register a place: inputs and constants a slot of their own, results one that is
    /// free by then.
    fn assign(&mut self) {
        let n_inputs = self.inputs.len();
        let mut last_use = vec![0; n_inputs + self.program.insts.len()];
        for (i, inst) in self.program.insts.iter().enumerate() {
            if let Inst::Apply(_, args) = inst {
                args.iter().for_each(|a| last_use[usize::from(*a)] = i);
            }
        }
        for output in &self.program.outputs {
            last_use[usize::from(*output)] = usize::MAX;
        }
        // Slots of inputs come first: slot `i` is input `i`'s.
        let mut places: Vec<Place> = (0..n_inputs).map(Place::Input).collect();
        let (mut slots, mut free) = (n_inputs, Vec::new());
        for (i, inst) in self.program.insts.iter().enumerate() {
            let mut fresh = || {
                slots += 1;
                slots - 1
            };
            let slot = match inst {
                Inst::Const(bits) => {
                    let slot = fresh();
                    self.constants.push((f32::from_bits(*bits), slot));
                    slot
                }
                Inst::Apply(op, names) => {
                    let mut args = [Place::Slot(0); 3];
                    for (arg, name) in args.iter_mut().zip(names) {
                        *arg = places[usize::from(*name)];
                    }
                    // A result may take the place of an operand that ends here: lanes are read first.
                    for name in names {
                        let at = usize::from(*name);
                        let constant = at >= n_inputs
                            && matches!(self.program.insts[at - n_inputs], Inst::Const(_));
                        if let Place::Slot(slot) = places[at]
                            && last_use[at] == i
                            && !constant
                            && !free.contains(&slot)
                        {
                            free.push(slot);
                        }
                    }
                    let slot = free.pop().unwrap_or_else(fresh);
                    self.references += usize::from(!apply::has_vector(*op));
                    self.steps.push(Step {
                        op: *op,
                        args,
                        slot,
                    });
                    slot
                }
            };
            places.push(Place::Slot(slot));
        }
        let outputs = self.program.outputs.iter();
        self.results = outputs.map(|o| places[usize::from(*o)]).collect();
        self.slots = slots;
    }

    /// Rows of a block.
    fn block_rows(&self) -> usize {
        if self.len < SHORT {
            (LANES / self.len.max(1)).max(1)
        } else {
            1
        }
    }

    /// Computes all outputs.
    ///
    /// # Safety
    /// Pointers are the first elements of the operands, in order, valid as far as shape and strides
    /// reach. Outputs do not overlap. An output overlaps no input, or lies exactly where one of its
    /// type and strides does; that one is no result of the program itself.
    /// `workspace` has [`Elementwise::workspace_elems`]; the machine has `exec.isa`.
    pub unsafe fn run(
        &self,
        exec: Exec<'_>,
        inputs: &[*const u8],
        outputs: &[*mut u8],
        workspace: *mut f32,
    ) {
        debug_assert_eq!(inputs.len(), self.inputs.len());
        debug_assert_eq!(outputs.len(), self.outputs.len());
        if self.rows * self.len == 0 {
            return;
        }
        let pointers = Pointers {
            inputs,
            outputs,
            workspace,
        };
        let blocks = Blocks {
            code: self,
            pointers,
        };
        let operands = inputs.len() + outputs.len();
        // SAFETY: the caller's promise.
        unsafe {
            if self.exact {
                let row_ns = self.len * (8 + 6 * self.program.insts.len());
                return exec.over(self.rows, row_ns, &exact::Rows(blocks));
            }
            let vectors = 2 * operands + 3 * self.steps.len();
            let lane_ns = |n: usize| n * (vectors + 64 * self.references) / 16 + 20;
            let (per_row, rows) = (self.len.div_ceil(LANES), self.block_rows());
            if rows == 1 {
                exec.over(self.rows * per_row, lane_ns(LANES.min(self.len)), &blocks);
            } else {
                exec.over(self.rows.div_ceil(rows), lane_ns(LANES), &blocks);
            }
        }
    }

    /// Offset of outer row `row` in the operand, in elements.
    #[inline(always)]
    fn offset(&self, view: &View, mut row: usize) -> usize {
        let mut at = 0;
        for (n, stride) in self.outer.iter().zip(&view.outer).rev() {
            at += row % n * stride;
            row /= n;
        }
        at
    }
}

/// A program over its blocks; a row of the kernel is a block.
struct Blocks<'a> {
    code: &'a Elementwise,
    pointers: Pointers<'a>,
}

/// One block: whole rows, or a part of one.
struct Block {
    rows: Range<usize>,
    lanes: Range<usize>,
}

impl Block {
    fn n(&self) -> usize {
        self.rows.len() * self.lanes.len()
    }
}

// SAFETY: blocks write different elements.
unsafe impl RowKernel for Blocks<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, blocks: Range<usize>, worker: usize) {
        let code = self.code;
        let (per_row, rows) = (code.len.div_ceil(LANES), code.block_rows());
        // SAFETY: the caller's promise; scratch by worker.
        unsafe {
            let slots = self.pointers.workspace.add(worker * code.worker_elems());
            for (value, slot) in &code.constants {
                std::slice::from_raw_parts_mut(slots.add(slot * LANES), LANES).fill(*value);
            }
            for i in blocks {
                let block = if rows == 1 {
                    let start = i % per_row * LANES;
                    let row = i / per_row;
                    Block {
                        rows: row..row + 1,
                        lanes: start..code.len.min(start + LANES),
                    }
                } else {
                    Block {
                        rows: i * rows..code.rows.min((i + 1) * rows),
                        lanes: 0..code.len,
                    }
                };
                self.block::<V>(&block, slots);
            }
        }
    }
}

impl Blocks<'_> {
    /// # Safety
    /// As for [`Elementwise::run`]; the block and `slots` belong to this worker.
    #[inline(always)]
    unsafe fn block<V: Vector>(&self, block: &Block, slots: *mut f32) {
        let code = self.code;
        let single = block.rows.len() == 1;
        // SAFETY: the caller's promise; a slot has `LANES >= block.n()` elements.
        unsafe {
            for (i, view) in code.inputs.iter().enumerate() {
                if !(single && view.direct()) {
                    self.load(i, view, block, slots.add(i * LANES));
                }
            }
            let place = |p: Place| match p {
                Place::Input(i) if single && code.inputs[i].direct() => self.input(i, block),
                Place::Input(slot) | Place::Slot(slot) => slots.add(slot * LANES).cast_const(),
            };
            let last = code.steps.len().wrapping_sub(1);
            let mut written = None;
            for (i, step) in code.steps.iter().enumerate() {
                let mut to = slots.add(step.slot * LANES);
                if i == last && single {
                    let here = |(o, result): (usize, &Place)| {
                        (*result == Place::Slot(step.slot) && code.outputs[o].direct()).then_some(o)
                    };
                    written = code.results.iter().enumerate().find_map(here);
                    if let Some(o) = written {
                        to = self.output(o, block);
                    }
                }
                apply::apply::<V>(step.op, to, step.args.map(place), block.n());
            }
            for (o, result) in code.results.iter().enumerate() {
                let mut from = place(*result);
                match written {
                    Some(w) if w == o => continue,
                    Some(w) if *result == code.results[w] => from = self.output(w, block),
                    _ => {}
                }
                self.store(o, block, from);
            }
        }
    }

    /// First element of the block in a direct input.
    #[inline(always)]
    fn input(&self, i: usize, block: &Block) -> *const f32 {
        let at = self.code.offset(&self.code.inputs[i], block.rows.start) + block.lanes.start;
        self.pointers.inputs[i].cast::<f32>().wrapping_add(at)
    }

    /// First element of the block in a direct output.
    #[inline(always)]
    fn output(&self, o: usize, block: &Block) -> *mut f32 {
        let at = self.code.offset(&self.code.outputs[o], block.rows.start) + block.lanes.start;
        self.pointers.outputs[o].cast::<f32>().wrapping_add(at)
    }

    /// Loads the block of input `i` into a slot, as f32.
    ///
    /// # Safety
    /// As for [`Blocks::block`].
    #[inline(always)]
    unsafe fn load(&self, i: usize, view: &View, block: &Block, slot: *mut f32) {
        let len = block.lanes.len();
        with_type!(view.dtype, T => {
            for (k, row) in block.rows.clone().enumerate() {
                let at = self.code.offset(view, row) + block.lanes.start * view.step;
                let from = self.pointers.inputs[i].cast::<T>().wrapping_add(at);
                let to = slot.wrapping_add(k * len);
                // SAFETY: the caller's promise.
                unsafe {
                    if view.step == 0 {
                        let value = Number::to_f32(from.read_unaligned());
                        std::slice::from_raw_parts_mut(to, len).fill(value);
                    } else if view.step == 1 {
                        for l in 0..len {
                            *to.add(l) = Number::to_f32(from.add(l).read_unaligned());
                        }
                    } else {
                        for l in 0..len {
                            *to.add(l) = Number::to_f32(from.add(l * view.step).read_unaligned());
                        }
                    }
                }
            }
        });
    }

    /// Stores a block to output `o`, converted.
    ///
    /// # Safety
    /// As for [`Blocks::block`]; `from` has `block.n()` elements.
    #[inline(always)]
    unsafe fn store(&self, o: usize, block: &Block, from: *const f32) {
        let (view, len) = (&self.code.outputs[o], block.lanes.len());
        with_type!(view.dtype, T => {
            for (k, row) in block.rows.clone().enumerate() {
                let at = self.code.offset(view, row) + block.lanes.start * view.step;
                let to = self.pointers.outputs[o].cast::<T>().wrapping_add(at);
                let from = from.wrapping_add(k * len);
                for l in 0..len {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let value = <T as Number>::from_f32(*from.add(l));
                        to.add(l * view.step).write_unaligned(value);
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests;
