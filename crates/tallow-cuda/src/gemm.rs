//! Matrix products by cuBLASLt.
//! Invariant: f32 operands are multiplied in f32 (never TF32), bf16 ones summed in f32; the algorithm is chosen
//! once for each product and alignment, when a recording is made.
//! Absent on purpose: products that the library has no good algorithm for; those have kernels of their own.
use crate::{
    driver::{Card, Memory},
    error::{Error, Result},
    launch::{Arg, Places},
};
use cudarc::cublaslt::{
    result::{self, CublasError},
    sys::{
        self, cublasComputeType_t, cublasLtMatmulDescAttributes_t as Desc,
        cublasLtMatmulHeuristicResult_t as Choice, cublasLtMatmulPreferenceAttributes_t as Pref,
        cublasLtMatrixLayoutAttribute_t as Lay, cudaDataType_t,
    },
};
use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Arc, Mutex},
};
use tallow_core::types::DType;

/// Memory that the library may use for one product; shared by all, since one stream runs one at a time.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Products with at least this much arithmetic are worth timing their algorithms.
const WORTH_TIMING_FLOPS: f64 = 2e8;
/// Algorithms timed.
const TIMED: usize = 16;

/// A row-major matrix, or a batch of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) at: Arg,
    /// Elements past the address where it begins.
    pub(crate) offset: usize,
    pub(crate) dtype: DType,
    /// Elements between rows as stored.
    pub(crate) row: usize,
    /// Elements between matrices of a batch.
    pub(crate) batch: usize,
    /// Stored with rows and columns exchanged.
    pub(crate) transposed: bool,
}

/// What is added to a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Added {
    /// Nothing: the result is overwritten.
    Nothing,
    /// What the result holds.
    Result,
    /// Another matrix.
    Matrix(Matrix),
}

/// `out [m, n] = alpha a [m, k] b [k, n] + added (+ bias [n])`, `count` times.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub(crate) count: usize,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f32,
    pub(crate) added: Added,
    pub(crate) bias: Option<Arg>,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) out: Matrix,
}

impl Product {
    /// What is added, or the result where nothing else is.
    fn added(&self) -> &Matrix {
        match &self.added {
            Added::Matrix(m) => m,
            Added::Nothing | Added::Result => &self.out,
        }
    }
}

/// Everything an algorithm's choice depends on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 4],
    accumulate: bool,
    biased: bool,
    matrices: [(DType, usize, usize, bool); 4],
    aligned: [u32; 4],
}

/// The library, opened for one card.
pub(crate) struct Blas {
    card: Arc<Card>,
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    chosen: Mutex<HashMap<Key, sys::cublasLtMatmulAlgo_t>>,
}
// SAFETY: the handle may be used from any thread (the library says so); the workspace by one stream.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}
impl Drop for Blas {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: created in `open`, destroyed once.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// Descriptors of a product, with column-major views of the operands (the library's order): `outᵀ = bᵀ aᵀ`.
struct Described {
    desc: sys::cublasLtMatmulDesc_t,
    /// `b`, `a`, what is added, `out`.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
}
// SAFETY: handles that only their owner uses.
unsafe impl Send for Described {}
impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: created in `describe`, destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for l in self.layouts {
                let _ = result::destroy_matrix_layout(l);
            }
        }
    }
}

/// A product with its addresses and algorithm.
pub(crate) struct Bound {
    blas: Arc<Blas>,
    described: Described,
    algo: sys::cublasLtMatmulAlgo_t,
    alpha: f32,
    beta: f32,
    a: u64,
    b: u64,
    added: u64,
    out: u64,
}

fn ask(doing: &'static str) -> impl Fn(CublasError) -> Error {
    move |e| Error::Blas {
        doing,
        code: format!("{:?}", e.0),
    }
}

fn kind(d: DType) -> Result<cudaDataType_t> {
    Ok(match d {
        DType::F32 => cudaDataType_t::CUDA_R_32F,
        DType::BF16 => cudaDataType_t::CUDA_R_16BF,
        DType::F16 => cudaDataType_t::CUDA_R_16F,
        DType::I32 | DType::U32 | DType::U8 => {
            return Err(Error::Blas {
                doing: "describing a product",
                code: format!("{d} has no product (bug in tallow)"),
            });
        }
    })
}

/// Largest power of two up to 256 that divides `address`.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// Is the library there?
pub(crate) fn present() -> bool {
    // SAFETY: opens and closes a library by its name; its initialisers are trusted.
    unsafe { sys::is_culib_present() }
}

pub(crate) fn missing() -> Error {
    Error::MissingLibrary {
        library: "cuBLASLt (libcublasLt.so, CUDA's matrix products)",
        remedy: "install the CUDA toolkit or `pip install nvidia-cublas` and put its folder on LD_LIBRARY_PATH",
    }
}

impl Blas {
    pub(crate) fn open(card: &Arc<Card>) -> Result<Arc<Self>> {
        if !present() {
            return Err(missing());
        }
        card.enter()?;
        Ok(Arc::new(Blas {
            card: card.clone(),
            handle: result::create_handle().map_err(ask("opening the library"))?,
            workspace: card.alloc(WORKSPACE_BYTES)?,
            chosen: Mutex::default(),
        }))
    }
    fn describe(p: &Product, bias: Option<u64>) -> Result<Described> {
        let layout = |x: &Matrix, rows: usize, cols: usize| {
            // A row-major [rows, cols] is a column-major [cols, rows].
            let (r, c) = if x.transposed {
                (rows, cols)
            } else {
                (cols, rows)
            };
            let l = result::create_matrix_layout(kind(x.dtype)?, r as u64, c as u64, x.row as i64)
                .map_err(ask("describing a matrix"))?;
            if p.count > 1 {
                let (count, stride) = (p.count as i32, x.batch as i64);
                // SAFETY: the layout was just made; the attributes are an i32 and an i64.
                unsafe {
                    let at = (&raw const count).cast::<c_void>();
                    result::set_matrix_layout_attribute(
                        l,
                        Lay::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                        at,
                        4,
                    )
                    .map_err(ask("describing a batch"))?;
                    let at = (&raw const stride).cast::<c_void>();
                    result::set_matrix_layout_attribute(
                        l,
                        Lay::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                        at,
                        8,
                    )
                    .map_err(ask("describing a batch"))?;
                }
            }
            Ok(l)
        };
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, cudaDataType_t::CUDA_R_32F)
            .map_err(ask("describing a product"))?;
        let layouts = [
            layout(&p.b, p.k, p.n)?,
            layout(&p.a, p.m, p.k)?,
            layout(p.added(), p.m, p.n)?,
            layout(&p.out, p.m, p.n)?,
        ];
        let turned = [
            (Desc::CUBLASLT_MATMUL_DESC_TRANSA, p.b.transposed),
            (Desc::CUBLASLT_MATMUL_DESC_TRANSB, p.a.transposed),
        ];
        for (which, transposed) in turned {
            let op = i32::from(transposed);
            // SAFETY: the description was just made; the attribute is an i32.
            unsafe { result::set_matmul_desc_attribute(desc, which, (&raw const op).cast(), 4) }
                .map_err(ask("describing a product"))?;
        }
        if let Some(at) = bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            let (which, pointer) = (
                Desc::CUBLASLT_MATMUL_DESC_EPILOGUE,
                Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
            );
            // SAFETY: the description was just made; the attributes are an enum of 4 bytes and an address.
            unsafe {
                result::set_matmul_desc_attribute(desc, which, (&raw const epilogue).cast(), 4)
                    .map_err(ask("describing a product"))?;
                result::set_matmul_desc_attribute(desc, pointer, (&raw const at).cast(), 8)
                    .map_err(ask("describing a product"))?;
            }
        }
        Ok(Described { desc, layouts })
    }
    /// The library's best guesses, best first.
    fn guesses(&self, d: &Described, aligned: [u32; 4], n: usize) -> Result<Vec<Choice>> {
        let pref = result::create_matmul_pref().map_err(ask("asking for algorithms"))?;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: as many algorithms are read as the library says it wrote.
        let found = unsafe {
            let set = |which, at: *const c_void, size| {
                result::set_matmul_pref_attribute(pref, which, at, size)
                    .map_err(ask("asking for algorithms"))
            };
            set(
                Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                8,
            )?;
            let [a, b, added, out] = &aligned;
            set(
                Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                (&raw const *b).cast(),
                4,
            )?;
            set(
                Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                (&raw const *a).cast(),
                4,
            )?;
            set(
                Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                (&raw const *added).cast(),
                4,
            )?;
            set(
                Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                (&raw const *out).cast(),
                4,
            )?;
            let mut all: Vec<Choice> = vec![std::mem::zeroed(); n];
            let mut count = 0;
            let [b, a, added, out] = d.layouts;
            let code = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                d.desc,
                b,
                a,
                added,
                out,
                pref,
                n as i32,
                all.as_mut_ptr(),
                &mut count,
            );
            let _ = result::destroy_matmul_pref(pref);
            code.result().map_err(ask("asking for algorithms"))?;
            all.truncate(count.max(0) as usize);
            all
        };
        let usable = |c: &Choice| c.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        Ok(found.into_iter().filter(usable).collect())
    }
    /// A product with its addresses and the algorithm chosen for it.
    ///
    /// # Safety
    /// The addresses hold the matrices as long as the result is launched.
    pub(crate) unsafe fn bind(self: &Arc<Self>, p: &Product, places: &Places<'_>) -> Result<Bound> {
        self.card.enter()?;
        let at = |x: &Matrix| places.resolve(x.at) + (x.offset * x.dtype.bytes()) as u64;
        let (a, b, out) = (at(&p.a), at(&p.b), at(&p.out));
        let added = at(p.added());
        let bias = p.bias.map(|arg| places.resolve(arg));
        let aligned = [a, b, added, out].map(alignment);
        let side = |x: &Matrix| (x.dtype, x.row, x.batch, x.transposed);
        let key = Key {
            sizes: [p.count, p.m, p.n, p.k],
            accumulate: !matches!(p.added, Added::Nothing),
            biased: bias.is_some(),
            matrices: [side(&p.a), side(&p.b), side(p.added()), side(&p.out)],
            aligned,
        };
        let mut bound = Bound {
            blas: self.clone(),
            described: Self::describe(p, bias)?,
            // SAFETY: plain words; replaced below.
            algo: unsafe { std::mem::zeroed() },
            alpha: p.alpha,
            beta: if matches!(p.added, Added::Nothing) {
                0.0
            } else {
                1.0
            },
            a,
            b,
            added,
            out,
        };
        let mut chosen = self.chosen.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(algo) = chosen.get(&key) {
            bound.algo = *algo;
            return Ok(bound);
        }
        let flops = 2.0 * (p.count * p.m * p.n) as f64 * p.k as f64;
        // In f32 the library's first guess, so that equal runs give equal bits.
        let timed = p.a.dtype != DType::F32 && flops >= WORTH_TIMING_FLOPS;
        let all = self.guesses(&bound.described, aligned, if timed { TIMED } else { 1 })?;
        let first = all.first().ok_or_else(|| Error::Blas {
            doing: "choosing an algorithm",
            code: format!("no algorithm for {p:?}"),
        })?;
        bound.algo = first.algo;
        if all.len() > 1 {
            bound.algo = self.fastest(&mut bound, p, &all)?;
        }
        chosen.insert(key, bound.algo);
        Ok(bound)
    }
    /// Times algorithms on the operands as they lie, with a result of their own.
    fn fastest(
        &self,
        bound: &mut Bound,
        p: &Product,
        all: &[Choice],
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        let span = (p.count - 1) * p.out.batch + (p.m - 1) * p.out.row + p.n;
        let spare = self.card.alloc(span * p.out.dtype.bytes() + 256)?;
        let out = bound.out;
        bound.out = spare.at + out % 256;
        let mut best = (f64::INFINITY, all[0].algo);
        let (start, end) = (self.card.event(true)?, self.card.event(true)?);
        for c in all {
            bound.algo = c.algo;
            // SAFETY: operands are the caller's, the result is `spare`, as large as the real one.
            if unsafe { bound.launch(self.card.stream) }.is_err() {
                continue;
            }
            start.record()?;
            for _ in 0..5 {
                // SAFETY: as above.
                unsafe { bound.launch(self.card.stream)? };
            }
            end.record()?;
            end.wait()?;
            let seconds = start.seconds_to(&end)?;
            if seconds < best.0 {
                best = (seconds, c.algo);
            }
        }
        bound.out = out;
        Ok(best.1)
    }
}

impl Bound {
    /// # Safety
    /// The addresses given to `bind` are still valid.
    pub(crate) unsafe fn launch(&self, stream: cudarc::driver::sys::CUstream) -> Result<()> {
        let [b, a, added, out] = self.described.layouts;
        // SAFETY: the handles are alive; the addresses are the caller's promise; the workspace has its size.
        unsafe {
            result::matmul(
                self.blas.handle,
                self.described.desc,
                (&raw const self.alpha).cast(),
                (&raw const self.beta).cast(),
                self.b as *const c_void,
                b,
                self.a as *const c_void,
                a,
                self.added as *const c_void,
                added,
                self.out as *mut c_void,
                out,
                &self.algo,
                self.blas.workspace.at as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(ask("multiplying"))
    }
}
