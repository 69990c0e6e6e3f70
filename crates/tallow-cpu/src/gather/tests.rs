//! Tests of gathers, scatters, copies and conversions against plain loops.
//! Invariant: every pair of dtypes; places that no element goes to keep their bytes.
//! Absent on purpose: speed.

use half::{bf16, f16};

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::{Rng, close};

/// `n` numbers of a type as bytes, with the numbers in f64.
fn numbers(dtype: DType, n: usize, rng: &mut Rng) -> (Vec<u8>, Vec<f64>) {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let x = rng.f32() * 300.0;
        let bits = rng.next_u64() as u32;
        let (b, v) = match dtype {
            DType::F32 => (x.to_ne_bytes().to_vec(), f64::from(x)),
            DType::BF16 => (
                bf16::from_f32(x).to_ne_bytes().to_vec(),
                bf16::from_f32(x).to_f64(),
            ),
            DType::F16 => (
                f16::from_f32(x).to_ne_bytes().to_vec(),
                f16::from_f32(x).to_f64(),
            ),
            DType::I32 => (bits.to_ne_bytes().to_vec(), f64::from(bits as i32)),
            DType::U32 => (bits.to_ne_bytes().to_vec(), f64::from(bits)),
            DType::U8 => (vec![bits as u8], f64::from(bits as u8)),
        };
        bytes.extend(b);
        values.push(v);
    }
    (bytes, values)
}

/// The best of `guess` and its neighbours; an infinity stays.
fn nearest_even(x: f64, guess: u16, value: impl Fn(u16) -> f64) -> u16 {
    if value(guess).is_infinite() || x == 0.0 {
        return guess;
    }
    let all = [guess.wrapping_sub(1), guess, guess + 1];
    let off = |b: u16| (value(b) - x).abs();
    let near = |b: &u16| off(*b).is_finite();
    let order = |a: &u16, b: &u16| off(*a).total_cmp(&off(*b)).then((a & 1).cmp(&(b & 1)));
    all.into_iter().filter(near).min_by(order).unwrap_or(guess)
}

/// `x` as bytes of `dtype`: round to nearest even, saturate.
fn stored(x: f64, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => (x as f32).to_ne_bytes().to_vec(),
        DType::BF16 => {
            let bits = nearest_even(x, bf16::from_f32(x as f32).to_bits(), |b| {
                bf16::from_bits(b).to_f64()
            });
            bits.to_ne_bytes().to_vec()
        }
        DType::F16 => {
            let bits = nearest_even(x, f16::from_f32(x as f32).to_bits(), |b| {
                f16::from_bits(b).to_f64()
            });
            bits.to_ne_bytes().to_vec()
        }
        DType::I32 => (x as i32).to_ne_bytes().to_vec(),
        DType::U32 => (x as u32).to_ne_bytes().to_vec(),
        DType::U8 => vec![x as u8],
    }
}

/// Runs `f` with 1 to 3 threads; it returns bytes, which must agree.
fn any_threads(mut f: impl FnMut(Exec<'_>) -> Vec<u8>) {
    let mut first = None;
    for threads in 1..=3 {
        let pool = Pool::new(threads);
        let exec = Exec {
            isa: Isa::best(),
            pool: &pool,
        };
        let bytes = f(exec);
        assert_eq!(*first.get_or_insert(bytes.clone()), bytes);
    }
}

#[test]
fn rounding_is_to_nearest_even() {
    // Halfway between two bf16: to the even one; just above: up.
    assert_eq!(
        bf16::from_f32(f32::from_bits(0x3f80_8000)).to_bits(),
        0x3f80
    );
    assert_eq!(
        bf16::from_f32(f32::from_bits(0x3f81_8000)).to_bits(),
        0x3f82
    );
    assert_eq!(
        bf16::from_f32(f32::from_bits(0x3f80_8001)).to_bits(),
        0x3f81
    );
    // An integer just above halfway: rounding to f32 first would hide that.
    assert_eq!(
        <bf16 as Number>::narrow(f64::from(0x8080_0001u32)).to_f64(),
        2164260864.0
    );
    assert_eq!(
        <bf16 as Number>::narrow(f64::from(0x8080_0000u32)).to_f64(),
        2147483648.0
    );
    assert_eq!(f16::from_f32(1.0 + 1.0 / 2048.0).to_bits(), 0x3c00);
    assert_eq!(f16::from_f32(1.0 + 3.0 / 2048.0).to_bits(), 0x3c02);
}

#[test]
fn copies_between_all_dtypes_and_layouts() {
    let mut rng = Rng::fresh();
    // Shape and orders of axes in memory, input and output, outermost first.
    let cases = [
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([1, 1, 1, 1, 1, 127], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([1, 1, 1, 2, 7, 33], [0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 3, 5]),
        ([2, 3, 2, 1, 5, 3], [5, 3, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]),
        ([1, 1, 1, 1, 32, 31], [0, 1, 2, 3, 5, 4], [0, 1, 2, 3, 4, 5]),
        (
            [1, 1, 1, 1, 1, 9000],
            [0, 1, 2, 3, 4, 5],
            [0, 1, 2, 3, 4, 5],
        ),
    ];
    for (shape, x_order, y_order) in cases {
        let strides = |order: [usize; MAX_RANK], gap: usize| {
            let (mut strides, mut step) = ([0; MAX_RANK], 1);
            for axis in order.into_iter().rev() {
                strides[axis] = step;
                step *= shape[axis] + if step > 1 { 0 } else { gap };
            }
            (strides, step)
        };
        let n: usize = shape.iter().product();
        for gap in [0, 2] {
            for from in DType::ALL {
                for to in DType::ALL {
                    let ((x_strides, x_n), (y_strides, y_n)) =
                        (strides(x_order, gap), strides(y_order, gap));
                    let (x, values) = numbers(from, x_n, &mut rng);
                    any_threads(|exec| {
                        let mut y = vec![0xa5u8; y_n * to.bytes()];
                        let args = Copy {
                            shape,
                            x: x.as_ptr(),
                            from,
                            x_strides,
                            y: y.as_mut_ptr(),
                            to,
                            y_strides,
                        };
                        // SAFETY: both buffers are as long as shape and strides reach.
                        unsafe { args.run(exec) };
                        let mut want = vec![0xa5u8; y_n * to.bytes()];
                        for i in 0..n {
                            let (mut rest, mut a, mut b) = (i, 0, 0);
                            for axis in (0..MAX_RANK).rev() {
                                a += rest % shape[axis] * x_strides[axis];
                                b += rest % shape[axis] * y_strides[axis];
                                rest /= shape[axis];
                            }
                            let (a8, b8) = (from.bytes(), to.bytes());
                            let bytes = match from == to {
                                true => x[a * a8..(a + 1) * a8].to_vec(),
                                false => stored(values[a], to),
                            };
                            want[b * b8..(b + 1) * b8].copy_from_slice(&bytes);
                        }
                        assert_eq!(y, want, "{from} to {to} {shape:?} gap {gap}");
                        y
                    });
                }
            }
        }
    }
}

#[test]
fn a_stride_of_zero_repeats() {
    let x = [1.0f32, 2.0];
    let mut y = [0.0f32; 6];
    let args = Copy {
        shape: [1, 1, 1, 1, 3, 2],
        x: x.as_ptr().cast(),
        from: DType::F32,
        x_strides: [0, 0, 0, 0, 0, 1],
        y: y.as_mut_ptr().cast(),
        to: DType::F32,
        y_strides: [0, 0, 0, 0, 2, 1],
    };
    let pool = Pool::new(1);
    let isa = Isa::best();
    // SAFETY: the output has six elements.
    unsafe { args.run(Exec { isa, pool: &pool }) };
    assert_eq!(y, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
}

#[test]
fn gathers_rows_of_any_dtype() {
    let mut rng = Rng::fresh();
    for (n, v, c) in [(1, 1, 1), (2, 3, 5), (33, 13, 31), (127, 40, 33)] {
        for from in [DType::F32, DType::BF16, DType::F16] {
            for to in [DType::F32, DType::BF16] {
                let (table, values) = numbers(from, v * (c + 1), &mut rng);
                // Some ids are past the table.
                let ids: Vec<u32> = (0..n)
                    .map(|_| (rng.next_u64() % (v as u64 + 2)) as u32)
                    .collect();
                any_threads(|exec| {
                    let mut y = vec![0xa5u8; n * (c + 2) * to.bytes()];
                    let args = Gather {
                        n,
                        v,
                        c,
                        table: table.as_ptr(),
                        from,
                        table_ld: c + 1,
                        ids: ids.as_ptr(),
                        y: y.as_mut_ptr(),
                        to,
                        y_ld: c + 2,
                    };
                    // SAFETY: all buffers are as long as the arguments say.
                    unsafe { args.run(exec) };
                    let mut want = vec![0xa5u8; y.len()];
                    for (i, id) in ids.iter().enumerate() {
                        for l in 0..c {
                            let value = match (*id as usize) < v {
                                true => values[*id as usize * (c + 1) + l],
                                false => 0.0,
                            };
                            let at = (i * (c + 2) + l) * to.bytes();
                            want[at..at + to.bytes()].copy_from_slice(&stored(value, to));
                        }
                    }
                    assert_eq!(y, want);
                    y
                });
            }
        }
    }
}

#[test]
fn scattered_rows_are_summed() {
    let mut rng = Rng::fresh();
    for (n, v, c) in [(1, 1, 1), (2, 3, 5), (33, 7, 31), (300, 13, 127)] {
        let x = rng.vec(n * (c + 1));
        let ids: Vec<u32> = (0..n)
            .map(|_| (rng.next_u64() % (v as u64 + 1)) as u32)
            .collect();
        for isa in Isa::available() {
            any_threads(|exec| {
                let mut y = vec![f32::NAN; v * (c + 2)];
                let args = ScatterAdd {
                    n,
                    v,
                    c,
                    ids: ids.as_ptr(),
                    x: Rows {
                        ptr: x.as_ptr(),
                        ld: c + 1,
                    },
                    y: Rows {
                        ptr: y.as_mut_ptr(),
                        ld: c + 2,
                    },
                };
                // SAFETY: all buffers are as long as the arguments say.
                unsafe { args.run(Exec { isa, ..exec }) };
                for (at, y) in y.iter().enumerate() {
                    let (row, l) = (at / (c + 2), at % (c + 2));
                    if l >= c {
                        assert!(y.is_nan());
                        continue;
                    }
                    let hits = (0..n).filter(|i| ids[*i] as usize == row);
                    let terms: Vec<f64> = hits.map(|i| f64::from(x[i * (c + 1) + l])).collect();
                    close(*y, &terms).unwrap();
                }
                y.iter().flat_map(|y| y.to_ne_bytes()).collect()
            });
        }
    }
}

#[test]
fn fills_and_counts() {
    for dtype in DType::ALL {
        let mut y = vec![0xa5u8; 5 * dtype.bytes()];
        // SAFETY: four of five elements.
        unsafe { fill(y.as_mut_ptr(), dtype, 4, 3.0) };
        let (head, tail) = y.split_at(4 * dtype.bytes());
        assert_eq!(head, stored(3.0, dtype).repeat(4), "{dtype}");
        assert!(tail.iter().all(|b| *b == 0xa5));
    }
    let mut y = vec![f32::NAN; 12];
    // SAFETY: 2 * 3 * 2 elements.
    unsafe { iota(y.as_mut_ptr(), [2, 3, 2]) };
    assert_eq!(
        y,
        [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    );
}
