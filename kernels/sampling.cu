// The best tokens of a row of logits, and what normalizes its probabilities: all that most samplers need of a large vocabulary.

static const u32 TOP = 64;
static const u32 TOP_CHUNK = 4096;

// Sorts ascending.
DEVICE void sort_chunk(u64* keys) {
    for (u32 size = 2; size <= TOP_CHUNK; size *= 2) {
        for (u32 stride = size / 2; stride > 0; stride /= 2) {
            sync_block();
            for (u32 i = threadIdx.x; i < TOP_CHUNK / 2; i += blockDim.x) {
                const u32 a = 2 * i - (i & (stride - 1)), b = a + stride;
                const u64 x = keys[a], y = keys[b];
                if ((x > y) == ((a & size) == 0)) {
                    keys[a] = y;
                    keys[b] = x;
                }
            }
        }
    }
    sync_block();
}

// As samplers take it: -infinity for NaN, the largest finite number for +infinity.
DEVICE float clean(float logit) {
    const u32 bits = float_bits(logit);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits_float(0xff800000);
    return bits == 0x7f800000 ? bits_float(0x7f7fffff) : logit;
}

// Orders as samplers do: by logit, largest first, then by token. Unusable ones (NaN, -infinity) come last.
DEVICE u64 top_key(float logit, u32 token) {
    const u32 bits = float_bits(clean(logit) + 0.0f); // -0 is 0
    if (bits == 0xff800000) return ~(u64)0;
    const u32 ascending = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return (u64)~ascending << 32 | token;
}

// Grid: (chunk of the vocabulary, row).
KERNEL(top_chunks, TopParams, 512) {
    SHARED(u64, keys, TOP_CHUNK);
    SHARED(float, partial, 32);
    const u32 chunk = blockIdx.x, row = blockIdx.y, first = chunk * TOP_CHUNK;
    const float* logits = p.logits + (u64)row * p.n_vocab;
    for (u32 i = threadIdx.x; i < TOP_CHUNK; i += blockDim.x) {
        keys[i] = first + i < p.n_vocab ? top_key(logits[first + i], first + i) : ~(u64)0;
    }
    sort_chunk(keys);
    const u64 at = (u64)row * p.n_chunks + chunk;
    for (u32 i = threadIdx.x; i < TOP; i += blockDim.x) p.keys[at * TOP + i] = keys[i];
    const bool is_any = keys[0] != ~(u64)0;
    const float largest = is_any ? clean(logits[(u32)keys[0]]) : 0;
    float sum = 0;
    for (u32 i = threadIdx.x; is_any && i < TOP_CHUNK && first + i < p.n_vocab; i += blockDim.x) {
        sum += expf(clean(logits[first + i]) - largest);
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) {
        p.parts[at * 2] = largest;
        p.parts[at * 2 + 1] = sum;
    }
}

// Grid: (row). At most TOP_CHUNK / TOP chunks.
KERNEL(top_rows, TopParams, 512) {
    SHARED(u64, keys, TOP_CHUNK);
    SHARED(float, partial, 32);
    const u32 row = blockIdx.x, n = p.n_chunks * TOP;
    for (u32 i = threadIdx.x; i < TOP_CHUNK; i += blockDim.x) keys[i] = i < n ? p.keys[(u64)row * n + i] : ~(u64)0;
    sort_chunk(keys);
    for (u32 i = threadIdx.x; i < TOP; i += blockDim.x) {
        const u32 token = keys[i] == ~(u64)0 ? ~(u32)0 : (u32)keys[i];
        p.tokens[row * TOP + i] = token;
        p.values[row * TOP + i] = token == ~(u32)0 ? 0 : p.logits[(u64)row * p.n_vocab + token];
    }
    const bool is_any = keys[0] != ~(u64)0;
    const float largest = is_any ? clean(p.logits[(u64)row * p.n_vocab + (u32)keys[0]]) : 0;
    float total = 0;
    for (u32 i = threadIdx.x; is_any && i < p.n_chunks; i += blockDim.x) {
        const float* part = p.parts + ((u64)row * p.n_chunks + i) * 2;
        if (part[1] > 0) total += part[1] * expf(part[0] - largest);
    }
    total = block_sum(total, partial);
    if (threadIdx.x == 0) p.totals[row] = total;
}
