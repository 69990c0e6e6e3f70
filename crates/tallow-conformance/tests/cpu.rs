//! The suite on the CPU backend.
use tallow_core::{session::Session, types::DType};
use tallow_cpu::{Cpu, CpuOptions};

fn session() -> Session {
    let options = CpuOptions {
        threads: Some(2),
        weights: DType::F32,
    };
    let cpu = Cpu::open(&options).expect("the CPU opens");
    Session::new(std::sync::Arc::new(cpu))
}

tallow_conformance::suite!(session());
