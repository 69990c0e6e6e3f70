//! The suite on the CPU backend, once for each instruction set this machine has.
use tallow_core::{session::Session, types::DType};
use tallow_cpu::{Cpu, CpuOptions, simd::Isa};

fn session(isa: Isa, threads: usize) -> Session {
    let options = CpuOptions {
        threads: Some(threads),
        weights: DType::F32,
        isa: Some(isa),
    };
    let cpu = Cpu::open(&options).expect("the CPU opens");
    Session::new(std::sync::Arc::new(cpu))
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
