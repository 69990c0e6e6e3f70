// Philox4x32-10: element `index` of the draw `id` under a seed, as every device draws it.
DEV float uniform(u32 seed0, u32 seed1, u32 id, u32 index) {
  u32 c0 = index / 4, c1 = 0, c2 = id, c3 = 0, k0 = seed0, k1 = seed1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    if (round) { k0 += 0x9E3779B9u; k1 += 0xBB67AE85u; }
    const u32 ph = __umulhi(0xD2511F53u, c0), pl = 0xD2511F53u * c0;
    const u32 qh = __umulhi(0xCD9E8D57u, c2), ql = 0xCD9E8D57u * c2;
    c0 = qh ^ c1 ^ k0; c1 = ql; c2 = ph ^ c3 ^ k1; c3 = pl;
  }
  const u32 lane = index % 4;
  const u32 w = lane == 0 ? c0 : lane == 1 ? c1 : lane == 2 ? c2 : c3;
  return (float)(w >> 8) * (1.f / 16777216.f);
}
