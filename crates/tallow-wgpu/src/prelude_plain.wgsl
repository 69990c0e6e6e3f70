// Reductions over a workgroup of `WG` threads, a power of two, through its memory alone.
// Every thread of the workgroup must call them, and all get the result.
struct Id {
  // Thread of the workgroup.
  @builtin(local_invocation_index) t: u32,
  @builtin(workgroup_id) w: vec3<u32>,
}
// Number of the workgroup in a grid that is a line.
fn group(id: Id) -> u32 { return id.w.x + id.w.y * 65535u; }

var<workgroup> parts: array<f32, WG>;
// Sum over the `n` threads, a power of two, whose number differs only below `n`.
fn sum_of(n: u32, v: f32, id: Id) -> f32 {
  workgroupBarrier();
  parts[id.t] = v;
  workgroupBarrier();
  for (var o = n / 2u; o > 0u; o /= 2u) {
    if ((id.t & (n - 1u)) < o) { parts[id.t] += parts[id.t + o]; }
    workgroupBarrier();
  }
  return parts[id.t & ~(n - 1u)];
}
fn sum_all(v: f32, id: Id) -> f32 { return sum_of(WG, v, id); }
fn max_all(v: f32, id: Id) -> f32 {
  workgroupBarrier();
  parts[id.t] = v;
  workgroupBarrier();
  for (var o = WG / 2u; o > 0u; o /= 2u) {
    if (id.t < o) { parts[id.t] = max(parts[id.t], parts[id.t + o]); }
    workgroupBarrier();
  }
  return parts[0];
}
