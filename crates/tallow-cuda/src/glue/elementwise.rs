//! Kernels that make each element of the result alone: fused maps, copies, constants, draws, and a few composites.
//! Invariant: an element is read only by the thread that writes its place, so a result may lie where an operand does.
//! Absent on purpose: reductions.
use super::{Arg, Job, Offer, THREADS, Target, blocks, c_type, kernel, source, word};
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    op::Dropout,
    scalar::Dialect,
    types::{DType, Walk},
};

const FILE: &str = include_str!("elementwise.cu");

/// A kernel made for one spec: its parameters, the code that finds element `i`, and what is stored.
struct Text {
    params: String,
    index: String,
    args: Vec<Arg>,
}

/// Element numbers `o0..` (operands) and `oy` (result) from the flat index `i`.
fn indexed(ins: &[&Operand], out: &Operand) -> Option<Text> {
    let mut all: Vec<&[usize]> = ins.iter().map(|o| &o.layout.strides[..]).collect();
    all.push(&out.layout.strides);
    let w = Walk::over(&out.layout.shape.0, &all);
    let name = |k: usize| {
        if k == ins.len() {
            "y".to_owned()
        } else {
            k.to_string()
        }
    };
    let mut t = Text {
        params: String::new(),
        index: String::new(),
        args: vec![],
    };
    let mut rest = String::from("i");
    for axis in (0..w.shape.len()).rev() {
        let at = match axis {
            0 => rest.clone(),
            _ => {
                t.params += &format!(", u32 n{axis}");
                t.args.push(word(w.shape[axis])?);
                t.index += &format!(
                    "const u32 q{axis} = {rest} / n{axis}, i{axis} = {rest} - q{axis} * n{axis};\n"
                );
                rest = format!("q{axis}");
                format!("i{axis}")
            }
        };
        for (k, s) in w.strides.iter().enumerate() {
            let first = axis + 1 == w.shape.len();
            let (o, old) = (
                name(k),
                if first {
                    String::new()
                } else {
                    format!("o{}_{} + ", name(k), axis + 1)
                },
            );
            let this = format!("const u64 o{o}_{axis} = {old}");
            t.index += &match s[axis] {
                0 => format!("{this}0;\n"),
                1 => format!("{this}{at};\n"),
                _ => {
                    t.params += &format!(", u32 s{o}_{axis}");
                    t.args.push(word(s[axis])?);
                    format!("{this}(u64){at} * s{o}_{axis};\n")
                }
            };
        }
    }
    for k in 0..=ins.len() {
        let o = name(k);
        let from = if w.shape.is_empty() {
            "0".into()
        } else {
            format!("o{o}_0")
        };
        t.index += &format!("const u64 o{o} = {from};\n");
    }
    Some(t)
}

/// Maps, copies, constants, indices and draws.
pub(super) fn generated(target: &Target, spec: &KernelSpec) -> Option<Offer> {
    let out = spec.outputs[0].as_ref()?;
    let n = out.layout.shape.numel();
    word(n)?;
    let whole = |d: DType| matches!(d, DType::I32 | DType::U32);
    // Whole numbers past 2^24 need more than a float.
    let wide = whole(out.dtype) && spec.inputs.iter().any(|o| whole(o.dtype));
    let number = if wide { "double" } else { "float" };
    let seeded = matches!(spec.body, Body::Random(_));
    let ins: Vec<&Operand> = if seeded {
        vec![]
    } else {
        spec.inputs.iter().collect()
    };
    let t = indexed(&ins, out)?;
    let (name, value) = match &spec.body {
        Body::Map(p) => {
            let code = p.render(Dialect::C);
            let code = if wide {
                code.replace("const float", "const double")
            } else {
                code
            };
            (
                "map_generated",
                format!("{code}const {number} v = r{};\n", p.outputs[0]),
            )
        }
        Body::Copy => ("copy_strided", format!("const {number} v = r0;\n")),
        Body::Fill(v) => ("fill", format!("const float v = {:?}f;\n", v.get())),
        Body::Iota(axis) => {
            let (extent, inner) = (out.layout.shape.0[*axis], out.layout.shape.strides()[*axis]);
            (
                "iota",
                format!("const float v = (float)(i / {inner}u % {extent}u);\n"),
            )
        }
        Body::Random(id) => (
            "random_philox",
            format!("const float v = uniform(seed[0], seed[1], {id}u, i);\n"),
        ),
        _ => return None,
    };
    let load = if wide { "ldd" } else { "ld" };
    let mut loads = String::new();
    let mut params = String::new();
    for (k, o) in ins.iter().enumerate() {
        params += &format!("const {}* x{k}, ", c_type(o.dtype));
        loads += &format!("const {number} r{k} = {load}(x{k} + o{k});\n");
    }
    if seeded {
        params += "const u32* seed, ";
    }
    let text = format!(
        "extern \"C\" __global__ void each({params}{}* y, u32 n{}) {{\n\
         for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {{\n\
         {}{loads}{value}st(y + oy, v);\n}}\n}}\n",
        c_type(out.dtype),
        t.params,
        t.index,
    );
    let philox = if seeded { PHILOX } else { "" };
    let mut args: Vec<Arg> = (0..spec.inputs.len()).map(Arg::Read).collect();
    args.extend([Arg::Write(0), word(n)?]);
    args.extend(t.args);
    // The walk may step past 2^32 elements at the end otherwise.
    if n > (u32::MAX - target.processors * 16 * THREADS) as usize {
        return None;
    }
    let source = source(&format!("{philox}{text}"), &[]);
    Some(Offer::new(
        name,
        vec![kernel("each", source, blocks(target, n), THREADS, args)],
    ))
}

const PHILOX: &str = include_str!("philox.cu");

/// Row strides of operands and results that are read as dense rows, in the order given.
fn row_args(all: &[&Operand]) -> Option<Vec<Arg>> {
    all.iter().map(|o| word(o.layout.row_stride()?)).collect()
}

/// A composite of rows `[rows, c]` whose elements stand alone: pointers, `n`, `c`, then row strides.
fn by_rows(
    target: &Target,
    entry: &'static str,
    spec: &KernelSpec,
    ins: usize,
    extra: &[Arg],
    defines: &[(&str, String)],
) -> Option<Offer> {
    let shape = &spec.inputs[0].layout.shape;
    let n = shape.numel();
    let mut args: Vec<Arg> = (0..spec.inputs.len()).map(Arg::Read).collect();
    args.extend((0..spec.outputs.len()).map(Arg::Write));
    args.extend([word(n)?, word(shape.last())?]);
    let operands = spec.inputs[..ins].iter();
    args.extend(row_args(&operands.collect::<Vec<_>>())?);
    for o in &spec.outputs {
        args.push(match o {
            Some(o) => word(o.layout.row_stride()?)?,
            None => Arg::U32(0),
        });
    }
    args.extend(extra);
    let job = kernel(
        entry,
        source(FILE, defines),
        blocks(target, n),
        THREADS,
        args,
    );
    Some(Offer::new(entry, vec![job]))
}

/// The kernel and the types it reads and writes.
fn typed(entry: &str, types: &[(&'static str, DType)]) -> Vec<(&'static str, String)> {
    let types = types.iter().map(|(name, d)| (*name, c_type(*d).to_owned()));
    [("KERNEL", format!("KERNEL_{entry}"))]
        .into_iter()
        .chain(types)
        .collect()
}

/// The one type of these operands, if it is f32 or bf16.
pub(super) fn one_type<'a>(all: impl IntoIterator<Item = &'a Operand>) -> Option<DType> {
    let mut types = all.into_iter().map(|o| o.dtype);
    let first = types.next()?;
    let known = matches!(first, DType::F32 | DType::BF16);
    (known && types.all(|d| d == first)).then_some(first)
}

pub(super) fn swiglu(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let types = [
        ("X", one_type(&spec.inputs)?),
        ("Y", one_type(spec.outputs.iter().flatten())?),
    ];
    by_rows(t, "swiglu", spec, 2, &[], &typed("swiglu", &types))
}

pub(super) fn swiglu_grad(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let types = [
        ("X", one_type(&spec.inputs[..2])?),
        ("D", one_type(&spec.inputs[2..])?),
        ("Y", one_type(spec.outputs.iter().flatten())?),
    ];
    by_rows(
        t,
        "swiglu_grad",
        spec,
        3,
        &[],
        &typed("swiglu_grad", &types),
    )
}

pub(super) fn adamw(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let fits = |o: &Operand| o.is_dense() && o.dtype == DType::F32;
    let all = || spec.inputs.iter().chain(spec.outputs.iter().flatten());
    if !all().all(fits) || spec.outputs.iter().any(Option::is_none) {
        return None;
    }
    by_rows(t, "adamw", spec, 0, &[], &typed("adamw", &[]))
}

pub(super) fn dropout(t: &Target, d: &Dropout, spec: &KernelSpec) -> Option<Offer> {
    if !spec.inputs[1].is_dense() {
        return None;
    }
    let extra = [Arg::U32(d.id), Arg::F32(d.keep.get())];
    let file = [PHILOX, FILE].concat();
    let types = [
        ("X", one_type(&spec.inputs[..1])?),
        ("Y", one_type(spec.outputs.iter().flatten())?),
    ];
    let defines = typed("dropout", &types);
    let offer = by_rows(t, "dropout", spec, 1, &extra, &defines)?;
    let jobs = offer.jobs.into_iter().map(|j| match j {
        Job::Kernel(mut k) => {
            k.source = source(&file, &defines);
            Job::Kernel(k)
        }
        other => other,
    });
    Some(Offer::new("dropout", jobs.collect()))
}

/// Strides of batch row, token and head, where the elements of a head are dense.
pub(super) fn head_strides(o: &Operand) -> Option<[usize; 3]> {
    let (s, n) = (&o.layout.strides, &o.layout.shape.0);
    (n[3] == 1 || s[3] == 1).then(|| [s[0], s[1], s[2]])
}

pub(super) fn rope(t: &Target, inverse: bool, spec: &KernelSpec) -> Option<Offer> {
    let (x, out) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    if !spec.inputs[1].is_dense() || !spec.inputs[2].is_dense() {
        return None;
    }
    let &[b, tokens, h, d] = &x.layout.shape.0[..] else {
        return None;
    };
    // Few tokens: a thread for each element, so that more of them run side by side.
    let span = if b * tokens >= 256 { 8 } else { 1 };
    let n = b * tokens * h.div_ceil(span) * (d / 2);
    let types = [("X", one_type([x])?), ("Y", one_type([out])?)];
    let mut defines = typed("rope", &types);
    defines.push(("SPAN", span.to_string()));
    let mut args: Vec<Arg> = (0..3).map(Arg::Read).collect();
    args.push(Arg::Write(0));
    for v in [n, tokens, h, d / 2] {
        args.push(word(v)?);
    }
    for s in head_strides(x)?.into_iter().chain(head_strides(out)?) {
        args.push(word(s)?);
    }
    args.push(Arg::F32(if inverse { -1.0 } else { 1.0 }));
    let job = kernel("rope", source(FILE, &defines), blocks(t, n), THREADS, args);
    Some(Offer::new("rope", vec![job]))
}
