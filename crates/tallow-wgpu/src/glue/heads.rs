//! What a decoded token's queries, keys and values go through before attention, in one dispatch.
//! Invariant: a position past the end of a cache writes nothing.
//! Absent on purpose: several tokens of a row; and which steps of a plan these are, which is `crate::fused`.
use super::{THREADS, Target, attention::head_strides, word};
use crate::{
    launch::{Kernel, read, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("heads.wgsl");
const TURN: &str = include_str!("turn.wgsl");

/// A rotation and two writes behind it. Operands and results are numbered over the three of them.
pub(crate) struct Heads<'a> {
    pub(crate) rope: &'a KernelSpec,
    /// The specs of the writes of keys and of values.
    pub(crate) writes: [&'a KernelSpec; 2],
}

/// The dispatch. `all`: operands and results of the three, one after another.
pub(crate) fn heads(t: &Target, h: &Heads<'_>, all: &KernelSpec) -> Option<Kernel> {
    let (x, q) = (&h.rope.inputs[0], h.rope.outputs[0].as_ref()?);
    let &[rows, 1, turned, d] = &x.layout.shape.0[..] else {
        return None;
    };
    let &[_, slots, keys, _] = &h.writes[0].inputs[0].layout.shape.0[..] else {
        return None;
    };
    let v = &h.writes[1].inputs[1];
    let each = turned * d / 2 + keys * d;
    let n = rows * each;
    let (ropes, news) = (h.rope.inputs.len(), h.writes[0].inputs.len());
    let mut args = vec![
        read("x", 0, DType::F32),
        read("pos", 1, DType::U32),
        read("f", 2, DType::F32),
        read("v", ropes + news + 1, DType::F32),
        write("q", 0, DType::F32),
        write("kc", 1, DType::F32),
        write("vc", 2, DType::F32),
        word("n", n)?,
        word("s", slots)?,
    ];
    let strides = [(x, "xb", "xh"), (q, "qb", "qh"), (v, "vb", "vh")];
    for (o, row, head) in strides {
        let [b, _, h] = head_strides(o)?;
        args.extend([word(row, b)?, word(head, h)?]);
    }
    let number = |n: usize| format!("{n}u");
    let draft = Draft {
        entry: "heads",
        body: &format!("{TURN}{FILE}"),
        consts: &[
            ("EACH", number(each)),
            ("TURNED", number(turned)),
            ("KEYS", number(keys)),
            ("HALF", number(d / 2)),
        ],
        threads: THREADS,
        grid: line(n.div_ceil(THREADS as usize))?,
        args,
    };
    kernel(t, all, draft)
}
