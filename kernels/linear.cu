// Linear layers with few rows, embeddings, and weights converted for a GEMM library. src/backend/cuda/pack.rs
// describes the layouts of weights.
//
// Decoding reads each weight once for a few rows, so these kernels are made to keep memory busy: weights go straight
// from memory into the registers of the lanes that multiply them, as operand A of m16n8k16 products (16 outputs, 16
// inputs); the activations are operand B (16 inputs, 8 columns). The lane (g, t) = (lane / 4, lane % 4) has the
// outputs g and g + 8 of a strip and a quarter of the inputs. Which inputs a product sums up does not matter as long
// as both operands agree: of a unit of 32 inputs lane t takes 8t .. 8t + 7, which are 16 contiguous bytes of the
// activations.
namespace linear {

constexpr u32 WARPS = 8;
constexpr u32 STRIP = 16; // outputs
constexpr u32 UNIT = 32;  // inputs

DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
DEVICE float first_f16(u32 x) { return from_f16((u16)x); }
DEVICE float second_f16(u32 x) { return from_f16((u16)(x >> 16)); }
DEVICE float first_bf16(u32 x) { return from_bf16((u16)x); }
DEVICE float second_bf16(u32 x) { return from_bf16((u16)(x >> 16)); }
DEVICE float byte_of(u32 x, u32 i) { return (float)(x >> (8 * i) & 0xff); }
DEVICE float signed_byte_of(u32 x, u32 i) { return (float)(i32)(i8)(x >> (8 * i) & 0xff); }

// A lane's part of a unit as products take it: pairs of bf16 values, the weights being their sums over the parts.
template <u32 PARTS>
struct Fragment {
    u32 pairs[PARTS][2][4]; // (part, output g or g + 8, pair of inputs)
};

// weight = scale * value - minimum
struct Scales {
    float scale[2][2]; // (group of 16 inputs, output g or g + 8); types with one scale to a unit have one group
    float minimum[2];  // (output g or g + 8)
};

// Every type is a struct that holds a lane's part of a chunk of 1 or 2 units, with load() and unpack(); see there.
// BYTES are a strip's for BLOCK inputs.
struct Type {
    static constexpr u32 BLOCK = 64;
    static constexpr u32 UNITS = 2;         // in a chunk
    static constexpr u32 PARTS = 1;         // of a weight
    static constexpr u32 GROUPS = 1;        // scales to a unit; if 2, lane t takes the inputs 4t .. 4t + 3 of each half
    static constexpr bool SCALED = true;    // otherwise values are the weights
    static constexpr bool MINIMUMS = false;
    static constexpr bool RAGGED = false;   // the last chunk may have its first unit alone
};

// A chunk of 64 inputs of the K types: a quarter of one of their blocks.
struct KType : Type {
    static constexpr u32 BLOCK = 256;
    uint4 q;      // low four bits
    uint2 scales; // a byte each
    uint2 d;      // f16
};

struct BF16 : Type {
    static constexpr u32 UNITS = 1, BLOCK = 32, BYTES = STRIP * 32 * 2;
    static constexpr bool SCALED = false;
    uint4 rows[2];
};
struct F16 : BF16 {
    static constexpr u32 PARTS = 2;
};
struct Q8_0 : Type {
    static constexpr u32 UNITS = 1, BLOCK = 32, BYTES = 512 + 32;
    uint4 q;
    u32 d;
};
struct Q4_0 : Type {
    static constexpr u32 BYTES = 512 + 64;
    static constexpr bool RAGGED = true;
    uint4 q;
    uint2 d;
};
struct Q4_1 : Type {
    static constexpr u32 BYTES = 512 + 128;
    static constexpr bool RAGGED = true, MINIMUMS = true;
    uint4 q, d;
};
struct Q4_K : KType {
    static constexpr u32 BYTES = 4 * 512 + 4 * 64 + 64;
    static constexpr bool MINIMUMS = true;
};
struct Q5_K : KType {
    static constexpr u32 BYTES = 4 * 512 + 4 * 128 + 4 * 64 + 64;
    static constexpr bool MINIMUMS = true;
    u32 fifth;
};
struct Q6_K : KType {
    static constexpr u32 BYTES = 4 * 512 + 4 * 256 + 4 * 64 + 32;
    static constexpr u32 GROUPS = 2;
    uint2 high;
};

template <class T>
DEVICE u32 chunks(const T&, u32 n_in) { return ceil_div(n_in, UNIT * T::UNITS); }

template <class T>
DEVICE u64 strip_bytes(const T&, u32 n_in) { return (u64)ceil_div(n_in, T::BLOCK) * T::BYTES; }

// load(): chunk i of a strip. Scales are shared by four lanes, or by four chunks; those loads may stay in the L1 cache.

DEVICE void load(BF16& c, const u8* strip, u32 i, u32 n_in, u32 lane) {
    const u32 pitch = ceil_div(n_in, UNIT) * (UNIT * 2);
    const u8* at = strip + (u64)(lane / 4) * pitch + i * (UNIT * 2) + lane % 4 * 16;
    c.rows[0] = load16(at);
    c.rows[1] = load16(at + (u64)8 * pitch);
}

DEVICE void load(Q8_0& c, const u8* strip, u32 i, u32, u32 lane) {
    const u8* at = strip + (u64)i * Q8_0::BYTES;
    c.q = load16(at + lane * 16);
    c.d = *(const u32*)(at + 512 + lane / 4 * 4);
}

DEVICE void load(Q4_0& c, const u8* strip, u32 i, u32, u32 lane) {
    const u8* at = strip + (u64)i * Q4_0::BYTES;
    c.q = load16(at + lane * 16);
    c.d = *(const uint2*)(at + 512 + lane / 4 * 8);
}

DEVICE void load(Q4_1& c, const u8* strip, u32 i, u32, u32 lane) {
    const u8* at = strip + (u64)i * Q4_1::BYTES;
    c.q = load16(at + lane * 16);
    c.d = *(const uint4*)(at + 512 + lane / 4 * 16);
}

DEVICE void load(Q4_K& c, const u8* strip, u32 i, u32, u32 lane) {
    const u8* block = strip + (u64)(i / 4) * Q4_K::BYTES;
    c.q = load16(block + i % 4 * 512 + lane * 16);
    c.scales = *(const uint2*)(block + 4 * 512 + i % 4 * 64 + lane / 4 * 8);
    c.d = *(const uint2*)(block + 4 * (512 + 64) + lane / 4 * 8);
}

DEVICE void load(Q5_K& c, const u8* strip, u32 i, u32, u32 lane) {
    const u8* block = strip + (u64)(i / 4) * Q5_K::BYTES;
    c.q = load16(block + i % 4 * 512 + lane * 16);
    c.fifth = *(const u32*)(block + 4 * 512 + i % 4 * 128 + lane * 4);
    c.scales = *(const uint2*)(block + 4 * (512 + 128) + i % 4 * 64 + lane / 4 * 8);
    c.d = *(const uint2*)(block + 4 * (512 + 128 + 64) + lane / 4 * 8);
}

DEVICE void load(Q6_K& c, const u8* strip, u32 i, u32, u32 lane) {
    const u8* block = strip + (u64)(i / 4) * Q6_K::BYTES;
    c.q = load16(block + i % 4 * 512 + lane * 16);
    c.high = *(const uint2*)(block + 4 * 512 + i % 4 * 256 + lane * 8);
    c.scales = *(const uint2*)(block + 4 * (512 + 256) + i % 4 * 64 + lane / 4 * 8);
    c.d.x = *(const u32*)(block + 4 * (512 + 256 + 64) + lane / 4 * 4);
}

// unpack(): a lane's part of a unit of the chunk. Small integers become bf16 values without conversions: 0x4300 is
// 128, whose last bit counts 1, so that bits below 128 can be put in; -128 is added again, which is exact.

// 0xc300 is -128; a type's offset comes on top of it.
DEVICE void unpack_nibbles(u32 q, u32 bias, u32 (&pairs)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) pairs[i] = add_bf16x2((q >> (4 * i) & 0x000f000f) | 0x43004300, bias);
}

// Shifts bit `from` to bit 4.
DEVICE u32 to_bit_4(u32 x, u32 from) { return from < 4 ? x << (4 - from) : x >> (from - 4); }

DEVICE void unpack(const BF16& c, u32, Fragment<1>& f, Scales&) {
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const uint4 row = c.rows[h];
        f.pairs[0][h][0] = row.x, f.pairs[0][h][1] = row.y, f.pairs[0][h][2] = row.z, f.pairs[0][h][3] = row.w;
    }
}

// The 11 bits of an f16 value are 8 and 3: two bf16 values.
DEVICE void unpack(const F16& c, u32, Fragment<2>& f, Scales&) {
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 words[4] = {c.rows[h].x, c.rows[h].y, c.rows[h].z, c.rows[h].w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float x = first_f16(words[i]), y = second_f16(words[i]);
            const u32 high = pack_bf16(x, y);
            f.pairs[0][h][i] = high;
            f.pairs[1][h][i] = pack_bf16(x - first_bf16(high), y - second_bf16(high));
        }
    }
}

DEVICE void unpack(const Q8_0& c, u32, Fragment<1>& f, Scales& s) {
    const u32 words[2][2] = {{c.q.x, c.q.y}, {c.q.z, c.q.w}};
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 q = words[h][i / 2] >> (8 * (i % 2));
            // The low seven bits, less 128 or, if the sign bit is set, 256 (0xc380).
            f.pairs[0][h][i] = add_bf16x2((q & 0x007f007f) | 0x43004300, (q & 0x00800080) | 0xc300c300);
        }
    }
    s.scale[0][0] = first_f16(c.d), s.scale[0][1] = second_f16(c.d);
}

DEVICE void unpack(const Q4_0& c, u32 unit, Fragment<1>& f, Scales& s) {
    unpack_nibbles(unit ? c.q.z : c.q.x, 0xc308c308, f.pairs[0][0]);
    unpack_nibbles(unit ? c.q.w : c.q.y, 0xc308c308, f.pairs[0][1]);
    const u32 d = unit ? c.d.y : c.d.x;
    s.scale[0][0] = first_f16(d), s.scale[0][1] = second_f16(d);
}

DEVICE void unpack(const Q4_1& c, u32 unit, Fragment<1>& f, Scales& s) {
    unpack_nibbles(unit ? c.q.z : c.q.x, 0xc300c300, f.pairs[0][0]);
    unpack_nibbles(unit ? c.q.w : c.q.y, 0xc300c300, f.pairs[0][1]);
    const u32 d[2] = {unit ? c.d.z : c.d.x, unit ? c.d.w : c.d.y};
#pragma unroll
    for (u32 h = 0; h < 2; h++) s.scale[0][h] = first_f16(d[h]), s.minimum[h] = -second_f16(d[h]);
}

DEVICE void unpack_scales(const KType& c, u32 unit, Scales& s) {
    const u32 d[2] = {c.d.x, c.d.y}, scales = unit ? c.scales.y : c.scales.x;
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        s.scale[0][h] = first_f16(d[h]) * byte_of(scales, 2 * h);
        s.minimum[h] = second_f16(d[h]) * byte_of(scales, 2 * h + 1);
    }
}

DEVICE void unpack(const Q4_K& c, u32 unit, Fragment<1>& f, Scales& s) {
    unpack_nibbles(unit ? c.q.z : c.q.x, 0xc300c300, f.pairs[0][0]);
    unpack_nibbles(unit ? c.q.w : c.q.y, 0xc300c300, f.pairs[0][1]);
    unpack_scales(c, unit, s);
}

DEVICE void unpack(const Q5_K& c, u32 unit, Fragment<1>& f, Scales& s) {
    const u32 words[2] = {unit ? c.q.z : c.q.x, unit ? c.q.w : c.q.y};
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 fifth = to_bit_4(c.fifth, unit * 8 + h * 4 + i) & 0x00100010;
            const u32 q = (words[h] >> (4 * i) & 0x000f000f) | fifth;
            f.pairs[0][h][i] = add_bf16x2(q | 0x43004300, 0xc300c300);
        }
    }
    unpack_scales(c, unit, s);
}

DEVICE void unpack(const Q6_K& c, u32 unit, Fragment<1>& f, Scales& s) {
    const u32 words[2] = {unit ? c.q.z : c.q.x, unit ? c.q.w : c.q.y};
    const u32 high = unit ? c.high.y : c.high.x, scales = unit ? c.scales.y : c.scales.x;
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 q = (words[h] >> (4 * i) & 0x000f000f) | (to_bit_4(high, h * 8 + 2 * i) & 0x00300030);
            f.pairs[0][h][i] = add_bf16x2(q | 0x43004300, 0xc320c320); // -160
        }
        const float d = h ? second_f16(c.d.x) : first_f16(c.d.x);
        s.scale[0][h] = d * signed_byte_of(scales, h);
        s.scale[1][h] = d * signed_byte_of(scales, 2 + h);
    }
}

// A lane's part of a unit of activations, in the order of the weights.
template <u32 GROUPS>
DEVICE uint4 load_x(const u16* x, u32 t) {
    if (GROUPS == 1) return *(const uint4*)(x + 8 * t);
    const uint2 a = *(const uint2*)(x + 4 * t), b = *(const uint2*)(x + 16 + 4 * t);
    return {a.x, a.y, b.x, b.y};
}

// The group of 8 `pairs` that is to be one product: (0, 1) or (2, 3) of both outputs.
DEVICE void product(float (&c)[4], const u32 (&pairs)[2][4], u32 first, u32 x, u32 y) {
    const u32 a[4] = {pairs[0][first], pairs[1][first], pairs[0][first + 1], pairs[1][first + 1]}, b[2] = {x, y};
    mma_bf16(c, a, b);
}

// Which matrix and which of its strips a block has; if gated, half of its warps have gate's strip, the others up's.
DEVICE u32 find_strip(const LinearParams& p, u32& strip) {
    strip = blockIdx.x;
    if (p.is_gated) return threadIdx.x / 32 / (WARPS / 2);
    u32 i = 0;
    for (; i + 1 < p.n_matrices && strip >= ceil_div(p.matrices[i].n_out, STRIP); i++) {
        strip -= ceil_div(p.matrices[i].n_out, STRIP);
    }
    return i;
}

// What comes of gate and up, or padding: columns of `act` that are the outputs of a strip. All threads of the block call this;
// sum(matrix, row, output) is what the products have come to, for any row of the group's even number of them.
template <class Sum>
DEVICE void write_gated(const LinearParams& p, u32 strip, u32 first, u32 rows, Sum sum) {
    for (u32 i = threadIdx.x; i < (rows + 1) / 2 * 32; i += blockDim.x) {
        const u32 row = i / STRIP, column = strip * STRIP + i % STRIP;
        float y[2] = {0, 0};
        if (column < p.matrices[0].n_out) {
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                y[m] = sum(m, row, i % STRIP);
                if (p.matrices[m].bias) y[m] += p.matrices[m].bias[column];
            }
        }
        write_activation(p.act, first + row, column, gated_value(y[0], y[1]), row < rows);
    }
}

struct alignas(8) Pair {
    float a, b;
};

// Of one strip and a group of TILES * 8 rows: all 8 warps take chunks in turn and add up in the end, always in one
// order. PARTS: of an activation, 2 or 1 (hi alone). If SHARED_TILE, there are 4 rows whose hi parts are the columns
// 0 .. 3 of the one tile, and the lo parts its columns 4 .. 7. No column depends on another.
template <class T, u32 TILES, u32 PARTS, bool SHARED_TILE>
DEVICE void multiply(const LinearParams& p) {
    constexpr u32 AHEAD = TILES > 1 ? 2 : 4; // chunks of each warp that are being loaded
    constexpr u32 ROWS = SHARED_TILE ? 4 : TILES * 8;
    SHARED(float, partial, WARPS * TILES * 128); // (warp, tile, element of the fragment, lane)
    const u32 n_warps = p.is_gated ? WARPS / 2 : WARPS; // to a strip
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % n_warps, g = lane / 4, t = lane % 4;
    u32 strip;
    const Matrix& m = p.matrices[find_strip(p, strip)]; // by reference: not to be kept in registers
    const u32 first = blockIdx.y * ROWS, rows = umin(p.rows - first, ROWS);
    const u32 stride = p.x.stride, n_units = ceil_div(p.n_in, UNIT);

    // This lane's column of the first tile as operand B, and its two columns of it in the result.
    const u32 column = SHARED_TILE ? g % 4 : g;
    const u64 at = (u64)(first + column) * stride;
    const u16* x[PARTS];
    x[0] = (SHARED_TILE && g >= 4 ? p.x.lo : p.x.hi) + at;
    if (PARTS == 2) x[PARTS - 1] = p.x.lo + at;
    const float* sums = nullptr;
    if (T::MINIMUMS) sums = p.x.sums + (u64)(first + 2 * t) * (stride / 16);
    const bool has_sums = !SHARED_TILE || t < 2;

    T ring[AHEAD];
    const u8* weights = m.weights + strip * strip_bytes(ring[0], p.n_in);
    // A strip of padding has none.
    const u32 n_chunks = strip * STRIP < m.n_out ? chunks(ring[0], p.n_in) : 0;
#pragma unroll
    for (u32 j = 0; j < AHEAD; j++) {
        if (warp + j * n_warps < n_chunks) load(ring[j], weights, warp + j * n_warps, p.n_in, lane);
    }
    wait_for_previous();
    float sum[TILES][4] = {};
    for (u32 base = warp; base < n_chunks; base += AHEAD * n_warps) {
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
            const u32 chunk = base + j * n_warps;
            if (chunk >= n_chunks) break;
#pragma unroll
            for (u32 u = 0; u < T::UNITS; u++) {
                const u32 unit = chunk * T::UNITS + u;
                if (T::RAGGED && unit >= n_units) break;
                Fragment<T::PARTS> f;
                Scales s;
                unpack(ring[j], u, f, s);
#pragma unroll
                for (u32 tile = 0; tile < TILES; tile++) {
                    float c[T::GROUPS][4] = {};
#pragma unroll
                    for (u32 part = 0; part < PARTS; part++) {
                        uint4 v = {0, 0, 0, 0};
                        if (tile * 8 + column < rows) {
                            v = load_x<T::GROUPS>((x[part] + unit * UNIT) + tile * 8 * stride, t);
                        }
#pragma unroll
                        for (u32 i = 0; i < T::PARTS; i++) {
                            product(T::SCALED ? c[0] : sum[tile], f.pairs[i], 0, v.x, v.y);
                            product(T::SCALED ? c[T::GROUPS - 1] : sum[tile], f.pairs[i], 2, v.z, v.w);
                        }
                    }
                    if constexpr (T::SCALED) {
#pragma unroll
                        for (u32 i = 0; i < 4 * T::GROUPS; i++) {
                            float& y = sum[tile][i % 4];
                            y = fmaf(s.scale[i / 4][i % 4 / 2], c[i / 4][i % 4], y);
                        }
                    }
                    if constexpr (T::MINIMUMS) {
#pragma unroll
                        for (u32 i = 0; i < 2; i++) {
                            if (!has_sums || tile * 8 + 2 * t + i >= rows) continue;
                            const Pair halves = *(const Pair*)((sums + unit * 2) + (tile * 8 + i) * (stride / 16));
                            const float of_x = halves.a + halves.b;
                            sum[tile][i] = fmaf(-s.minimum[0], of_x, sum[tile][i]);
                            sum[tile][i + 2] = fmaf(-s.minimum[1], of_x, sum[tile][i + 2]);
                        }
                    }
                }
            }
            const u32 next = chunk + AHEAD * n_warps;
            if (next < n_chunks) load(ring[j], weights, next, p.n_in, lane);
        }
    }

#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) partial[((threadIdx.x / 32 * TILES + tile) * 4 + i) * 32 + lane] = sum[tile][i];
    }
    sync_block();
    // Of the warps that had a strip, `from` being their first one's sums.
    const auto add_up = [&](const float* from, u32 row, u32 output) {
        float y = 0;
#pragma unroll
        for (u32 part = 0; part < (SHARED_TILE ? 2 : 1); part++) {
            const u32 col = row % 8 + part * 4;
            const u32 element = (row / 8 * 4 + output / 8 * 2 + col % 2) * 32 + output % 8 * 4 + col / 2;
            for (u32 w = 0; w < n_warps; w++) y += from[w * TILES * 128 + element];
        }
        return y;
    };
    if (p.is_gated) {
        write_gated(p, strip, first, rows, [&](u32 matrix, u32 row, u32 output) {
            return add_up(partial + matrix * n_warps * TILES * 128, row, output);
        });
        return;
    }
    for (u32 i = threadIdx.x; i < rows * STRIP; i += WARPS * 32) {
        const u32 row = i / STRIP, output = i % STRIP;
        if (strip * STRIP + output >= m.n_out) continue;
        float y = add_up(partial, row, output);
        if (m.bias) y += m.bias[strip * STRIP + output];
        m.out[(u64)(first + row) * m.n_out + strip * STRIP + output] = y;
    }
}

struct alignas(16) Floats {
    float v[4];
};

// Up to ROWS rows with f32 weights, to y: (row, output of the strip), in shared memory. A warp takes two outputs. A row's sum does
// not depend on ROWS.
template <u32 ROWS>
DEVICE void multiply_f32(const LinearParams& p, const Matrix& m, u32 strip, u32 first, u32 rows, float* y) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 pitch = ceil_div(p.n_in, UNIT) * UNIT;
    const float* weights = (const float*)m.weights + (u64)(strip * STRIP + warp) * pitch;
    const float* x = p.x.exact + (u64)first * p.x.stride;
    float sum[2][ROWS] = {};
#pragma unroll(ROWS > 4 ? 1 : ROWS > 2 ? 2 : 4)
    for (u32 k = lane * 4; k < pitch; k += 128) {
        const Floats a = *(const Floats*)(weights + k), b = *(const Floats*)(weights + (u64)8 * pitch + k);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const Floats v = *(const Floats*)(x + (u64)umin(r, rows - 1) * p.x.stride + k);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                sum[0][r] = fmaf(a.v[i], v.v[i], sum[0][r]);
                sum[1][r] = fmaf(b.v[i], v.v[i], sum[1][r]);
            }
        }
    }
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const float total = warp_sum(sum[h][r]);
            if (lane == 0) y[r * STRIP + warp + 8 * h] = total;
        }
    }
}

// A lane's weights of a unit: outputs g and g + 8 of the strip; w[i] is input_of(T, t, i).
template <class T>
DEVICE void weights_of(const T& c, u32 unit, float (&w)[2][8]) {
    Fragment<T::PARTS> f;
    Scales s;
    unpack(c, unit, f, s);
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            float x = 0;
#pragma unroll
            for (u32 part = 0; part < T::PARTS; part++) {
                const u32 pair = f.pairs[part][h][i / 2];
                x += i % 2 ? second_bf16(pair) : first_bf16(pair);
            }
            if (T::SCALED) x *= s.scale[T::GROUPS == 2 ? i / 4 : 0][h];
            if (T::MINIMUMS) x -= s.minimum[h];
            w[h][i] = x;
        }
    }
}

template <class T>
DEVICE u32 input_of(const T&, u32 t, u32 i) { return T::GROUPS == 2 ? i / 4 * 16 + 4 * t + i % 4 : 8 * t + i; }

// One block to a row of the pass.
template <class T>
DEVICE void embed(const EmbedParams& p) {
    if (p.tables[blockIdx.x] != p.table) return;
    const u32 token = p.tokens[blockIdx.x], row = token % STRIP;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T c;
    const u8* strip = p.weights + token / STRIP * strip_bytes(c, p.n);
    float* x = p.x + (u64)blockIdx.x * p.n;
    for (u32 chunk = warp; chunk < chunks(c, p.n); chunk += WARPS) {
        load(c, strip, chunk, p.n, lane);
        if (lane / 4 != row % 8) continue;
#pragma unroll
        for (u32 u = 0; u < T::UNITS; u++) {
            float w[2][8];
            weights_of(c, u, w);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const u32 k = (chunk * T::UNITS + u) * UNIT + input_of(c, lane % 4, i);
                if (k < p.n) x[k] = row < 8 ? w[0][i] : w[1][i];
            }
        }
    }
}

// One block to a strip.
template <class T>
DEVICE void dequantize(const DequantizeParams& p) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 pitch = ceil_div(p.n_in, UNIT) * UNIT;
    T c;
    const u8* strip = p.weights + blockIdx.x * strip_bytes(c, p.n_in);
    u16* out = p.out + (u64)(blockIdx.x * STRIP + lane / 4) * pitch;
    for (u32 chunk = warp; chunk < chunks(c, p.n_in); chunk += WARPS) {
        load(c, strip, chunk, p.n_in, lane);
#pragma unroll
        for (u32 u = 0; u < T::UNITS; u++) {
            const u32 unit = chunk * T::UNITS + u;
            if (unit * UNIT >= pitch) break;
            float w[2][8];
            weights_of(c, u, w);
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
#pragma unroll
                for (u32 i = 0; i < 8; i += 4) {
                    const uint2 four = {pack_bf16(w[h][i], w[h][i + 1]), pack_bf16(w[h][i + 2], w[h][i + 3])};
                    *(uint2*)(out + (u64)(8 * h) * pitch + unit * UNIT + input_of(c, lane % 4, i)) = four;
                }
            }
        }
    }
}

} // namespace linear

// The number in the name: columns of activations in tiles of 8, which make 4, 8, 16 and 64 rows. Grid: see
// LinearParams. Their first weights are on the way before they wait. Where a second number stands, a multiprocessor shall have room for
// that many blocks: left to itself the compiler spills a few registers to make room for three.
#define LINEAR_KERNELS(name, T)                                                                              \
    KERNEL_THAT_WAITS(linear_##name##_1, LinearParams, 256, 2) { linear::multiply<linear::T, 1, 1, true>(p); }  \
    KERNEL_THAT_WAITS(linear_##name##_2, LinearParams, 256, 2) { linear::multiply<linear::T, 1, 2, false>(p); } \
    KERNEL_THAT_WAITS(linear_##name##_4, LinearParams, 256, 2) { linear::multiply<linear::T, 2, 2, false>(p); } \
    KERNEL_THAT_WAITS(linear_##name##_8, LinearParams, 256) {    linear::multiply<linear::T, 8, 1, false>(p); } \
    KERNEL(embed_##name, EmbedParams, 256) { linear::embed<linear::T>(p); }
#define DEQUANTIZE_KERNEL(name, T) \
    KERNEL(dequantize_##name, DequantizeParams, 256) { linear::dequantize<linear::T>(p); }

LINEAR_KERNELS(f16, F16)
LINEAR_KERNELS(bf16, BF16)
LINEAR_KERNELS(q8_0, Q8_0)
LINEAR_KERNELS(q4_0, Q4_0)
LINEAR_KERNELS(q4_1, Q4_1)
LINEAR_KERNELS(q4_k, Q4_K)
LINEAR_KERNELS(q5_k, Q5_K)
LINEAR_KERNELS(q6_k, Q6_K)
DEQUANTIZE_KERNEL(f16, F16)
DEQUANTIZE_KERNEL(q8_0, Q8_0)
DEQUANTIZE_KERNEL(q4_0, Q4_0)
DEQUANTIZE_KERNEL(q4_1, Q4_1)
DEQUANTIZE_KERNEL(q4_k, Q4_K)
DEQUANTIZE_KERNEL(q5_k, Q5_K)
DEQUANTIZE_KERNEL(q6_k, Q6_K)

// Groups of 8 rows.
KERNEL_THAT_WAITS(linear_f32, LinearParams, 256, 2) {
    wait_for_previous();
    using namespace linear;
    SHARED(float, y, 2 * 8 * STRIP); // (gate or up, row, output of the strip), or the one matrix's
    const u32 first = blockIdx.y * 8, rows = umin(p.rows - first, 8u);
    u32 strip;
    const u32 found = find_strip(p, strip);
    const Matrix& one = p.matrices[p.is_gated ? 0 : found];
    for (u32 i = 0; i < (p.is_gated ? 2 : 1) && strip * STRIP < one.n_out; i++) {
        const Matrix& m = p.is_gated ? p.matrices[i] : one;
        float* to = y + i * 8 * STRIP;
        if (rows == 1) multiply_f32<1>(p, m, strip, first, rows, to);
        else if (rows == 2) multiply_f32<2>(p, m, strip, first, rows, to);
        else if (rows <= 4) multiply_f32<4>(p, m, strip, first, rows, to);
        else multiply_f32<8>(p, m, strip, first, rows, to);
    }
    sync_block();
    if (p.is_gated) {
        write_gated(p, strip, first, rows, [&](u32 m, u32 row, u32 output) { return y[(m * 8 + row) * STRIP + output]; });
        return;
    }
    for (u32 i = threadIdx.x; i < rows * STRIP; i += WARPS * 32) {
        const u32 output = strip * STRIP + i % STRIP;
        if (output < one.n_out) {
            one.out[(u64)(first + i / STRIP) * one.n_out + output] = one.bias ? y[i] + one.bias[output] : y[i];
        }
    }
}

KERNEL(embed_f32, EmbedParams, 256) {
    if (p.tables[blockIdx.x] != p.table) return;
    const u32 pitch = linear::ceil_div(p.n, linear::UNIT) * linear::UNIT;
    const float* from = (const float*)p.weights + (u64)p.tokens[blockIdx.x] * pitch;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) p.x[(u64)blockIdx.x * p.n + i] = from[i];
}
