//! The cases: graphs with inputs. Composites bring their own examples; a new op needs no line here.
use tallow_core::{
    Result,
    graph::{Builder, Graph, Node, NodeId, Update},
    op::{AdamW, Composite, LinearIns, Op, ReduceOp, Role},
    oracle::{Value, sample},
    scalar::ScalarOp,
    types::{DType, Layout, Shape, TensorType},
};

/// One graph with its inputs.
pub struct Case {
    /// For messages.
    pub name: String,
    /// The computation.
    pub graph: Graph,
    /// By input slot.
    pub inputs: Vec<Value>,
}

/// A new seed on every run; printed with a failure through the case's name.
fn seed() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |d| d.subsec_nanos())
}

/// Builds a case from operand types and a function that makes its outputs.
fn case(
    name: impl Into<String>,
    tys: &[(Role, TensorType)],
    f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<Vec<NodeId>>,
) -> Case {
    let (mut b, seed, name) = (Builder::default(), seed(), name.into());
    let ins: Vec<NodeId> = tys.iter().map(|(r, t)| b.input(*r, t.clone())).collect();
    let outs = f(&mut b, &ins).unwrap_or_else(|e| panic!("case {name} does not type-check: {e}"));
    let inputs = tys.iter().enumerate();
    Case {
        graph: b.finish(outs, vec![]),
        inputs: inputs
            .map(|(i, (_, t))| sample::random(t, 5, seed, i as u32))
            .collect(),
        name: format!("{name} (seed {seed})"),
    }
}

fn data(shapes: &[&[usize]]) -> Vec<(Role, TensorType)> {
    shapes
        .iter()
        .map(|s| (Role::Data, TensorType::f32(*s)))
        .collect()
}

/// Every composite in every example, with its weights frozen and not, all results and each alone.
pub fn composites() -> Vec<Case> {
    let mut all = vec![];
    for (i, (c, tys)) in Composite::examples().into_iter().enumerate() {
        for role in [Role::Frozen, Role::Data] {
            let seed = seed().wrapping_add(i as u32);
            let mut b = Builder::default();
            let ins: Vec<NodeId> = tys.iter().map(|t| b.input(role, t.clone())).collect();
            let Ok(outs) = b.composite(c.clone(), &ins) else {
                panic!("example {i} of {} does not type-check", c.name())
            };
            let single = (outs.len() > 1).then(|| outs.iter().map(|o| vec![*o]));
            let mut wanted = vec![outs.clone()];
            wanted.extend(single.into_iter().flatten());
            for outs in wanted {
                let mut b = Builder::default();
                let ins: Vec<NodeId> = tys.iter().map(|t| b.input(role, t.clone())).collect();
                if b.composite(c.clone(), &ins).is_err() {
                    continue;
                }
                let name = format!(
                    "{} example {i} {role:?} results {outs:?} {tys:?} (seed {seed})",
                    c.name()
                );
                all.push(Case {
                    name,
                    graph: b.finish(outs, vec![]),
                    inputs: sample::operands(&c, &tys, seed),
                });
            }
        }
    }
    all
}

/// `case` of one composite with its activations negated on the way in, and its f32 results on the way out: so they are
/// intermediates, which a device may store in half the bytes. Weights stay as they are.
///
/// # Errors
/// None that the case itself does not give.
pub fn inside(case: &Case) -> Result<Case> {
    let negated = |b: &mut Builder, x: NodeId| match b.ty(x).dtype {
        DType::F32 => b.map(ScalarOp::Neg, &[x]),
        _ => Ok(x),
    };
    let kept: Vec<NodeId> = case.graph.nodes.iter().flat_map(weights).collect();
    let mut b = Builder::default();
    let mut map: Vec<NodeId> = vec![];
    let mut inputs = case.inputs.clone();
    for (id, n) in case.graph.iter() {
        let ins: Vec<NodeId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        map.push(match n.op {
            Op::Input(slot, role) if kept.contains(&id) => b.input_at(slot, role, n.ty.clone()),
            Op::Input(slot, _) => {
                let x = b.input_at(slot, Role::Data, n.ty.clone());
                if n.ty.dtype == DType::F32 {
                    let data = &mut inputs[slot as usize].data;
                    data.iter_mut().for_each(|v| *v = -*v);
                }
                negated(&mut b, x)?
            }
            _ => b.push(n.op.clone(), &ins)?,
        });
    }
    let outs = case.graph.outputs.iter();
    let outs = outs.map(|o| negated(&mut b, map[o.index()]));
    let outs = outs.collect::<Result<Vec<_>>>()?;
    Ok(Case {
        name: format!("{} inside", case.name),
        graph: b.finish(outs, vec![]),
        inputs,
    })
}

/// Operands of a composite that are not activations.
fn weights(n: &Node) -> Vec<NodeId> {
    let Op::Composite(c) = &n.op else {
        return vec![];
    };
    let of = |ins: Vec<LinearIns>| {
        let all = ins.into_iter().flat_map(|i| {
            let ab = i.ab.into_iter().flatten().flat_map(|(a, b)| [a, b]);
            ab.chain(i.bias).chain([i.w]).collect::<Vec<_>>()
        });
        all.collect()
    };
    let at = match c {
        Composite::Linear(l) => of(l.ins()),
        Composite::LinearGrad(l) => of(l.ins()),
        Composite::CrossEntropy(_) | Composite::RmsNorm(_) | Composite::RmsNormGrad(_) => vec![1],
        Composite::AddRmsNorm(_) | Composite::Rope(_) => vec![2],
        Composite::LayerNorm(_) => vec![1, 2],
        _ => vec![],
    };
    at.into_iter().map(|i| n.inputs[i]).collect()
}

/// Every structural op on awkward shapes.
pub fn structural() -> Vec<Case> {
    let mut all = vec![];
    for op in ScalarOp::ALL {
        for s in [&[1usize][..], &[7, 33], &[3, 5, 257]] {
            let tys = data(&vec![s; op.arity()]);
            all.push(case(op.name(), &tys, |b, x| {
                let mut x = x.to_vec();
                if op.wants_positive() {
                    for x in &mut x {
                        *x = b.map(ScalarOp::Mul, &[*x, *x])?;
                    }
                }
                Ok(vec![b.map(*op, &x)?])
            }));
        }
    }
    for r in [ReduceOp::Sum, ReduceOp::Max] {
        for (s, axis) in [
            (&[1usize][..], 0),
            (&[7, 33], 1),
            (&[7, 33], 0),
            (&[3, 129, 5], 1),
            (&[2, 3, 1031], 2),
        ] {
            all.push(case(
                format!("{r:?} {s:?} axis {axis}"),
                &data(&[s]),
                |b, x| Ok(vec![b.push(Op::Reduce(r, axis), x)?]),
            ));
        }
    }
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        for [n, m, k, l] in [
            [1, 1, 1, 1],
            [1, 3, 7, 5],
            [2, 33, 31, 65],
            [1, 129, 8, 127],
            [3, 17, 130, 2],
        ] {
            let (a, c) = (
                if ta { [k, m] } else { [m, k] },
                if tb { [l, k] } else { [k, l] },
            );
            let tys = data(&[&[n, a[0], a[1]], &[n, c[0], c[1]]]);
            let alpha = (-0.75).into();
            all.push(case(
                format!("matmul {n} {m}x{k}x{l} {ta} {tb}"),
                &tys,
                |b, x| Ok(vec![b.push(Op::MatMul { ta, tb, alpha }, x)?]),
            ));
        }
    }
    // Adapter gradients: a long sum over rows, few columns on one side.
    for [rows, r, n] in [[1, 1, 1], [130, 8, 96], [67, 5, 33], [512, 64, 65]] {
        let tys = data(&[&[rows, r], &[rows, n]]);
        all.push(case(format!("outer {rows} {r} {n}"), &tys, |b, x| {
            Ok(vec![
                b.matmul(x[0], true, x[1], false)?,
                b.matmul(x[1], true, x[0], false)?,
            ])
        }));
    }
    // Few outputs, weights that never change, no adapter: an adapter's own product.
    for [m, k, n] in [
        [1, 33, 4],
        [9, 512, 8],
        [128, 512, 8],
        [131, 515, 9],
        [300, 68, 64],
        [17, 1028, 3],
    ] {
        let tys = [
            (Role::Data, TensorType::f32([m, k])),
            (Role::Frozen, TensorType::f32([n, k])),
        ];
        all.push(case(format!("thin linear {m}x{k}x{n}"), &tys, |b, x| {
            linear(b, x[0], x[1])
        }));
    }
    all.extend(views());
    all
}

/// Concatenations, windows, padding, tables, indices.
fn views() -> Vec<Case> {
    let table = [
        (Role::Frozen, TensorType::f32([5, 7])),
        (Role::Data, TensorType::u32([3, 2])),
    ];
    let rows = [
        (Role::Data, TensorType::u32([9])),
        (Role::Data, TensorType::f32([9, 7])),
    ];
    vec![
        case("concat", &data(&[&[3, 4], &[3, 5], &[3, 1]]), |b, x| {
            let y = b.map(ScalarOp::Neg, &[x[1]])?;
            Ok(vec![b.push(Op::Concat(1), &[x[0], y, x[2], x[0]])?])
        }),
        case("concat of concat", &data(&[&[2, 3], &[2, 3]]), |b, x| {
            let (p, q) = (
                b.map(ScalarOp::Exp, &[x[0]])?,
                b.map(ScalarOp::Abs, &[x[1]])?,
            );
            let inner = b.push(Op::Concat(1), &[p, q])?;
            let r = b.map(ScalarOp::Tanh, &[x[0]])?;
            Ok(vec![b.push(Op::Concat(1), &[r, inner])?, r])
        }),
        case("pad", &data(&[&[3, 4]]), |b, x| {
            let (axis, before, after) = (1, 2, 3);
            Ok(vec![b.push(
                Op::Pad {
                    axis,
                    before,
                    after,
                },
                x,
            )?])
        }),
        case("slice permute reshape", &data(&[&[4, 6, 5]]), |b, x| {
            let s = b.slice(x[0], 1, 2, 3)?;
            let p = b.permute(s, &[2, 0, 1])?;
            Ok(vec![b.reshape(p, [5, 12])?, p, s])
        }),
        case("broadcast", &data(&[&[4, 1, 3]]), |b, x| {
            Ok(vec![b.push(Op::Broadcast([2, 4, 5, 3].into()), x)?])
        }),
        case(
            "constants and inputs as outputs",
            &data(&[&[2, 2]]),
            |b, x| {
                let c = b.scalar(2.5);
                let wide = b.broadcast(c, &[3, 2].into())?;
                Ok(vec![c, wide, x[0], x[0]])
            },
        ),
        case("iota", &[], |b, _| {
            Ok(vec![
                b.push(Op::Iota([3, 4, 5].into(), 1), &[])?,
                b.push(Op::Iota([7].into(), 0), &[])?,
            ])
        }),
        case("gather", &table, |b, x| {
            Ok(vec![b.push(Op::Gather(DType::F32), x)?])
        }),
        case("scatter add", &rows, |b, x| {
            Ok(vec![b.push(Op::ScatterAdd(6), x)?])
        }),
        case("random", &[(Role::Data, TensorType::u32([2]))], |b, x| {
            let draw = |b: &mut Builder, id, n: usize| {
                b.push(
                    Op::Random {
                        id,
                        shape: [n].into(),
                    },
                    x,
                )
            };
            Ok(vec![draw(b, 1, 1)?, draw(b, 2, 37)?, draw(b, 3, 1030)?])
        }),
    ]
}

/// Conversions between all dtypes, and elementwise work in each.
pub fn dtypes() -> Vec<Case> {
    let mut all = vec![];
    for from in DType::ALL {
        for to in DType::ALL {
            if from.is_float() && !to.is_float() {
                continue; // out of range is not defined
            }
            let ty = [(Role::Data, TensorType::new([3, 21], from))];
            all.push(case(format!("{from} to {to}"), &ty, |b, x| {
                Ok(vec![b.push(Op::Cast(to), x)?])
            }));
        }
        let ty = vec![(Role::Data, TensorType::new([5, 19], from)); 2];
        all.push(case(format!("add in {from}"), &ty, |b, x| {
            Ok(vec![b.push(Op::Map(ScalarOp::Add), x)?])
        }));
        let table = [
            (Role::Frozen, TensorType::new([5, 7], from)),
            (Role::Data, TensorType::u32([9])),
        ];
        all.push(case(format!("gather from {from}"), &table, |b, x| {
            Ok(vec![b.push(Op::Gather(from), x)?])
        }));
    }
    for w in [DType::BF16, DType::F16] {
        let tys = [
            (Role::Data, TensorType::f32([6, 40])),
            (Role::Frozen, TensorType::new([33, 40], w)),
        ];
        all.push(case(format!("linear over {w} weights"), &tys, |b, x| {
            linear(b, x[0], x[1])
        }));
    }
    all
}

fn linear(b: &mut Builder, x: NodeId, w: NodeId) -> Result<Vec<NodeId>> {
    let block = tallow_core::op::Block {
        n: b.shape(w).0[0],
        bias: false,
        adapters: vec![None],
    };
    let op = tallow_core::op::Linear {
        blocks: vec![block],
        residual: false,
    };
    b.composite(op, &[x, w])
}

/// Operands that are windows of wider values and results that land in them.
pub fn layouts() -> Vec<Case> {
    let mut all = vec![];
    for (i, (c, tys)) in Composite::examples().into_iter().enumerate() {
        let seed = seed().wrapping_add(i as u32);
        let values = sample::operands(&c, &tys, seed);
        let mut b = Builder::default();
        let (mut ins, mut inputs) = (vec![], vec![]);
        for (t, v) in tys.iter().zip(&values) {
            let (wide, value) = widened(t, v);
            let x = b.input(Role::Data, wide.clone());
            ins.push(cut(&mut b, x, &wide, t));
            inputs.push(value);
        }
        let Ok(outs) = b.composite(c.clone(), &ins) else {
            panic!("example {i} of {} does not type-check", c.name())
        };
        // Each result beside a constant: it is written straight into the wider one.
        let mut wide = vec![];
        for o in outs {
            let axis = b.shape(o).rank() - 1;
            let one = b.scalar(1.0);
            let edge = b.shape(o).with(axis, 3);
            let edge = b
                .broadcast(one, &edge)
                .and_then(|e| b.cast(e, b.ty(o).dtype));
            let joined = edge.and_then(|e| b.push(Op::Concat(axis), &[e, o, e]));
            wide.push(joined.unwrap_or_else(|e| panic!("case {i}: {e}")));
        }
        all.push(Case {
            name: format!("strided {} example {i} {tys:?} (seed {seed})", c.name()),
            graph: b.finish(wide, vec![]),
            inputs,
        });
    }
    all
}

/// The value inside one that is wider along the innermost axis.
fn widened(t: &TensorType, v: &Value) -> (TensorType, Value) {
    let wide = TensorType::new(t.shape.with_last(t.shape.last() + 5), t.dtype);
    let mut out = Value::full(wide.clone(), 3.0);
    let window = Layout::contiguous(&wide.shape).slice(t.shape.rank() - 1, 2, t.shape.last());
    for (i, x) in v.data.iter().enumerate() {
        out.data[window.index(i)] = *x;
    }
    (wide, out)
}

fn cut(b: &mut Builder, x: NodeId, wide: &TensorType, t: &TensorType) -> NodeId {
    let axis = wide.shape.rank() - 1;
    b.slice(x, axis, 2, t.shape.last())
        .unwrap_or_else(|e| panic!("window of {wide}: {e}"))
}

/// A small training step: loss, gradients, optimizer in place; two losses of one state; swaps.
pub fn training() -> Vec<Case> {
    let mut all = vec![];
    for [rows, c, r] in [[5, 8, 2], [33, 40, 5]] {
        let seed = seed();
        let (mut b, mut tys) = (Builder::default(), vec![]);
        let mut input = |b: &mut Builder, role, shape: &[usize]| {
            tys.push(TensorType::f32(shape));
            b.input(role, TensorType::f32(shape))
        };
        let x = input(&mut b, Role::Data, &[rows, c]);
        let w = input(&mut b, Role::Frozen, &[c, c]);
        let p = input(&mut b, Role::State, &[2 * r * c]);
        let m = input(&mut b, Role::State, &[2 * r * c]);
        let v = input(&mut b, Role::State, &[2 * r * c]);
        let h = input(&mut b, Role::Data, &[8]);
        let made = step(&mut b, x, w, p, [m, v, h], r);
        let (outs, updates) = made.unwrap_or_else(|e| panic!("training case: {e}"));
        let graph = b.finish(outs, updates);
        let mut inputs: Vec<Value> = tys
            .iter()
            .enumerate()
            .map(|(i, t)| sample::random(t, 5, seed, i as u32))
            .collect();
        inputs[4].data.iter_mut().for_each(|v| *v = v.abs());
        inputs[5].data.copy_from_slice(
            &[0.01, 0.9, 0.99, 1e-6, 0.01, 0.1, 0.1, 1.0].map(|v: f32| f64::from(v)),
        );
        all.push(Case {
            name: format!("training step {rows} {c} {r} (seed {seed})"),
            graph,
            inputs,
        });
    }
    let state = |b: &mut Builder| b.input(Role::State, TensorType::f32([9]));
    let mut b = Builder::default();
    let (p, q) = (state(&mut b), state(&mut b));
    let sum = b
        .map(ScalarOp::Add, &[p, q])
        .unwrap_or_else(|e| panic!("{e}"));
    let updates = vec![Update { slot: 0, value: q }, Update { slot: 1, value: p }];
    all.push(Case {
        name: "two states swapped".into(),
        graph: b.finish(vec![sum], updates),
        inputs: (0..2)
            .map(|i| sample::random(&TensorType::f32([9]), 5, seed(), i))
            .collect(),
    });
    let mut b = Builder::default();
    let p = state(&mut b);
    let twice = b
        .map_const(ScalarOp::Mul, p, 2.0)
        .unwrap_or_else(|e| panic!("{e}"));
    let after = b
        .map(ScalarOp::Sub, &[twice, p])
        .unwrap_or_else(|e| panic!("{e}"));
    all.push(Case {
        name: "old value read after its successor".into(),
        graph: b.finish(
            vec![after, p, twice],
            vec![Update {
                slot: 0,
                value: twice,
            }],
        ),
        inputs: vec![sample::random(&TensorType::f32([9]), 5, seed(), 0)],
    });
    all
}

fn step(
    b: &mut Builder,
    x: NodeId,
    w: NodeId,
    p: NodeId,
    [m, v, h]: [NodeId; 3],
    r: usize,
) -> Result<(Vec<NodeId>, Vec<Update>)> {
    let c = b.shape(x).last();
    let a = b.slice(p, 0, 0, r * c)?;
    let a = b.reshape(a, [r, c])?;
    let up = b.slice(p, 0, r * c, r * c)?;
    let up = b.reshape(up, [c, r])?;
    let block = tallow_core::op::Block {
        n: c,
        bias: false,
        adapters: vec![Some((r, 0.5.into()))],
    };
    let op = tallow_core::op::Linear {
        blocks: vec![block],
        residual: true,
    };
    let y = b.composite(op, &[x, w, a, up, x])?[0];
    let y = b.map(ScalarOp::Tanh, &[y])?;
    let sq = b.map(ScalarOp::Mul, &[y, y])?;
    let n = b.shape(sq).numel();
    let flat = b.reshape(sq, [n])?;
    let loss = b.reduce(ReduceOp::Sum, 0, flat)?;
    let loss = b.reshape(loss, Shape::default())?;
    // Gradients of the two windows, beside the loss; then the optimizer on the flat parameters.
    let g = std::mem::take(b).finish(vec![loss, a, up], vec![]);
    let wrt = g.outputs[1..].to_vec();
    let mut only = g.clone();
    only.outputs.truncate(1);
    let grads = tallow_core::grad::grad(&only, &wrt)?;
    *b = Builder::resume(&grads);
    let mut flat = vec![];
    for d in &grads.outputs[1..] {
        flat.push(b.reshape(*d, [r * c])?);
    }
    let d = b.concat(0, &flat)?;
    let next = b.composite(AdamW, &[p, d, m, v, h])?;
    let updates = [2, 3, 4]
        .into_iter()
        .zip(&next)
        .map(|(slot, v)| Update { slot, value: *v });
    Ok((vec![grads.outputs[0], d], updates.collect()))
}
