// Residuals, norms and the gated activation: one block to a row.

// The sum over a block's threads; all of them get it. `partial` holds one value to a warp.
DEVICE float block_sum(float x, float* partial) {
    const u32 warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    x = warp_sum(x);
    sync_block(); // whoever still reads the last sum
    if (threadIdx.x % 32 == 0) partial[warp] = x;
    sync_block();
    float sum = 0;
    for (u32 i = 0; i < n_warps; i++) sum += partial[i];
    return sum;
}

KERNEL(residual_norm, ResidualParams, 256) {
    DYNAMIC_SHARED(float, values); // (n)
    SHARED(float, partial, 8);
    const u32 row = blockIdx.x;
    const float* x = p.x_in + (u64)(p.gather ? p.gather[row] : row) * p.n;
    const float* add = p.add ? p.add + (u64)row * p.n : nullptr;
    float scale = 1;
    if (add && p.add_norm) {
        float squares = 0;
        for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) squares += add[i] * add[i];
        scale = 1 / sqrtf(block_sum(squares, partial) / (float)p.n + p.eps);
    }
    float squares = 0;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        float y = x[i];
        if (add) y += p.add_norm ? add[i] * (scale * p.add_norm[i]) : add[i];
        if (p.x_out) p.x_out[(u64)row * p.n + i] = y;
        values[i] = y;
        squares += y * y;
    }
    if (p.norm) {
        scale = 1 / sqrtf(block_sum(squares, partial) / (float)p.n + p.eps);
        for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) values[i] *= scale * p.norm[i];
    }
    if (p.normed) {
        for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) p.normed[(u64)row * p.n + i] = values[i];
    }
    if (p.act.hi) write_activations(values, 0, p.n, row, p.act);
}

KERNEL(gated, GatedParams, 256) {
    DYNAMIC_SHARED(float, values); // (n)
    const u64 row = (u64)blockIdx.x * p.n;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        values[i] = gated_value(p.gate[row + i], p.up[row + i]);
    }
    write_activations(values, 0, p.n, blockIdx.x, p.act);
}

// y += bias: one block to a row.
KERNEL(add_bias, BiasParams, 256) {
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) p.y[(u64)blockIdx.x * p.n + i] += p.bias[i];
}
