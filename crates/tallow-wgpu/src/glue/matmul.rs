//! Products: one tiled kernel for matrices of any strides and float types, with all that a linear adds to it.
//! Invariant: a product of f32 matrices is exact f32 arithmetic.
//! Absent on purpose: sums cut into pieces. A result is made by one workgroup.
use super::{FLOPS_PER_S, Offer, Target, coop, elementwise::index, one_float, outer, skinny, word};
use crate::{
    launch::{Arg, Kernel, wide, write},
    shader::{Draft, kernel},
};
use std::fmt::Write;
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

const FILE: &str = include_str!("product.wgsl");
/// Squares of 4 x 4 that a thread makes along each side, and the rows and columns that a workgroup then makes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tile(usize);
const SMALL: Tile = Tile(1);
const LARGE: Tile = Tile(2);

impl Tile {
    fn extent(self) -> usize {
        64 * self.0
    }
    /// Is a result `[m, n]` large enough to keep a GPU busy with tiles of this size?
    fn suits(self, m: usize, n: usize) -> bool {
        self == SMALL || (m / self.extent()) * (n / self.extent()) >= 16
    }
    /// Seconds of a product `[m, n]` over `k` beyond its bytes and arithmetic.
    fn seconds(self, [m, n, k]: [usize; 3]) -> f64 {
        let up = |n: usize| n.next_multiple_of(self.extent()) as f64;
        // A small tile reads shared memory twice as often.
        let rate = 5e11 * self.0 as f64;
        let chain = k.div_ceil(16) as f64 * 1e-6;
        let whole = 2.0 * (up(m) * up(n) * k as f64) / rate;
        chain + whole - 2.0 * (m * n * k) as f64 / FLOPS_PER_S
    }
    /// The file with its loops over squares written out, so that sums stay in registers.
    fn text(self, find: &str) -> String {
        let Tile(r) = self;
        let (mut multiply, mut end) = (String::new(), String::new());
        for i in 0..r {
            let _ = writeln!(
                multiply,
                "let p{i} = xs[s * QUADS + ty + {q}u]; let q{i} = ws[s * QUADS + tx + {q}u];",
                q = 16 * i
            );
        }
        for (i, j, c) in (0..r * r * 4).map(|e| (e / 4 / r, e / 4 % r, e % 4)) {
            let (at, lane) = ((i * r + j) * 4 + c, ["x", "y", "z", "w"][c]);
            let _ = writeln!(multiply, "acc[{at}] += p{i}.{lane} * q{j};");
            let _ = writeln!(
                end,
                "end(y0, row0 + (slow + {}u) * 4u + {c}u, col0 + (fast + {}u) * 4u, acc[{at}]);",
                16 * i,
                16 * j
            );
        }
        FILE.replace("  FIND\n", &format!("  {find}\n"))
            .replace("    MULTIPLY\n", &multiply)
            .replace("  END\n", &end)
    }
}

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

fn zero(name: &'static str) -> Arg {
    Arg::U32(name.into(), 0)
}

fn no_tail() -> impl Iterator<Item = Arg> {
    let numbers = ["h0", "hr", "bc", "bi", "b0"].map(zero);
    let buffers = [absent("h"), absent("b")];
    let scale = Arg::F32("scale".into(), 0.0);
    buffers.into_iter().chain(numbers).chain([scale])
}

fn no_past() -> [Arg; 3] {
    [absent("past"), zero("past0"), zero("pastr")]
}

/// As [`Product::added`], for a product that adds nothing.
pub(super) fn nothing() -> impl Iterator<Item = Arg> {
    no_tail()
        .chain([absent("bias"), zero("bias0")])
        .chain(no_past())
}

/// WGSL for where the matrices of [`Product::starts`] begin.
const STARTS: &str = "let x0 = a.x_first; let w0 = a.w_first; let y0 = a.y_first;";

impl Product {
    /// Buffers and numbers, but where the matrices begin.
    pub(super) fn args(&self) -> Option<Vec<Arg>> {
        let mut args = vec![self.x.arg.clone(), self.w.arg.clone(), self.y.arg.clone()];
        let [m, n, k] = self.sizes;
        args.extend([word("m", m)?, word("n", n)?, word("k", k)?]);
        args.extend([
            word("xr", self.x.strides[0])?,
            word("wc", self.w.strides[0])?,
        ]);
        args.push(word("yr", self.y.strides[0])?);
        args.extend(self.added()?);
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
    /// Buffers and numbers of what is added to the product.
    pub(super) fn added(&self) -> Option<Vec<Arg>> {
        let mut args = vec![];
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
            None => args.extend(no_tail()),
        }
        let none = || (absent("bias"), 0);
        let (bias, bias0) = self.bias.clone().unwrap_or_else(none);
        args.extend([bias, word("bias0", bias0)?]);
        match &self.past {
            Some(p) => {
                args.extend([p.arg.clone(), word("past0", p.at)?]);
                args.push(word("pastr", p.strides[0])?);
            }
            None => args.extend(no_past()),
        }
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
        let [m, n, _] = self.sizes;
        let tile = if LARGE.suits(m, n) { LARGE } else { SMALL };
        self.tiled_by(t, spec, (find, count), (numbers, tile))
    }
    fn tiled_by(
        &self,
        t: &Target,
        spec: &KernelSpec,
        (find, count): (&str, usize),
        (numbers, tile): (&[Arg], Tile),
    ) -> Option<Kernel> {
        let mut args = self.args()?;
        args.extend_from_slice(numbers);
        let rank = self.tail.as_ref().map_or(0, |t| t.rank);
        let mut consts = vec![
            ("RANK", format!("{rank}u")),
            ("ADD", self.add.to_string()),
            ("R", format!("{}u", tile.0)),
        ];
        let b = self.tail.as_ref().map_or([1, 1], |t| t.b.strides);
        for (name, [row, along]) in [("XK", self.x.strides), ("WK", self.w.strides), ("BK", b)] {
            consts.push((name, (along == 1 || row != 1).to_string()));
        }
        consts.push(("DENSE_x", (self.x.strides[0] == 1).to_string()));
        consts.push(("DENSE_w", (self.w.strides[0] == 1).to_string()));
        let [m, n, _] = self.sizes;
        let tiles = |n: usize| u32::try_from(n.div_ceil(tile.extent())).ok();
        let draft = Draft {
            entry: "product",
            body: &tile.text(find),
            consts: &consts,
            threads: 256,
            grid: [tiles(n)?, tiles(m)?, u32::try_from(count).ok()?],
            args,
        };
        kernel(t, spec, draft)
    }
    /// Where its matrices begin. Numbers, not text: products that differ in them alone share a pipeline.
    fn starts(&self) -> Option<[Arg; 3]> {
        Some([
            word("x_first", self.x.at)?,
            word("w_first", self.w.at)?,
            word("y_first", self.y.at)?,
        ])
    }
    /// The tiled kernel for one product, whose matrices begin where their sides say.
    pub(super) fn alone(&self, t: &Target, spec: &KernelSpec) -> Option<Kernel> {
        self.tiled(t, spec, (STARTS, 1), &self.starts()?)
    }
    /// By the kernel `way`, where it takes this product; else tiled. With the seconds of [`Offer::extra`].
    pub(super) fn by(&self, t: &Target, spec: &KernelSpec, way: Way) -> Option<(Kernel, f64)> {
        let find = (STARTS, 1);
        let other = match way {
            Way::Skinny => skinny::product(t, spec, self, find, &self.starts()?)
                .map(|job| (job, skinny::seconds(self.sizes))),
            Way::Coop => {
                coop::product(t, spec, self, find, &self.starts()?).zip(coop::seconds(t, self))
            }
            Way::Tiled => None,
        };
        if other.is_some() {
            return other;
        }
        let [m, n, _] = self.sizes;
        let tile = if LARGE.suits(m, n) { LARGE } else { SMALL };
        Some((self.alone(t, spec)?, tile.seconds(self.sizes)))
    }
    /// Is the kernel `way` for products like it?
    pub(super) fn suits(&self, t: &Target, way: Way) -> bool {
        match way {
            Way::Tiled => true,
            Way::Skinny => self.sizes[0].min(self.sizes[1]) <= skinny::NARROW,
            Way::Coop => coop::seconds(t, self).is_some(),
        }
    }
}

/// Kernels of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Skinny,
    Coop,
    Tiled,
}

impl Way {
    pub(super) const ALL: [Way; 3] = [Way::Skinny, Way::Coop, Way::Tiled];
}

pub(super) fn offers(t: &Target, ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Vec<Offer> {
    let outer = outer::offer(t, ta, tb, alpha, spec);
    let general = general(ta, tb, alpha, spec);
    let skinny = general.as_ref().and_then(|g| g.skinny(t, spec));
    let tile = |tile| general.as_ref().and_then(|g| g.tiled(t, spec, tile));
    let coop = general.as_ref().and_then(|g| g.coop(t, spec));
    let all = [outer, skinny, coop, tile(LARGE), tile(SMALL)];
    all.into_iter().flatten().collect()
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

/// A batch of products.
struct Batch {
    product: Product,
    /// WGSL for where those of batch `z` begin, and how many there are.
    find: String,
    count: usize,
}

fn general(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Batch> {
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
    Some(Batch {
        product,
        find,
        count: shape.iter().product(),
    })
}

impl Batch {
    fn tiled(&self, t: &Target, spec: &KernelSpec, tile: Tile) -> Option<Offer> {
        let [m, n, _] = self.product.sizes;
        if !tile.suits(m, n) {
            return None;
        }
        let find = (&self.find[..], self.count);
        let job = self.product.tiled_by(t, spec, find, (&[], tile))?;
        let name = match tile {
            SMALL => "matmul_tiled_64",
            _ => "matmul_tiled_128",
        };
        Some(Offer {
            extra: tile.seconds(self.product.sizes),
            ..Offer::new(name, vec![job])
        })
    }
    fn coop(&self, t: &Target, spec: &KernelSpec) -> Option<Offer> {
        let find = (&self.find[..], self.count);
        let job = coop::product(t, spec, &self.product, find, &[])?;
        Some(Offer {
            extra: coop::seconds(t, &self.product)?,
            ..Offer::new("matmul_coop", vec![job])
        })
    }
    fn skinny(&self, t: &Target, spec: &KernelSpec) -> Option<Offer> {
        let find = (&self.find[..], self.count);
        let job = skinny::product(t, spec, &self.product, find, &[])?;
        Some(Offer {
            extra: skinny::seconds(self.product.sizes),
            ..Offer::new("matmul_skinny", vec![job])
        })
    }
}

/// Matrices of any float type may be read; sums are f32, and so is what holds them.
pub(super) const SUMS: DType = DType::F32;
