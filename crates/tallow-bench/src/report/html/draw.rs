//! The drawings of a report's page, in SVG: bars against the floor, and the roofline.
//! Invariant: colours come from the page's style, so both follow print and the dark.

use super::text;
use crate::report::{Group, Report};

const WIDE: f64 = 960.0;
/// Room for names at the left of the bars.
const LEFT: f64 = 220.0;
const ROW: f64 = 22.0;

/// Waited times of a task's rows in units of each row's floor.
pub(super) fn bars(g: &Group) -> String {
    let high = ROW * g.rows.len() as f64 + 18.0;
    let times = |i: usize| {
        let row = &g.rows[i];
        let f = row.figures()?;
        Some([f.waited.p10, f.waited.median, f.waited.p90].map(|s| s / row.floor.seconds))
    };
    // A spread wider than this is cut off at the edge; the table has it.
    let most = (0..g.rows.len()).filter_map(times).map(|t| 1.3 * t[1]);
    let most = most.fold(2.0, f64::max);
    let x = |v: f64| LEFT + (WIDE - LEFT - 70.0) * v.min(most) / most;
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDE} {high}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\">\n"
    );
    for (i, row) in g.rows.iter().enumerate() {
        let (top, middle) = (ROW * i as f64 + 4.0, ROW * i as f64 + 11.0);
        out += &format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n",
            LEFT - 8.0,
            middle + 4.0,
            text(&short(&row.engine))
        );
        let Some([p10, median, p90]) = times(i) else {
            out += &format!(
                "<text class=\"bad\" x=\"{:.1}\" y=\"{}\">INVALID</text>\n",
                x(1.0) + 6.0,
                middle + 4.0
            );
            continue;
        };
        let class = if i == 0 { "bar" } else { "other" };
        out += &format!(
            "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{top}\" width=\"{:.1}\" height=\"14\"/>\n",
            x(median) - LEFT
        );
        out += &format!(
            "<path class=\"spread\" d=\"M{:.1} {middle}H{:.1}\"/>\n",
            x(p10),
            x(p90)
        );
        out += &format!(
            "<text class=\"faint\" x=\"{:.1}\" y=\"{}\">{median:.2}</text>\n",
            x(p90) + 6.0,
            middle + 4.0
        );
    }
    let (floor, bottom) = (x(1.0), high - 14.0);
    out += &format!("<path class=\"floor\" d=\"M{floor:.1} 0V{bottom}\"/>\n");
    out += &format!(
        "<text class=\"faint\" x=\"{floor:.1}\" y=\"{}\" text-anchor=\"middle\">floor</text>\n</svg>\n",
        high - 2.0
    );
    out
}

fn short(name: &str) -> String {
    match name.char_indices().nth(34) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

/// Axes of the roofline, both logarithmic.
struct Axes {
    x: [f64; 2],
    y: [f64; 2],
}

const HIGH: f64 = 380.0;
const MARGIN: [f64; 4] = [12.0, 150.0, 40.0, 60.0];

impl Axes {
    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let [top, right, bottom, left] = MARGIN;
        let share = |v: f64, [from, to]: [f64; 2]| (v / from).log10() / (to / from).log10();
        (
            left + (WIDE - left - right) * share(x, self.x),
            top + (HIGH - top - bottom) * (1.0 - share(y, self.y)),
        )
    }

    fn powers([from, to]: [f64; 2]) -> impl Iterator<Item = f64> {
        let (from, to) = (from.log10().ceil() as i32, to.log10().floor() as i32);
        (from..=to).map(|e| 10f64.powi(e))
    }
}

/// Rates this close are one.
const ALIKE: f64 = 1.3;

/// Arithmetic a second by arithmetic a byte.
pub(super) fn roofline(r: &Report) -> String {
    let mut points = vec![];
    for g in &r.groups {
        for row in &g.rows {
            if let (Some(f), true) = (row.figures(), row.floor.flops > 0.0) {
                let intensity = row.floor.flops / row.floor.bytes.max(1) as f64;
                let name = format!("{}, {}", g.name, row.engine);
                points.push((intensity, row.floor.flops / f.waited.median / 1e9, name));
            }
        }
    }
    let peak = match &*r.dtype {
        "bf16" => tallow::DType::BF16,
        _ => tallow::DType::F32,
    };
    let peak = r.probe.flops(peak, r.threads) / 1e9;
    let lowest = points.iter().map(|p| p.1).fold(peak, f64::min);
    let axes = Axes {
        x: [0.02, 1000.0],
        y: [(lowest / 2.0).max(peak * 1e-6), peak * 2.0],
    };
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDE} {HIGH}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\">\n"
    );
    out += &grid(&axes);
    let sizes = [
        (32, "32 KiB"),
        (1 << 10, "1 MiB"),
        (16 << 10, "16 MiB"),
        (256 << 10, "256 MiB"),
    ];
    // Sizes that are about as fast share a line.
    let mut roofs: Vec<(f64, String)> = vec![];
    for (kib, name) in sizes {
        let rate = r.probe.bytes_per_s(kib << 10, r.threads) / 1e9;
        match roofs.last_mut() {
            Some((faster, names)) if *faster < ALIKE * rate => *names += &format!(", {name}"),
            _ => roofs.push((rate, name.to_owned())),
        }
    }
    for (i, (rate, names)) in roofs.into_iter().enumerate() {
        let name = format!("{names}: {rate:.0} GB/s");
        out += &roof(&axes, rate, peak, &name, 0.25 + 0.18 * i as f64);
    }
    let (_, y) = axes.place(1.0, peak);
    out += &format!(
        "<text x=\"{}\" y=\"{:.1}\">peak {peak:.0} GFLOP/s</text>\n",
        WIDE - MARGIN[1] + 8.0,
        y + 4.0
    );
    for (intensity, rate, name) in points {
        let (x, y) = axes.place(intensity.clamp(axes.x[0], axes.x[1]), rate.max(axes.y[0]));
        out += &format!(
            "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{}: {rate:.1} GFLOP/s</title></circle>\n",
            text(&name)
        );
    }
    out + "</svg>\n"
}

fn grid(axes: &Axes) -> String {
    let mut out = String::new();
    for v in Axes::powers(axes.x) {
        let (x, bottom) = axes.place(v, axes.y[0]);
        let (_, top) = axes.place(v, axes.y[1]);
        out += &format!("<path class=\"grid\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>\n");
        let y = bottom + 14.0;
        out += &format!(
            "<text class=\"faint\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{v}</text>\n"
        );
    }
    for v in Axes::powers(axes.y) {
        let (left, y) = axes.place(axes.x[0], v);
        let (right, _) = axes.place(axes.x[1], v);
        out += &format!("<path class=\"grid\" d=\"M{left:.1} {y:.1}H{right:.1}\"/>\n");
        let (x, y) = (left - 6.0, y + 4.0);
        out += &format!(
            "<text class=\"faint\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{v}</text>\n"
        );
    }
    out += &format!(
        "<text class=\"faint\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">operations a byte (GFLOP/s upwards)</text>\n",
        WIDE / 2.0,
        HIGH - 6.0
    );
    out
}

/// A slope up to the peak, then flat; its name stands at the share `along` of the slope.
fn roof(axes: &Axes, gb_per_s: f64, peak: f64, name: &str, along: f64) -> String {
    let knee = (peak / gb_per_s).clamp(axes.x[0], axes.x[1]);
    let start = (axes.y[0] / gb_per_s).clamp(axes.x[0], knee);
    let (x0, y0) = axes.place(start, (start * gb_per_s).max(axes.y[0]));
    let (x1, y1) = axes.place(knee, (knee * gb_per_s).min(peak));
    let (x2, _) = axes.place(axes.x[1], peak);
    let mid = start * (knee / start).powf(along);
    let (tx, ty) = axes.place(mid, (mid * gb_per_s).clamp(axes.y[0], peak));
    let angle = (y1 - y0).atan2(x1 - x0).to_degrees();
    format!(
        "<path class=\"roof\" d=\"M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}H{x2:.1}\"/>\n\
         <text class=\"faint\" transform=\"translate({tx:.1} {:.1}) rotate({angle:.1})\" text-anchor=\"middle\">{}</text>\n",
        ty - 5.0,
        text(name)
    )
}
