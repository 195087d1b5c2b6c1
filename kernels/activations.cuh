// Writes a row of a linear layer's input from `values`, n floats in shared memory that the block has just written. All
// threads of the block call this, whole warps; who writes to `values` again afterwards calls sync_block() first.
DEVICE void write_activations(const float* values, u32 n, u32 row, const Activations& act) {
    sync_block();
    const u32 lane = threadIdx.x % 32;
    // A warp takes 32 consecutive values, for the sake of the sums; the stride is a multiple of 32.
    for (u32 part = threadIdx.x / 32; part < act.stride / 32; part += blockDim.x / 32) {
        const u32 i = part * 32 + lane;
        const u64 at = (u64)row * act.stride + i;
        const float x = i < n ? values[i] : 0.0f;
        const u16 hi = to_bf16(x);
        const u16 lo = to_bf16(x - from_bf16(hi));
        act.hi[at] = hi;
        act.lo[at] = lo;
        if (act.exact) act.exact[at] = x;
        if (act.sums) {
            const float sum = warp_sum(from_bf16(hi) + from_bf16(lo));
            if (lane == 0) act.sums[(u64)row * (act.stride / 32) + part] = sum;
        }
    }
}
