//! What can go wrong between the host and the GPU, one clear sentence each.
//! Absent on purpose: errors of shapes and plans, which are the core's.

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the GPU cannot be used, or stopped being usable.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No adapter at all.
    #[error(
        "no GPU found: neither Vulkan nor Metal nor DX12 shows an adapter; install the GPU's driver, on Linux with its Vulkan loader (libvulkan.so.1), or use --device cpu"
    )]
    NoAdapter,
    /// Adapters, but all of them compute on the processor.
    #[error(
        "no GPU found: the only adapter is {name}, which computes on the processor; use --device cpu, or wgpu:0 to run on it all the same"
    )]
    OnlySoftware {
        /// Its name.
        name: String,
    },
    /// No adapter with this number.
    #[error("no wgpu adapter {number}: this machine has {count}")]
    NoSuchAdapter {
        /// Number asked for.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// The adapter lacks what the kernels need.
    #[error("{name} lacks what the kernels need: {what}")]
    Lacks {
        /// Name of the adapter.
        name: String,
        /// What it lacks.
        what: String,
    },
    /// The driver refused to open the adapter.
    #[error("{name} cannot be opened: {why}")]
    Open {
        /// Name of the adapter.
        name: String,
        /// The driver's words.
        why: String,
    },
    /// An operand is larger than the adapter can bind.
    #[error(
        "{what} takes {bytes} bytes, and this adapter binds at most {most}; use a smaller model, batch or context, or --device cpu"
    )]
    Binding {
        /// Which operand.
        what: String,
        /// Its size.
        bytes: u64,
        /// The adapter's limit.
        most: u64,
    },
    /// A buffer is larger than the adapter can make.
    #[error(
        "one buffer of {bytes} bytes is wanted, and this adapter makes at most {most}; use a smaller model, batch or context, or --device cpu"
    )]
    TooLarge {
        /// Bytes asked for.
        bytes: u64,
        /// The adapter's limit.
        most: u64,
    },
    /// An allocation did not fit.
    #[error(
        "no memory on the GPU for {bytes} bytes; use a smaller batch, context or model, or end other programs that use the GPU"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The GPU went away or was reset; nothing on it can be trusted any more.
    #[error("the GPU was lost ({why}); start the program again")]
    Lost {
        /// The driver's words.
        why: String,
    },
    /// The driver refused.
    #[error("{doing}: {why}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// The driver's words.
        why: String,
    },
    /// A kernel did not compile.
    #[error("kernel {name} does not compile (bug in tallow): {log}")]
    Compile {
        /// Entry point.
        name: String,
        /// The compiler's words.
        log: String,
    },
}

impl Error {
    /// The same as the core reports it, on the device called `device`.
    pub(crate) fn on(self, device: &str) -> tallow_core::Error {
        tallow_core::Error::Device {
            device: device.into(),
            what: self.to_string(),
        }
    }
}
