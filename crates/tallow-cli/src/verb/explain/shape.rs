//! `tallow explain --shape`: the kernels that could run one product: what each was predicted to take, what it took, and
//! which one is chosen.
//! Invariant: times are the honest clock's; a candidate that cannot be believed has none.
use super::Args;
use crate::{
    Outcome, interrupt,
    open::{self, Global},
    out,
};
use anyhow::Result;
use serde_json::json;
use tallow::{DType, cpu::pool, llm::ComputeDType};
use tallow_bench::{
    calm::Canary,
    floors::Floors,
    measure::{Row, Settings, Verdict, measure},
    probe::Probe,
    report::{seconds, table},
    suite::{
        Context,
        candidates::{Offer, candidates, parse},
    },
    work::Wall,
};

pub(super) fn run(text: &str, args: &Args, global: &Global) -> Result<Outcome> {
    let shape = parse(text, args.rank.unwrap_or(0))?;
    let threads = match global.threads {
        Some(n) => n,
        None => pool::threads_from_env()?,
    };
    let session = open::session(global, args.dtype)?;
    let dtype = match args.dtype {
        ComputeDType::F32 => DType::F32,
        ComputeDType::BF16 => DType::BF16,
    };
    let cx = Context {
        session,
        threads,
        dtype,
        quick: true,
        batch: None,
        models: vec![],
        spinner: None,
    };
    let again = || Probe::of(&Wall::new(), &cx.session, cx.dtype, cx.threads);
    let mut floors = Floors::new(again()?, again);
    let (offers, mut contenders) = candidates(&cx, shape)?;
    let mut calm = Canary::of(&cx.session, &floors.probe, cx.threads)?;
    let measured = measure(
        &Wall::new(),
        &Settings::QUICK.on(&cx.session),
        &mut contenders,
        &mut *calm,
        &interrupt::asked,
    );
    let (measured, rounds) =
        measured.ok_or_else(|| interrupt::Interrupted("nothing was measured".to_owned()))?;
    let (rows, revised) = floors.rows(&shape.to_string(), &measured);
    for what in &revised {
        eprintln!("{what}");
    }
    if !rounds.fine() {
        eprintln!("{rounds}");
    }
    let all: Vec<(&Offer, &Row)> = offers.iter().zip(&rows).collect();
    match args.json {
        true => out::json(&document(&shape.to_string(), threads, &cx, &all))?,
        false => lines(&shape.to_string(), threads, &cx, &all)?,
    }
    match rows.iter().all(|r| r.figures().is_some()) {
        true => Ok(Outcome::Fine),
        false => Ok(Outcome::OutOfTolerance),
    }
}

fn lines(shape: &str, threads: usize, cx: &Context, all: &[(&Offer, &Row)]) -> Result<()> {
    out::line(format!(
        "{shape}, {} weights, {threads} {}",
        cx.dtype,
        if threads == 1 { "thread" } else { "threads" }
    ))?;
    let wide = all.iter().map(|(o, _)| o.name.len()).max().unwrap_or(0);
    let [a, b, c, d, e] = ["predicted", "waited", "in plan", "floor", "x floor"];
    out::line(format!(
        "  {:wide$} {a:>10} {b:>10} {c:>10} {d:>10} {e:>8}",
        ""
    ))?;
    for (offer, row) in all {
        let times = match &row.verdict {
            Verdict::Invalid(reason) => format!("INVALID: {reason}"),
            Verdict::Valid(f) => format!(
                "{:>10} {:>10} {:>10} {:>8.2}  {}",
                seconds(f.waited.median),
                f.in_plan
                    .as_ref()
                    .map_or("-".to_owned(), |s| seconds(s.median)),
                seconds(row.floor.seconds),
                f.waited.median / row.floor.seconds,
                table::check(&f.check),
            ),
        };
        let predicted = seconds(offer.predicted_s);
        out::line(format!("  {:wide$} {predicted:>10} {times}", offer.name))?;
        if let Some(why) = &offer.chosen {
            out::line(format!("  {:wide$} chosen: {why}", ""))?;
        }
    }
    Ok(())
}

fn document(
    shape: &str,
    threads: usize,
    cx: &Context,
    all: &[(&Offer, &Row)],
) -> serde_json::Value {
    let one = |(offer, row): &(&Offer, &Row)| {
        json!({
            "kernel": offer.name,
            "predicted_s": offer.predicted_s,
            "chosen": offer.chosen.is_some(),
            "why": offer.chosen,
            "floor_s": row.floor.seconds,
            "waited_s": row.figures().map(|f| f.waited.median),
            "in_plan_s": row.figures().and_then(|f| f.in_plan.as_ref()).map(|s| s.median),
            "invalid": match &row.verdict {
                Verdict::Invalid(reason) => Some(reason.to_string()),
                Verdict::Valid(_) => None,
            },
        })
    };
    json!({
        "shape": shape,
        "dtype": cx.dtype.name(),
        "threads": threads,
        "candidates": all.iter().map(one).collect::<Vec<_>>(),
    })
}
