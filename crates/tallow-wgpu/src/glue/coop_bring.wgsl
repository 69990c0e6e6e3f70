// From row `r0` and place `k0` of the sum on, TILE rows by STEP, zeros where the matrix ends. Four elements at once: along
// the sum where @ is dense there or nowhere (ALONG_@), else along its rows.
fn bring_@(first: u32, r0: u32, k0: u32, t: u32) {
  for (var i = 0u; i < TILE * STEP / (4u * WG); i++) {
    let q = t + i * WG;
    let r = select((q % (TILE / 4u)) * 4u, q / (STEP / 4u), ALONG_@);
    let k = select(q / (TILE / 4u), (q % (STEP / 4u)) * 4u, ALONG_@);
    let dr = select(1u, 0u, ALONG_@);
    let dk = 1u - dr;
    let rest_r = max(ROWS, r0 + r) - (r0 + r);
    let rest_k = max(UPTO, k0 + k) - (k0 + k);
    let at = first + (r0 + r) * ROW_STRIDE + (k0 + k) * SUM_STRIDE;
    var v = vec4<f32>(0.0);
    if (rest_r > 3u * dr && rest_k > 3u * dk) {
      if (DENSE_@) {
        v = ld4_@(at);
      } else {
        let d = dr * ROW_STRIDE + dk * SUM_STRIDE;
        v = vec4<f32>(ld_@(at), ld_@(at + d), ld_@(at + 2u * d), ld_@(at + 3u * d));
      }
    } else {
      for (var j = 0u; j < 4u; j++) {
        if (rest_r > j * dr && rest_k > j * dk) { v[j] = ld_@(at + j * (dr * ROW_STRIDE + dk * SUM_STRIDE)); }
      }
    }
    v = SCALED;
    let to = r * ROW + k;
    let d = dr * ROW + dk;
    INTO[to] = NUMBER(v.x);
    INTO[to + d] = NUMBER(v.y);
    INTO[to + 2u * d] = NUMBER(v.z);
    INTO[to + 3u * d] = NUMBER(v.w);
  }
}
