//! The arithmetic of comparing. Whole folders are compared in `tests/models`.

use super::*;

#[test]
fn nan_never_passes_and_is_named() {
    let part = |name: &str, d| (name.to_owned(), d);
    let parts = [part("a", 0.5), part("b", f64::NAN), part("c", 1e9)];
    let check = worst_part("gradients", 1e12, &parts, &[]);
    assert!(!check.pass && check.note.ends_with(": b"), "{check:?}");
    assert!(!worst_part("gradients", 1.0, &[], &[]).pass);
    let nan = relative(&[f32::NAN], &[1.0]);
    assert!(!Check::measured("loss", nan, 1.0, String::new()).pass);
}

#[test]
fn the_worst_part_is_named_and_a_missing_one_fails() {
    let parts = [("a".to_owned(), 1e-6), ("b".to_owned(), 2e-5)];
    let check = worst_part("gradients", 1e-4, &parts, &[]);
    assert!(check.pass && check.measured == Some(2e-5) && check.note.ends_with(": b"));
    let check = worst_part("gradients", 1e-4, &parts, &["c".to_owned()]);
    assert!(!check.pass && check.note.ends_with("only on one side: c"));
}

#[test]
fn differences_are_relative_to_the_norm_or_absolute_where_it_is_zero() {
    assert_eq!(relative(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
    assert_eq!(relative(&[0.0, 0.5], &[0.0, 0.0]), 0.5);
    assert_eq!(relative(&[0.0], &[0.0]), 0.0);
}
