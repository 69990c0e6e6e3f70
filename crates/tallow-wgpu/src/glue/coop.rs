//! Products by units that multiply small matrices: cooperative matrices, as wgpu calls them.
//! Invariant: a unit multiplies what the operands hold, exactly. f32 and bf16 go to units of f32 (bf16 is widened, which
//! loses nothing), operands that are both f16 to units of f16 whose sums are f32; where the adapter has no such unit there
//! is no offer.
//! Absent on purpose: f32 or bf16 rounded to f16, whose range they leave; sums in f16; results of a few rows or columns.
use super::{
    FLOPS_PER_S, Target,
    matmul::{Product, Side},
};
use crate::{
    launch::{Arg, Kernel},
    shader::{Coop, Draft, Units, kernel},
};
use std::fmt::Write;
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("coop.wgsl");
const BRING: &str = include_str!("coop_bring.wgsl");
#[cfg(test)]
const THREADS: &str = include_str!("coop_threads.wgsl");

/// Subgroups of a workgroup, as a square of two by two.
const SUBGROUPS: u32 = 4;
/// Matrices that a subgroup makes along each side.
const R: usize = 4;
/// Fewest rows and columns of a result that this is offered for: with fewer, a unit multiplies zeros.
const LEAST: usize = 8;

/// A unit as a product uses it.
#[derive(Clone, Copy)]
struct Unit {
    by: Units,
    side: usize,
    /// What it multiplies.
    number: &'static str,
    /// Threads of a subgroup.
    lanes: u32,
}

impl Unit {
    /// The unit for these operands.
    fn of(coop: &Coop, x: DType, w: DType) -> Option<Unit> {
        let unit = |side: u32, number| Unit {
            by: coop.by,
            side: side as usize,
            number,
            lanes: coop.lanes,
        };
        let halves = coop.f16s.filter(|_| [x, w] == [DType::F16; 2]);
        let halves = halves.map(|side| unit(side, "f16"));
        halves.or_else(|| Some(unit(coop.f32s?, "f32")))
    }
    fn tile(self) -> usize {
        2 * R * self.side
    }
    /// Elements between rows in shared memory.
    fn pad(self) -> usize {
        if self.is_half() { 8 } else { 4 }
    }
    fn is_half(self) -> bool {
        self.number == "f16"
    }
    /// Bytes of shared memory.
    fn shared(self) -> usize {
        let side = 2 * self.tile() * (2 * self.side + self.pad());
        match self.is_half() {
            true => side * 2 + 8 * self.side * self.side * 4,
            false => side * 4,
        }
    }
    fn ty(self, number: &str, role: char) -> String {
        format!("coop_mat{0}x{0}<{number}, {role}>", self.side)
    }
    fn load_x(self, at: &str) -> String {
        match self.by {
            // Rows of x, one behind the other.
            Units::Adapter => format!("coopLoadT<{}>(&xs[{at}], ROW)", self.ty(self.number, 'A')),
            #[cfg(test)]
            Units::Threads => at.to_owned(),
        }
    }
    fn load_w(self, at: &str) -> String {
        match self.by {
            // Columns of the other factor, one behind the other.
            Units::Adapter => format!("coopLoad<{}>(&ws[{at}], ROW)", self.ty(self.number, 'B')),
            #[cfg(test)]
            Units::Threads => at.to_owned(),
        }
    }
    fn zeros(self) -> String {
        match self.by {
            Units::Adapter => format!("coopLoadT<{}>(&OUT[0], SIDE)", self.ty("f32", 'C')),
            #[cfg(test)]
            Units::Threads => "load_sums(0u, id.lane)".to_owned(),
        }
    }
    fn multiply_add(self, x: &str, w: &str, sum: &str) -> String {
        match self.by {
            Units::Adapter => format!("coopMultiplyAdd({x}, {w}, {sum})"),
            #[cfg(test)]
            Units::Threads => format!("multiply_add({x}, {w}, {sum}, id.lane)"),
        }
    }
    fn store(self, sum: &str, at: &str) -> String {
        match self.by {
            Units::Adapter => format!("coopStoreT({sum}, &OUT[{at}], OUT_ROW)"),
            #[cfg(test)]
            Units::Threads => format!("put_sums({sum}, {at}, id.lane)"),
        }
    }
    /// The file with its loops over matrices written out, so that sums stay in registers.
    fn text(self, find: &str) -> String {
        let (mut zeros, mut multiply, mut end) = (String::new(), String::new(), String::new());
        for (i, j) in squares() {
            let _ = writeln!(zeros, "var c{i}{j} = {};", self.zeros());
        }
        for step in 0..2 {
            let _ = writeln!(multiply, "{{");
            for i in 0..R {
                let at = |part| format!("(part.{part} + {i}u * SIDE) * ROW + {step}u * SIDE");
                let (x, w) = (self.load_x(&at('x')), self.load_w(&at('y')));
                let _ = writeln!(multiply, "let p{i} = {x}; let q{i} = {w};");
            }
            for (i, j) in squares() {
                let (p, q, c) = (format!("p{i}"), format!("q{j}"), format!("c{i}{j}"));
                let _ = writeln!(multiply, "{c} = {};", self.multiply_add(&p, &q, &c));
            }
            let _ = writeln!(multiply, "}}");
        }
        for (i, j) in squares() {
            let right = j % 2;
            let at = format!("part.x / 4u * OUT_ROW + part.y / 2u + {right}u * SIDE");
            let _ = writeln!(end, "{};", self.store(&format!("c{i}{j}"), &at));
            if right == 1 {
                let begin = format!("vec2<u32>({i}u, {}u) * SIDE", j - 1);
                let _ = writeln!(
                    end,
                    "workgroupBarrier(); finish(y0, row0, col0, {begin}, id.t); workgroupBarrier();"
                );
            }
        }
        let (sums, out) = match self.is_half() {
            true => (
                "var<workgroup> sums: array<f32, 2u * SIDE * OUT_ROW>;",
                "sums",
            ),
            // Sums go where x was.
            false => ("", "xs"),
        };
        let units = match self.by {
            Units::Adapter => "",
            #[cfg(test)]
            Units::Threads => THREADS,
        };
        let text = FILE
            .replace("SUMS\n", &format!("{sums}\n"))
            .replace("  FIND\n", &format!("  {find}\n"))
            .replace("  ZEROS\n", &zeros)
            .replace("    MULTIPLY\n", &multiply)
            .replace("  END\n", &end);
        let text = (text + units).replace("OUT[", &format!("{out}["));
        (text + &bring()).replace("NUMBER", self.number)
    }
}

/// How each matrix comes into shared memory.
fn bring() -> String {
    let one = |(name, [rows, upto, row, along], into, scaled): (&str, [&str; 4], &str, &str)| {
        BRING
            .replace('@', name)
            .replace("ROW_STRIDE", row)
            .replace("SUM_STRIDE", along)
            .replace("ROWS", rows)
            .replace("UPTO", upto)
            .replace("INTO", into)
            .replace("SCALED", scaled)
    };
    let all = [
        ("x", ["a.m", "a.k", "a.xr", "a.xi"], "xs", "v"),
        ("w", ["a.n", "a.k", "a.wc", "a.wi"], "ws", "v"),
        ("h", ["a.m", "RANK", "a.hr", "1u"], "xs", "v"),
        ("b", ["a.n", "RANK", "a.bc", "a.bi"], "ws", "v * a.scale"),
    ];
    all.into_iter().map(one).collect()
}

/// Row and column of each matrix that a subgroup makes.
fn squares() -> impl Iterator<Item = (usize, usize)> {
    (0..R * R).map(|e| (e / R, e % R))
}

/// How four neighbours of a matrix are read: along its sum? As they lie?
fn ways(name: [&'static str; 2], [row, along]: [usize; 2]) -> [(&'static str, String); 2] {
    let by_sum = along == 1 || row != 1;
    [
        (name[0], by_sum.to_string()),
        (name[1], (along == 1 || row == 1).to_string()),
    ]
}

fn unit(t: &Target, p: &Product) -> Option<Unit> {
    let float = |s: &Side| match &s.arg {
        Arg::Read { ty, .. } | Arg::Part { ty, .. } | Arg::Scratch { ty, .. } => Some(ty.dtype()),
        _ => None,
    };
    let [m, n, _] = p.sizes;
    let unit = Unit::of(t.coop.as_ref()?, float(&p.x)?, float(&p.w)?)?;
    // A tail is of f32, and its scale is no part of alpha.
    let tail = p.tail.is_none() || !unit.is_half() && p.alpha == 1.0;
    let fits = tail && m.min(n) >= LEAST && unit.shared() <= t.shared;
    (fits && t.subgroups.is_some()).then_some(unit)
}

/// Seconds of a product beyond its bytes and arithmetic; `None` where no unit takes it.
pub(super) fn seconds(t: &Target, p: &Product) -> Option<f64> {
    let unit = unit(t, p)?;
    let up = |n: usize| n.next_multiple_of(unit.tile()) as f64;
    let [m, n, k] = p.sizes;
    // Twice what the tiled kernel is taken to reach, and four times for operands half as wide.
    let rate = if unit.is_half() { 4e12 } else { 2e12 };
    let chain = k.div_ceil(2 * unit.side) as f64 * 1e-6;
    let whole = 2.0 * up(m) * up(n) * k as f64 / rate;
    Some(chain + whole - 2.0 * (m * n * k) as f64 / FLOPS_PER_S)
}

/// As [`Product::tiled`], by units.
pub(super) fn product(
    t: &Target,
    spec: &KernelSpec,
    p: &Product,
    (find, count): (&str, usize),
    numbers: &[Arg],
) -> Option<Kernel> {
    let unit = unit(t, p)?;
    let mut args = p.args()?;
    args.extend_from_slice(numbers);
    let rank = p.tail.as_ref().map_or(0, |t| t.rank);
    let tail = p.tail.as_ref();
    let (h, b) = (
        tail.map_or([1, 1], |t| t.h.strides),
        tail.map_or([1, 1], |t| t.b.strides),
    );
    let mut consts = vec![
        ("SIDE", format!("{}u", unit.side)),
        ("PAD", format!("{}u", unit.pad())),
        ("RANK", format!("{rank}u")),
        ("ADD", p.add.to_string()),
    ];
    consts.extend(ways(["ALONG_x", "DENSE_x"], p.x.strides));
    consts.extend(ways(["ALONG_w", "DENSE_w"], p.w.strides));
    consts.extend(ways(["ALONG_h", "DENSE_h"], h));
    consts.extend(ways(["ALONG_b", "DENSE_b"], b));
    let [m, n, _] = p.sizes;
    let tiles = |n: usize| u32::try_from(n.div_ceil(unit.tile())).ok();
    let draft = Draft {
        entry: "product_coop",
        body: &unit.text(find),
        consts: &consts,
        threads: SUBGROUPS * unit.lanes,
        grid: [tiles(n)?, tiles(m)?, u32::try_from(count).ok()?],
        args,
    };
    kernel(t, spec, draft)
}

#[cfg(test)]
#[path = "../../tests/conformance/products.rs"]
#[expect(dead_code, reason = "the rest is for the suite")]
mod products;

/// The texts around the units, on any GPU: threads do the work of the units.
#[cfg(test)]
mod tests {
    use super::{products, *};
    use crate::{Choice, Wgpu, WgpuOptions};
    use std::sync::{Arc, Mutex};
    use tallow_conformance::{Case, check_all};
    use tallow_core::{
        backend::{Backend, Chooser},
        kernel::Candidate,
        session::Session,
    };

    /// The units' candidate where there is one, and how often there was.
    struct ByUnits(Arc<Mutex<[usize; 2]>>);
    impl Chooser for ByUnits {
        fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> tallow_core::Result<(usize, String)> {
            let found = c.iter().position(|c| c.name.ends_with("coop"));
            let mut count = self.0.lock().expect("no panic before");
            count[usize::from(found.is_some())] += 1;
            Ok((found.unwrap_or(0), "by units".into()))
        }
    }

    /// Runs `cases` on a GPU with units made of threads, of these sides for f32 and f16.
    fn run(cases: Vec<Case>, f32s: Option<u32>, f16s: Option<u32>) {
        let options = WgpuOptions {
            adapter: Choice::Number(0),
            weights: DType::F32,
            plain: false,
            binding_bytes: None,
        };
        let gpu = match Wgpu::open(&options) {
            Ok(gpu) => gpu,
            Err(e) => {
                let required = std::env::var_os("TALLOW_REQUIRE_WGPU").is_some();
                assert!(!required, "TALLOW_REQUIRE_WGPU is set, but {e}");
                eprintln!("SKIP: {e}");
                return;
            }
        };
        let Some(lanes) = gpu.target().subgroups else {
            eprintln!("SKIP: {} has no subgroups", gpu.info().name);
            return;
        };
        if f16s.is_some() && !gpu.gpu.features.contains(wgpu::Features::SHADER_F16) {
            eprintln!("SKIP: {} has no f16 in kernels", gpu.info().name);
            return;
        }
        let gpu = gpu.with_units(Coop {
            f32s,
            f16s,
            lanes,
            by: Units::Threads,
        });
        let (count, n) = (Arc::new(Mutex::default()), cases.len());
        let chooser = Box::new(ByUnits(count.clone()));
        check_all(&Session::with_chooser(Arc::new(gpu), chooser), cases);
        let [without, with] = *count.lock().expect("no panic before");
        assert!(
            with >= n,
            "{with} of {n} products by units, {without} kernels without"
        );
    }

    #[test]
    fn products_around_units_of_f32() {
        run(products::coop(), Some(8), None);
    }

    #[test]
    fn products_around_units_of_f16() {
        run(products::coop_f16(), None, Some(8));
    }
}
