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
#define NC ((D + 15) / 16)
#define DP (NC * 16)
