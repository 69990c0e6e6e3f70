//! Every kernel that a device offers for one product, each as a contender: what `explain --shape` measures.
//! Invariant: candidates take turns under the same clock as everything else; one that fails its check has no figure.

use tallow::Session;
use tallow::core::backend::Chooser;
use tallow::core::kernel::{Candidate, KernelSpec};

use super::Context;
use super::products::{LoraShape, lora};
use crate::measure::Contender;
use crate::{Error, Result};

/// A kernel that could run the product.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// Its name.
    pub name: String,
    /// The backend's estimate, in seconds.
    pub predicted_s: f64,
    /// Why it is chosen; `None` where another one is.
    pub chosen: Option<String>,
}

/// Takes the candidate of one index wherever there are as many.
struct Pick(usize);

impl Chooser for Pick {
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> tallow::core::Result<(usize, String)> {
        Ok((self.0.min(c.len() - 1), "asked for".to_owned()))
    }
}

/// `128x512 @ 512x8` as rows, values in, values out.
///
/// # Errors
/// [`Error::Setting`] for anything else.
pub fn parse(text: &str, rank: usize) -> Result<LoraShape> {
    let wrong = || Error::Setting {
        name: "--shape",
        want: "MxK @ KxN, as in \"128x512 @ 512x8\", each from 1 to 65536",
        got: text.to_owned(),
    };
    let pair = |part: &str| -> Option<[usize; 2]> {
        let (a, b) = part.trim().split_once(['x', 'X', '×'])?;
        let number = |s: &str| s.trim().parse().ok().filter(|n| (1..=1 << 16).contains(n));
        Some([number(a)?, number(b)?])
    };
    let (x, w) = text.split_once('@').ok_or_else(wrong)?;
    match (pair(x), pair(w)) {
        (Some([m, k]), Some([k2, n])) if k == k2 => Ok(LoraShape { m, k, n, rank }),
        _ => Err(wrong()),
    }
}

/// All candidates for the product of `shape`, and the same as contenders, in the backend's order.
///
/// # Errors
/// No memory.
pub fn candidates(cx: &Context, shape: LoraShape) -> Result<(Vec<Offer>, Vec<Contender>)> {
    let default = lora(&cx.session, shape, cx.dtype)?;
    let steps = &default.plan().steps;
    let chosen = steps.iter().find(|s| s.spec.name() == "linear");
    let chosen = chosen.or(steps.last()).ok_or_else(|| Error::Setting {
        name: "--shape",
        want: "a product with a plan",
        got: shape.to_string(),
    })?;
    let (mut offers, mut contenders) = (vec![], vec![]);
    for i in 0..=chosen.rejected.len() {
        let session = Session::with_chooser(cx.session.backend().clone(), Box::new(Pick(i)));
        let work = lora(&session, shape, cx.dtype)?;
        let same = |s: &&tallow::core::plan::Step| s.spec == chosen.spec;
        let Some(step) = work.plan().steps.iter().find(same) else {
            continue;
        };
        let is_chosen = step.kernel == chosen.kernel;
        offers.push(Offer {
            name: step.kernel_name.to_owned(),
            predicted_s: step.cost,
            chosen: is_chosen.then(|| chosen.why.clone()),
        });
        let name = step.kernel_name.to_owned();
        contenders.push(cx.ours(&name, work, &shape.cost(cx.dtype)));
    }
    Ok((offers, contenders))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_and_nonsense_is_refused() {
        let want = LoraShape {
            m: 128,
            k: 512,
            n: 8,
            rank: 4,
        };
        assert_eq!(parse("128x512 @ 512x8", 4).unwrap(), want);
        assert_eq!(parse(" 128 X 512@512×8 ", 4).unwrap(), want);
        for bad in [
            "",
            "128x512",
            "128x512 @ 511x8",
            "0x1 @ 1x1",
            "ax1 @ 1x1",
            "1x99999 @ 99999x1",
        ] {
            assert!(parse(bad, 0).is_err(), "{bad}");
        }
    }

    #[test]
    fn exactly_one_candidate_is_chosen() {
        let cx = Context {
            session: tallow::open("cpu").unwrap(),
            threads: 1,
            dtype: tallow::DType::F32,
            quick: true,
            batch: None,
            models: vec![],
            spinner: None,
        };
        let shape = parse("5x24 @ 24x16", 0).unwrap();
        let (offers, contenders) = candidates(&cx, shape).unwrap();
        assert_eq!(offers.len(), contenders.len());
        assert_eq!(offers.iter().filter(|o| o.chosen.is_some()).count(), 1);
        assert!(offers.iter().all(|o| o.predicted_s > 0.0));
    }
}
