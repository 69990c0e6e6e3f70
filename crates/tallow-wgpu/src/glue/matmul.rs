//! Products: one tiled kernel for matrices of any strides and float types, with all that a linear adds to it.
//! Invariant: a product of f32 matrices is exact f32 arithmetic.
//! Absent on purpose: sums cut into pieces. A result is made by one workgroup.
use super::{Offer, Target, elementwise::index, one_float, word};
use crate::{
    launch::{Arg, Kernel, wide, write},
    shader::{Draft, kernel},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

const FILE: &str = include_str!("product.wgsl");
/// Rows and columns that a workgroup makes.
const TILE: usize = 64;

/// A matrix `[rows, sum]` of a product: an operand or scratch, and its strides.
#[derive(Clone)]
pub(super) struct Side {
    pub(super) arg: Arg,
    /// First element, counted from the start of the argument.
    pub(super) at: usize,
    /// Strides of a row and along the sum.
    pub(super) strides: [usize; 2],
}

/// The low-rank part of a product: `scale h bᵀ`.
#[derive(Clone)]
pub(super) struct Tail {
    pub(super) h: Side,
    pub(super) b: Side,
    pub(super) rank: usize,
    pub(super) scale: f32,
}

/// A product `[m, n]` over `k`.
pub(super) struct Product {
    pub(super) sizes: [usize; 3],
    pub(super) x: Side,
    pub(super) w: Side,
    /// The result, its first element, and its strides.
    pub(super) y: Side,
    pub(super) alpha: f32,
    pub(super) tail: Option<Tail>,
    /// With the element of column 0.
    pub(super) bias: Option<(Arg, usize)>,
    /// Added to the result; its columns are dense.
    pub(super) past: Option<Side>,
    /// Add to what lies in the result.
    pub(super) add: bool,
}

fn absent(name: &'static str) -> Arg {
    Arg::Absent(name.into())
}

impl Product {
    /// Buffers and numbers, but where the matrices begin.
    fn args(&self) -> Option<Vec<Arg>> {
        let mut args = vec![self.x.arg.clone(), self.w.arg.clone(), self.y.arg.clone()];
        let [m, n, k] = self.sizes;
        args.extend([word("m", m)?, word("n", n)?, word("k", k)?]);
        args.extend([
            word("xr", self.x.strides[0])?,
            word("wc", self.w.strides[0])?,
        ]);
        args.push(word("yr", self.y.strides[0])?);
        match &self.tail {
            Some(t) => {
                args.extend([t.h.arg.clone(), t.b.arg.clone()]);
                args.extend([word("h0", t.h.at)?, word("hr", t.h.strides[0])?]);
                args.extend([
                    word("bc", t.b.strides[0])?,
                    word("bi", t.b.strides[1])?,
                    word("b0", t.b.at)?,
                ]);
                args.push(Arg::F32("scale".into(), t.scale));
            }
            None => {
                args.extend([absent("h"), absent("b")]);
                let zero = |name: &'static str| Arg::U32(name.into(), 0);
                args.extend(["h0", "hr", "bc", "bi", "b0"].map(zero));
                args.push(Arg::F32("scale".into(), 0.0));
            }
        }
        let none = || (absent("bias"), 0);
        let (bias, bias0) = self.bias.clone().unwrap_or_else(none);
        args.extend([bias, word("bias0", bias0)?]);
        match &self.past {
            Some(p) => {
                args.extend([p.arg.clone(), word("past0", p.at)?]);
                args.push(word("pastr", p.strides[0])?);
            }
            None => {
                args.push(absent("past"));
                args.extend([word("past0", 0)?, word("pastr", 0)?]);
            }
        }
        args.extend([
            word("xi", self.x.strides[1])?,
            word("wi", self.w.strides[1])?,
        ]);
        args.extend([
            word("yc", self.y.strides[1])?,
            Arg::F32("alpha".into(), self.alpha),
        ]);
        Some(args)
    }
    /// The tiled kernel. `find`: WGSL for `x0`, `w0`, `y0` of batch `z`, of which there are `count`; `numbers`: what
    /// it names beside `z`.
    pub(super) fn tiled(
        &self,
        t: &Target,
        spec: &KernelSpec,
        (find, count): (&str, usize),
        numbers: &[Arg],
    ) -> Option<Kernel> {
        let mut args = self.args()?;
        args.extend_from_slice(numbers);
        let rank = self.tail.as_ref().map_or(0, |t| t.rank);
        let mut consts = vec![("RANK", format!("{rank}u")), ("ADD", self.add.to_string())];
        let b = self.tail.as_ref().map_or([1, 1], |t| t.b.strides);
        for (name, [row, along]) in [("XK", self.x.strides), ("WK", self.w.strides), ("BK", b)] {
            consts.push((name, (along == 1 || row != 1).to_string()));
        }
        consts.push(("DENSE_x", (self.x.strides[0] == 1).to_string()));
        consts.push(("DENSE_w", (self.w.strides[0] == 1).to_string()));
        let [m, n, _] = self.sizes;
        let tiles = |n: usize| u32::try_from(n.div_ceil(TILE)).ok();
        let draft = Draft {
            entry: "product",
            body: &FILE.replace("FIND", find),
            consts: &consts,
            threads: 256,
            grid: [tiles(n)?, tiles(m)?, u32::try_from(count).ok()?],
            args,
        };
        kernel(t, spec, draft)
    }
    /// The tiled kernel for one product, whose matrices begin where their sides say.
    pub(super) fn alone(&self, t: &Target, spec: &KernelSpec) -> Option<Kernel> {
        // Numbers, not text: products that differ in them alone share a pipeline.
        let starts = [
            word("x_first", self.x.at)?,
            word("w_first", self.w.at)?,
            word("y_first", self.y.at)?,
        ];
        let find = "let x0 = a.x_first; let w0 = a.w_first; let y0 = a.y_first;";
        self.tiled(t, spec, (find, 1), &starts)
    }
}

pub(super) fn offers(t: &Target, ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Vec<Offer> {
    general(t, ta, tb, alpha, spec).into_iter().collect()
}

/// Extents and strides of the two innermost axes, exchanged if `turned`.
fn inner(o: &Operand, turned: bool) -> ([usize; 2], [usize; 2]) {
    let rank = o.layout.shape.rank();
    let (s, n) = (&o.layout.strides[rank - 2..], &o.layout.shape.0[rank - 2..]);
    match turned {
        false => ([n[0], n[1]], [s[0], s[1]]),
        true => ([n[1], n[0]], [s[1], s[0]]),
    }
}

fn general(t: &Target, ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Offer> {
    let (p, q, out) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    let types = [one_float([p])?, one_float([q])?, one_float([out])?];
    for o in [p, q, out] {
        u32::try_from(o.layout.end()).ok()?;
    }
    let ([m, k], xs) = inner(p, ta);
    let ([n, _], ws) = inner(q, !tb);
    let (_, ys) = inner(out, false);
    let outer = |o: &Operand| o.layout.strides[..o.layout.shape.rank() - 2].to_vec();
    let shape = &out.layout.shape.0[..out.layout.shape.rank() - 2];
    let (a, b, c) = (outer(p), outer(q), outer(out));
    let find = index("z", shape, &[("x0", &a), ("w0", &b), ("y0", &c)])?;
    let side = |arg, strides| Side {
        arg,
        at: 0,
        strides,
    };
    let product = Product {
        sizes: [m, n, k],
        x: side(wide("x", 0, types[0]), xs),
        w: side(wide("w", 1, types[1]), ws),
        y: side(write("y", 0, types[2]), ys),
        alpha,
        tail: None,
        bias: None,
        past: None,
        add: false,
    };
    let job = product.tiled(t, spec, (&find, shape.iter().product()), &[])?;
    Some(Offer::new("matmul_tiled_any", vec![job]))
}

/// Matrices of any float type may be read; sums are f32, and so is what holds them.
pub(super) const SUMS: DType = DType::F32;
