//! A curve for the terminal, in braille, and as an SVG file.
//! Absent on purpose: anything but loss by step.
use anyhow::{Context as _, Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// A point: step and loss, both dimensionless here.
pub(crate) type Point = (f64, f64);

/// Size of the terminal's drawing, in characters.
const COLUMNS: usize = 64;
const ROWS: usize = 12;
/// Dots of one braille character.
const DOTS: [usize; 2] = [2, 4];

/// Each point replaced by the mean of the `width` points up to it.
pub(crate) fn smooth(points: &[Point], width: usize) -> Vec<Point> {
    let mean = |i: usize| {
        let from = (i + 1).saturating_sub(width);
        let part = &points[from..=i];
        part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// The smallest box around some points; `None` without a finite one.
fn bounds<'a>(points: impl Iterator<Item = &'a Point>) -> Option<[f64; 4]> {
    let mut found: Option<[f64; 4]> = None;
    for (x, y) in points.filter(|p| p.0.is_finite() && p.1.is_finite()) {
        let b = found.get_or_insert([*x, *x, *y, *y]);
        *b = [b[0].min(*x), b[1].max(*x), b[2].min(*y), b[3].max(*y)];
    }
    found
}

/// The curve as lines of text.
pub(crate) fn braille(points: &[Point]) -> Vec<String> {
    let Some([x0, x1, y0, y1]) = bounds(points.iter()) else {
        return vec![];
    };
    let (wide, high) = (COLUMNS * DOTS[0], ROWS * DOTS[1]);
    let place = |v: f64, from: f64, to: f64, dots: usize| {
        let share = if to > from {
            (v - from) / (to - from)
        } else {
            0.5
        };
        (share * (dots - 1) as f64).round() as usize
    };
    let mut cells = vec![[0_u8; COLUMNS]; ROWS];
    for (x, y) in points.iter().filter(|p| p.1.is_finite()) {
        let across = place(*x, x0, x1, wide);
        let down = high - 1 - place(*y, y0, y1, high);
        cells[down / DOTS[1]][across / DOTS[0]] |= dot(across % DOTS[0], down % DOTS[1]);
    }
    let draw = |row: &[u8; COLUMNS]| -> String {
        let one = |bits: &u8| char::from_u32(0x2800 + u32::from(*bits)).unwrap_or(' ');
        row.iter().map(one).collect()
    };
    let label = |i: usize| match i {
        0 => format!("{y1:6.2}"),
        _ if i == ROWS - 1 => format!("{y0:6.2}"),
        _ => " ".repeat(6),
    };
    let mut lines: Vec<String> = cells
        .iter()
        .enumerate()
        .map(|(i, row)| format!("{} ┤{}", label(i), draw(row).trim_end_matches('\u{2800}')))
        .collect();
    lines.push(format!("       └{}", "─".repeat(COLUMNS)));
    lines.push(format!(
        "        step {x0:<10}{:>width$}",
        x1,
        width = COLUMNS - 15
    ));
    lines
}

/// The bit of a dot in a braille character: the columns' upper three dots come first.
fn dot(across: usize, down: usize) -> u8 {
    match (across, down) {
        (a, 3) => 1 << (6 + a),
        (a, d) => 1 << (3 * a + d),
    }
}

/// Writes the curve, its smoothed line, and points measured on other text.
pub(crate) fn svg(path: &Path, train: &[Point], evals: &[Point]) -> Result<()> {
    let smoothed = smooth(train, (train.len() / 20).max(1));
    let [x0, x1, y0, y1] =
        bounds(train.iter().chain(evals)).ok_or_else(|| anyhow!("there is no loss to draw"))?;
    let mut text = String::new();
    draw(&mut text, [x0, x1, y0, y1], train, &smoothed, evals)
        .map_err(|e| anyhow!("cannot draw the loss curve: {e}"))?;
    tallow::llm::files::write_atomic(path, |w| w.write_all(text.as_bytes()))
        .context("cannot write the loss curve")?;
    Ok(())
}

type Drawn<T> = Result<T, Box<dyn std::error::Error>>;

fn draw(
    text: &mut String,
    [x0, x1, y0, y1]: [f64; 4],
    train: &[Point],
    smoothed: &[Point],
    evals: &[Point],
) -> Drawn<()> {
    let root = SVGBackend::with_string(text, (800, 450)).into_drawing_area();
    root.fill(&WHITE)?;
    let pad = 0.05 * (y1 - y0).max(1e-3);
    let mut chart = ChartBuilder::on(&root)
        .caption("loss, nats a token", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(x0..x1.max(x0 + 1.0), y0 - pad..y1 + pad)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .light_line_style(WHITE)
        .y_label_formatter(&|y| format!("{y:.1}"))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    let (blue, pale, red) = (
        RGBColor(31, 90, 160),
        RGBColor(180, 205, 235),
        RGBColor(200, 60, 40),
    );
    chart.draw_series(LineSeries::new(train.iter().copied(), &pale))?;
    chart.draw_series(LineSeries::new(
        smoothed.iter().copied(),
        blue.stroke_width(2),
    ))?;
    chart.draw_series(evals.iter().map(|p| Circle::new(*p, 4, red.filled())))?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_line_goes_from_the_upper_left_to_the_lower_right() {
        let points: Vec<Point> = (0..200)
            .map(|i| (f64::from(i), f64::from(200 - i)))
            .collect();
        let lines = braille(&points);
        assert_eq!(lines.len(), ROWS + 2);
        let first = lines[0].chars().nth(8).unwrap();
        assert_ne!(first, '\u{2800}', "{lines:?}");
        assert_eq!(lines[ROWS - 1].chars().count(), 8 + COLUMNS);
        assert!(lines[0].chars().count() < 8 + COLUMNS / 4);
        assert!(lines[0].starts_with("200.00 ┤"));
    }

    #[test]
    fn odd_curves_are_drawn_too() {
        assert!(braille(&[]).is_empty());
        assert!(braille(&[(1.0, f64::NAN)]).is_empty());
        assert_eq!(braille(&[(1.0, 2.0)]).len(), ROWS + 2);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.svg");
        svg(&path, &[(1.0, 2.0)], &[]).unwrap();
        svg(&path, &[(1.0, 5.0), (2.0, 4.0)], &[(2.0, 4.5)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("nats a token") && text.contains("<circle"));
    }

    #[test]
    fn smoothing_is_a_trailing_mean() {
        let got = smooth(&[(1.0, 2.0), (2.0, 4.0), (3.0, 9.0)], 2);
        assert_eq!(got, [(1.0, 2.0), (2.0, 3.0), (3.0, 6.5)]);
    }
}
