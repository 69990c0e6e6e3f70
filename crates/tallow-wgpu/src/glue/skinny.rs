//! Products with few rows or few columns: the ways into adapters, and what else gives a tiled kernel a handful of
//! workgroups.
//! Invariant: a sum is cut into the same parts on every run, and they are joined in one order.
//! Absent on purpose: matrices that are dense along neither the sum nor their columns.
use super::{
    Arg, Target,
    linear::Around,
    linear_few::pick,
    matmul::{Product, Side, nothing},
    rows::part,
    word,
};
use crate::{
    launch::Kernel,
    shader::{Draft, kernel, line},
};
use std::fmt::Write;
use tallow_core::kernel::KernelSpec;

const FILE: &str = include_str!("skinny.wgsl");
/// Most columns (or rows) of a result that these kernels are offered for.
pub(super) const NARROW: usize = 64;
/// Threads that keep a large GPU busy.
const BUSY: usize = 1 << 15;

/// One `w` beside others that share `x`: `[n, k]` over `columns`, first and how many.
pub(super) struct Way {
    pub(super) n: usize,
    pub(super) w: Arg,
    /// Strides of a column of the result and along the sum.
    pub(super) strides: [usize; 2],
    pub(super) columns: [usize; 2],
    pub(super) scale: f32,
}

/// How results and threads are shared out.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cut {
    /// Rows and columns of a group of threads.
    r: usize,
    c: usize,
    /// Threads of a group and of a workgroup.
    g: usize,
    wg: usize,
}

impl Cut {
    /// For `m` rows of ways with `ns` columns over sums of `k`.
    fn new(m: usize, ns: &[usize], k: usize) -> Self {
        let groups =
            |r: usize, c: usize| m.div_ceil(r) * ns.iter().map(|n| n.div_ceil(c)).sum::<usize>();
        let most = ns.iter().copied().max().unwrap_or(1);
        let mut c = most.next_power_of_two().min(8);
        while c > 1 && groups(1, c) < 64 {
            c /= 2;
        }
        let r = match groups(1, c) {
            0..1024 => 1,
            1024..4096 => 2,
            _ => 4,
        };
        let r = r.min(m.next_power_of_two());
        let wanted = (BUSY / groups(r, c).max(1)).next_power_of_two();
        let useful = k.div_ceil(4).next_power_of_two();
        let g = wanted.min(useful).clamp(32, 256);
        // Parts of all sums lie in 8 KiB.
        let g = g.min(2048 / (r * c));
        Cut {
            r,
            c,
            g,
            wg: g.max(64),
        }
    }
}

/// WGSL that adds to `acc` the products of a way with `n` columns and matrices dense along the sum: `s` elements at a
/// time. Where all rows lie in pieces of four, none of their loads stands behind a question of its own.
fn along(cut: Cut, n: usize, s: usize) -> String {
    let step = format!("for (var i = lane * {s}u; i < whole; i += G * {s}u) {{\n{{}}}}\n");
    let [straight, asking] =
        ["get4", "ld4"].map(|load| step.replace("{}", &fours(cut, n, s, load)));
    let rest = place(cut, "i", false);
    format!(
        "let whole = K_I / {s}u * {s}u;\n\
         if (in4_x(x0) && in4_w_I(w0) && ((a.xr | WC_I) & 3u) == 0u) {{\n{straight}}} else {{\n{asking}}}\n\
         for (var i = whole + lane; i < K_I; i += G) {{\n{rest}}}\n"
    )
}

/// The products at `s` places of the sum from `i` on, which `load` brings four at a time.
fn fours(cut: Cut, n: usize, s: usize, load: &str) -> String {
    let (mut text, fours) = (String::new(), s / 4);
    for (r, f) in (0..cut.r * fours).map(|e| (e / fours, e % fours)) {
        let _ = writeln!(text, "var x{r}_{f} = {load}_x(at{r} + i + {}u);", f * 4);
        let _ = writeln!(
            text,
            "if (HAS_nw) {{ squares += dot(x{r}_{f}, x{r}_{f}); x{r}_{f} *= ld4_nw(i + {}u); }}",
            f * 4
        );
    }
    for c in 0..cut.c {
        // Columns past the end are the last one once more.
        let column = match n.is_multiple_of(cut.c) {
            true => format!("(j0 + {c}u)"),
            false => format!("min(j0 + {c}u, N_I - 1u)"),
        };
        let _ = writeln!(text, "{{ let at = w0 + {column} * WC_I + i;");
        for f in 0..fours {
            let _ = writeln!(text, "let w{f} = {load}_w_I(at + {}u);", f * 4);
        }
        for r in 0..cut.r {
            let dots = (0..fours).map(|f| format!("dot(w{f}, x{r}_{f})"));
            let sum = dots.collect::<Vec<_>>().join(" + ");
            let _ = writeln!(text, "acc[{}] += {sum};", r * cut.c + c);
        }
        text += "}\n";
    }
    text
}

/// The same with columns of `w` side by side: neighbouring threads take neighbouring places of the sum.
fn across(cut: Cut) -> String {
    let fours = cut.c.is_multiple_of(4);
    let steps: String = (0..4)
        .map(|s| place(cut, &format!("i + {s}u * G"), fours))
        .collect();
    format!(
        "var i = lane;\nfor (; i + 3u * G < K_I; i += 4u * G) {{\n{steps}}}\n\
         for (; i < K_I; i += G) {{\n{}}}\n",
        place(cut, "i", fours)
    )
}

/// The products at one place of the sum. `fours`: four columns of `w` lie side by side.
fn place(cut: Cut, i: &str, fours: bool) -> String {
    let mut text = format!("{{ let p = {i};\n");
    for r in 0..cut.r {
        let _ = writeln!(text, "var x{r} = ld_x(at{r} + p);");
        let _ = writeln!(
            text,
            "if (HAS_nw) {{ squares += x{r} * x{r}; x{r} *= ld_nw(p); }}"
        );
    }
    let (step, lanes): (usize, &[&str]) = match fours {
        true => (4, &[".x", ".y", ".z", ".w"]),
        false => (1, &[""]),
    };
    for c in (0..cut.c).step_by(step) {
        let load = match fours {
            true => "let w = four_w_I(at, N_I - min(N_I, j));",
            false => "let w = ld_w_I(at);",
        };
        let column = match fours {
            true => format!("j0 + {c}u"),
            false => format!("min(j0 + {c}u, N_I - 1u)"),
        };
        let _ = writeln!(
            text,
            "{{ let j = {column}; let at = w0 + p * WI_I + j * WC_I; {load}"
        );
        for (r, l) in (0..cut.r).flat_map(|r| (0..lanes.len()).map(move |l| (r, l))) {
            let _ = writeln!(text, "acc[{}] += x{r} * w{};", r * cut.c + c + l, lanes[l]);
        }
        text += "}\n";
    }
    text + "}\n"
}

/// Several ways from the same `x [m, ..]`, their columns side by side in `y`.
struct Many<'a> {
    m: usize,
    x: Side,
    y: Side,
    ways: &'a [Way],
    /// Rows and columns of `y` have changed places.
    swap: bool,
    /// Buffers and numbers of a norm in front.
    norm: Vec<Arg>,
}

impl Many<'_> {
    fn cut(&self) -> Cut {
        let k = self.ways.iter().map(|w| w.columns[1]).max();
        let ns: Vec<usize> = self.ways.iter().map(|w| w.n).collect();
        let cut = Cut::new(self.m, &ns, k.unwrap_or(1));
        // The squares of one row are summed.
        let r = if self.normed() { 1 } else { cut.r };
        Cut { r, ..cut }
    }
    fn normed(&self) -> bool {
        self.norm.iter().any(Arg::is_buffer)
    }
    /// The kernel. `find`: WGSL for `x0`, `w0`, `y0` of batch `z`, of which there are `count`; `args`: what it names beside
    /// `z`, and what is added to the product.
    fn kernel(
        &self,
        t: &Target,
        spec: &KernelSpec,
        (find, count): (&str, usize),
        (rest, rank, add): (Vec<Arg>, usize, bool),
    ) -> Option<Kernel> {
        if self.m == 0 || self.x.strides[1] != 1 {
            return None;
        }
        let cut = self.cut();
        let mut args = vec![self.x.arg.clone().named("x"), self.y.arg.clone().named("y")];
        args.extend([word("m", self.m)?, word("xr", self.x.strides[0])?]);
        args.extend([
            word("yr", self.y.strides[0])?,
            word("yc", self.y.strides[1])?,
        ]);
        let (mut text, mut out, mut blocks) = (String::new(), 0, vec![]);
        for (i, w) in self.ways.iter().enumerate() {
            // A row's squares are summed over the whole row.
            let whole = w.columns == [0, self.ways[0].columns[1]] && !self.swap;
            if w.n == 0 || !w.strides.contains(&1) || (self.normed() && !whole) {
                return None;
            }
            args.push(w.w.clone().named(format!("w_{i}")));
            text += &way(cut, w, &self.x).replace("_I", &format!("_{i}"));
            let _ = writeln!(text, "const OUT_{i} = {out}u;");
            out += w.n;
            blocks.push(w.n.div_ceil(cut.c));
        }
        args.extend(rest);
        args.extend(self.norm.iter().cloned());
        args.push(word("xk", self.ways.first()?.columns[1])?);
        let find = format!("{find}\n");
        let dots = "dots_I(select(x0, w0, SWAP) + C0_I, select(w0, x0, SWAP), row, j * C, lane);";
        let ended = "end_I(y0, row + e / C, j * C + e % C, v);";
        let share = |e: usize| format!("parted[{e}u * (WG + T) + id.t] = acc[{e}];\n");
        let shares: String = (0..cut.r * cut.c).map(share).collect();
        let main = part(FILE, "skinny")
            .replace("FIND\n", &find)
            .replace("DOTS", &pick(blocks.iter().copied(), dots))
            .replace("ENDED", &pick(blocks.iter().copied(), ended))
            .replace("SHARE\n", &shares);
        let body = format!(
            "var<private> acc: array<f32, R * C>;\nvar<private> squares: f32;\n\
             var<workgroup> parted: array<f32, R * C * (WG + T)>;\n{text}{main}"
        );
        let number = |n: usize| format!("{n}u");
        let consts = [
            ("R", number(cut.r)),
            ("C", number(cut.c)),
            ("G", number(cut.g)),
            ("T", number(cut.g / (cut.r * cut.c))),
            ("BLOCKS", number(blocks.iter().sum())),
            ("RANK", number(rank)),
            ("ADD", add.to_string()),
            ("SWAP", self.swap.to_string()),
        ];
        let groups = self.m.div_ceil(cut.r) * blocks.iter().sum::<usize>();
        let [gx, gy, _] = line(groups.div_ceil(cut.wg / cut.g))?;
        let draft = Draft {
            entry: "skinny",
            body: &body,
            consts: &consts,
            threads: cut.wg as u32,
            grid: [gx, gy, u32::try_from(count).ok()?],
            args,
        };
        kernel(t, spec, draft)
    }
}

/// Constants and functions of one way.
fn way(cut: Cut, w: &Way, x: &Side) -> String {
    let ([wc, wi], [c0, k]) = (w.strides, w.columns);
    let mut text = format!(
        "const WC_I = {wc}u; const WI_I = {wi}u; const N_I = {}u; const K_I = {k}u; const C0_I = {c0}u;\n\
         const SCALE_I = f32({:?});\n",
        w.n, w.scale
    );
    let (sum, rows) = match wi {
        1 => {
            let half = [&w.w, &x.arg].iter().any(|a| a.is_half());
            (
                along(cut, w.n, if half { 8 } else { 4 }),
                part(FILE, "skinny_way"),
            )
        }
        _ => {
            text += part(FILE, "skinny_four");
            (across(cut), part(FILE, "skinny_way"))
        }
    };
    let at = |r: usize| format!("let at{r} = x0 + min(row + {r}u, a.m - 1u) * a.xr;\n");
    let ats: String = (0..cut.r).map(at).collect();
    text + &rows.replace("ROWS\n", &ats).replace("SUM\n", &sum)
}

/// `y [m, Σn]`, way by way, of `x [m, ..]`: one dispatch, nothing added.
pub(super) fn ways(
    t: &Target,
    spec: &KernelSpec,
    m: usize,
    (x, y): (Side, Side),
    (ways, norm): (&[Way], Vec<Arg>),
) -> Option<Kernel> {
    let starts = vec![word("x_first", x.at)?, word("y_first", y.at)?];
    let find = "let x0 = a.x_first; let w0 = 0u; let y0 = a.y_first;";
    let many = Many {
        m,
        x,
        y,
        ways,
        swap: false,
        norm,
    };
    let rest = starts.into_iter().chain(nothing()).collect();
    many.kernel(t, spec, (find, 1), (rest, 0, false))
}

/// A product with few rows or few columns; `None` if it has many of both, or lies otherwise. `find`, `count`, `numbers`: as
/// the tiled kernel takes them.
pub(super) fn product(
    t: &Target,
    spec: &KernelSpec,
    p: &Product,
    (find, count): (&str, usize),
    numbers: &[Arg],
) -> Option<Kernel> {
    let [m, n, k] = p.sizes;
    if m.min(n) > NARROW {
        return None;
    }
    let swap = m < n && p.w.strides[1] == 1;
    let (m, n, x, w) = match swap {
        true => (n, m, &p.w, &p.x),
        false => (m, n, &p.x, &p.w),
    };
    let way = Way {
        n,
        w: w.arg.clone(),
        strides: w.strides,
        columns: [0, k],
        scale: p.alpha,
    };
    let many = Many {
        m,
        x: x.clone(),
        y: p.y.clone(),
        ways: &[way],
        swap,
        norm: Around::default().norm_args(),
    };
    let rank = p.tail.as_ref().map_or(0, |t| t.rank);
    let rest = p.added()?.into_iter().chain(numbers.iter().cloned());
    many.kernel(t, spec, (find, count), (rest.collect(), rank, p.add))
}

/// Seconds of a product `[m, n]` over `k` beyond its bytes and arithmetic: a chain of loads, and what several groups
/// read again.
pub(super) fn seconds([m, n, k]: [usize; 3]) -> f64 {
    let (m, n) = (m.max(n), m.min(n));
    let cut = Cut::new(m, &[n], k);
    let groups = (m.div_ceil(cut.r) * n.div_ceil(cut.c)) as f64;
    let chain = 1e-6 + 0.4e-6 * (k as f64 / (4 * cut.g) as f64);
    let loads = groups * ((cut.r + cut.c) * k * 4) as f64;
    // From the caches of a laptop's GPU.
    chain + loads / 5e11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_results_still_make_many_workgroups() {
        let workgroups = |m: usize, n: usize, k: usize| {
            let c = Cut::new(m, &[n], k);
            (m.div_ceil(c.r) * n.div_ceil(c.c)).div_ceil(c.wg / c.g)
        };
        assert_eq!(workgroups(128, 8, 512), 128);
        assert!(workgroups(1, 24, 896) >= 24);
        assert!(workgroups(4096, 16, 896) >= 512);
    }

    #[test]
    fn parts_fit_a_workgroup_and_every_result_has_a_thread() {
        for m in [1, 2, 3, 63, 128, 1000, 5000, 100_000] {
            for n in [1, 2, 5, 8, 24, 64] {
                for k in [1, 8, 130, 512, 14_336] {
                    let c = Cut::new(m, &[n], k);
                    let all = [c.r, c.c, c.g, c.wg];
                    assert!(all.iter().all(|v| v.is_power_of_two()), "{c:?}");
                    assert!(c.g >= c.r * c.c && c.wg >= c.g && c.wg <= 256, "{c:?}");
                    assert!(
                        c.r * c.c * (c.wg + c.g / (c.r * c.c)) * 4 <= 10 << 10,
                        "{c:?}"
                    );
                }
            }
        }
    }
}
