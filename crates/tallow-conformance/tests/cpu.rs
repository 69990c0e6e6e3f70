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
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> (usize, String) {
        let dearest = (0..c.len()).max_by(|a, b| c[*a].cost.total_cmp(&c[*b].cost));
        (dearest.unwrap_or(0), "dearest".into())
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
