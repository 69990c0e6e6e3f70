//! What other programs computed, within the tolerances of `tests/goldens/README.md`.

use serde_json::{Map, Value, json};
use tallow_llm::{Check, verify};

use crate::support::*;

/// `config.json` as it was written before transformers 5.
fn old_layout(config: &mut Map<String, Value>) {
    let rope = config.remove("rope_parameters").unwrap();
    let mut rope = rope.as_object().unwrap().clone();
    config.insert("rope_theta".into(), rope.remove("rope_theta").unwrap());
    let scaling = match rope.get("rope_type").unwrap() == "default" {
        true => Value::Null,
        false => json!(rope),
    };
    config.insert("rope_scaling".into(), scaling);
    let dtype = config.remove("dtype").unwrap();
    config.insert("torch_dtype".into(), dtype);
    config.remove("layer_types");
}

fn print(name: &str, checks: &[Check]) {
    for c in checks {
        let m = c.measured.unwrap_or(f64::NAN);
        println!("{name:16} {:16} {m:9.2e} <= {:7.0e} {} {}", c.quantity, c.tolerance, c.pass, c.note);
    }
}

fn check_all(name: &str, checks: &[Check]) {
    print(name, checks);
    assert_eq!(checks.len(), 7, "{name}");
    for c in checks {
        assert!(c.pass && c.measured.is_some(), "{name}: {c:?}");
    }
}

#[test]
fn the_reference_outputs_are_reproduced_in_both_config_layouts() {
    for name in GOLDENS {
        check_all(name, &verify(&session(), &golden(name)).unwrap());
        let old = with_config(&golden(name), old_layout);
        check_all(&format!("{name} (old)"), &verify(&session(), old.path()).unwrap());
    }
}
