//! Linears of few rows, as in decoding: one launch and one pass over the weights.
//! Invariant: the adapter is the tail of each sum, in the same registers; `h` is made by blocks of the same launch.
//! Absent on purpose: several shares of rows, and gradients; those have many rows.
use super::{
    Arg, Offer, Target, c_type, kernel,
    linear::{Call, exact, pick, weights},
    source,
};
use tallow_core::{kernel::KernelSpec, types::DType};

const FEW: &str = include_str!("linear_few.cu");
/// Rows up to which a warp for each output beats the library.
pub(super) const FEW_ROWS: usize = 8;

/// Parameters of a kernel made for one spec, and what is passed for them.
#[derive(Default)]
struct Own {
    params: String,
    names: String,
    args: Vec<Arg>,
}

impl Own {
    fn push(&mut self, name: &str, kind: &str, arg: Arg) {
        self.params += &format!(", {kind} {name}");
        self.names += &format!(", {name}");
        self.args.push(arg);
    }
}

/// Warps for each output; the adapter is the tail of its sum.
pub(super) fn forward(t: &Target, c: &Call, spec: &KernelSpec) -> Option<Offer> {
    let [share] = &c.shares[..] else { return None };
    if c.m > FEW_ROWS || c.m == 0 || !exact(spec, c.residual) {
        return None;
    }
    let exact = t.weights == DType::F32;
    let w = weights(spec, &c.at, t.weights, exact)?;
    let k = spec.inputs[0].layout.shape.last();
    // Rows of a weight that was not prepared must be dense here.
    let rows_dense = c.at.iter().zip(&w.strides).all(|(i, s)| {
        let n = spec.inputs[i.w].layout.shape.0[0];
        (s[1] == 1 || k == 1) && (s[0] == k || n == 1)
    });
    if !rows_dense {
        return None;
    }
    let mut own = Own {
        args: vec![Arg::Read(0), Arg::Write(0), share.hidden.0],
        ..Own::default()
    };
    let (mut down, mut up, mut tail) = (vec![], vec![], vec![]);
    let mut r0 = 0;
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        own.push(&format!("w{i}"), "const W*", Arg::Read(at.w));
        let mut body = format!("dot<W>(w{i} + (u64)j * {k}u, x, acc, lane, lanes);");
        let mut last = String::new();
        if let (Some((r, scale)), Some((ia, ib))) = (b.adapters[0], at.ab[0]) {
            own.push(&format!("a{i}"), "const float*", Arg::Read(ia));
            own.push(&format!("b{i}"), "const float*", Arg::Read(ib));
            let row = format!("dot<float>(a{i} + (u64)j * {k}u, x, acc, lane, lanes);");
            down.push((r, row));
            let s = scale.get();
            last = format!("tail<{r}>(b{i} + (u64)j * {r}u, h + {r0}u, {s:?}f, acc, lane, lanes);");
            r0 += r;
        }
        if let Some(bias) = at.bias {
            own.push(&format!("c{i}"), "const float*", Arg::Read(bias));
            body += &format!(" add = c{i}[j];");
        }
        up.push((b.n, body));
        tail.push((b.n, last));
    }
    if let Some((i, _)) = c.residual {
        own.push("past", "const float*", Arg::Read(i));
    }
    let outputs: usize = c.blocks.iter().map(|b| b.n).sum();
    // Enough warps to fill a large card, each with at least one whole load.
    let split = [1, 2, 4]
        .into_iter()
        .find(|s| outputs * s >= 3000 || k < 2 * s * 32 * 8)
        .unwrap_or(4);
    let defines = [
        ("W", c_type(w.dtype).to_owned()),
        ("M", c.m.to_string()),
        ("K", k.to_string()),
        ("XS", c.in_row.to_string()),
        ("YS", c.out_row.to_string()),
        ("HS", share.hidden.1.to_string()),
        ("OUTPUTS", format!("{outputs}u")),
        ("SPLIT", split.to_string()),
        ("RANKS", format!("{}u", share.rank)),
        (
            "PAST",
            c.residual.map_or(String::new(), |(_, row)| {
                format!("add += past[(u64)lane * {row}u + o];")
            }),
        ),
    ];
    let text = FEW
        .replace("PARAMS", &own.params)
        .replace("NAMES", &own.names)
        .replace("PICK_DOWN", &pick(down.into_iter()))
        .replace("PICK_UP", &pick(up.into_iter()))
        .replace("PICK_TAIL", &pick(tail.into_iter()));
    let source = source(&text, &defines);
    let grid = share.rank + outputs.div_ceil(8 / split);
    let jobs = vec![kernel("up", source, grid as u32, 256, own.args)];
    let name = if c.adapted() {
        "lora_linear_warp"
    } else {
        "linear_warp"
    };
    Some(Offer {
        prepare: w.prepare,
        ..Offer::new(name, jobs).scratch(c.hidden_scratch)
    })
}
