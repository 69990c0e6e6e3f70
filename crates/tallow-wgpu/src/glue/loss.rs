//! Cross entropy, of logits and of a projection.
//! Invariant: the logits of a projection exist for one chunk of rows at a time.
//! Absent on purpose: gradients of the projection; whoever trains it gets the decomposition.
use super::{
    THREADS,
    matmul::{Product, Side},
    table::{rows_bound, rows_of},
    word,
};
use crate::{
    launch::{Arg, Kernel, Offer, Ty, read, wide, write},
    shader::{Draft, Target, kernel, line},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

const FILE: &str = include_str!("cross_entropy.wgsl");
const JOIN: &str = include_str!("cross_entropy_join.wgsl");
/// Most bytes of logits held at a time.
const CHUNK_BYTES: usize = 256 << 20;

/// The kernel over `n` rows of logits: losses, and the gradient where wanted.
/// `buffers`: logits, targets, losses, gradient; `sizes`: columns, row strides of both, first row of targets and losses.
fn rows(
    t: &Target,
    spec: &KernelSpec,
    body: &str,
    n: usize,
    buffers: Vec<Arg>,
    sizes: [usize; 4],
) -> Option<Kernel> {
    let mut args = buffers;
    args.push(word("n", n)?);
    for (name, v) in ["v", "ls", "ds", "first"].into_iter().zip(sizes) {
        args.push(word(name, v)?);
    }
    let draft = Draft {
        entry: "cross_entropy",
        body,
        consts: &[],
        threads: THREADS,
        grid: line(n)?,
        args,
    };
    kernel(t, spec, draft)
}

/// Are targets and losses dense, and all numbers f32?
fn fits(spec: &KernelSpec, target: usize) -> bool {
    let dense = |o: &Operand| o.is_dense();
    let floats = |o: &&Operand| o.dtype == DType::F32;
    dense(&spec.inputs[target])
        && spec.outputs[0].as_ref().is_none_or(dense)
        && spec
            .outputs
            .iter()
            .flatten()
            .chain([&spec.inputs[0]])
            .all(|o| floats(&o))
}

pub(super) fn of_logits(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let l = &spec.inputs[0];
    if !fits(spec, 1) {
        return None;
    }
    let (n, v) = (l.layout.shape.0[0], l.layout.shape.0[1]);
    let dl_row = match &spec.outputs[1] {
        Some(o) => o.layout.row_stride()?,
        None => 0,
    };
    let buffers = vec![
        read("l", 0, DType::F32),
        read("goal", 1, DType::U32),
        write("nll", 0, DType::F32),
        write("dl", 1, DType::F32),
    ];
    let sizes = [v, l.layout.row_stride()?, dl_row, 0];
    let job = rows(
        t,
        spec,
        &format!("const HOT = true;\n{FILE}"),
        n,
        buffers,
        sizes,
    )?;
    Some(Offer::new("logits_cross_entropy_f32", vec![job]))
}

/// A product `[m, n]` over `k` that adds nothing.
fn product(sizes: [usize; 3], [x, w, y]: [Side; 3]) -> Product {
    Product {
        sizes,
        x,
        w,
        y,
        alpha: 1.0,
        tail: None,
        bias: None,
        past: None,
        add: false,
    }
}

fn side(arg: Arg, at: usize, strides: [usize; 2]) -> Side {
    Side { arg, at, strides }
}

/// Part of the scratch memory: where it begins, and its bytes.
#[derive(Clone, Copy)]
struct Room {
    at: usize,
    bytes: usize,
}

impl Room {
    fn arg(self, name: &'static str, ty: Ty) -> Arg {
        let (name, Room { at, bytes }) = (name.into(), self);
        Arg::Scratch {
            name,
            at,
            bytes,
            ty,
        }
    }
}

/// Where everything of a cross entropy lies: extents `[n, c, v]`, the weight's strides, the row stride of logits.
struct Call<'a> {
    t: &'a Target,
    spec: &'a KernelSpec,
    c: usize,
    v: usize,
    x_row: usize,
    w: [usize; 2],
    pitch: usize,
    /// Rows of the weight that are bound at once, and those of a part.
    step: usize,
    each: usize,
    logits: Room,
    parts: Room,
}

impl Call<'_> {
    /// Columns of logits that one workgroup sums over on the way back: so that many work side by side.
    fn part(v: usize) -> usize {
        v.div_ceil(32).next_multiple_of(64).max(1024).min(v)
    }
    /// Rows `[first, count]` of the weight.
    fn weight(&self, rows: [usize; 2]) -> Arg {
        let w = &self.spec.inputs[1];
        rows_of("w", 1, w, rows, Ty::Wide(w.dtype))
    }
    /// The weight's pieces that are bound at once: first row and number of rows. All but the last are whole parts.
    fn pieces(&self) -> impl Iterator<Item = [usize; 2]> {
        let v = self.v;
        (0..v)
            .step_by(self.step)
            .map(move |first| [first, self.step.min(v - first)])
    }
    /// `l = x wᵀ` for `m` rows from `first` on.
    fn logits(&self, first: usize, m: usize) -> Option<Vec<Kernel>> {
        let one = |[v0, n]: [usize; 2]| {
            let x = wide("x", 0, DType::F32);
            let l = self.logits.arg("y", Ty::Plain(DType::F32));
            let sides = [
                side(x, first * self.x_row, [self.x_row, 1]),
                side(self.weight([v0, n]), 0, self.w),
                side(l, v0, [self.pitch, 1]),
            ];
            product([m, n, self.c], sides).alone(self.t, self.spec)
        };
        self.pieces().map(one).collect()
    }
    /// `dx = dl w` for these rows: a part of the sum for each workgroup, then their sum.
    fn back(&self, first: usize, m: usize, dx: &Operand) -> Option<Vec<Kernel>> {
        let (part, [wr, wc]) = (self.each, self.w);
        let f32s = Ty::Plain(DType::F32);
        let (part_w, part_y) = (word("part_w", part * wr)?, word("part_y", m * self.c)?);
        let find =
            "let x0 = a.l0 + z * a.part; let w0 = z * a.part_w; let y0 = a.y_first + z * a.part_y;";
        let mut jobs = vec![];
        for [v0, rows] in self.pieces() {
            let (whole, rest) = (rows / part, rows % part);
            // Part `from` of this piece.
            let sides = |from: usize| {
                let l = self.logits.arg("x", Ty::Wide(DType::F32));
                let y = (v0 / part + from) * m * self.c;
                [
                    side(l, v0 + from * part, [self.pitch, 1]),
                    side(self.weight([v0, rows]), from * part * wr, [wc, wr]),
                    side(self.parts.arg("y", f32s), y, [self.c, 1]),
                ]
            };
            if whole > 0 {
                let all = sides(0);
                let starts = [word("l0", all[0].at)?, word("y_first", all[2].at)?];
                let step = [word("part", part)?, part_w.clone(), part_y.clone()];
                let numbers = [&starts[..], &step[..]].concat();
                let all = product([m, self.c, part], all);
                jobs.push(all.tiled(self.t, self.spec, (find, whole), &numbers)?);
            }
            if rest > 0 {
                let last = product([m, self.c, rest], sides(whole));
                jobs.push(last.alone(self.t, self.spec)?);
            }
        }
        for piece in self.pieces() {
            jobs.push(self.join((first, m), piece, dx)?);
        }
        Some(jobs)
    }
    /// The sum of all parts, less the targets' rows as far as they are in this piece of the weight.
    fn join(
        &self,
        (first, m): (usize, usize),
        [v0, rows]: [usize; 2],
        dx: &Operand,
    ) -> Option<Kernel> {
        let n = m * self.c;
        let draft = Draft {
            entry: "join_loss",
            body: JOIN,
            consts: &[("FIRST", (v0 == 0).to_string())],
            threads: THREADS,
            grid: line(n.div_ceil(THREADS as usize))?,
            args: vec![
                self.parts.arg("part", Ty::Plain(DType::F32)),
                self.weight([v0, rows]),
                read("goal", 2, DType::U32),
                write("y", 1, DType::F32),
                word("n", n)?,
                word("c", self.c)?,
                word("piece0", v0)?,
                word("piece", rows)?,
                word("count", self.v.div_ceil(self.each))?,
                word("first", first)?,
                word("wr", self.w[0])?,
                word("wc", self.w[1])?,
                word("ys", dx.layout.row_stride()?)?,
            ],
        };
        kernel(self.t, self.spec, draft)
    }
}

pub(super) fn cross_entropy(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (x, w) = (&spec.inputs[0], &spec.inputs[1]);
    if !fits(spec, 2) {
        return None;
    }
    let ([n, c], v) = ([0, 1].map(|i| x.layout.shape.0[i]), w.layout.shape.0[0]);
    u32::try_from(w.layout.end()).ok()?;
    // Rows of logits begin where four can be read at once.
    let pitch = v.next_multiple_of(4);
    let most = CHUNK_BYTES.min(t.binding as usize / 2);
    let fit = (most / (pitch * 4)).max(1);
    let chunk = if fit > 64 { fit / 64 * 64 } else { fit }.min(n).max(1);
    // Parts that are summed on the way back lie in one piece of the weight.
    let bound = rows_bound(t, w).unwrap_or(v).min(v).max(1);
    let each = Call::part(v).min(bound);
    let step = if bound < v { bound / each * each } else { v };
    let count = v.div_ceil(each);
    let logits = Room {
        at: 0,
        bytes: chunk * pitch * 4,
    };
    let parts = Room {
        at: logits.bytes.next_multiple_of(256),
        bytes: count * chunk * c * 4,
    };
    let call = Call {
        t,
        spec,
        c,
        v,
        x_row: x.layout.row_stride()?,
        w: [w.layout.strides[0], w.layout.strides[1]],
        pitch,
        step,
        each,
        logits,
        parts,
    };
    let dx = spec.outputs[1].as_ref();
    // The gradient lies in place of the logits.
    let body = format!(
        "const LIVE_dl = {};\nconst HOT = false;\n{}",
        dx.is_some(),
        FILE.replace("st_dl(", "st_l(")
    );
    let mut jobs = vec![];
    for first in (0..n).step_by(chunk) {
        let m = chunk.min(n - first);
        jobs.extend(call.logits(first, m)?);
        let buffers = vec![
            logits.arg("l", Ty::Plain(DType::F32)),
            read("goal", 2, DType::U32),
            write("nll", 0, DType::F32),
        ];
        jobs.push(rows(t, spec, &body, m, buffers, [v, pitch, pitch, first])?);
        if let Some(dx) = dx {
            jobs.extend(call.back(first, m, dx)?);
        }
    }
    let scratch = match dx {
        Some(_) => parts.at + parts.bytes,
        None => logits.bytes,
    };
    Some(Offer::new("cross_entropy_chunks_f32", jobs).scratch(scratch))
}
