// The h of a row x where whoever made it left no parts behind: np [R, 1], one block a rank. A factor of a norm is not in
// it, as in parts; the norm's weights nw are.
extern "C" __global__ void __launch_bounds__(256) down(const float* x, float* np, const float* nw PARAMS) {
  GRID_WAIT;
  const u32 r = blockIdx.x;
  const float* down = 0;
  NEXT_ROW
  float h = 0.f;
  for (u32 i = threadIdx.x; i < NEXT_K; i += 256) h += down[i] * (nw ? nw[i] : 1.f) * x[i];
  h = block_sum(h);
  if (threadIdx.x == 0) np[r] = h;
}
