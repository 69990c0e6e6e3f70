//! Rows of several documents: each computes what it computes alone, losses and gradients.
//! Absent on purpose: how rows are packed; that is the trainer's.

use tallow_core::op::Role;
use tallow_core::tensor::{Tensor, value_and_grad};
use tallow_llm::{Adapter, Model};

use crate::support::*;

/// A batch `[b, t]` on the host.
struct Batch {
    b: usize,
    ids: Vec<u32>,
    pos: Vec<u32>,
    starts: Vec<u32>,
    targets: Vec<u32>,
}

/// Documents one after another in rows of `t` inputs, padding behind them.
fn packed(rows: &[Vec<&[u32]>], t: usize) -> Batch {
    let mut batch = Batch {
        b: rows.len(),
        ids: vec![],
        pos: vec![],
        starts: vec![],
        targets: vec![],
    };
    for row in rows {
        let begin = batch.ids.len();
        for doc in row {
            let (n, start) = (doc.len() - 1, batch.ids.len() - begin);
            batch.ids.extend(&doc[..n]);
            batch.targets.extend(&doc[1..]);
            batch.pos.extend(0..n as u32);
            batch.starts.extend(vec![start as u32; n]);
        }
        let end = begin + t;
        assert!(batch.ids.len() <= end);
        batch.ids.resize(end, 0);
        batch.pos.resize(end, NONE);
        batch.starts.resize(end, 0);
        batch.targets.resize(end, NONE);
    }
    batch
}

/// Each token's loss, and the gradient of their sum as one vector.
fn run(model: &Model, adapter: &Adapter, batch: &Batch, together: bool) -> (Vec<f32>, Vec<f32>) {
    let s = &model.session;
    let shape = [batch.b, batch.ids.len() / batch.b];
    let leaf = |v: &[u32]| s.tensor_u32(v, shape, Role::Data).unwrap();
    let (ids, pos, starts) = (leaf(&batch.ids), leaf(&batch.pos), leaf(&batch.starts));
    let hidden = match together {
        true => model.hidden_packed(&ids, &pos, &starts, Some(adapter)),
        false => model.hidden(&ids, &pos, Some(adapter), None),
    };
    let nll = model
        .nll(&hidden.unwrap().x, &leaf(&batch.targets))
        .unwrap();
    let parts = adapter.parts().unwrap();
    let wrt: Vec<&Tensor> = parts.iter().map(|p| &p.1).collect();
    let made = value_and_grad(&nll.sum_all().unwrap(), &wrt).unwrap();
    let mut all = vec![&nll];
    all.extend(&made.grads);
    let all: Vec<Tensor> = all.into_iter().cloned().collect();
    let mut read = s
        .eval(&all)
        .unwrap()
        .into_iter()
        .map(|t| s.read(&t).unwrap());
    (read.next().unwrap(), read.flatten().collect())
}

fn relative(a: &[f32], b: &[f32]) -> f64 {
    let norm = |v: Vec<f64>| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let each = a.iter().zip(b);
    let off = norm(each.map(|(a, b)| f64::from(*a) - f64::from(*b)).collect());
    off / norm(b.iter().map(|b| f64::from(*b)).collect())
}

#[test]
fn packed_documents_are_as_if_alone() {
    for name in ["llama", "qwen2", "mistral-window"] {
        let model = load(&golden(name));
        let adapter = adapter(&model, &golden(name));
        let ids = some_ids(120, model.config.vocab);
        let cuts = [0, 21, 28, 30, 49, 74, 96];
        let docs: Vec<&[u32]> = cuts.windows(2).map(|w| &ids[w[0]..w[1]]).collect();
        let rows = [
            vec![docs[0], docs[1], docs[2]],
            vec![docs[3]],
            vec![docs[4], docs[5]],
        ];
        let (nll, grad) = run(&model, &adapter, &packed(&rows, 48), true);
        let mut sum = vec![0.0_f32; grad.len()];
        for (r, row) in rows.iter().enumerate() {
            let mut at = r * 48;
            for doc in row {
                let one = packed(&[vec![*doc]], doc.len() - 1);
                let (alone, g) = run(&model, &adapter, &one, false);
                let far = distance(&nll[at..at + alone.len()], &alone);
                assert!(far < 2e-5, "{name}: document at {at} of row {r}: {far}");
                at += alone.len();
                sum.iter_mut().zip(&g).for_each(|(s, g)| *s += g);
            }
            assert!(nll[at..(r + 1) * 48].iter().all(|v| *v == 0.0));
        }
        let off = relative(&grad, &sum);
        assert!(off < 1e-5, "{name}: gradients differ by {off:e}");
        // Without the starts it is another computation: the test can fail.
        let mut open = packed(&rows, 48);
        open.starts.fill(0);
        for p in open.pos.chunks_mut(48) {
            let real = p.iter().filter(|p| **p != NONE).count();
            (0..real).for_each(|i| p[i] = i as u32);
        }
        assert!(distance(&run(&model, &adapter, &open, false).0, &nll) > 1e-3);
    }
}
