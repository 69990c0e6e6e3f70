// Shared by the attention kernels. Constants: head size D, heads for each key head G, SCALE, and the mask: CAUSAL,
// WINDOW (0: none).
// Less than any score; a finite number, since what WGSL makes of infinities is not said.
const LOW: f32 = -1e30;
// A query at position p of a document that starts at `first` sees keys x <= key < y; a padded one none.
fn seen(p: u32, first: u32, keys: u32) -> vec2<u32> {
  if (!CAUSAL) { return vec2(0u, keys); }
  if (p >= keys || (HAS_starts && first > p)) { return vec2(0u, 0u); }
  var near = 0u;
  if (WINDOW > 0u && p + 1u > WINDOW) { near = p + 1u - WINDOW; }
  if (HAS_starts) { near = max(near, first); }
  return vec2(near, p + 1u);
}
