//! Forward and backward of a linear with any mix of blocks.
//! Invariant: each case runs on one, two and three threads, which must agree bit for bit.
//! Absent on purpose: tolerance tuning. An adapter is also tested alone, on the difference it makes.

use half::bf16;

use super::world::{Case, World, cases};
use super::*;
use crate::tile::Pairs;

fn run_forward<E: Packed>(
    isa: Isa,
    pool: &Pool,
    case: &Case,
    world: &World,
    panels: &[Vec<E>],
) -> (Matrix, Matrix) {
    let (tails, heads) = (world.tails(case), world.heads(case));
    let blocks = world.blocks(case, panels, &tails, &heads);
    let mut y = Matrix::poisoned(case.m, case.n());
    let mut h = Matrix::poisoned(case.m, case.r());
    let mut workspace = vec![POISON; forward_workspace(&blocks, 1, case.k, pool.threads())];
    let job = Forward {
        m: case.m,
        k: case.k,
        x: world.x.input(),
        shares: 1,
        blocks: &blocks,
        y: y.output(),
        residual: if case.residual {
            world.residual.input()
        } else {
            Rows::<*const f32>::NONE
        },
        h: &[h.output()],
    };
    // SAFETY: every matrix has the size that the case asks for.
    unsafe { forward(Exec { isa, pool }, &job, &mut workspace) };
    (y, h)
}

/// What a frozen weight's product is made of: with pairs of bf16, rounded.
fn factor<E: Packed>(v: f32) -> f32 {
    if E::DOTS {
        bf16::from_f32(v).to_f32()
    } else {
        v
    }
}

fn check_forward<E: Packed>(isa: Isa, name: &str, pools: &[Pool], case: &Case, rng: &mut Rng) {
    let world = World::new(case, rng);
    let panels = world.panels::<E>(case, true);
    let (y, h) = run_forward(isa, &pools[0], case, &world, &panels);
    y.check(&format!("{name} y {case:?}"), &|row, j| {
        let (i, jj, _) = case.owner(j);
        let mut terms: Vec<f64> = (0..case.k)
            .map(|l| (world.x.at(row, l), world.w[i][jj * case.k + l]))
            .map(|(x, w)| product(factor::<E>(x), factor::<E>(w)))
            .collect();
        let r = case.blocks[i].1;
        for c in 0..r {
            let f = f64::from(world.scale[i]) * f64::from(world.b[i][jj * r + c]);
            terms.extend(world.hidden(case, row, i, c).iter().map(|t| t * f));
        }
        if case.bias {
            terms.push(f64::from(world.bias[i][jj]));
        }
        if case.residual {
            terms.push(f64::from(world.residual.at(row, j)));
        }
        terms
    });
    h.check(&format!("{name} h {case:?}"), &|row, c| {
        let (mut i, mut c) = (0, c);
        while c >= case.blocks[i].1 {
            c -= case.blocks[i].1;
            i += 1;
        }
        world.hidden(case, row, i, c)
    });
    for pool in &pools[1..] {
        let (y2, h2) = run_forward(isa, pool, case, &world, &panels);
        assert_eq!(
            y.bits(),
            y2.bits(),
            "{name} {case:?} y on {} threads",
            pool.threads()
        );
        assert_eq!(
            h.bits(),
            h2.bits(),
            "{name} {case:?} h on {} threads",
            pool.threads()
        );
    }
}

fn run_backward<E: Packed>(
    isa: Isa,
    pool: &Pool,
    case: &Case,
    world: &World,
    panels: &[Vec<E>],
    need_dx: bool,
) -> (Matrix, Matrix) {
    let blocks = world.blocks(case, panels, &[], &[]);
    let mut dx = Matrix::poisoned(case.m, case.k);
    let mut dh = Matrix::poisoned(case.m, case.r());
    let mut workspace = vec![POISON; backward_workspace(&blocks, 1, pool.threads())];
    let job = Backward {
        m: case.m,
        k: case.k,
        dy: world.dy.input(),
        shares: 1,
        blocks: &blocks,
        dx: if need_dx {
            dx.output()
        } else {
            Rows::<*mut f32>::NONE
        },
        residual: if case.residual {
            world.residual.input()
        } else {
            Rows::<*const f32>::NONE
        },
        dh: &[dh.output()],
    };
    // SAFETY: every matrix has the size that the case asks for.
    unsafe { backward(Exec { isa, pool }, &job, &mut workspace) };
    (dx, dh)
}

fn check_backward<E: Packed>(isa: Isa, name: &str, pools: &[Pool], case: &Case, rng: &mut Rng) {
    let world = World::new(case, rng);
    let panels = world.panels::<E>(case, false);
    let (dx, dh) = run_backward(isa, &pools[0], case, &world, &panels, true);
    dh.check(&format!("{name} dh {case:?}"), &|row, c| {
        let (mut i, mut c) = (0, c);
        while c >= case.blocks[i].1 {
            c -= case.blocks[i].1;
            i += 1;
        }
        let s = f64::from(world.scale[i]);
        world.down(case, row, i, c).iter().map(|t| t * s).collect()
    });
    dx.check(&format!("{name} dx {case:?}"), &|row, l| {
        let mut terms = Vec::new();
        let mut first = 0;
        for (i, &(n, r)) in case.blocks.iter().enumerate() {
            let factors = |j: usize| (world.dy.at(row, first + j), world.w[i][j * case.k + l]);
            let term = |(dy, w)| product(factor::<E>(dy), factor::<E>(w));
            terms.extend((0..n).map(factors).map(term));
            for c in 0..r {
                let f = f64::from(world.scale[i]) * f64::from(world.a[i][c * case.k + l]);
                terms.extend(world.down(case, row, i, c).iter().map(|t| t * f));
            }
            first += n;
        }
        if case.residual {
            terms.push(f64::from(world.residual.at(row, l)));
        }
        terms
    });
    let (untouched, alone) = run_backward(isa, &pools[0], case, &world, &panels, false);
    assert_eq!(alone.bits(), dh.bits(), "{name} {case:?} dh without dx");
    assert!(untouched.bits().iter().all(|&b| b == POISON.to_bits()));
    for pool in &pools[1..] {
        let (dx2, dh2) = run_backward(isa, pool, case, &world, &panels, true);
        assert_eq!(
            dx.bits(),
            dx2.bits(),
            "{name} {case:?} dx on {} threads",
            pool.threads()
        );
        assert_eq!(
            dh.bits(),
            dh2.bits(),
            "{name} {case:?} dh on {} threads",
            pool.threads()
        );
    }
}

#[test]
fn forward_is_the_sum_it_says() {
    let (mut rng, pools) = (Rng::fresh(), pools());
    each_isa(&mut |isa, name| {
        for case in cases(&mut rng) {
            check_forward::<f32>(isa, name, &pools, &case, &mut rng);
            if isa == Isa::Avx512Bf16 {
                check_forward::<Pairs>(isa, "pairs", &pools, &case, &mut rng);
            }
        }
    });
}

#[test]
fn backward_is_the_sum_it_says() {
    let (mut rng, pools) = (Rng::fresh(), pools());
    each_isa(&mut |isa, name| {
        for case in cases(&mut rng) {
            check_backward::<f32>(isa, name, &pools, &case, &mut rng);
            if isa == Isa::Avx512Bf16 {
                check_backward::<Pairs>(isa, "pairs", &pools, &case, &mut rng);
            }
        }
    });
}

#[test]
fn no_rows_is_no_work() {
    let mut rng = Rng::fresh();
    let case = Case {
        m: 0,
        k: 9,
        blocks: vec![(5, 2)],
        bias: true,
        residual: true,
        packed_tail: false,
        turned: false,
    };
    for pool in pools() {
        check_forward::<f32>(
            Isa::best(),
            "empty",
            std::slice::from_ref(&pool),
            &case,
            &mut rng,
        );
        check_backward::<f32>(
            Isa::best(),
            "empty",
            std::slice::from_ref(&pool),
            &case,
            &mut rng,
        );
    }
}

/// With weights of zero the result is the adapter alone; without an adapter it is exactly the bare one.
#[test]
fn the_adapter_adds_what_it_says_and_costs_a_bare_block_nothing() {
    let (mut rng, pool) = (Rng::fresh(), Pool::new(2));
    each_isa(&mut |isa, name| {
        let adapted = Case {
            m: 29,
            k: 67,
            blocks: vec![(50, 8), (33, 0), (20, 3)],
            bias: false,
            residual: false,
            packed_tail: false,
            turned: false,
        };
        let mut world = World::new(&adapted, &mut rng);
        let bare = Case {
            blocks: adapted.blocks.iter().map(|b| (b.0, 0)).collect(),
            ..adapted.clone()
        };
        let panels = world.panels::<f32>(&adapted, true);
        let (with, _) = run_forward(isa, &pool, &adapted, &world, &panels);
        let (without, _) = run_forward(isa, &pool, &bare, &world, &panels);
        for row in 0..adapted.m {
            for j in 0..adapted.n() {
                let (i, _, _) = adapted.owner(j);
                let same = with.at(row, j).to_bits() == without.at(row, j).to_bits();
                assert_eq!(same, adapted.blocks[i].1 == 0, "{name} [{row},{j}]");
            }
        }
        world.w.iter_mut().for_each(|w| w.fill(0.0));
        let panels = world.panels::<f32>(&adapted, true);
        let (alone, _) = run_forward(isa, &pool, &adapted, &world, &panels);
        alone.check(&format!("{name} alone"), &|row, j| {
            let (i, jj, _) = adapted.owner(j);
            let r = adapted.blocks[i].1;
            (0..r)
                .flat_map(|c| {
                    let f = f64::from(world.scale[i]) * f64::from(world.b[i][jj * r + c]);
                    world
                        .hidden(&adapted, row, i, c)
                        .into_iter()
                        .map(move |t| t * f)
                })
                .collect()
        });
        for row in 0..adapted.m {
            for j in 0..adapted.n() {
                let difference = with.at(row, j) - without.at(row, j);
                let off = (difference - alone.at(row, j)).abs();
                assert!(off < 1e-4, "{name} [{row},{j}]: {off}");
            }
        }
    });
}

#[test]
fn a_residual_may_be_the_output_itself() {
    let (mut rng, pool) = (Rng::fresh(), Pool::new(2));
    let case = Case {
        m: 31,
        k: 45,
        blocks: vec![(45, 4)],
        bias: true,
        residual: true,
        packed_tail: false,
        turned: false,
    };
    let world = World::new(&case, &mut rng);
    let panels = [
        world.panels::<f32>(&case, true),
        world.panels::<f32>(&case, false),
    ];
    each_isa(&mut |isa, name| {
        let exec = Exec { isa, pool: &pool };
        let (want_y, mut h) = run_forward(isa, &pool, &case, &world, &panels[0]);
        let (want_dx, mut dh) = run_backward(isa, &pool, &case, &world, &panels[1], true);
        let copy = || Matrix {
            rows: case.m,
            cols: 45,
            data: world.residual.data.clone(),
        };
        let (mut y, mut dx) = (copy(), copy());
        let blocks = world.blocks(&case, &panels[0], &[], &[]);
        let mut workspace = vec![
            POISON;
            forward_workspace(&blocks, 1, case.k, 2)
                .max(backward_workspace(&blocks, 1, 2))
        ];
        let job = Forward {
            m: case.m,
            k: case.k,
            x: world.x.input(),
            shares: 1,
            blocks: &blocks,
            residual: y.input(),
            y: y.output(),
            h: &[h.output()],
        };
        // SAFETY: every matrix has the size that the case asks for; `residual` is `y`.
        unsafe { forward(exec, &job, &mut workspace) };
        let blocks = world.blocks(&case, &panels[1], &[], &[]);
        let job = Backward {
            m: case.m,
            k: case.k,
            dy: world.dy.input(),
            shares: 1,
            blocks: &blocks,
            residual: dx.input(),
            dx: dx.output(),
            dh: &[dh.output()],
        };
        // SAFETY: as above.
        unsafe { backward(exec, &job, &mut workspace) };
        for row in 0..case.m {
            for j in 0..45 {
                assert!(
                    (y.at(row, j) - want_y.at(row, j)).abs() < 1e-4,
                    "{name} y [{row},{j}]"
                );
                assert!(
                    (dx.at(row, j) - want_dx.at(row, j)).abs() < 1e-4,
                    "{name} dx [{row},{j}]"
                );
            }
        }
    });
}

/// bf16 panels give the bits that f32 panels of the same rounded weights give.
#[test]
fn bf16_panels_are_the_rounded_weights() {
    let (mut rng, pool) = (Rng::fresh(), Pool::new(2));
    each_isa(&mut |isa, name| {
        for m in [1, 5, 40] {
            let case = Case {
                m,
                k: 77,
                blocks: vec![(70, 8), (32, 0)],
                bias: true,
                residual: false,
                packed_tail: true,
                turned: false,
            };
            let mut world = World::new(&case, &mut rng);
            let (narrow, _) = run_forward(
                isa,
                &pool,
                &case,
                &world,
                &world.panels::<bf16>(&case, true),
            );
            for w in world.w.iter_mut().flatten() {
                *w = bf16::from_f32(*w).to_f32();
            }
            let (wide, _) =
                run_forward(isa, &pool, &case, &world, &world.panels::<f32>(&case, true));
            assert_eq!(narrow.bits(), wide.bits(), "{name} {m} rows");
        }
    });
}

/// A row's bits are the same alone and in a batch.
#[test]
fn bits_do_not_depend_on_the_batch() {
    let (mut rng, pool) = (Rng::fresh(), Pool::new(3));
    each_isa(&mut |isa, name| {
        let case = Case {
            m: 101,
            k: 130,
            blocks: vec![(96, 8), (31, 4)],
            bias: true,
            residual: false,
            packed_tail: true,
            turned: false,
        };
        let world = World::new(&case, &mut rng);
        let panels = world.panels::<f32>(&case, true);
        let (all, _) = run_forward(isa, &pool, &case, &world, &panels);
        let stride = case.n() + GAP;
        for row in [0, 50, 100] {
            let one = Case {
                m: 1,
                ..case.clone()
            };
            let mut alone = World::new(&one, &mut Rng::new(1));
            alone
                .x
                .data
                .copy_from_slice(&world.x.data[row * (case.k + GAP)..][..case.k + GAP]);
            (alone.a, alone.b, alone.scale, alone.bias) = (
                world.a.clone(),
                world.b.clone(),
                world.scale.clone(),
                world.bias.clone(),
            );
            let (y, _) = run_forward(isa, &pool, &one, &alone, &panels);
            assert_eq!(
                y.bits()[..],
                all.bits()[row * stride..][..stride],
                "{name} row {row}"
            );
        }
    });
}

/// Adapters that share the rows have the bits that each has alone.
#[test]
fn each_share_is_as_if_it_were_alone() {
    let (mut rng, pool) = (Rng::fresh(), Pool::new(2));
    each_isa(&mut |isa, name| {
        for (share, ranks) in [(1, [3, 0, 8]), (5, [1, 9, 2]), (37, [8, 16, 0])] {
            let case = |g: usize| Case {
                m: share,
                k: 70,
                blocks: vec![(50, ranks[g]), (33, ranks[2 - g])],
                bias: true,
                residual: false,
                packed_tail: false,
                turned: false,
            };
            let mut worlds: Vec<World> = (0..3).map(|g| World::new(&case(g), &mut rng)).collect();
            for g in 1..3 {
                (worlds[g].w, worlds[g].bias) = (worlds[0].w.clone(), worlds[0].bias.clone());
            }
            let all = |of: fn(&World) -> &Matrix| Matrix {
                rows: 3 * share,
                cols: of(&worlds[0]).cols,
                data: worlds.iter().flat_map(|w| &of(w).data).copied().collect(),
            };
            let (x, dy) = (all(|w| &w.x), all(|w| &w.dy));
            let [front, back] = [true, false].map(|f| worlds[0].panels::<f32>(&case(0), f));
            let blocks = |panels| -> Vec<Block> {
                let one = |g: usize| worlds[g].blocks(&case(g), panels, &[], &[]);
                (0..3).flat_map(one).collect()
            };
            let hidden = || [0, 1, 2].map(|g| Matrix::poisoned(share, case(g).r()));
            let (mut h, mut dh) = (hidden(), hidden());
            let (mut y, mut dx) = (
                Matrix::poisoned(3 * share, 83),
                Matrix::poisoned(3 * share, 70),
            );
            let (on_y, on_dx) = (blocks(&front), blocks(&back));
            let floats = forward_workspace(&on_y, 3, 70, 2).max(backward_workspace(&on_dx, 3, 2));
            let mut workspace = vec![POISON; floats];
            let exec = Exec { isa, pool: &pool };
            let job = Forward {
                m: 3 * share,
                k: 70,
                x: x.input(),
                shares: 3,
                blocks: &on_y,
                y: y.output(),
                residual: Rows::<*const f32>::NONE,
                h: &h.each_mut().map(Matrix::output),
            };
            // SAFETY: every matrix has the size that the case asks for.
            unsafe { forward(exec, &job, &mut workspace) };
            let job = Backward {
                m: 3 * share,
                k: 70,
                dy: dy.input(),
                shares: 3,
                blocks: &on_dx,
                dx: dx.output(),
                residual: Rows::<*const f32>::NONE,
                dh: &dh.each_mut().map(Matrix::output),
            };
            // SAFETY: as above.
            unsafe { backward(exec, &job, &mut workspace) };
            for g in 0..3 {
                let alone = run_forward(isa, &pool, &case(g), &worlds[g], &front);
                let below = run_backward(isa, &pool, &case(g), &worlds[g], &back, true);
                for (whole, one) in [(&y, &alone.0), (&dx, &below.0)] {
                    let row = one.cols + GAP;
                    let part = &whole.bits()[g * share * row..][..share * row];
                    assert_eq!(part, one.bits(), "{name} share {g} of {share} rows");
                }
                assert_eq!(h[g].bits(), alone.1.bits(), "{name} h of share {g}");
                assert_eq!(dh[g].bits(), below.1.bits(), "{name} dh of share {g}");
            }
        }
    });
}

/// Rounded rows are kept from block to block and from task to task, but not from call to call: the same `x`, with
/// other numbers, in the same workspace gives other results.
#[test]
fn pairs_are_rounded_anew_in_every_call() {
    if !Isa::available().any(|isa| isa == Isa::Avx512Bf16) {
        println!("SKIP: this machine does not multiply bf16");
        return;
    }
    let (mut rng, pool) = (Rng::fresh(), Pool::new(2));
    let case = Case {
        m: 50,
        k: 70,
        blocks: vec![(64, 0), (40, 3)],
        bias: false,
        residual: false,
        packed_tail: false,
        turned: false,
    };
    let mut world = World::new(&case, &mut rng);
    let panels = world.panels::<Pairs>(&case, true);
    let mut workspace = vec![];
    for _ in 0..3 {
        let blocks = world.blocks(&case, &panels, &[], &[]);
        workspace.resize(forward_workspace(&blocks, 1, case.k, 2), POISON);
        let mut y = Matrix::poisoned(case.m, case.n());
        let job = Forward {
            m: case.m,
            k: case.k,
            x: world.x.input(),
            shares: 1,
            blocks: &blocks,
            y: y.output(),
            residual: Rows::<*const f32>::NONE,
            h: &[Rows::<*mut f32>::NONE],
        };
        let exec = Exec {
            isa: Isa::Avx512Bf16,
            pool: &pool,
        };
        // SAFETY: every matrix has the size that the case asks for.
        unsafe { forward(exec, &job, &mut workspace) };
        let (fresh, _) = run_forward(Isa::Avx512Bf16, &pool, &case, &world, &panels);
        assert_eq!(y.bits(), fresh.bits());
        world.x.data.iter_mut().for_each(|v| *v *= -1.5);
    }
}
