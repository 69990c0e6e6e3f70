// The thread's four rows of a tile into NAME, from `column` on.
fn store_NAME(base: u32, stride: u32, first: u32, limit: u32, column: u32, x: mat4x4<f32>) {
  for (var i = 0u; i < 4u; i++) {
    if (first + i >= limit || column >= D) { continue; }
    let at = base + (first + i) * stride + column;
    st_NAME(at, x[i].x);
    if (column + 1u < D) { st_NAME(at + 1u, x[i].y); }
    if (column + 2u < D) { st_NAME(at + 2u, x[i].z); }
    if (column + 3u < D) { st_NAME(at + 3u, x[i].w); }
  }
}
