//! Kernels made for one spec, each element of the result alone: fused maps, copies, constants, indices, draws.
//! Invariant: an element is read only by the thread that writes its place, so a result may lie where an operand does.
//! Absent on purpose: reductions, and extents as arguments. The text holds them, so that divisions are by constants.
use super::{Offer, THREADS, Target};
use crate::{
    launch::{read, write},
    shader::{Draft, kernel, line, number},
};
use std::fmt::Write;
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    scalar::{Dialect, Inst, ScalarOp, ScalarProgram},
    types::{DType, Walk},
};

const PHILOX: &str = include_str!("philox.wgsl");

/// WGSL that finds, from the flat index `i` over `shape`, the element of each operand: `let name = ..;`.
/// `None` where one lies past what 32 bits count.
pub(super) fn index(i: &str, shape: &[usize], operands: &[(&str, &[usize])]) -> Option<String> {
    let strides: Vec<&[usize]> = operands.iter().map(|(_, s)| *s).collect();
    let w = Walk::over(shape, &strides);
    let end = |s: &Vec<usize>| -> usize {
        let reach = |(n, s): (&usize, &usize)| n.saturating_sub(1) * s;
        w.shape.iter().zip(s).map(reach).sum()
    };
    if w.strides.iter().any(|s| u32::try_from(end(s)).is_err()) {
        return None;
    }
    let (mut text, mut sums) = (String::new(), vec![String::new(); operands.len()]);
    let mut rest = i.to_owned();
    for axis in (0..w.shape.len()).rev() {
        let n = w.shape[axis];
        let at = match axis {
            0 => rest.clone(),
            _ => {
                let _ = writeln!(
                    text,
                    "let {i}_q{axis} = {rest} / {n}u; let {i}_{axis} = {rest} - {i}_q{axis} * {n}u;"
                );
                rest = format!("{i}_q{axis}");
                format!("{i}_{axis}")
            }
        };
        for (sum, s) in sums.iter_mut().zip(&w.strides) {
            let _ = match s[axis] {
                0 => Ok(()),
                1 => write!(sum, " + {at}"),
                s => write!(sum, " + {at} * {s}u"),
            };
        }
    }
    for ((name, _), sum) in operands.iter().zip(sums) {
        let sum = sum.strip_prefix(" + ").unwrap_or("0u");
        let _ = writeln!(text, "let {name} = {sum};");
    }
    Some(text)
}

fn whole(d: DType) -> bool {
    !d.is_float()
}

/// A number of f32, which may be one that WGSL cannot write.
fn literal(v: f32) -> String {
    match (v.is_nan(), v.is_infinite()) {
        (true, _) => "bits(0x7fc00000u)".to_owned(),
        (_, true) if v > 0.0 => "bits(0x7f800000u)".to_owned(),
        (_, true) => "bits(0xff800000u)".to_owned(),
        _ => format!("f32({v:?})"),
    }
}

/// A program over floats.
fn float_program(p: &ScalarProgram) -> String {
    let mut text = String::new();
    for (i, line) in p.render(Dialect::Wgsl).lines().enumerate() {
        let _ = match &p.insts[i] {
            Inst::Const(bits) => {
                let r = usize::from(p.n_inputs) + i;
                writeln!(text, "let r{r} = {};", literal(f32::from_bits(*bits)))
            }
            Inst::Apply(op, args) => writeln!(text, "{}", exact(*op, args, line)),
        };
    }
    text
}

/// Where the adapter's function is too rough, ours.
fn exact(op: ScalarOp, args: &[u16], line: &str) -> String {
    let ours = match op {
        ScalarOp::Sin => "sin_of",
        ScalarOp::Cos => "cos_of",
        ScalarOp::Tanh => "tanh_of",
        ScalarOp::Exp => "exp_of",
        ScalarOp::Log => "log_of",
        ScalarOp::Sigmoid => "sigmoid_of",
        _ => return line.to_owned(),
    };
    let to = line.split('=').next().unwrap_or_default();
    format!("{to}= {ours}(r{});", args[0])
}

/// A program over whole numbers; `None` where one of its functions has no meaning there.
fn whole_program(p: &ScalarProgram, number: &str) -> Option<String> {
    let mut text = String::new();
    for (i, inst) in p.insts.iter().enumerate() {
        let value = match inst {
            Inst::Const(bits) => format!("{number}({:?})", f32::from_bits(*bits)),
            Inst::Apply(op, x) => {
                let r = |k: usize| format!("r{}", x[k]);
                match op {
                    ScalarOp::Add => format!("{} + {}", r(0), r(1)),
                    ScalarOp::Sub => format!("{} - {}", r(0), r(1)),
                    ScalarOp::Mul => format!("{} * {}", r(0), r(1)),
                    ScalarOp::Max => format!("max({}, {})", r(0), r(1)),
                    ScalarOp::Min => format!("min({}, {})", r(0), r(1)),
                    ScalarOp::Neg => format!("{number}(0) - {}", r(0)),
                    ScalarOp::Abs => format!("abs({})", r(0)),
                    ScalarOp::Floor => r(0),
                    ScalarOp::Less => format!("{number}({} < {})", r(0), r(1)),
                    ScalarOp::Equal => format!("{number}({} == {})", r(0), r(1)),
                    ScalarOp::Select => format!("select({}, {}, {} != 0)", r(2), r(1), r(0)),
                    _ => return None,
                }
            }
        };
        let _ = writeln!(text, "let r{} = {value};", usize::from(p.n_inputs) + i);
    }
    Some(text)
}

/// Name of the offer, and WGSL that makes `v` from `r0..` and `i`.
fn value(spec: &KernelSpec, out: &Operand, ints: bool) -> Option<(&'static str, String)> {
    let n = number(out.dtype);
    Some(match &spec.body {
        Body::Map(p) => {
            let code = match ints {
                true => whole_program(p, n)?,
                false => float_program(p),
            };
            (
                "map_generated",
                format!("{code}let v = r{};\n", p.outputs[0]),
            )
        }
        Body::Copy => ("copy_strided", "let v = r0;\n".to_owned()),
        Body::Fill(v) => ("fill", format!("let v = {};\n", literal(v.get()))),
        Body::Iota(axis) => {
            let (extent, inner) = (out.layout.shape.0[*axis], out.layout.shape.strides()[*axis]);
            let text = format!("let v = f32(i / {inner}u % {extent}u);\n");
            ("iota", text)
        }
        Body::Random(id) => {
            let text = format!("let v = between_0_and_1(ld_seed(0u), ld_seed(1u), {id}u, i);\n");
            ("random_philox", text)
        }
        _ => return None,
    })
}

/// Maps, copies, constants, indices and draws.
pub(super) fn generated(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let out = spec.outputs[0].as_ref()?;
    let n = out.layout.shape.numel();
    let seeded = matches!(spec.body, Body::Random(_));
    let ins: &[Operand] = if seeded { &[] } else { &spec.inputs };
    let ints = whole(out.dtype) && ins.iter().all(|o| whole(o.dtype)) && !ins.is_empty();
    let names: Vec<String> = (0..ins.len()).map(|k| format!("o{k}")).collect();
    let mut all: Vec<(&str, &[usize])> = names
        .iter()
        .zip(ins)
        .map(|(name, o)| (name.as_str(), &o.layout.strides[..]))
        .collect();
    all.push(("oy", &out.layout.strides));
    let find = index("i", &out.layout.shape.0, &all)?;
    let (name, value) = value(spec, out, ints)?;
    let register = if ints { number(out.dtype) } else { "f32" };
    let (mut loads, mut args) = (String::new(), vec![]);
    for (k, o) in ins.iter().enumerate() {
        let _ = writeln!(loads, "let r{k} = {register}(ld_x{k}(o{k}));");
        args.push(read(format!("x{k}"), k, o.dtype));
    }
    if seeded {
        args.push(read("seed", 0, DType::U32));
    }
    args.push(write("y", 0, out.dtype));
    let n = u32::try_from(n).ok()?;
    let philox = if seeded { PHILOX } else { "" };
    let body = format!(
        "{philox}@compute @workgroup_size(WG) fn each(id: Id) {{\n\
         let i = group(id) * WG + id.t;\nif (i >= {n}u) {{ return; }}\n\
         {find}{loads}{value}st_y(oy, {}(v));\n}}\n",
        number(out.dtype),
    );
    let draft = Draft {
        entry: "each",
        body: &body,
        consts: &[],
        threads: THREADS,
        grid: line((n as usize).div_ceil(THREADS as usize))?,
        args,
    };
    Some(Offer::new(name, vec![kernel(t, spec, draft)?]))
}
