//! Products by the matrix classes of Metal Performance Shaders, encoded on the queue that everything else goes through.
//! Invariant: nothing waits: a command buffer that holds a product is handed in between those of wgpu, and Metal keeps
//! the order of their reads and writes by itself.
//! Absent on purpose: which products; that is `glue::mps`. This file compiles for macOS alone and has never run.
use crate::{
    error::{Error, Result},
    glue::Gemm,
    gpu::Gpu,
    memory::Slab,
    recording::{Places, Window},
};
use objc2::{AllocAnyThread, rc::Retained, runtime::ProtocolObject};
use objc2_metal::{MTLBuffer, MTLDevice, MTLResourceOptions};
use objc2_metal_performance_shaders::{
    MPSDataType, MPSMatrix, MPSMatrixDescriptor, MPSMatrixMultiplication,
    MPSMatrixVectorMultiplication, MPSVector, MPSVectorDescriptor,
};
use wgpu::hal::api::Metal;

/// Metal's own handle of a buffer.
pub(crate) struct Raw(Retained<ProtocolObject<dyn MTLBuffer>>);

// SAFETY: a buffer's handle is only retained, released and named in commands, which Metal allows on any thread (wgpu holds
// its own in the same way); its contents are reached by the GPU alone.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// Is the adapter Metal's?
pub(crate) fn has(info: &wgpu::AdapterInfo) -> bool {
    info.backend == wgpu::Backend::Metal
}

fn device(gpu: &Gpu) -> Option<Retained<ProtocolObject<dyn MTLDevice>>> {
    // SAFETY: the handle is only cloned, which retains it.
    let hal = unsafe { gpu.device.as_hal::<Metal>() }?;
    Some(hal.raw_device().clone())
}

/// Memory made by Metal and known to wgpu: `size` bytes, not zeroed. `None` on an adapter of another API.
pub(crate) fn memory(gpu: &Gpu, size: u64, usage: wgpu::BufferUsages) -> Option<Result<Slab>> {
    let device = device(gpu)?;
    let options = MTLResourceOptions::StorageModePrivate;
    let Some(raw) = device.newBufferWithLength_options(size as usize, options) else {
        return Some(Err(Error::OutOfMemory { bytes: size }));
    };
    let how = wgpu::BufferDescriptor {
        label: None,
        size,
        usage,
        mapped_at_creation: false,
    };
    // SAFETY: the buffer is of this device, has `size` bytes, is neither mapped nor in use, and whoever asked for it
    // clears it before anything else reads it.
    let known = unsafe {
        let hal = wgpu::hal::metal::Device::buffer_from_raw(raw.clone(), size);
        gpu.device.create_buffer_from_hal::<Metal>(hal, &how)
    };
    Some(Ok(Slab::new(known, Some(Raw(raw)))))
}

/// A product with its matrices.
enum Made {
    Matrices(Retained<MPSMatrixMultiplication>, [Retained<MPSMatrix>; 3]),
    Vector {
        kernel: Retained<MPSMatrixVectorMultiplication>,
        matrix: Retained<MPSMatrix>,
        x: Retained<MPSVector>,
        y: Retained<MPSVector>,
    },
}

/// A product of a recording.
pub(crate) struct BoundGemm(Made);

// SAFETY: the objects are used by one thread at a time: a recording is only reached through `&mut`, and what they hold
// (buffers and numbers) may be released on any thread.
unsafe impl Send for BoundGemm {}

fn matrix(w: &Window<'_>, [rows, columns]: [usize; 2], row: usize) -> Result<Retained<MPSMatrix>> {
    let raw = raw(w)?;
    // SAFETY: `row` is at least `columns`; the window holds `rows` of them from its offset on (`Plan::verify`), all f32; the
    // recording keeps the buffer alive until the GPU is done with it.
    Ok(unsafe {
        let how = MPSMatrixDescriptor::matrixDescriptorWithRows_columns_rowBytes_dataType(
            rows,
            columns,
            row * 4,
            MPSDataType::Float32,
        );
        MPSMatrix::initWithBuffer_offset_descriptor(MPSMatrix::alloc(), raw, w.offset, &how)
    })
}

fn vector(w: &Window<'_>, n: usize) -> Result<Retained<MPSVector>> {
    let raw = raw(w)?;
    // SAFETY: as for a matrix; its `n` elements lie side by side.
    Ok(unsafe {
        let how = MPSVectorDescriptor::vectorDescriptorWithLength_dataType(n, MPSDataType::Float32);
        MPSVector::initWithBuffer_offset_descriptor(MPSVector::alloc(), raw, w.offset, &how)
    })
}

fn raw<'a>(w: &Window<'a>) -> Result<&'a ProtocolObject<dyn MTLBuffer>> {
    let missing = || Error::Refused {
        doing: "binding a product of MPS",
        why: "a buffer that Metal does not know (bug in tallow)".to_owned(),
    };
    w.buffer.raw().map(|r| &*r.0).ok_or_else(missing)
}

impl BoundGemm {
    pub(crate) fn new(gpu: &Gpu, g: &Gemm, places: &Places<'_>) -> Result<Self> {
        let missing = || Error::Refused {
            doing: "binding a product of MPS",
            why: "an operand or the device is missing (bug in tallow)".to_owned(),
        };
        let device = device(gpu).ok_or_else(missing)?;
        let read = |i: usize| places.reads.get(g.operands[i]).ok_or_else(missing);
        let (a, b) = (read(0)?, read(1)?);
        let y = places.writes.first().and_then(Option::as_ref);
        let y = y.ok_or_else(missing)?;
        let ([m, n, k], [ta, tb]) = (g.sizes, g.turned);
        let stored = |rows: usize, columns: usize, turned: bool| match turned {
            true => [columns, rows],
            false => [rows, columns],
        };
        let alpha = f64::from(g.alpha);
        // One row: y = op(b)ᵀ a. A vector's elements lie side by side only where a row of them does.
        if m == 1 && !ta {
            // SAFETY: extents are those of the matrix and vectors below.
            let kernel = unsafe {
                MPSMatrixVectorMultiplication::initWithDevice_transpose_rows_columns_alpha_beta(
                    MPSMatrixVectorMultiplication::alloc(),
                    &device,
                    !tb,
                    n,
                    k,
                    alpha,
                    0.0,
                )
            };
            return Ok(BoundGemm(Made::Vector {
                kernel,
                matrix: matrix(b, stored(k, n, tb), g.rows[1])?,
                x: vector(a, k)?,
                y: vector(y, n)?,
            }));
        }
        // SAFETY: extents are those of the matrices below.
        let kernel = unsafe {
            MPSMatrixMultiplication::initWithDevice_transposeLeft_transposeRight_resultRows_resultColumns_interiorColumns_alpha_beta(
                MPSMatrixMultiplication::alloc(),
                &device,
                ta,
                tb,
                m,
                n,
                k,
                alpha,
                0.0,
            )
        };
        let left = matrix(a, stored(m, k, ta), g.rows[0])?;
        let right = matrix(b, stored(k, n, tb), g.rows[1])?;
        let result = matrix(y, [m, n], g.rows[2])?;
        Ok(BoundGemm(Made::Matrices(kernel, [left, right, result])))
    }
    /// Encodes it into a command buffer of its own.
    pub(crate) fn encode(&self, gpu: &Gpu) -> Result<wgpu::CommandBuffer> {
        let mut encoder = gpu.encoder();
        // SAFETY: the encoder is not used in another way; its command buffer is neither ended nor kept, and the objects
        // live as long as the recording, which waits for the GPU before it goes.
        let found = unsafe {
            encoder.as_hal_mut::<Metal, _, _>(|hal| {
                let commands = hal?.raw_command_buffer()?;
                match &self.0 {
                    Made::Matrices(kernel, [left, right, result]) => kernel
                        .encodeToCommandBuffer_leftMatrix_rightMatrix_resultMatrix(
                            commands, left, right, result,
                        ),
                    Made::Vector {
                        kernel,
                        matrix,
                        x,
                        y,
                    } => kernel.encodeToCommandBuffer_inputMatrix_inputVector_resultVector(
                        commands, matrix, x, y,
                    ),
                }
                Some(())
            })
        };
        let none = || Error::Refused {
            doing: "encoding a product of MPS",
            why: "no command buffer of Metal's".to_owned(),
        };
        found.ok_or_else(none)?;
        Ok(encoder.finish())
    }
}
