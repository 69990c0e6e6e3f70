//! Every kernel as Apple's compiler would get it: naga translates it to the Metal shading language as wgpu has it do.
//! Invariant: no kernel asks for more than every adapter has; one that does, or that naga refuses, fails here.
//! Absent on purpose: Apple's compiler, and a Mac. Whether the text compiles and how fast it is, nobody has seen here.
use naga::{
    AddressSpace, Module,
    back::{msl, spv},
    proc::{BoundsCheckPolicies, BoundsCheckPolicy, Layouter},
    valid::{Capabilities, ModuleInfo, ValidationFlags, Validator},
};
use std::{collections::BTreeMap, fmt::Write};
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    types::{DType, TensorType},
};
use tallow_wgpu::{Source, Wanted, sources};

/// What a kernel is in Metal.
struct Made {
    text: String,
    /// Bytes of memory that a workgroup shares.
    shared: usize,
}

/// Slots as wgpu gives them out: numbers first, then buffers, then the sizes of the buffers.
fn slots(s: &Source) -> msl::EntryPointResources {
    let numbers = u8::from(!s.uniform);
    let all = s.buffers + usize::from(s.uniform);
    let target = |i: usize| {
        let binding = naga::ResourceBinding {
            group: 0,
            binding: i as u32,
        };
        let target = msl::BindTarget {
            buffer: Some(numbers + i as u8),
            mutable: i < s.buffers,
            ..Default::default()
        };
        (binding, target)
    };
    msl::EntryPointResources {
        resources: (0..all).map(target).collect(),
        immediates_buffer: (!s.uniform).then_some(0),
        sizes_buffer: Some(numbers + all as u8),
    }
}

/// The options of a release build.
fn options(s: &Source) -> msl::Options {
    let unchecked = BoundsCheckPolicy::Unchecked;
    msl::Options {
        lang_version: (2, 4),
        per_entry_point_map: [(s.entry.to_owned(), slots(s))].into(),
        fake_missing_bindings: false,
        bounds_check_policies: BoundsCheckPolicies {
            index: unchecked,
            buffer: unchecked,
            image_load: unchecked,
            binding_array: unchecked,
        },
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ..Default::default()
    }
}

/// Bytes of what threads of a workgroup share in the kernel's entry point.
fn shared(m: &Module, info: &ModuleInfo) -> usize {
    let mut layouts = Layouter::default();
    layouts.update(m.to_ctx()).unwrap();
    let used = info.get_entry_point(0);
    let globals = m.global_variables.iter();
    let bytes = globals
        .filter(|(h, v)| v.space == AddressSpace::WorkGroup && !used[*h].is_empty())
        .map(|(_, v)| layouts[v.ty].size.next_multiple_of(16) as usize);
    bytes.sum()
}

fn checked(s: &Source) -> Result<(Module, ModuleInfo), String> {
    let parsed = naga::front::wgsl::parse_str(&s.text);
    let module = parsed.map_err(|e| e.emit_to_string(&s.text))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module);
    let info = info.map_err(|e| e.emit_to_string(&s.text))?;
    Ok((module, info))
}

fn metal(s: &Source) -> Result<Made, String> {
    let (module, info) = checked(s)?;
    let pipeline = msl::PipelineOptions {
        entry_point: Some((naga::ShaderStage::Compute, s.entry.to_owned())),
        ..Default::default()
    };
    let (text, _) = msl::write_string(&module, &info, &options(s), &pipeline)
        .map_err(|e| format!("no Metal: {e}"))?;
    let shared = shared(&module, &info);
    Ok(Made { text, shared })
}

fn wanted(subgroups: Option<u32>, weights: DType) -> Wanted {
    Wanted {
        subgroups,
        weights,
        units: [None, None],
        shared_bytes: 16 << 10,
    }
}

/// Apple's units: 8 x 8, of f32 and of f16.
fn apple() -> Wanted {
    Wanted {
        units: [Some(8), Some(8)],
        ..wanted(Some(32), DType::F32)
    }
}

/// With a product of f16.
fn with_f16(mut specs: Vec<KernelSpec>) -> Vec<KernelSpec> {
    let dense = |s: [usize; 2]| Operand::dense(&TensorType::new(s, DType::F16));
    specs.push(KernelSpec {
        body: Body::MatMul {
            ta: false,
            tb: true,
            alpha: 1.0.into(),
        },
        inputs: vec![dense([65, 33]), dense([70, 33])],
        outputs: vec![Some(dense([65, 70]))],
    });
    specs
}

/// All kernels: with subgroups as Apple has them, and without; weights multiplied as f32 and as bf16.
fn all() -> Vec<Source> {
    let specs = tallow_conformance::specs();
    let mut all = vec![];
    for subgroups in [Some(32), None] {
        for weights in [DType::F32, DType::BF16] {
            all.extend(sources(&specs, &wanted(subgroups, weights)));
        }
    }
    all.extend(sources(&with_f16(specs), &apple()));
    all.sort_by(|a, b| a.text.cmp(&b.text));
    all.dedup_by(|a, b| a.text == b.text);
    all
}

#[test]
fn every_kernel_is_translated() {
    let mut table: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    let mut bad = vec![];
    for s in all() {
        let made = match metal(&s) {
            Ok(m) => m,
            Err(e) => {
                bad.push(format!("{}: {e}", s.entry));
                continue;
            }
        };
        if made.shared > 16 << 10 || s.buffers > 8 || !s.uniform && s.numbers > 128 {
            bad.push(format!(
                "{}: {} bytes of shared memory, {} buffers, {} bytes of numbers",
                s.entry, made.shared, s.buffers, s.numbers
            ));
        }
        let row = table.entry(s.entry).or_default();
        let most = [1, s.buffers, s.numbers, made.shared];
        row[0] += 1;
        for (have, new) in row.iter_mut().zip(most).skip(1) {
            *have = (*have).max(new);
        }
    }
    assert!(bad.is_empty(), "{} kernels:\n{}", bad.len(), bad.join("\n"));
    let mut text = format!(
        "{:<20} {:>5} {:>7} {:>13} {:>12}\n",
        "kernel", "texts", "buffers", "numbers bytes", "shared bytes"
    );
    for (entry, [texts, buffers, numbers, shared]) in table {
        let _ = writeln!(
            text,
            "{entry:<20} {texts:>5} {buffers:>7} {numbers:>13} {shared:>12}"
        );
    }
    insta::assert_snapshot!("kernels", text);
}

/// The bodies of two kernels, without what the prelude brings: one with subgroups, one through shared memory alone.
#[test]
fn two_kernels_in_full() {
    let specs = tallow_conformance::specs();
    for (subgroups, entry) in [(Some(32), "kv_write"), (None, "join")] {
        let all = sources(&specs, &wanted(subgroups, DType::F32));
        let mut of_entry = all.iter().filter(|s| s.entry == entry);
        let s = of_entry.next().unwrap();
        let text = metal(s).unwrap().text;
        let body = text.find("kernel void").expect("an entry point");
        insta::assert_snapshot!(entry, &text[body..]);
    }
}

/// Units in the languages of both APIs that have them: Apple's, and those of f16 that NVIDIA's cards tell of.
#[test]
fn units_are_spoken_of_in_metal_and_in_spirv() {
    let nvidia = Wanted {
        units: [None, Some(16)],
        shared_bytes: 48 << 10,
        ..apple()
    };
    let specs = with_f16(tallow_conformance::specs());
    for (wanted, metals) in [(apple(), true), (nvidia, false)] {
        let all = sources(&specs, &wanted);
        let units: Vec<_> = all.iter().filter(|s| s.entry == "product_coop").collect();
        let halves = |s: &&&Source| s.text.contains("enable f16;");
        assert_eq!(units.iter().filter(halves).count(), 1, "one product of f16");
        assert_eq!(units.len() > 1, metals, "f32 by units of f32 alone");
        for s in units {
            let (module, info) = checked(s).unwrap();
            let options = spv::Options {
                lang_version: (1, 5),
                ..Default::default()
            };
            let words = spv::write_vec(&module, &info, &options, None).unwrap();
            // OpCooperativeMatrixMulAddKHR
            let fmas = words.iter().filter(|w| **w & 0xffff == 4459).count();
            assert!(fmas >= 32, "{fmas} instructions of units");
            if metals {
                let text = metal(s).unwrap().text;
                let side = if halves(&&s) { "half8x8" } else { "float8x8" };
                assert!(text.contains("simdgroup_multiply_accumulate") && text.contains(side));
            }
        }
    }
}
