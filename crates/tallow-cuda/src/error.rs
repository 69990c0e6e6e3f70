//! What can go wrong between the host and the card, one clear sentence each.
//! Absent on purpose: errors of shapes and plans, which are the core's.
use cudarc::driver::{DriverError, sys::CUresult};

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the card cannot be used, or stopped being usable.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shared library that is loaded at run time is not there.
    #[error("{library} was not found; {remedy}")]
    MissingLibrary {
        /// The library, by what it is for.
        library: &'static str,
        /// Where it comes from.
        remedy: &'static str,
    },
    /// The driver is there, but no card with this number.
    #[error("no CUDA device {ordinal}: the driver sees {count}")]
    NoDevice {
        /// Number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The card lacks instructions that the kernels use.
    #[error("{name} has compute capability {}.{}; want 8.0 or newer", capability.0, capability.1)]
    TooOld {
        /// Name of the card.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// The compiler makes code that the driver cannot load.
    #[error(
        "the NVIDIA driver is for CUDA {}.{}, and NVRTC is that of CUDA {}.{}; install a newer driver, or an NVRTC of CUDA {}",
        driver.0, driver.1, compiler.0, compiler.1, driver.0
    )]
    OldDriver {
        /// The driver's version.
        driver: (i32, i32),
        /// The compiler's.
        compiler: (i32, i32),
    },
    /// An allocation did not fit.
    #[error(
        "no memory on the card for {wanted} bytes ({free} of {total} free); use a smaller batch, context or model, or end other programs that use the card"
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free then.
        free: usize,
        /// Bytes the card has.
        total: usize,
    },
    /// The card faulted or went away; nothing on it can be trusted any more.
    #[error("the card failed while {doing} ({code}); start the program again")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// The driver's name of the failure.
        code: String,
    },
    /// The driver refused.
    #[error("{doing}: the driver says {code}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's name of the failure.
        code: String,
    },
    /// The product library refused.
    #[error("{doing}: cuBLASLt says {code}")]
    Blas {
        /// What was being done.
        doing: &'static str,
        /// The library's name of the failure.
        code: String,
    },
    /// A kernel did not compile.
    #[error("kernel {name} does not compile for {arch} (bug in tallow): {log}")]
    Compile {
        /// Entry point.
        name: String,
        /// Architecture, `sm_90a`.
        arch: String,
        /// The compiler's words.
        log: String,
    },
}

impl Error {
    /// Does a driver of that version load what the compiler makes?
    pub(crate) fn fits(driver: (i32, i32), compiler: (i32, i32)) -> Result<()> {
        match driver.0 < compiler.0 {
            true => Err(Error::OldDriver { driver, compiler }),
            false => Ok(()),
        }
    }
    /// What the driver's `e` means while `doing` something other than allocating.
    pub(crate) fn driver(doing: &'static str, e: DriverError) -> Self {
        let code = format!("{:?}", e.0);
        let lost = matches!(
            e.0,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
                | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
        );
        match lost {
            true => Error::Lost { doing, code },
            false => Error::Driver { doing, code },
        }
    }
    /// The same as the core reports it, on the device called `device`.
    pub(crate) fn on(self, device: &str) -> tallow_core::Error {
        tallow_core::Error::Device {
            device: device.into(),
            what: self.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_must_not_be_older_than_the_compiler() {
        let old = Error::fits((12, 8), (13, 0)).unwrap_err().to_string();
        assert!(
            old.contains("CUDA 12.8") && old.contains("an NVRTC of CUDA 12"),
            "{old}"
        );
        // Within a major version either may be newer.
        for driver in [(13, 0), (13, 1), (14, 0)] {
            Error::fits(driver, (13, 1)).unwrap();
        }
    }

    #[test]
    fn a_fault_is_a_lost_device_and_a_refusal_is_not() {
        let fault = Error::driver("reading", DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        assert!(
            fault
                .to_string()
                .starts_with("the card failed while reading (CUDA_ERROR_ILLEGAL_ADDRESS)")
        );
        let refused = Error::driver("reading", DriverError(CUresult::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(
            refused.to_string(),
            "reading: the driver says CUDA_ERROR_INVALID_VALUE"
        );
    }
}
