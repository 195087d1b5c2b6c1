// Inputs of linear layers.

// silu(gate) * up.
DEVICE float gated_value(float gate, float up) {
    return gate / (1 + expf(-gate)) * up;
}

// Writes column i of a row, if it is_there. The whole warp calls this; each half of it has 16 consecutive columns, of which all are
// there or none.
DEVICE void write_activation(const Activations& act, u32 row, u32 i, float x, bool is_there) {
    const u64 at = (u64)row * act.stride + i;
    const u16 hi = to_bf16(x);
    const u16 lo = to_bf16(x - from_bf16(hi));
    if (is_there) {
        act.hi[at] = hi;
        act.lo[at] = lo;
        if (act.exact) act.exact[at] = x;
    }
    if (act.sums) {
        float sum = from_bf16(hi) + from_bf16(lo);
        for (u32 mask = 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (is_there && threadIdx.x % 16 == 0) act.sums[at / 16] = sum;
    }
}

// Writes columns first .. first + n of a row, and what pads them to a multiple of 32, from `values`: n floats in shared memory that
// the block has just written. `first` is a multiple of 32. All threads of the block call this, whole warps; who writes to `values`
// again afterwards calls sync_block() first.
DEVICE void write_activations(const float* values, u32 first, u32 n, u32 row, const Activations& act) {
    sync_block();
    const u32 padded = (n + 31) / 32 * 32;
    for (u32 i = threadIdx.x; i < padded; i += blockDim.x) {
        write_activation(act, row, first + i, i < n ? values[i] : 0.0f, true);
    }
}
