// What kernels are told: one struct by value each. src/backend/cuda/params.rs mirrors every one of them; all pointers are
// device pointers, all fields are 4 or 8 bytes wide, 8-byte ones first, so that no compiler has padding to choose.

// The input of linear layers, (row, stride), the stride being the layer's inputs rounded up to 32. Padding is zero.
// x = hi + lo, two bf16 values, which together keep 16 bits of x.
struct Activations {
    u16* hi;      // (row, stride) bf16
    u16* lo;      // (row, stride) bf16
    float* exact; // (row, stride), or null if no layer has f32 weights
    float* sums;  // (row, stride / 16): sums of 16 consecutive values of hi + lo; null if no layer has types with minimums
    u32 stride;
    u32 unused;
};

// y = W x + b. Weights lie in strips of 16 outputs, see src/backend/cuda/pack.rs.
struct Matrix {
    const u8* weights;
    const float* bias; // (n_out), or null
    float* out;        // (row, n_out)
    u32 n_out;
    u32 unused;
};

// Up to three matrices of one type on the same input: q, k, v; or gate, up. Grid: x over the strips of all matrices, one after
// the other, y over groups of rows.
//
// If is_gated, the matrices are gate and up, and silu(gate x) * up x goes to `act`, nothing to their `out`. Grid: x over strips of 16
// columns of `act`, padding included.
struct LinearParams {
    Activations x;
    Activations act;
    Matrix matrices[3];
    u32 n_matrices;
    u32 n_in;
    u32 rows;
    u32 is_gated;
};

struct EmbedParams {
    const u8* weights;   // packed as the matrix (n_vocab, n) would be
    const u32* tokens;   // (row)
    const u32* tables;   // (row): rows of other tables than `table` are left alone
    float* x;            // (row, n)
    u32 table;
    u32 n;
    u32 rows;
    u32 unused;
};

// x_out[r] = x_in[gather[r]] + add[r]; y = x_out[r] normed, or as it is; y goes to `act`. One block to a row.
struct ResidualParams {
    const float* x_in;      // (row, n)
    const u32* gather;      // (row of x_out), or null: the same row
    const float* add;       // (row of x_out, n), or null
    const float* add_norm;  // (n): RMS norm of `add` before it is added (olmo2), or null
    float* x_out;           // (row, n), not x_in; null if nobody wants it
    const float* norm;      // (n): weight of the RMS norm, or null for none
    float* normed;          // (row, n): y, or null
    Activations act;        // y; hi may be null
    u32 rows;
    u32 n;
    float eps;
    u32 unused;
};

// y += bias. One block to a row.
struct BiasParams {
    float* y;          // (row, n)
    const float* bias; // (n)
    u32 rows;
    u32 n;
};

// act = silu(gate) * up, if they were not computed together. One block to a row.
struct GatedParams {
    const float* gate; // (row, n)
    const float* up;   // (row, n)
    Activations act;
    u32 rows;
    u32 n;
};

// A row of the pass, as src/schedule.rs has it.
struct Row {
    u32 stored;       // sees the first `stored` stored rows of its sequence ...
    u32 hidden_from;  // ... and the hidden tokens hidden_from..hidden_to
    u32 hidden_to;
    u32 entry;
    u32 place;        // stored row: its cache row; hidden row: its place among the pass's hidden rows
    u32 is_hidden;
};

// One sequence's part of the pass.
struct Entry {
    u32 seq;
    u32 blocks;       // its first block in `blocks`
    u32 first_hidden; // hidden tokens before this one are in the ring at seq * ring_capacity + number % ring_capacity,
    u32 hidden_base;  // others in the pass's own rows at hidden_base + number - first_hidden
    u32 n_hidden;
    u32 unused;
};

// Rows of one sequence that attend together: their heads of one key head share each key that is read.
struct Tile {
    u32 first;        // index in `keep`
    u32 n;
    u32 entry;
    u32 stored;       // most stored rows that any of them sees
    u32 split;        // of which a split has so many, a multiple of 64
    u32 hidden_from;  // hidden tokens that any of them sees; empty if hidden_from == hidden_to
    u32 hidden_to;
};

// Keys and values of a layer, (row, row_bytes): heads one after another. f32, f16, bf16; or q8_0: kv_dim rounded up to 32 int8
// values, then one f16 scale for each 32 of them. row_bytes is a multiple of 16.
struct KeyValues {
    u8* k;
    u8* v;
};

// Queries, keys and values: norms, RoPE; keys and values are encoded into the cache or the pass's own rows. One block to an
// entering row.
struct QkvParams {
    float* q;            // (entering row, n_heads * head_dim), rotated in place
    const float* k;      // (entering row, n_kv_heads * head_dim)
    const float* v;      // (entering row, n_kv_heads * head_dim)
    const float* q_norm; // (head_dim), or (n_heads * head_dim) if norm_whole; null for none
    const float* k_norm;
    const float* rope;   // (row of the pass, head_dim / 2, 2): cosine and sine; rows beyond n_rope pairs are not rotated
    const Row* rows;     // (row of the pass)
    const u32* enter;    // (entering row): row of the pass
    KeyValues cache;     // (cache row, row_bytes)
    KeyValues fresh;     // (hidden row of the pass, row_bytes)
    u32 n;               // entering rows
    u32 n_heads;
    u32 n_kv_heads;
    u32 head_dim;
    u32 n_rope;          // rotated pairs of a head, at most head_dim / 2
    u32 adjacent;        // pairs are (2i, 2i + 1), not (i, i + head_dim / 2)
    u32 norm_whole;
    u32 cache_type;      // 0 f32, 1 f16, 2 q8_0, 3 bf16
    u32 row_bytes;
    float eps;
};

// Grid of attention_*: (tile, key head, split). Split i of a tile sees the stored rows i * tile.split .. (i + 1) * tile.split,
// and the last one also the hidden tokens. Tiles of rows other than first .. first + n are left alone.
//
// If is_invariant, a row's results depend in no bit on the tile that it is in. Keys are taken in steps, and by warps, that begin
// at multiples of the step's length, whatever the tile's first key is; and a key that a row does not see changes nothing: its
// weight is 0, and the largest score and the sums remain what they were.
struct AttentionParams {
    const float* q;      // (entering row, n_heads * head_dim)
    const Row* rows;     // (row of the pass)
    const u32* enter;    // (entering row): row of the pass
    const u32* keep;     // (row that goes on): entering row
    const Tile* tiles;
    const Entry* entries;
    const u32* blocks;
    KeyValues cache;     // (cache row, row_bytes); stored row i of a sequence is cache row
                         // blocks[entry.blocks + i / rows_per_block] * rows_per_block + i % rows_per_block
    KeyValues ring;      // (sequence, hidden number % ring_capacity, row_bytes)
    KeyValues fresh;     // (hidden row of the pass, row_bytes)
    float* partial;      // (row that goes on, from `first`; head, split, head_dim + 2): sum of exp2(score - max) * v, then max, sum of exp2.
                         // score = q.k * scale * log2(e). An empty split writes max = -infinity, sum = 0 and zeros.
    u32 first;
    u32 n;
    u32 n_heads;
    u32 n_kv_heads;
    u32 head_dim;
    u32 splits;
    u32 rows_per_block;
    u32 ring_capacity;
    u32 cache_type;
    u32 row_bytes;
    u32 is_invariant;
    float scale;         // 1 / sqrt(head_dim)
};

// Merges the splits; the heads' outputs, one after another, are the output projection's input. Hidden rows of the pass that later
// passes may see go into the rings: number = hidden_to - 1 is kept unless number + ring_capacity < entry.first_hidden + entry.n_hidden.
//
// Grid: x over the n rows that go on, then over the entering rows, if they are to be kept; y over groups of heads.
struct MergeParams {
    const float* partial; // see AttentionParams
    Activations act;
    const Row* rows;      // (row of the pass)
    const u32* enter;     // (entering row): row of the pass
    const Entry* entries;
    KeyValues ring;
    KeyValues fresh;
    u32 n;
    u32 n_heads;
    u32 head_dim;
    u32 heads;            // of a group; heads * head_dim is a multiple of 32, unless there is one group
    u32 splits;
    u32 ring_capacity;
    u32 row_bytes;
    u32 unused;
};

// Strips of a matrix to bf16. One block to a strip.
struct DequantizeParams {
    const u8* weights;
    u16* out;          // (16 * n_strips, n_in rounded up to 32)
    u32 n_in;
    u32 n_strips;
};

// The best tokens of each row of logits: top_chunks, then top_rows.
struct TopParams {
    const float* logits; // (row, n_vocab)
    u64* keys;           // (row, chunk, 64): scratch
    u32* tokens;         // (row, 64): best first; 2^32 - 1 where there are no more
    float* values;       // (row, 64): their logits
    float* parts;        // (row, chunk, 2): largest logit, sum of exp(logit - largest); scratch
    float* totals;       // (row): sum of exp(logit - the row's largest); 0 where there are no tokens
    u32 n_vocab;
    u32 n_chunks;        // of 4096 tokens
};

// src/backend/cuda/params.rs says the same.
static_assert(sizeof(Activations) == 40, "");
static_assert(sizeof(Matrix) == 32, "");
static_assert(sizeof(LinearParams) == 192, "");
static_assert(sizeof(DequantizeParams) == 24, "");
static_assert(sizeof(EmbedParams) == 48, "");
static_assert(sizeof(ResidualParams) == 112, "");
static_assert(sizeof(GatedParams) == 64, "");
static_assert(sizeof(BiasParams) == 24, "");
static_assert(sizeof(Row) == 24, "");
static_assert(sizeof(Entry) == 24, "");
static_assert(sizeof(Tile) == 28, "");
static_assert(sizeof(KeyValues) == 16, "");
static_assert(sizeof(QkvParams) == 136, "");
static_assert(sizeof(AttentionParams) == 160, "");
static_assert(sizeof(MergeParams) == 136, "");
static_assert(sizeof(TopParams) == 56, "");
