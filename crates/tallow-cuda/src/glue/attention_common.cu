// Shared by the attention kernels. Constants: head size D, heads for each key head G, SCALE, and the mask.
// A query at position p sees keys lo <= key < hi; a padded one none.
struct Range { u32 lo, hi; };
DEV Range seen(const u32* pos, const u32* starts, u32 i, u32 s) {
#if CAUSAL
  const u32 p = pos[i], first = STARTS ? starts[i] : 0;
  if (p >= s || first > p) return {0, 0};
  const u32 near = WINDOW && p + 1 > WINDOW ? p + 1 - WINDOW : 0;
  return {max(first, near), p + 1};
#else
  return {0, s};
#endif
}
//cap // A score before it is scaled, bent so that SCALE times it is CAP tanh(SCALE x / CAP); and the slope of that where it
//cap // gave y.
//cap // Near 0, where 1 - 2 / (e^2x + 1) cancels, a polynomial, as in Cephes. The power is volatile to keep the compiler from
//cap // making all scores of a tile at once, which spills.
//cap DEV float bent(float x) {
//cap   const float u = x * CAP_IN, a = fabsf(u), z = u * u;
//cap   const float near = ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z
//cap     - 3.33332819422e-1f) * z * u + u;
//cap   float e;
//cap   asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(a * 2.8853900817779268f));
//cap   const float far = copysignf(1.f - __fdividef(2.f, e + 1.f), u);
//cap   return CAP_OUT * (a < 0.625f ? near : far);
//cap }
//cap DEV float slope(float y) { const float t = y * CAP_IN; return 1.f - t * t; }
#define NC ((D + 15) / 16)
#define DP (NC * 16)
