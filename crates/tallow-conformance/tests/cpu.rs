//! The suite on the CPU backend, once for each instruction set this machine has, and with the kernels that estimates
//! would not choose.
use tallow_core::{
    backend::Chooser,
    kernel::{Candidate, KernelSpec},
    session::Session,
    types::DType,
};
use tallow_cpu::{Cpu, CpuOptions, simd::Isa};

fn cpu(isa: Isa, threads: usize) -> std::sync::Arc<Cpu> {
    let options = CpuOptions {
        threads: Some(threads),
        weights: DType::F32,
        isa: Some(isa),
    };
    std::sync::Arc::new(Cpu::open(&options).expect("the CPU opens"))
}

fn session(isa: Isa, threads: usize) -> Session {
    Session::new(cpu(isa, threads))
}

/// The dearest candidate: what is offered but seldom chosen is tested too.
struct Dearest;
impl Chooser for Dearest {
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> tallow_core::Result<(usize, String)> {
        let dearest = (0..c.len()).max_by(|a, b| c[*a].cost.total_cmp(&c[*b].cost));
        Ok((dearest.unwrap_or(0), "dearest".into()))
    }
}

mod dearest {
    use super::*;
    tallow_conformance::suite!(Session::with_chooser(
        cpu(Isa::best(), 2),
        Box::new(Dearest)
    ));
}

mod best {
    use super::*;
    tallow_conformance::suite!(session(Isa::best(), 2));
}

mod portable {
    use super::*;
    tallow_conformance::suite!(session(Isa::Portable, 1));
}

#[test]
fn every_instruction_set_between_best_and_portable() {
    let rest = Isa::available().filter(|i| *i != Isa::best() && *i != Isa::Portable);
    for isa in rest {
        let s = session(isa, 3);
        tallow_conformance::check_all(&s, tallow_conformance::composites());
        tallow_conformance::check_all(&s, tallow_conformance::structural());
        tallow_conformance::check_all(&s, tallow_conformance::layouts());
        tallow_conformance::check_all(&s, tallow_conformance::training());
    }
}

/// In bf16 frozen weights are rounded, and where the processor multiplies bf16 the other operand too: within two
/// percent of the oracle in norm, and never exact by accident of another path.
#[test]
fn products_in_bf16_are_near_the_oracle() {
    let rounded_ops = ["linear", "lora_linear", "lora_linear_grad", "linear_grad"];
    for isa in Isa::available() {
        let options = CpuOptions {
            threads: Some(2),
            weights: DType::BF16,
            isa: Some(isa),
        };
        let s = Session::new(std::sync::Arc::new(Cpu::open(&options).expect("opens")));
        let (mut bad, mut rounded, mut count) = (vec![], 0, 0);
        for case in tallow_conformance::composites() {
            let op = case.name.split(' ').next().unwrap_or_default();
            // Only weights that never change are rounded.
            if !rounded_ops.contains(&op) || !case.name.contains("Frozen") {
                continue;
            }
            for d in tallow_conformance::distance(&s, &case).expect("runs") {
                count += 1;
                rounded += usize::from(d > 1e-5);
                if d.is_nan() || d > 2e-2 {
                    bad.push(format!("{}: {d:.2e}", case.name));
                }
            }
        }
        assert!(bad.is_empty(), "{}: {}", isa.name(), bad.join("\n"));
        assert!(
            rounded * 4 > count,
            "{}: only {rounded} of {count} results were rounded: bf16 did not run",
            isa.name()
        );
    }
}
