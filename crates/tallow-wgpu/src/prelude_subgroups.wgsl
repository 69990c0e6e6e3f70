// Reductions over a workgroup of `WG` threads, with subgroups of any size from LANES on.
// Every thread of the workgroup must call them, and all get the result.
struct Id {
  // Thread of the workgroup.
  @builtin(local_invocation_index) t: u32,
  @builtin(workgroup_id) w: vec3<u32>,
  @builtin(subgroup_invocation_id) lane: u32,
  @builtin(subgroup_id) sub: u32,
  @builtin(num_subgroups) subs: u32,
}
// Number of the workgroup in a grid that is a line.
fn group(id: Id) -> u32 { return id.w.x + id.w.y * 65535u; }

var<workgroup> parts: array<f32, WG>;
fn sum_all(v: f32, id: Id) -> f32 {
  let s = subgroupAdd(v);
  workgroupBarrier();
  if (id.lane == 0u) { parts[id.sub] = s; }
  workgroupBarrier();
  var r = 0.0;
  for (var i = 0u; i < id.subs; i++) { r += parts[i]; }
  return r;
}
fn max_all(v: f32, id: Id) -> f32 {
  let s = subgroupMax(v);
  workgroupBarrier();
  if (id.lane == 0u) { parts[id.sub] = s; }
  workgroupBarrier();
  var r = parts[0];
  for (var i = 1u; i < id.subs; i++) { r = max(r, parts[i]); }
  return r;
}
// Sum over the `n` threads, a power of two, whose number differs only below `n`.
fn sum_of(n: u32, v: f32, id: Id) -> f32 {
  var s = v;
  for (var o = 1u; o < min(n, LANES); o *= 2u) { s += subgroupShuffleXor(s, o); }
  if (n > LANES) {
    workgroupBarrier();
    parts[id.t] = s;
    workgroupBarrier();
    let first = id.t & ~(n - 1u);
    s = 0.0;
    for (var i = 0u; i < n; i += LANES) { s += parts[first + i]; }
  }
  return s;
}
