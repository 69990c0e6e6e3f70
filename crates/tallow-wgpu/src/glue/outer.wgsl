// c[f, col] = alpha sum_row narrow[row, f] broad[row, col], for few columns on one side: the gradients of adapters. Chunks of
// rows side by side, each thread one column and FEW sums; then joined in order, unless there is one chunk.
// Bound by reading `broad` once for every FEW columns.
// == outer_parts
const TILE: u32 = 16u;
var<workgroup> sh: array<f32, TILE * FEW>;
@compute @workgroup_size(WG) fn outer_parts(id: Id) {
  let col = id.w.x * WG + id.t;
  let f0 = id.w.z * FEW;
  let last = min(a.rows, (id.w.y + 1u) * a.chunk);
  var acc: array<f32, FEW>;
  for (var f = 0u; f < FEW; f++) { acc[f] = 0.0; }
  for (var r0 = id.w.y * a.chunk; r0 < last; r0 += TILE) {
    workgroupBarrier();
    for (var e = id.t; e < TILE * FEW; e += WG) {
      let row = r0 + e / FEW;
      let f = f0 + e % FEW;
      var v = 0.0;
      if (row < last && f < a.few) { v = ld_narrow(row * a.fr + f); }
      sh[e] = v;
    }
    workgroupBarrier();
    if (col < a.many) {
      let n = min(TILE, last - r0);
      for (var r = 0u; r < n; r++) {
        let v = ld_broad((r0 + r) * a.mr + col);
        for (var f = 0u; f < FEW; f++) { acc[f] += sh[r * FEW + f] * v; }
      }
    }
  }
  if (col >= a.many) { return; }
  for (var j = 0u; j < min(FEW, a.few - f0); j++) {
    let f = f0 + j;
    PUT
  }
}
// == outer_join
@compute @workgroup_size(WG) fn outer_join(id: Id) {
  let e = group(id) * WG + id.t;
  if (e >= a.few * a.many) { return; }
  let f = e / a.many;
  let col = e % a.many;
  var s = 0.0;
  for (var i = 0u; i < a.chunks; i++) { s += ld_part((i * a.few + f) * a.many + col); }
  st_c(select(f * a.cr + col, col * a.cr + f, TURNED), a.alpha * s);
}
