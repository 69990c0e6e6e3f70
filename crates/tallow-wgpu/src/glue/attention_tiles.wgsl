// Tiles of 32 rows by 32 columns for 64 threads: thread (tx, ty) = (lane % 8, lane / 8) owns rows 4 ty.. and columns 4 tx..
// Rows lie 9 vectors apart, every fourth one vector further, so that no two threads of a read meet in a memory bank.
var<workgroup> ta: array<vec4<f32>, 296>;
var<workgroup> tb: array<vec4<f32>, 296>;
var<workgroup> tp: array<vec4<f32>, 296>;
fn row(r: u32) -> u32 { return r * 9u + r / 4u; }
// s[i][j] += row 4 ty + i of `ta` · row 4 tx + j of `tb`.
fn dots(tx: u32, ty: u32, s: mat4x4<f32>) -> mat4x4<f32> {
  var r = s;
  let p = row(ty * 4u);
  let q = row(tx * 4u);
  for (var c = 0u; c < 8u; c++) {
    let b = mat4x4<f32>(tb[q + c], tb[q + 9u + c], tb[q + 18u + c], tb[q + 27u + c]);
    r[0] += ta[p + c] * b;
    r[1] += ta[p + 9u + c] * b;
    r[2] += ta[p + 18u + c] * b;
    r[3] += ta[p + 27u + c] * b;
  }
  return r;
}
// acc[i] += sum over k of tp[4 ty + i][k] * tb[k][4 tx..].
fn accumulate(tx: u32, ty: u32, acc: mat4x4<f32>) -> mat4x4<f32> {
  var r = acc;
  let p = row(ty * 4u);
  for (var k = 0u; k < 8u; k++) {
    let at = row(k * 4u) + tx;
    let v = mat4x4<f32>(tb[at], tb[at + 9u], tb[at + 18u], tb[at + 27u]);
    r[0] += v * tp[p + k];
    r[1] += v * tp[p + 9u + k];
    r[2] += v * tp[p + 18u + k];
    r[3] += v * tp[p + 27u + k];
  }
  return r;
}
var<workgroup> least: atomic<u32>;
var<workgroup> most: atomic<u32>;
var<workgroup> both: vec2<u32>;
// The keys that the queries of a tile see together; each thread brings what one query sees.
fn together(lane: u32, see: vec2<u32>) -> vec2<u32> {
  if (lane == 0u) {
    atomicStore(&least, 0xffffffffu);
    atomicStore(&most, 0u);
  }
  workgroupBarrier();
  if (see.y > see.x) {
    atomicMin(&least, see.x);
    atomicMax(&most, see.y);
  }
  workgroupBarrier();
  if (lane == 0u) { both = vec2(atomicLoad(&least), atomicLoad(&most)); }
  return workgroupUniformLoad(&both);
}
