// 32 columns, from `column` on, of rows first.. of a head of NAME, into TILE: zeros past the end and past D.
fn load_NAME_TILE(lane: u32, base: u32, stride: u32, first: u32, limit: u32, column: u32) {
  let c = column + lane % 8u * 4u;
  for (var r = lane / 8u; r < 32u; r += 8u) {
    var x = vec4<f32>();
    if (first + r < limit && c < D) {
      let at = base + (first + r) * stride + c;
      if (c + 4u <= D) {
        x = ld4_NAME(at);
      } else {
        x.x = ld_NAME(at);
        if (c + 1u < D) { x.y = ld_NAME(at + 1u); }
        if (c + 2u < D) { x.z = ld_NAME(at + 2u); }
      }
    }
    TILE[row(r) + lane % 8u] = x;
  }
}
