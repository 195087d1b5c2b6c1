// Queries, keys and values of a layer: norms, RoPE, the cache's types; attention over stored and hidden rows; rings.
//
// Attention carries the softmax along (Milakov and Gimelshein, arXiv 1805.02867), in base 2, over pieces of the keys.
// The rows of a tile and the heads that share a key head read each key once.

constexpr u32 CACHE_F32 = 0, CACHE_F16 = 1, CACHE_Q8_0 = 2, CACHE_BF16 = 3;
constexpr float LOG2_E = 1.44269504088896341f;

// The score of a key that is not seen: minus infinity.
DEVICE float unseen() {
    return from_bf16(0xff80);
}

// ------------------------------------------------------------------ qkv_finish

// To f16 as the CPU does it: what is too large becomes infinite, where to_f16 saturates.
DEVICE u16 to_cached_f16(float x) {
    if (fabsf(x) < 65520.0f) return to_f16(x);
    return (u16)((x < 0 ? 0x8000 : 0) | (x == x ? 0x7c00 : 0x7e00));
}

// Encodes a row of n values in shared memory, heads one after another. src/tensor.rs, quantize_row, does the same.
DEVICE void encode_row(const float* values, u32 n, u32 type, u8* to) {
    if (type == CACHE_F32) {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) ((float*)to)[i] = values[i];
    } else if (type == CACHE_F16) {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) ((u16*)to)[i] = to_cached_f16(values[i]);
    } else if (type == CACHE_BF16) {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) ((u16*)to)[i] = to_bf16(values[i]);
    } else {
        const u32 lane = threadIdx.x % 32, n_parts = (n + 31) / 32;
        u16* scales = (u16*)(to + n_parts * 32);
        for (u32 part = threadIdx.x / 32; part < n_parts; part += blockDim.x / 32) {
            const u32 i = part * 32 + lane;
            const float x = i < n ? values[i] : 0.0f;
            const float scale = warp_max(fabsf(x)) / 127.0f;
            const float scaled = x * (scale == 0.0f ? 0.0f : 1.0f / scale);
            // Rust's conversion to i8 saturates, and makes zero of what is not a number.
            const i32 rounded = scaled == scaled ? (i32)roundf(fminf(fmaxf(scaled, -128.0f), 127.0f)) : 0;
            ((i8*)to)[i] = (i8)rounded;
            if (lane == 0) scales[part] = to_cached_f16(scale);
        }
    }
}

// RMS norm of heads of `dim` values in shared memory, one after another, or of all of them as one. 128 threads.
DEVICE void norm_heads(float* values, u32 n_heads, u32 dim, const float* weight, bool whole, float eps) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (whole) {
        SHARED(float, partial, 4);
        const u32 n = n_heads * dim;
        float squares = 0;
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) squares += values[i] * values[i];
        squares = warp_sum(squares);
        if (lane == 0) partial[warp] = squares;
        sync_block();
        squares = partial[0] + partial[1] + partial[2] + partial[3];
        const float scale = 1.0f / sqrtf(squares / (float)n + eps);
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) values[i] *= scale * weight[i];
    } else {
        for (u32 head = warp; head < n_heads; head += blockDim.x / 32) {
            float* x = values + head * dim;
            float squares = 0;
            for (u32 i = lane; i < dim; i += 32) squares += x[i] * x[i];
            const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)dim + eps);
            for (u32 i = lane; i < dim; i += 32) x[i] *= scale * weight[i];
        }
    }
}

// Grid: (entering row), or (entering row, 3) to do queries, keys and values at the same time.
KERNEL(qkv_finish, QkvParams, 128) {
    DYNAMIC_SHARED(float, values); // (n_heads * head_dim)
    if (blockIdx.x >= p.n) return;
    const u32 dim = p.head_dim;
    const u32 row_of_pass = p.enter[blockIdx.x];
    const Row row = p.rows[row_of_pass];
    const float* rope = p.rope + (u64)row_of_pass * (dim / 2) * 2;
    const KeyValues store = row.is_hidden ? p.fresh : p.cache;
    for (u32 part = blockIdx.y; part < 3; part += gridDim.y) { // 0: queries, 1: keys, 2: values
        const u32 n_heads = part == 0 ? p.n_heads : p.n_kv_heads, n = n_heads * dim;
        const u64 at = (u64)blockIdx.x * n;
        const float* x = (part == 0 ? p.q : part == 1 ? p.k : p.v) + at;
        sync_block(); // the last part is still read
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) values[i] = x[i];
        sync_block();
        const float* norm = part == 0 ? p.q_norm : part == 1 ? p.k_norm : nullptr;
        if (norm) {
            norm_heads(values, n_heads, dim, norm, p.norm_whole, p.eps);
            sync_block();
        }
        const u32 n_pairs = part < 2 ? n_heads * p.n_rope : 0;
        for (u32 i = threadIdx.x; i < n_pairs; i += blockDim.x) {
            const u32 pair = i % p.n_rope, head = i / p.n_rope * dim;
            const u32 first = head + (p.adjacent ? 2 * pair : pair);
            const u32 second = p.adjacent ? first + 1 : first + dim / 2;
            const float cosine = rope[2 * pair], sine = rope[2 * pair + 1];
            const float a = values[first], b = values[second];
            values[first] = a * cosine - b * sine;
            values[second] = b * cosine + a * sine;
        }
        sync_block();
        if (part == 0) {
            for (u32 i = threadIdx.x; i < n; i += blockDim.x) p.q[at + i] = values[i];
        } else {
            encode_row(values, n, p.cache_type, (part == 1 ? store.k : store.v) + (u64)row.place * p.row_bytes);
        }
    }
}

// ------------------------------------------------------------------ what attention goes over

// The keys of a block: a tile's stored rows in a split, then its hidden tokens if the split is the last.
struct Keys {
    u32 from, to;               // stored rows
    u32 hidden_from, hidden_to; // hidden tokens; from a multiple of the step's length
    u32 hidden_low;             // those before this one are seen by nobody and may be gone
};

// Some of them, stored or hidden.
struct Step {
    u32 first, n;
    u32 low; // for numbers below it, this one is read
    bool is_hidden;
};

// Where a key and its value lie.
struct Place {
    const u8* k;
    const u8* v;
};

// In steps of up to `most` keys.
DEVICE Keys keys_of(const AttentionParams& p, const Tile& tile, u32 most) {
    const u32 split = blockIdx.z;
    Keys keys;
    keys.from = umin(split * tile.split, tile.stored);
    keys.to = umin(keys.from + tile.split, tile.stored);
    keys.hidden_low = tile.hidden_from;
    keys.hidden_from = tile.hidden_from / most * most;
    const bool has_hidden = split + 1 == p.splits && tile.hidden_from < tile.hidden_to;
    keys.hidden_to = has_hidden ? tile.hidden_to : keys.hidden_from;
    return keys;
}

DEVICE u32 count_steps(const Keys& keys, u32 most) {
    return (keys.to - keys.from + most - 1) / most + (keys.hidden_to - keys.hidden_from + most - 1) / most;
}

DEVICE Step step_of(const Keys& keys, u32 most, u32 index) {
    const u32 n_stored = (keys.to - keys.from + most - 1) / most;
    Step step;
    step.is_hidden = index >= n_stored;
    step.first = step.is_hidden ? keys.hidden_from + (index - n_stored) * most : keys.from + index * most;
    step.n = umin((step.is_hidden ? keys.hidden_to : keys.to) - step.first, most);
    step.low = step.is_hidden ? keys.hidden_low : 0;
    return step;
}

// Where the key with this number lies: of the sequence's stored rows, or of its hidden tokens.
DEVICE Place place_of(const AttentionParams& p, const Entry& entry, bool is_hidden, u32 number) {
    KeyValues store = p.cache;
    u64 row;
    if (!is_hidden) {
        row = (u64)p.blocks[entry.blocks + number / p.rows_per_block] * p.rows_per_block + number % p.rows_per_block;
    } else if (number < entry.first_hidden) {
        store = p.ring;
        row = (u64)entry.seq * p.ring_capacity + number % p.ring_capacity;
    } else {
        store = p.fresh;
        row = entry.hidden_base + (number - entry.first_hidden);
    }
    Place place;
    place.k = store.k + row * p.row_bytes;
    place.v = store.v + row * p.row_bytes;
    return place;
}

// A query of a tile: the heads of a row that share the key head, row after row.
struct Query {
    const float* q; // (head_dim)
    float* partial; // (head_dim + 2)
    Row row;
};

DEVICE Query query_of(const AttentionParams& p, const Tile& tile, u32 index) {
    const u32 group = p.n_heads / p.n_kv_heads;
    const u32 head = blockIdx.y * group + index % group;
    const u32 keep = tile.first + index / group;
    const u32 enter = p.keep[keep];
    Query query;
    query.q = p.q + ((u64)enter * p.n_heads + head) * p.head_dim;
    query.partial = p.partial + (((u64)(keep - p.first) * p.n_heads + head) * p.splits + blockIdx.z) * (p.head_dim + 2);
    query.row = p.rows[p.enter[enter]];
    return query;
}

// Of a step's keys, those that a row sees: low .. low + n, by their numbers.
struct Sight {
    u32 low, n;
};

DEVICE Sight sight_of(const Row& row, const Step& step) {
    const u32 low = step.is_hidden ? row.hidden_from : 0;
    const u32 high = umin(step.is_hidden ? row.hidden_to : row.stored, step.first + step.n);
    Sight sight;
    sight.low = low;
    sight.n = umax(low, high) - low;
    return sight;
}

DEVICE bool sees(const Sight& sight, u32 number) {
    return number - sight.low < sight.n; // below `low` it wraps around
}

// What exponents are relative to: the largest score, unless nothing has been seen.
DEVICE float base_of(float max) {
    return max == unseen() ? 0.0f : max;
}

// ------------------------------------------------------------------ attention_plain

// Value i of a row.
DEVICE float decode(const u8* row, u32 i, u32 type, u32 kv_dim) {
    if (type == CACHE_F32) return ((const float*)row)[i];
    if (type == CACHE_F16) return from_f16(((const u16*)row)[i]);
    if (type == CACHE_BF16) return from_bf16(((const u16*)row)[i]);
    return (float)((const i8*)row)[i] * from_f16(((const u16*)(row + (kv_dim + 31) / 32 * 32))[i / 32]);
}

constexpr u32 PLAIN_KEYS = 32;    // to a step: a lane has one
constexpr u32 PLAIN_QUERIES = 4;  // of a warp
constexpr u32 PLAIN_LANE_DIM = 8; // dimensions of the output in a lane: head_dim is at most 256

// Attention in f32, for any head dimension up to 256, cache type and number of queries: 16 of them go over the keys
// together. Dynamic shared memory: (16 * head_dim + 64 * (head_dim | 1)) floats.
KERNEL(attention_plain, AttentionParams, 128) {
    DYNAMIC_SHARED(float, shared);
    const Tile tile = p.tiles[blockIdx.x];
    if (tile.first - p.first >= p.n) return;
    const u32 dim = p.head_dim, stride = dim | 1; // an odd stride: a lane's key in a bank of its own
    float* q = shared;                            // (query of the 16, dim), scaled
    float* k = q + 16 * dim;                      // (key, stride)
    float* v = k + PLAIN_KEYS * stride;           // (key, stride)
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Entry entry = p.entries[tile.entry];
    const Keys keys = keys_of(p, tile, PLAIN_KEYS);
    const u32 n_queries = tile.n * (p.n_heads / p.n_kv_heads), n_steps = count_steps(keys, PLAIN_KEYS);

    for (u32 first = 0; first < n_queries; first += 16) {
        float max[PLAIN_QUERIES], sum[PLAIN_QUERIES], out[PLAIN_QUERIES][PLAIN_LANE_DIM];
        Query queries[PLAIN_QUERIES];
        sync_block(); // the last queries are still read
        for (u32 j = 0; j < PLAIN_QUERIES; j++) {
            max[j] = unseen();
            sum[j] = 0;
            for (u32 i = 0; i < PLAIN_LANE_DIM; i++) out[j][i] = 0;
            // Queries beyond the last repeat it.
            queries[j] = query_of(p, tile, umin(first + j * 4 + warp, n_queries - 1));
            for (u32 i = lane; i < dim; i += 32) q[(j * 4 + warp) * dim + i] = queries[j].q[i] * (p.scale * LOG2_E);
        }
        for (u32 index = 0; index < n_steps; index++) {
            const Step step = step_of(keys, PLAIN_KEYS, index);
            sync_block(); // the last keys are still read
            for (u32 key = warp; key < PLAIN_KEYS; key += 4) {
                if (key >= step.n) {
                    for (u32 i = lane; i < dim; i += 32) k[key * stride + i] = 0; // its value will not be looked at
                    continue;
                }
                const Place place = place_of(p, entry, step.is_hidden, umax(step.first + key, step.low));
                for (u32 i = lane; i < dim; i += 32) {
                    const u32 at = blockIdx.y * dim + i;
                    k[key * stride + i] = decode(place.k, at, p.cache_type, p.n_kv_heads * dim);
                    v[key * stride + i] = decode(place.v, at, p.cache_type, p.n_kv_heads * dim);
                }
            }
            sync_block();
            if (first + warp >= n_queries) continue; // the warp has none

            float weights[PLAIN_QUERIES] = {0, 0, 0, 0};
            for (u32 i = 0; i < dim; i++) {
                const float x = k[lane * stride + i];
                for (u32 j = 0; j < PLAIN_QUERIES; j++) weights[j] += q[(j * 4 + warp) * dim + i] * x;
            }
            for (u32 j = 0; j < PLAIN_QUERIES; j++) {
                const float score = sees(sight_of(queries[j].row, step), step.first + lane) ? weights[j] : unseen();
                const float new_max = fmaxf(max[j], warp_max(score)), base = base_of(new_max);
                const float shrink = exp2_approx(max[j] - base);
                weights[j] = exp2_approx(score - base);
                sum[j] = sum[j] * shrink + weights[j]; // the lane's; lanes are added up at the end
                max[j] = new_max;
                for (u32 i = 0; i < PLAIN_LANE_DIM; i++) out[j][i] *= shrink;
            }
            for (u32 key = 0; key < step.n; key++) {
                float weight[PLAIN_QUERIES];
                for (u32 j = 0; j < PLAIN_QUERIES; j++) weight[j] = shuffle(weights[j], key);
                for (u32 i = 0; i < PLAIN_LANE_DIM; i++) {
                    const u32 d = i * 32 + lane;
                    if (d >= dim) break;
                    const float x = v[key * stride + d];
                    for (u32 j = 0; j < PLAIN_QUERIES; j++) out[j][i] += weight[j] * x;
                }
            }
        }
        for (u32 j = 0; j < PLAIN_QUERIES; j++) {
            const float total = warp_sum(sum[j]);
            if (first + j * 4 + warp >= n_queries) continue;
            float* to = queries[j].partial;
            for (u32 i = 0; i < PLAIN_LANE_DIM; i++) {
                if (i * 32 + lane < dim) to[i * 32 + lane] = out[j][i];
            }
            if (lane == 0) to[dim] = max[j];
            if (lane == 0) to[dim + 1] = total;
        }
    }
}

// ------------------------------------------------------------------ attention_mma

constexpr u32 MMA_KEYS = 64; // to a step; a warp loads 16 of them

// Weights of values are f16, whose smallest number is 2^-24: scores are taken relative to the maximum less this, and so
// the weights of keys that matter little but are many are kept. Sums are f32.
constexpr float HEADROOM = 8.0f;

// What tensor cores multiply: f16; over a bf16 cache bf16, since its keys and values may be larger than any f16. Of queries, hi + lo
// keep 22 bits, or 16 in bf16. One bf16 would keep 8 bits of a weight, no more than of a value: those are hi + lo as well then.
template <bool BF16> DEVICE u32 pack_half(float first, float second) {
    return BF16 ? pack_bf16(first, second) : pack_f16(first, second);
}
template <bool BF16> DEVICE u32 pack_rest(float first, float second, u32 high) {
    if (BF16) return pack_bf16(first - from_bf16((u16)high), second - from_bf16((u16)(high >> 16)));
    return pack_f16(first - from_f16((u16)high), second - from_f16((u16)(high >> 16)));
}
template <bool BF16> DEVICE void mma_half(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if (BF16) {
        mma_bf16(c, a, b);
    } else {
        mma_f16(c, a, b);
    }
}

// Shared memory: two buffers of 64 keys, then 64 values, of 16 bits each, (key, MMA_STRIDE bytes); the stride avoids bank
// conflicts. With q8_0 only the first is used so; the second holds what is on the way, (key, STAGED_STRIDE).
template <u32 DIM> constexpr u32 MMA_STRIDE = DIM * 2 + 16;
template <u32 DIM> constexpr u32 STAGED_STRIDE = DIM + 16;
template <u32 DIM> constexpr u32 MMA_BUFFER = 2 * MMA_KEYS * MMA_STRIDE<DIM>;

DEVICE const u8* shuffle_address(const u8* x, u32 lane) {
    const u64 bits = (u64)x;
    return (const u8*)((u64)shuffle((u32)(bits >> 32), lane) << 32 | shuffle((u32)bits, lane));
}

// Begins to copy the warp's 16 keys and values, `BYTES` of each; lanes l and 16 + l know where key l lies.
template <u32 BYTES> DEVICE void copy_rows(u8* to, u32 stride, const Place& place) {
    constexpr u32 CHUNKS = BYTES / 16, ROWS = 32 / CHUNKS; // of a row; at a time
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < 16; i += ROWS) {
        const u32 row = i + lane / CHUNKS, chunk = lane % CHUNKS * 16;
        u8* at = to + (warp * 16 + row) * stride + chunk;
        copy16_async(at, shuffle_address(place.k, row) + chunk);
        copy16_async(at + MMA_KEYS * stride, shuffle_address(place.v, row) + chunk);
    }
}

// Turns the warp's 16 keys (lanes 0..16) and values (16..32) from int8 into f16.
template <u32 DIM> DEVICE void expand_rows(const u8* staged, u8* to, const u32 (&scales)[DIM / 64]) {
    const u32 lane = threadIdx.x % 32, row = lane / 16 * MMA_KEYS + threadIdx.x / 32 * 16 + lane % 16;
    const u8* from = staged + row * STAGED_STRIDE<DIM>;
    u32* at = (u32*)(to + row * MMA_STRIDE<DIM>);
#pragma unroll
    for (u32 i = 0; i < DIM / 16; i++) {
        const uint4 bytes = *(const uint4*)(from + i * 16);
        const u32 half = scales[i / 4] >> (i / 2 % 2 * 16) & 0xffff, scale = half | half << 16;
        const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 first, second;
            int8_to_f16(words[j], first, second);
            at[i * 8 + j * 2] = multiply_f16(first, scale);
            at[i * 8 + j * 2 + 1] = multiply_f16(second, scale);
        }
    }
}

// The tile's queries over the keys of the block's split. All warps load keys; GROUPS is how many groups of 16 keys a
// warp multiplies: 1, if all warps have the same 16 queries and share the keys; 4, if each has 16 queries of its own.
template <u32 DIM, bool BF16, u32 GROUPS>
DEVICE void attend(const AttentionParams& p, const Tile& tile, u32 n_queries, u8* shared) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first_query = GROUPS == 1 ? 0 : warp * 16, first_group = GROUPS == 1 ? warp : 0;
    const bool is_q8 = !BF16 && p.cache_type == CACHE_Q8_0, has_queries = first_query < n_queries;
    const Entry entry = p.entries[tile.entry];
    const Keys keys = keys_of(p, tile, MMA_KEYS);
    const u32 n_steps = count_steps(keys, MMA_KEYS);

    // Queries as fragments, scaled, hi + lo; a lane has parts of the rows lane / 4 and lane / 4 + 8.
    u32 hi[DIM / 16][4], lo[DIM / 16][4];
    Row rows[2];
    float* partial[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 index = first_query + half * 8 + lane / 4;
        const Query query = query_of(p, tile, umin(index, n_queries - 1)); // those beyond the last repeat it
        rows[half] = query.row;
        partial[half] = index < n_queries ? query.partial : nullptr;
#pragma unroll
        for (u32 i = 0; i < DIM / 8; i++) {
            const float* q = query.q + i * 8 + lane % 4 * 2;
            const float x = q[0] * (p.scale * LOG2_E), y = q[1] * (p.scale * LOG2_E);
            const u32 high = pack_half<BF16>(x, y);
            hi[i / 2][i % 2 * 2 + half] = high;
            lo[i / 2][i % 2 * 2 + half] = pack_rest<BF16>(x, y, high);
        }
    }

    // Loading: what step `index` needs is looked up a step before it is copied, and copied a step before it is used.
    Place place = {nullptr, nullptr};
    u32 scales[DIM / 64] = {}; // q8_0: of the row that this lane will expand
    const auto look_up = [&](u32 index) {
        if (index >= n_steps) return;
        const Step step = step_of(keys, MMA_KEYS, index);
        // Those beyond the last repeat it: what has no weight must still be a number.
        const u32 number = umax(step.first + umin(warp * 16 + lane % 16, step.n - 1), step.low);
        place = place_of(p, entry, step.is_hidden, number);
        const u32 head = blockIdx.y * DIM * (is_q8 ? 1 : 2);
        place.k += head;
        place.v += head;
    };
    const auto copy = [&](u32 index) {
        if (index >= n_steps || warp * 16 >= step_of(keys, MMA_KEYS, index).n) return;
        if (is_q8) {
            const u32 to_scales = p.n_kv_heads * DIM - blockIdx.y * DIM + blockIdx.y * (DIM / 16);
            const u32* from = (const u32*)((lane < 16 ? place.k : place.v) + to_scales);
            for (u32 i = 0; i < DIM / 64; i++) scales[i] = from[i];
            copy_rows<DIM>(shared + MMA_BUFFER<DIM>, STAGED_STRIDE<DIM>, place);
        } else {
            copy_rows<DIM * 2>(shared + index % 2 * MMA_BUFFER<DIM>, MMA_STRIDE<DIM>, place);
        }
    };
    look_up(0);
    copy(0);
    copy_commit();
    look_up(1);

    float out[DIM / 8][4] = {}, max[2] = {unseen(), unseen()}, sum[2] = {0, 0};
    for (u32 index = 0; index < n_steps; index++) {
        const Step step = step_of(keys, MMA_KEYS, index);
        copy_wait<0>();
        if (is_q8) {
            sync_block(); // the last keys are no longer read, and the warp's copies are there
            if (warp * 16 < step.n) expand_rows<DIM>(shared + MMA_BUFFER<DIM>, shared, scales);
        }
        sync_block();
        copy(index + 1);
        copy_commit();
        look_up(index + 2);
        if (!has_queries) continue;

        const u8* k = shared + (is_q8 ? 0 : index % 2) * MMA_BUFFER<DIM>;
        const u8* v = k + MMA_KEYS * MMA_STRIDE<DIM>;
        const Sight sights[2] = {sight_of(rows[0], step), sight_of(rows[1], step)};
        float scores[GROUPS * 2][4]; // (8 keys, (row half, lane % 4 * 2 and the next))
#pragma unroll
        for (u32 g = 0; g < GROUPS; g++) {
            const u32 group = first_group + g;
#pragma unroll
            for (u32 i = 0; i < 8; i++) scores[g * 2 + i / 4][i % 4] = 0;
            if (group * 16 < step.n) {
                const u8* from = k + (group * 16 + lane / 16 * 8 + lane % 8) * MMA_STRIDE<DIM> + lane / 8 % 2 * 16;
#pragma unroll
                for (u32 i = 0; i < DIM / 16; i++) {
                    u32 b[4];
                    load_matrices(b, from + i * 32);
                    const u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                    mma_half<BF16>(scores[g * 2], hi[i], b0);
                    mma_half<BF16>(scores[g * 2 + 1], hi[i], b1);
                    mma_half<BF16>(scores[g * 2], lo[i], b0);
                    mma_half<BF16>(scores[g * 2 + 1], lo[i], b1);
                }
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const u32 number = step.first + group * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
                if (!sees(sights[i % 4 / 2], number)) scores[g * 2 + i / 4][i % 4] = unseen();
            }
        }

#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float largest = unseen();
#pragma unroll
            for (u32 i = 0; i < GROUPS * 4; i++) largest = fmaxf(largest, scores[i / 2][half * 2 + i % 2]);
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            const float new_max = fmaxf(max[half], largest - HEADROOM), base = base_of(new_max);
            const float shrink = exp2_approx(max[half] - base);
            max[half] = new_max;
            sum[half] *= shrink; // the lane's; the four lanes of a row are added up at the end
#pragma unroll
            for (u32 i = 0; i < GROUPS * 4; i++) {
                float& score = scores[i / 2][half * 2 + i % 2];
                score = exp2_approx(score - base);
                sum[half] += score;
            }
#pragma unroll
            for (u32 i = 0; i < DIM / 4; i++) out[i / 2][half * 2 + i % 2] *= shrink;
        }

#pragma unroll
        for (u32 g = 0; g < GROUPS; g++) {
            const u32 group = first_group + g;
            if (group * 16 >= step.n) break;
            const float(&first)[4] = scores[g * 2], (&second)[4] = scores[g * 2 + 1];
            const u32 weights[4] = {pack_half<BF16>(first[0], first[1]), pack_half<BF16>(first[2], first[3]),
                                    pack_half<BF16>(second[0], second[1]), pack_half<BF16>(second[2], second[3])};
            u32 rest[4] = {};
            if (BF16) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const float(&x)[4] = scores[g * 2 + i / 2];
                    rest[i] = pack_rest<BF16>(x[i % 2 * 2], x[i % 2 * 2 + 1], weights[i]);
                }
            }
            const u8* from = v + (group * 16 + lane % 16) * MMA_STRIDE<DIM> + lane / 16 * 16;
#pragma unroll
            for (u32 i = 0; i < DIM / 16; i++) {
                u32 b[4];
                load_matrices_transposed(b, from + i * 32);
                const u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_half<BF16>(out[i * 2], weights, b0);
                mma_half<BF16>(out[i * 2 + 1], weights, b1);
                if (BF16) mma_half<BF16>(out[i * 2], rest, b0);
                if (BF16) mma_half<BF16>(out[i * 2 + 1], rest, b1);
            }
        }
    }

#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        sum[half] += shuffle_xor(sum[half], 1);
        sum[half] += shuffle_xor(sum[half], 2);
    }
    if (GROUPS > 1) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float* to = partial[half];
            if (!to) continue;
#pragma unroll
            for (u32 i = 0; i < DIM / 4; i++) to[i / 2 * 8 + lane % 4 * 2 + i % 2] = out[i / 2][half * 2 + i % 2];
            if (lane % 4 == 0) to[DIM] = max[half];
            if (lane % 4 == 0) to[DIM + 1] = sum[half];
        }
        return;
    }

    // The warps' shares of the keys are put together.
    constexpr u32 STRIDE = DIM + 8;     // free of bank conflicts
    float* shares = (float*)shared;     // (warp, query, STRIDE)
    float* sums = shares + 64 * STRIDE; // (warp, query, 2): max, sum
    sync_block(); // keys are still read
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 at = warp * 16 + half * 8 + lane / 4;
#pragma unroll
        for (u32 i = 0; i < DIM / 4; i++) {
            shares[at * STRIDE + i / 2 * 8 + lane % 4 * 2 + i % 2] = out[i / 2][half * 2 + i % 2];
        }
        if (lane % 4 == 0) sums[at * 2] = max[half];
        if (lane % 4 == 0) sums[at * 2 + 1] = sum[half];
    }
    sync_block();
    for (u32 query = warp; query < n_queries; query += 4) {
        float all_max = unseen(), all_sum = 0, factors[4];
        for (u32 i = 0; i < 4; i++) all_max = fmaxf(all_max, sums[(i * 16 + query) * 2]);
        for (u32 i = 0; i < 4; i++) {
            factors[i] = exp2_approx(sums[(i * 16 + query) * 2] - base_of(all_max));
            all_sum += factors[i] * sums[(i * 16 + query) * 2 + 1];
        }
        float* to = query_of(p, tile, query).partial;
        for (u32 d = lane; d < DIM; d += 32) {
            float x = 0;
            for (u32 i = 0; i < 4; i++) x += factors[i] * shares[(i * 16 + query) * STRIDE + d];
            to[d] = x;
        }
        if (lane == 0) to[DIM] = all_max;
        if (lane == 0) to[DIM + 1] = all_sum;
    }
}

// Attention on tensor cores over an f16 or q8_0 cache, or over a bf16 one, for tiles of up to 64 queries. Dynamic shared memory:
// 2 * MMA_BUFFER.
template <u32 DIM, bool BF16> DEVICE void attention_mma(const AttentionParams& p, u8* shared) {
    const Tile tile = p.tiles[blockIdx.x];
    if (tile.first - p.first >= p.n) return;
    const u32 n_queries = tile.n * (p.n_heads / p.n_kv_heads);
    // Warps that share queries add up in another order.
    if (n_queries <= 16 && !p.is_invariant) {
        attend<DIM, BF16, 1>(p, tile, n_queries, shared);
    } else {
        attend<DIM, BF16, 4>(p, tile, n_queries, shared);
    }
}

KERNEL(attention_mma_64, AttentionParams, 128) {
    DYNAMIC_SHARED(u8, shared);
    attention_mma<64, false>(p, shared);
}

KERNEL(attention_mma_128, AttentionParams, 128) {
    DYNAMIC_SHARED(u8, shared);
    attention_mma<128, false>(p, shared);
}

KERNEL(attention_mma_bf16_64, AttentionParams, 128) {
    DYNAMIC_SHARED(u8, shared);
    attention_mma<64, true>(p, shared);
}

KERNEL(attention_mma_bf16_128, AttentionParams, 128) {
    DYNAMIC_SHARED(u8, shared);
    attention_mma<128, true>(p, shared);
}

// ------------------------------------------------------------------ attention_merge

DEVICE void keep_hidden(const MergeParams& p, u32 entering) {
    const Row row = p.rows[p.enter[entering]];
    if (!row.is_hidden) return;
    const Entry entry = p.entries[row.entry];
    const u32 number = row.hidden_to - 1;
    // A later hidden token of this pass takes its place.
    if (number + p.ring_capacity < entry.first_hidden + entry.n_hidden) return;
    const u64 from = (u64)row.place * p.row_bytes;
    const u64 to = ((u64)entry.seq * p.ring_capacity + number % p.ring_capacity) * p.row_bytes;
    for (u32 i = threadIdx.x * 16; i < p.row_bytes; i += blockDim.x * 16) {
        *(uint4*)(p.ring.k + to + i) = *(const uint4*)(p.fresh.k + from + i);
        *(uint4*)(p.ring.v + to + i) = *(const uint4*)(p.fresh.v + from + i);
    }
}

KERNEL(attention_merge, MergeParams, 128) {
    DYNAMIC_SHARED(float, values); // (head of the group, head_dim)
    if (blockIdx.x >= p.n) {
        if (blockIdx.y == 0) keep_hidden(p, blockIdx.x - p.n);
        return;
    }
    const u32 lane = threadIdx.x % 32, width = p.head_dim + 2, parts = (p.head_dim + 31) / 32;
    const u32 first = blockIdx.y * p.heads, heads = umin(p.heads, p.n_heads - first);
    // A warp takes 32 values of a head.
    for (u32 part = threadIdx.x / 32; part < heads * parts; part += blockDim.x / 32) {
        const u32 head = part / parts, d = part % parts * 32 + lane;
        const float* splits = p.partial + ((u64)blockIdx.x * p.n_heads + first + head) * p.splits * width; // (split, width)
        const float* sums = splits + p.head_dim;
        float max = unseen(), sum = 0;
        for (u32 i = lane; i < p.splits; i += 32) max = fmaxf(max, sums[i * width]);
        const float base = base_of(warp_max(max));
        for (u32 i = lane; i < p.splits; i += 32) sum += exp2_approx(sums[i * width] - base) * sums[i * width + 1];
        sum = warp_sum(sum);
        if (d >= p.head_dim) continue;
        float x = 0;
        for (u32 i = 0; i < p.splits; i++) x += exp2_approx(sums[i * width] - base) * splits[i * width + d];
        values[head * p.head_dim + d] = x * (sum > 0 ? 1.0f / sum : 0.0f);
    }
    write_activations(values, first * p.head_dim, heads * p.head_dim, blockIdx.x, p.act);
}
