//! Tests of the interpreter against the programs' meaning in f64.
//! Invariant: every op, every dtype, dense, broadcast and transposed operands, every instruction
//! set, 1 to 3 threads, poisoned outputs.
//! Absent on purpose: speed.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::Rng;

/// Runs `f` with every instruction set and thread count; it returns bytes, which must agree.
fn everywhere(mut f: impl FnMut(Exec<'_>) -> Vec<u8>) {
    for isa in Isa::available() {
        let mut first = None;
        for threads in 1..=3 {
            let pool = Pool::new(threads);
            let bytes = f(Exec { isa, pool: &pool });
            assert_eq!(*first.get_or_insert(bytes.clone()), bytes, "{}", isa.name());
        }
    }
}

fn program(n_inputs: u16, insts: Vec<Inst>, outputs: &[u16]) -> ScalarProgram {
    ScalarProgram {
        n_inputs,
        insts,
        outputs: outputs.to_vec(),
    }
}

fn apply(op: ScalarOp, args: &[u16]) -> Inst {
    Inst::Apply(op, args.to_vec())
}

fn constant(x: f32) -> Inst {
    Inst::Const(x.to_bits())
}

fn dense(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    strides
}

fn f32_operand(strides: Vec<usize>) -> Operand {
    let dtype = DType::F32;
    Operand { dtype, strides }
}

fn index(mut i: usize, shape: &[usize], strides: &[usize]) -> usize {
    let mut at = 0;
    for (n, stride) in shape.iter().zip(strides).rev() {
        at += i % n * stride;
        i /= n;
    }
    at
}

/// Runs an f32 program; outputs are dense. Returns them and the references in f64.
fn run(
    p: &ScalarProgram,
    shape: &[usize],
    inputs: &[(Vec<f32>, Vec<usize>)],
    exec: Exec<'_>,
) -> (Vec<Vec<f32>>, Vec<Vec<f64>>) {
    let n: usize = shape.iter().product();
    let operands: Vec<_> = inputs.iter().map(|(_, s)| f32_operand(s.clone())).collect();
    let outs = vec![f32_operand(dense(shape)); p.outputs.len()];
    let code = Elementwise::new(p, shape, &operands, &outs);
    let mut ws = vec![f32::NAN; code.workspace_elems(exec.pool.threads())];
    let mut y = vec![vec![f32::NAN; n]; p.outputs.len()];
    let x: Vec<*const u8> = inputs.iter().map(|(x, _)| x.as_ptr().cast()).collect();
    let to: Vec<*mut u8> = y.iter_mut().map(|y| y.as_mut_ptr().cast()).collect();
    // SAFETY: all buffers reach as far as the strides.
    unsafe { code.run(exec, &x, &to, ws.as_mut_ptr()) };
    let mut want = vec![Vec::new(); p.outputs.len()];
    for i in 0..n {
        let load = |(x, strides): &(Vec<f32>, Vec<usize>)| f64::from(x[index(i, shape, strides)]);
        let mut regs: Vec<f64> = inputs.iter().map(load).collect();
        p.eval(&mut regs);
        for (want, o) in want.iter_mut().zip(&p.outputs) {
            want.push(regs[usize::from(*o)]);
        }
    }
    (y, want)
}

fn bytes(y: &[Vec<f32>]) -> Vec<u8> {
    y.iter().flatten().flat_map(|y| y.to_ne_bytes()).collect()
}

/// Within `ulps` of the exact value, or the same special value.
fn near(got: f32, want: f64, ulps: f64) -> bool {
    let exact = want as f32;
    let bound = f64::from(f32::EPSILON) * ulps * want.abs() + 1e-37;
    got == exact || (got.is_nan() && exact.is_nan()) || (f64::from(got) - want).abs() <= bound
}

#[test]
fn every_op_over_plain_and_special_numbers() {
    let mut rng = Rng::fresh();
    let inf = f32::INFINITY;
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        inf,
        -inf,
        f32::NAN,
        1e-40,
        3e38,
        -3e38,
        4e9,
        0.5,
    ];
    for op in ScalarOp::ALL {
        for n in [1, 2, 3, 5, 7, 13, 31, 32, 33, 127, 300, 9000] {
            let arity = op.arity();
            let mut inputs: Vec<(Vec<f32>, Vec<usize>)> = (0..arity)
                .map(|_| (rng.vec(n).iter().map(|x| x * 9.0).collect(), vec![1]))
                .collect();
            if n > 150 {
                for (i, s) in special.iter().enumerate() {
                    inputs[0].0[i * special.len()..(i + 1) * special.len()].fill(*s);
                    for (k, input) in inputs[1..].iter_mut().enumerate() {
                        for (j, t) in special.iter().enumerate() {
                            input.0[i * special.len() + (j + k) % special.len()] = *t;
                        }
                    }
                }
            }
            let args: Vec<u16> = (0..arity as u16).collect();
            let p = program(arity as u16, vec![apply(*op, &args)], &[arity as u16]);
            everywhere(|exec| {
                let (y, want) = run(&p, &[n], &inputs, exec);
                for i in 0..n {
                    // Sums of f32 are exact in f64 but for rounding; functions have their bounds.
                    let x: Vec<f32> = inputs.iter().map(|x| x.0[i]).collect();
                    let (got, want) = (y[0][i], want[0][i]);
                    assert!(near(got, want, 4.0), "{op:?} {x:?}: want {want}, got {got}");
                }
                bytes(&y)
            });
        }
    }
}

#[test]
fn an_op_without_a_vector_version_runs_by_its_reference() {
    let mut rng = Rng::fresh();
    for op in ScalarOp::ALL {
        let inputs: Vec<Vec<f32>> = (0..op.arity()).map(|_| rng.vec(37)).collect();
        let mut y = inputs[0].clone();
        let mut args = [std::ptr::null(); 3];
        for (arg, x) in args.iter_mut().zip(&inputs) {
            *arg = x.as_ptr();
        }
        args[0] = y.as_ptr();
        // SAFETY: 37 elements each; the result lies exactly where the first argument does.
        unsafe { apply::reference(*op, y.as_mut_ptr(), args, 37) };
        for i in 0..37 {
            let x: Vec<f64> = inputs.iter().map(|x| f64::from(x[i])).collect();
            let want = op.eval(&x) as f32;
            assert!(y[i] == want || (y[i].is_nan() && want.is_nan()), "{op:?}");
        }
        let registers: Vec<u16> = (0..op.arity() as u16).collect();
        let n_inputs = op.arity() as u16;
        let p = program(n_inputs, vec![apply(*op, &registers)], &[n_inputs]);
        let operands = vec![f32_operand(vec![1]); op.arity()];
        let code = Elementwise::new(&p, &[37], &operands, &[f32_operand(vec![1])]);
        let slow = code.name() == "map_blocks_reference";
        assert_eq!(slow, !apply::has_vector(*op), "{op:?}");
    }
    assert!(apply::has_vector(ScalarOp::Add));
}

#[test]
fn layouts_of_operands() {
    let mut rng = Rng::fresh();
    // (a * b + c, and -b): with constants, two outputs, operands of many layouts.
    let p = program(
        3,
        vec![
            apply(ScalarOp::Mul, &[0, 1]),
            constant(0.25),
            apply(ScalarOp::Add, &[3, 2]),
            apply(ScalarOp::Neg, &[1]),
            apply(ScalarOp::Mul, &[5, 4]),
        ],
        &[7, 6],
    );
    for shape in [
        vec![],
        vec![1],
        vec![257],
        vec![3, 7],
        vec![40, 5],
        vec![2, 3, 4, 5],
        vec![13, 127],
        vec![5, 600],
        vec![2, 1, 3, 1, 33],
    ] {
        let full = dense(&shape);
        let n: usize = shape.iter().product();
        let scalar = vec![0; shape.len()];
        let mut row = scalar.clone();
        let mut column = full.clone();
        if let (Some(r), Some(c)) = (row.last_mut(), column.last_mut()) {
            (*r, *c) = (1, 0);
        }
        // The shape's axes in the opposite order in memory.
        let back: Vec<usize> = shape.iter().rev().copied().collect();
        let turned: Vec<usize> = dense(&back).into_iter().rev().collect();
        let gaps: Vec<usize> = full.iter().map(|s| s * 3).collect();
        for strides in [&full, &scalar, &row, &column, &turned, &gaps] {
            let other = rng.vec(3 * n);
            let inputs = [
                (rng.vec(n), full.clone()),
                (other, strides.clone()),
                (rng.vec(n), turned.clone()),
            ];
            everywhere(|exec| {
                let (y, want) = run(&p, &shape, &inputs, exec);
                for (y, want) in y.iter().zip(&want) {
                    for (y, want) in y.iter().zip(want) {
                        let off = (f64::from(*y) - want).abs();
                        assert!(
                            off <= 4.0 * f64::from(f32::EPSILON),
                            "{shape:?} {strides:?}"
                        );
                    }
                }
                bytes(&y)
            });
        }
    }
}

#[test]
fn random_programs_keep_their_registers_apart() {
    let mut rng = Rng::fresh();
    // Sums and maxima of small integers are exact, so any mixed-up register shows.
    let ops = [
        ScalarOp::Add,
        ScalarOp::Sub,
        ScalarOp::Max,
        ScalarOp::Min,
        ScalarOp::Neg,
    ];
    for n in [1, 33, 600] {
        for _ in 0..40 {
            let mut insts = Vec::new();
            for i in 0..rng.next_u64() % 16 + 1 {
                let mut name = || (rng.next_u64() % (3 + i)) as u16;
                let args = [name(), name()];
                let op = ops[(rng.next_u64() % 5) as usize];
                insts.push(match rng.next_u64() % 6 {
                    0 => constant((rng.next_u64() % 9) as f32),
                    _ => apply(op, &args[..op.arity()]),
                });
            }
            let regs = 3 + insts.len() as u64;
            let outputs: Vec<u16> = (0..rng.next_u64() % 3 + 1)
                .map(|_| (rng.next_u64() % regs) as u16)
                .collect();
            let p = program(3, insts, &outputs);
            let mut input = || (0..n).map(|_| (rng.next_u64() % 19) as f32 - 9.0).collect();
            let inputs = [0; 3].map(|_| (input(), vec![1]));
            everywhere(|exec| {
                let (y, want) = run(&p, &[n], &inputs, exec);
                for (y, want) in y.iter().zip(&want) {
                    let y: Vec<f64> = y.iter().map(|y| f64::from(*y)).collect();
                    assert_eq!(y, *want, "{p:?}");
                }
                // The sign of a zero is not part of a maximum's meaning.
                y.iter()
                    .flatten()
                    .flat_map(|y| (y + 0.0).to_ne_bytes())
                    .collect()
            });
        }
    }
}

#[test]
fn a_result_may_lie_where_an_operand_does() {
    let mut rng = Rng::fresh();
    // gelu's tanh form of x, then the product with y: x is used early and late.
    let p = program(
        2,
        vec![
            apply(ScalarOp::Mul, &[0, 0]),
            apply(ScalarOp::Mul, &[2, 0]),
            constant(0.044_715),
            apply(ScalarOp::Mul, &[3, 4]),
            apply(ScalarOp::Add, &[0, 5]),
            apply(ScalarOp::Tanh, &[6]),
            apply(ScalarOp::Mul, &[7, 0]),
            apply(ScalarOp::Mul, &[8, 1]),
        ],
        &[9],
    );
    for (rows, c) in [(1, 1), (3, 33), (7, 127), (1, 5000)] {
        for place in 0..2 {
            let (x, y) = (rng.vec(rows * c), rng.vec(rows * c));
            everywhere(|exec| {
                let strides = vec![(x.clone(), vec![c, 1]), (y.clone(), vec![c, 1])];
                let (apart, _) = run(&p, &[rows, c], &strides, exec);
                let operand = f32_operand(vec![c, 1]);
                let code = Elementwise::new(
                    &p,
                    &[rows, c],
                    &[operand.clone(), operand.clone()],
                    &[operand],
                );
                let mut ws = vec![f32::NAN; code.workspace_elems(exec.pool.threads())];
                let mut both = [x.clone(), y.clone()];
                let at = both.each_mut().map(|x| x.as_mut_ptr().cast::<u8>());
                let inputs = at.map(|p| p.cast_const());
                // SAFETY: the output is one of the inputs, of the same type and strides.
                unsafe { code.run(exec, &inputs, &[at[place]], ws.as_mut_ptr()) };
                assert_eq!(both[place], apart[0]);
                bytes(&apart)
            });
        }
    }
}

#[test]
fn half_and_byte_operands_are_converted() {
    let mut rng = Rng::fresh();
    let p = program(2, vec![apply(ScalarOp::Add, &[0, 1])], &[2]);
    for n in [1, 33, 700] {
        let a: Vec<half::bf16> = rng.vec(n).into_iter().map(half::bf16::from_f32).collect();
        let b: Vec<u8> = (0..n).map(|_| rng.next_u64() as u8).collect();
        everywhere(|exec| {
            let operand = |dtype| Operand {
                dtype,
                strides: vec![1],
            };
            let inputs = [operand(DType::BF16), operand(DType::U8)];
            let code = Elementwise::new(&p, &[n], &inputs, &[operand(DType::F16)]);
            let mut y = vec![half::f16::NAN; n];
            let mut ws = vec![f32::NAN; code.workspace_elems(exec.pool.threads())];
            let x = [a.as_ptr().cast(), b.as_ptr().cast()];
            // SAFETY: all buffers have `n` elements.
            unsafe { code.run(exec, &x, &[y.as_mut_ptr().cast()], ws.as_mut_ptr()) };
            for i in 0..n {
                assert_eq!(y[i], half::f16::from_f32(a[i].to_f32() + f32::from(b[i])));
            }
            y.iter().flat_map(|y| y.to_ne_bytes()).collect()
        });
    }
}

#[test]
fn integers_are_exact_beyond_24_bits() {
    let mut rng = Rng::fresh();
    let p = program(
        2,
        vec![
            apply(ScalarOp::Add, &[0, 1]),
            apply(ScalarOp::Less, &[0, 1]),
        ],
        &[2, 3],
    );
    for n in [1, 33, 3000] {
        let a: Vec<u32> = (0..n).map(|_| rng.next_u64() as u32 / 2).collect();
        let b: Vec<u32> = (0..n)
            .map(|i| {
                if i % 3 == 0 {
                    a[i] + 1
                } else {
                    rng.next_u64() as u32 / 2
                }
            })
            .collect();
        everywhere(|exec| {
            let operand = || Operand {
                dtype: DType::U32,
                strides: vec![1],
            };
            let code = Elementwise::new(&p, &[n], &[operand(), operand()], &[operand(), operand()]);
            let mut y = [vec![u32::MAX; n], vec![u32::MAX; n]];
            let mut ws = vec![f32::NAN; code.workspace_elems(exec.pool.threads())];
            let x = [a.as_ptr().cast(), b.as_ptr().cast()];
            let to = y.each_mut().map(|y| y.as_mut_ptr().cast());
            // SAFETY: all buffers have `n` elements.
            unsafe { code.run(exec, &x, &to, ws.as_mut_ptr()) };
            for i in 0..n {
                assert_eq!((y[0][i], y[1][i]), (a[i] + b[i], u32::from(a[i] < b[i])));
            }
            y.iter().flatten().flat_map(|y| y.to_ne_bytes()).collect()
        });
    }
}
