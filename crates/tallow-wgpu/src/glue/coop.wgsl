// As product.wgsl, by units: the threads of a subgroup multiply matrices of SIDE x SIDE together. A workgroup of four
// subgroups makes TILE x TILE of the result, a subgroup four by four matrices. Factors are NUMBER, sums f32.
// The texts put in say where each matrix begins (x0, w0, y0), make sums of zeros, multiply what was brought, and end
// rows of matrices. In shared memory a row of x, and of w, lies along the sum.
const TILE: u32 = 8u * SIDE;
// Of the sum, brought at once. Rows are 16 bytes apart from each other, so that they begin in different banks.
const STEP: u32 = 2u * SIDE;
const ROW: u32 = STEP + PAD;
const OUT_ROW: u32 = 4u * SIDE;
var<workgroup> xs: array<NUMBER, TILE * ROW>;
var<workgroup> ws: array<NUMBER, TILE * ROW>;
SUMS

// Two neighbouring matrices of each subgroup, from row and column `begin` of its part on, which lie as the subgroups do.
fn finish(y0: u32, row0: u32, col0: u32, begin: vec2<u32>, t: u32) {
  for (var e = t; e < 2u * SIDE * OUT_ROW; e += WG) {
    let r = e / OUT_ROW;
    let c = e % OUT_ROW;
    let row = row0 + r / SIDE * 4u * SIDE + begin.x + r % SIDE;
    let col = col0 + c / (2u * SIDE) * 4u * SIDE + begin.y + c % (2u * SIDE);
    if (row < a.m && col < a.n) {
      var v = a.alpha * OUT[e];
      if (HAS_bias) { v += ld_bias(a.bias0 + col); }
      if (HAS_past) { v += ld_past(a.past0 + row * a.pastr + col); }
      let at = y0 + row * a.yr + col * a.yc;
      if (ADD) { v += ld_y(at); }
      st_y(at, v);
    }
  }
}

@compute @workgroup_size(WG) fn product_coop(id: Id) {
  let z = id.w.z;
  FIND
  let row0 = id.w.y * TILE;
  let col0 = id.w.x * TILE;
  let part = vec2<u32>(id.sub / 2u, id.sub % 2u) * 4u * SIDE;
  for (var i = id.t; i < SIDE * SIDE; i += WG) { OUT[i] = 0.0; }
  workgroupBarrier();
  ZEROS
  workgroupBarrier();
  // The low-rank part runs on behind the sum.
  let whole = (a.k + STEP - 1u) / STEP * STEP;
  for (var k0 = 0u; k0 < whole + RANK; k0 += STEP) {
    if (RANK == 0u || k0 < whole) {
      bring_x(x0, row0, k0, id.t);
      bring_w(w0, col0, k0, id.t);
    } else {
      bring_h(a.h0, row0, k0 - whole, id.t);
      bring_b(a.b0, col0, k0 - whole, id.t);
    }
    workgroupBarrier();
    MULTIPLY
    workgroupBarrier();
  }
  END
}
