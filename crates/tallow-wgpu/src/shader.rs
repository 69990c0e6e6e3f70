//! The text of a kernel: the prelude, its constants, a header made of its arguments, its body.
//! Invariant: a body reaches memory only through what the header gives it, so it does not know where an operand
//! begins, how wide its elements are stored, or whether anybody wants a result.
//! Absent on purpose: files. A body is text; which one is the business of `glue`.
//!
//! For an argument `x` the header gives, as far as the body names them:
//! - `x`, the buffer itself, `array<f32>`, `array<u32>`, `array<i32>` (a result narrower than 32 bits:
//!   `array<atomic<u32>>`; a [`Ty::Wide`] operand: `array<vec4<..>>`), and `a.x_at`, the element where `x` begins;
//! - `ld_x(i) -> f32` (`u32`, `i32`): element `i`; `ld4_x(i) -> vec4<f32>`: elements `i..i + 4` of a float type;
//!   `in4_x(i) -> bool`: do they lie in one piece? `get4_x(i)`: the same as `ld4_x` where they do, and else nonsense;
//! - `st_x(i, v)`: writes element `i` of a result; does nothing where nobody wants it;
//! - `LIVE_x: bool`: does anybody want this result? So work for it can be left out;
//! - `HAS_x: bool`: has this spec this operand? Where not ([`Arg::Absent`]), `ld_x`, `ld4_x` and `get4_x` give zeros.
//!
//! Numbers are `a.name`. `group(id)` is the number of the workgroup in a grid made by [`line`].
use crate::launch::{Arg, Kernel, Ty};
use std::{fmt::Write, sync::Arc};
use tallow_core::{kernel::KernelSpec, types::DType};

const PRELUDE: &str = include_str!("prelude.wgsl");
const FUNCTIONS: &str = include_str!("functions.wgsl");
const WITH_SUBGROUPS: &str = include_str!("prelude_subgroups.wgsl");
const WITHOUT_SUBGROUPS: &str = include_str!("prelude_plain.wgsl");

/// Most workgroups along one axis of a grid.
const AXIS: u32 = 65_535;

/// What of an adapter decides which kernels it gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// Smallest size of a subgroup; `None`: kernels use none.
    pub(crate) subgroups: Option<u32>,
    /// Most buffers of a kernel.
    pub(crate) buffers: usize,
    /// Bytes of numbers that can be passed without a buffer.
    pub(crate) immediates: usize,
    /// Bytes of memory that a workgroup shares.
    pub(crate) shared: usize,
    /// Most threads of a workgroup.
    pub(crate) threads: u32,
    /// Most bytes of a weight that are bound at once.
    pub(crate) binding: u64,
    /// What frozen weights are multiplied as.
    pub(crate) weights: DType,
    /// Are Apple's own products there?
    pub(crate) mps: bool,
    /// Units for small matrices, if kernels may use some.
    pub(crate) coop: Option<Coop>,
}

/// Units that multiply small square matrices, the threads of a subgroup together (cooperative matrices).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coop {
    /// Side of the matrices of a unit that multiplies f32 and adds f32.
    pub(crate) f32s: Option<u32>,
    /// The same of f16, added as f32.
    pub(crate) f16s: Option<u32>,
    /// Threads of every subgroup.
    pub(crate) lanes: u32,
    pub(crate) by: Units,
}

impl Coop {
    /// What there are units for.
    pub(crate) fn multiplied(&self) -> impl Iterator<Item = DType> + use<> {
        let all = [(DType::F32, self.f32s), (DType::F16, self.f16s)];
        all.into_iter()
            .filter(|(_, side)| side.is_some())
            .map(|(d, _)| d)
    }
}

/// What does the work of a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Units {
    Adapter,
    /// Nothing but threads, to test what is around units where there are none.
    #[cfg(test)]
    Threads,
}

/// A kernel before its text is complete.
pub(crate) struct Draft<'a> {
    /// Entry point: a function `@compute @workgroup_size(WG)` of the body.
    pub(crate) entry: &'static str,
    /// Functions, without header.
    pub(crate) body: &'a str,
    /// Constants: name and value as WGSL.
    pub(crate) consts: &'a [(&'static str, String)],
    /// Threads of a workgroup; `WG` in the body.
    pub(crate) threads: u32,
    /// Workgroups.
    pub(crate) grid: [u32; 3],
    pub(crate) args: Vec<Arg>,
}

/// A grid of `n` workgroups in a line, as `group(id)` counts them; those past `n` must do nothing.
pub(crate) fn line(n: usize) -> Option<[u32; 3]> {
    let n = u32::try_from(n).ok()?;
    match n {
        0..=AXIS => Some([n, 1, 1]),
        _ => Some([AXIS, n.div_ceil(AXIS), 1]),
    }
}

/// The kernel for `spec` on `t`; `None` if it has more buffers, threads or workgroups than `t` can have.
pub(crate) fn kernel(t: &Target, spec: &KernelSpec, d: Draft<'_>) -> Option<Kernel> {
    let wanted = |a: &Arg| match a {
        Arg::Write { result, .. } => spec.outputs.get(*result).is_some_and(Option::is_some),
        Arg::Absent(_) => false,
        _ => true,
    };
    let (args, unwanted): (Vec<Arg>, Vec<Arg>) = d.args.into_iter().partition(wanted);
    let words = args.len();
    let bound = |a: &&Arg| a.is_buffer();
    let buffers = args.iter().filter(bound).count();
    let uniform = words * 4 > t.immediates;
    let fits = buffers <= t.buffers && d.threads <= t.threads && d.grid.iter().all(|n| *n <= AXIS);
    if !fits {
        return None;
    }
    let mut text = enables(d.body) + PRELUDE;
    let functions = [
        "exp_of(",
        "log_of(",
        "sin_of(",
        "cos_of(",
        "tanh_of(",
        "sigmoid_of(",
    ];
    if functions.iter().any(|f| d.body.contains(f)) {
        text += FUNCTIONS;
    }
    let _ = writeln!(text, "const WG: u32 = {}u;", d.threads);
    match t.subgroups {
        Some(smallest) => {
            let _ = writeln!(text, "const LANES: u32 = {smallest}u;");
            text += WITH_SUBGROUPS;
        }
        None => text += WITHOUT_SUBGROUPS,
    }
    for (name, value) in d.consts {
        let _ = writeln!(text, "const {name} = {value};");
    }
    numbers(&mut text, &args, buffers, uniform);
    for (i, a) in args.iter().filter(bound).enumerate() {
        buffer(&mut text, d.body, i, a);
    }
    for a in &unwanted {
        nothing(&mut text, a);
    }
    text += d.body;
    Some(Kernel {
        entry: d.entry,
        source: Arc::from(text),
        grid: d.grid,
        args,
        uniform,
        unless_same: None,
    })
}

/// The extensions that `body` names something of.
fn enables(body: &str) -> String {
    let all = [
        ("array<f16", "enable f16;\n"),
        ("coop_mat", "enable wgpu_cooperative_matrix;\n"),
    ];
    let named = all.iter().filter(|(of, _)| body.contains(of));
    named.map(|(_, line)| *line).collect()
}

/// The struct of all numbers: where buffers begin, then those passed.
fn numbers(text: &mut String, args: &[Arg], buffers: usize, uniform: bool) {
    *text += "struct Args {\n";
    for a in args {
        let _ = match a {
            Arg::Read { name, .. }
            | Arg::Part { name, .. }
            | Arg::Write { name, .. }
            | Arg::Scratch { name, .. } => {
                writeln!(text, "  {name}_at: u32,")
            }
            Arg::U32(name, _) => writeln!(text, "  {name}: u32,"),
            Arg::F32(name, _) => writeln!(text, "  {name}: f32,"),
            Arg::Absent(_) => Ok(()),
        };
    }
    *text += "}\n";
    let _ = match uniform {
        true => writeln!(text, "@group(0) @binding({buffers}) var<uniform> a: Args;"),
        false => writeln!(text, "var<immediate> a: Args;"),
    };
}

/// The declaration of buffer `i` and the functions that reach its elements, those that `body` names.
fn buffer(text: &mut String, body: &str, i: usize, a: &Arg) {
    let (name, ty, written) = match a {
        Arg::Read { name, ty, .. } | Arg::Part { name, ty, .. } => (name, *ty, false),
        Arg::Write { name, ty, .. } | Arg::Scratch { name, ty, .. } => (name, *ty, true),
        Arg::U32(..) | Arg::F32(..) | Arg::Absent(_) => return,
    };
    let element = match (ty, ty.dtype()) {
        (Ty::Wide(_), DType::F32) => "vec4<f32>",
        (Ty::Wide(_), _) => "vec4<u32>",
        (_, DType::F32) => "f32",
        (_, DType::U32) => "u32",
        (_, DType::I32) => "i32",
        (_, DType::BF16 | DType::F16 | DType::U8) if written => "atomic<u32>",
        (_, DType::BF16 | DType::F16 | DType::U8) => "u32",
    };
    let _ = writeln!(
        text,
        "@group(0) @binding({i}) var<storage, read_write> {name}: array<{element}>;"
    );
    let known = if matches!(a, Arg::Write { .. }) {
        "LIVE"
    } else {
        "HAS"
    };
    let _ = writeln!(text, "const {known}_{name} = true;");
    let names = |f: &str| body.contains(&format!("{f}_{name}("));
    let piece = names("in4") || names("get4");
    if names("ld") || names("ld4") || piece {
        load(text, name, ty, written);
    }
    if names("ld4") || piece {
        load4(text, name, ty);
    }
    if piece {
        get4(text, name, ty);
    }
    if names("st") {
        store(text, name, ty.dtype());
    }
}

/// `ld_name(i)`.
fn load(text: &mut String, name: &str, ty: Ty, written: bool) {
    let (number, d) = (number(ty.dtype()), ty.dtype());
    let word = |per: u32| match (ty, written) {
        (Ty::Wide(_), _) => format!("{name}[e / {}u][(e / {per}u) & 3u]", per * 4),
        (Ty::Plain(_), true) => format!("atomicLoad(&{name}[e / {per}u])"),
        (Ty::Plain(_), false) => format!("{name}[e / {per}u]"),
    };
    let value = match (ty, d) {
        (Ty::Wide(_), DType::F32) => format!("{name}[e >> 2u][e & 3u]"),
        (_, DType::F32 | DType::U32 | DType::I32) => format!("{name}[e]"),
        (_, DType::BF16) => format!("bf16_of({}, e & 1u)", word(2)),
        (_, DType::F16) => format!("f16_of({}, e & 1u)", word(2)),
        (_, DType::U8) => format!("u8_of({}, e & 3u)", word(4)),
    };
    let _ = writeln!(
        text,
        "fn ld_{name}(i: u32) -> {number} {{ let e = a.{name}_at + i; return {value}; }}"
    );
}

/// Four elements from `e` on as WGSL, where they lie in one piece of a buffer that is read in pieces.
fn four(name: &str, ty: Ty) -> Option<String> {
    let four = match (ty, ty.dtype()) {
        (Ty::Wide(_), DType::F32) => return Some(format!("return {name}[e >> 2u];")),
        (Ty::Wide(_), DType::BF16) => "bf16x4",
        (Ty::Wide(_), _) => "f16x4",
        (Ty::Plain(_), _) => return None,
    };
    Some(format!(
        "let w = {name}[e >> 3u]; return {four}(select(w.xy, w.zw, (e & 4u) != 0u));"
    ))
}

/// `ld4_name(i)`: in one piece where the elements lie in one, else one by one.
fn load4(text: &mut String, name: &str, ty: Ty) {
    let one_by_one = format!(
        "return vec4<f32>(ld_{name}(i), ld_{name}(i + 1u), ld_{name}(i + 2u), ld_{name}(i + 3u));"
    );
    let whole = four(name, ty).map_or(String::new(), |f| format!("if ((e & 3u) == 0u) {{ {f} }} "));
    let _ = writeln!(
        text,
        "fn ld4_{name}(i: u32) -> vec4<f32> {{ let e = a.{name}_at + i; {whole}{one_by_one} }}"
    );
}

/// `in4_name(i)` and `get4_name(i)`: a body that asks once for many loads has them on their way together.
fn get4(text: &mut String, name: &str, ty: Ty) {
    let (inside, get) = match four(name, ty) {
        Some(f) => (
            format!("((a.{name}_at + i) & 3u) == 0u"),
            format!("let e = a.{name}_at + i; {f}"),
        ),
        None => ("false".to_owned(), format!("return ld4_{name}(i);")),
    };
    let _ = writeln!(
        text,
        "fn in4_{name}(i: u32) -> bool {{ return {inside}; }}\nfn get4_{name}(i: u32) -> vec4<f32> {{ {get} }}"
    );
}

/// `st_name(i, v)`. A narrow element shares its word with others, which other threads write.
fn store(text: &mut String, name: &str, d: DType) {
    let number = number(d);
    let narrow = |per: u32, mask: &str, bits: &str| {
        let width = 32 / per;
        format!(
            "let s = (e & {}u) * {width}u; atomicAnd(&{name}[e / {per}u], ~({mask} << s)); \
             atomicOr(&{name}[e / {per}u], {bits} << s);",
            per - 1
        )
    };
    let put = match d {
        DType::F32 | DType::U32 | DType::I32 => format!("{name}[e] = v;"),
        DType::BF16 => narrow(2, "0xffffu", "bf16_bits(v)"),
        DType::F16 => narrow(2, "0xffffu", "f16_bits(v)"),
        DType::U8 => narrow(4, "0xffu", "(v & 0xffu)"),
    };
    let _ = writeln!(
        text,
        "fn st_{name}(i: u32, v: {number}) {{ let e = a.{name}_at + i; {put} }}"
    );
}

/// A result that nobody wants, or an operand that is not there.
fn nothing(text: &mut String, a: &Arg) {
    let _ = match a {
        Arg::Write { name, ty, .. } => {
            let number = number(ty.dtype());
            writeln!(
                text,
                "const LIVE_{name} = false;\nfn st_{name}(i: u32, v: {number}) {{}}"
            )
        }
        Arg::Absent(name) => writeln!(
            text,
            "const HAS_{name} = false;\nfn ld_{name}(i: u32) -> f32 {{ return 0.0; }}\n\
             fn ld4_{name}(i: u32) -> vec4<f32> {{ return vec4<f32>(0.0); }}\n\
             fn in4_{name}(i: u32) -> bool {{ return true; }}\n\
             fn get4_{name}(i: u32) -> vec4<f32> {{ return vec4<f32>(0.0); }}"
        ),
        _ => Ok(()),
    };
}

/// What an element is to a kernel.
pub(crate) fn number(d: DType) -> &'static str {
    match d {
        DType::F32 | DType::BF16 | DType::F16 => "f32",
        DType::U32 | DType::U8 => "u32",
        DType::I32 => "i32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::{read, write};
    use tallow_core::kernel::{Body, Operand};
    use tallow_core::types::TensorType;

    fn target() -> Target {
        Target {
            subgroups: None,
            buffers: 2,
            immediates: 16,
            shared: 16 << 10,
            threads: 256,
            binding: 1 << 27,
            weights: DType::F32,
            mps: false,
            coop: None,
        }
    }

    /// A copy whose result somebody wants, or nobody.
    fn made(t: &Target, wanted: bool, more: &[Arg]) -> Option<Kernel> {
        let x = Operand::dense(&TensorType::f32([4]));
        let spec = KernelSpec {
            body: Body::Copy,
            inputs: vec![x.clone()],
            outputs: vec![wanted.then_some(x)],
        };
        let mut args = vec![read("x", 0, DType::F32), write("y", 0, DType::F32)];
        args.extend_from_slice(more);
        let draft = Draft {
            entry: "copy",
            body: "fn copy(id: Id) { st_y(id.t, ld_x(id.t)); }",
            consts: &[("FOUR", "4u".to_owned())],
            threads: 64,
            grid: [1, 1, 1],
            args,
        };
        kernel(t, &spec, draft)
    }

    #[test]
    fn a_result_that_nobody_wants_is_not_bound() {
        let all = made(&target(), true, &[]).expect("fits");
        assert_eq!(all.args.len(), 2);
        assert!(all.source.contains("const LIVE_y = true;") && all.source.contains("@binding(1)"));
        let one = made(&target(), false, &[]).expect("fits");
        assert_eq!(one.args.len(), 1);
        assert!(
            one.source.contains("const LIVE_y = false;") && !one.source.contains("@binding(1)")
        );
    }

    #[test]
    fn numbers_past_the_immediates_come_in_a_buffer() {
        let number = |n: u32| Arg::U32(format!("n{n}").into(), n);
        let few = made(&target(), true, &[number(0), number(1)]).expect("fits");
        assert!(!few.uniform && few.source.contains("var<immediate> a: Args;"));
        let many = made(&target(), true, &[number(0), number(1), number(2)]).expect("fits");
        assert!(many.uniform && many.source.contains("@binding(2) var<uniform> a: Args;"));
    }

    #[test]
    fn what_an_adapter_cannot_run_is_not_offered() {
        let buffers = Target {
            buffers: 1,
            ..target()
        };
        assert!(made(&buffers, true, &[]).is_none());
        assert!(made(&buffers, false, &[]).is_some());
        let threads = Target {
            threads: 32,
            ..target()
        };
        assert!(made(&threads, true, &[]).is_none());
    }

    #[test]
    fn a_long_line_of_workgroups_is_folded() {
        assert_eq!(line(65_535), Some([65_535, 1, 1]));
        assert_eq!(line(65_536), Some([65_535, 2, 1]));
        assert_eq!(line(1 << 33), None);
    }
}
