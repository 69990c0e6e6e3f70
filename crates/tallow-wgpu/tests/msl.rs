//! Every kernel as Apple's compiler would get it: naga translates it to the Metal shading language as wgpu has it do.
//! Invariant: no kernel asks for more than every adapter has; one that does, or that naga refuses, fails here.
//! Absent on purpose: Apple's compiler, and a Mac. Whether the text compiles and how fast it is, nobody has seen here.
use naga::{
    AddressSpace, Module,
    back::msl,
    proc::{BoundsCheckPolicies, BoundsCheckPolicy, Layouter},
    valid::{Capabilities, ModuleInfo, ValidationFlags, Validator},
};
use std::{collections::BTreeMap, fmt::Write};
use tallow_core::types::DType;
use tallow_wgpu::{Source, sources};

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

fn metal(s: &Source) -> Result<Made, String> {
    let parsed = naga::front::wgsl::parse_str(&s.text);
    let module = parsed.map_err(|e| e.emit_to_string(&s.text))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module);
    let info = info.map_err(|e| e.emit_to_string(&s.text))?;
    let pipeline = msl::PipelineOptions {
        entry_point: Some((naga::ShaderStage::Compute, s.entry.to_owned())),
        ..Default::default()
    };
    let (text, _) = msl::write_string(&module, &info, &options(s), &pipeline)
        .map_err(|e| format!("no Metal: {e}"))?;
    let shared = shared(&module, &info);
    Ok(Made { text, shared })
}

/// All kernels: with subgroups as Apple has them, and without; weights multiplied as f32 and as bf16.
fn all() -> Vec<Source> {
    let specs = tallow_conformance::specs();
    let mut all = vec![];
    for subgroups in [Some(32), None] {
        for weights in [DType::F32, DType::BF16] {
            all.extend(sources(&specs, subgroups, weights));
        }
    }
    all.sort_by(|a, b| a.text.cmp(&b.text));
    all.dedup_by(|a, b| a.text == b.text);
    all
}

#[test]
fn every_kernel_is_translated() {
    let mut table: BTreeMap<&str, [usize; 5]> = BTreeMap::new();
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
        let most = [1, s.buffers, s.numbers, made.shared, made.text.len() >> 10];
        row[0] += 1;
        for (have, new) in row.iter_mut().zip(most).skip(1) {
            *have = (*have).max(new);
        }
    }
    assert!(bad.is_empty(), "{} kernels:\n{}", bad.len(), bad.join("\n"));
    let mut text = format!(
        "{:<20} {:>5} {:>7} {:>13} {:>12} {:>3}\n",
        "kernel", "texts", "buffers", "numbers bytes", "shared bytes", "KiB"
    );
    for (entry, [texts, buffers, numbers, shared, kib]) in table {
        let _ = writeln!(
            text,
            "{entry:<20} {texts:>5} {buffers:>7} {numbers:>13} {shared:>12} {kib:>3}"
        );
    }
    insta::assert_snapshot!("kernels", text);
}

/// Two texts whole: one with subgroups, one through shared memory alone.
#[test]
fn two_kernels_in_full() {
    let specs = tallow_conformance::specs();
    for (subgroups, entry) in [(Some(32), "kv_write"), (None, "join")] {
        let all = sources(&specs, subgroups, DType::F32);
        let mut of_entry = all.iter().filter(|s| s.entry == entry);
        let s = of_entry.next().unwrap();
        insta::assert_snapshot!(entry, metal(s).unwrap().text);
    }
}
