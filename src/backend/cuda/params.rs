//! The structs of `kernels/params.cuh`, field by field; see there what they mean.

/// Address in the device's memory; 0 is null.
pub type Address = u64;

/// # Safety
/// Every bit pattern of the type is a value, it has no padding, and `kernels/params.cuh` declares the same fields.
pub unsafe trait Params: Copy {}

// SAFETY: numbers.
unsafe impl Params for u32 {}
// SAFETY: numbers.
unsafe impl Params for f32 {}

macro_rules! params {
    ($($(#[$m:meta])* $name:ident = $size:literal { $($field:ident: $t:ty),* $(,)? })*) => { $(
        $(#[$m])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name { $(pub $field: $t),* }
        // The same numbers stand in kernels/params.cuh. No padding: the fields fill the struct.
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$t>())* == $size);
        // SAFETY: integers, floats and structs of them without padding, as just asserted; mirrored by hand and checked by size.
        unsafe impl Params for $name {}
    )* };
}

params! {
    Activations = 40 { hi: Address, lo: Address, exact: Address, sums: Address, stride: u32, unused: u32 }
    Matrix = 32 { weights: Address, bias: Address, out: Address, n_out: u32, unused: u32 }
    LinearParams = 192 {
        x: Activations, act: Activations, matrices: [Matrix; 3], n_matrices: u32, n_in: u32, rows: u32, is_gated: u32,
    }
    DequantizeParams = 24 { weights: Address, out: Address, n_in: u32, n_strips: u32 }
    EmbedParams = 48 {
        weights: Address, tokens: Address, tables: Address, x: Address, table: u32, n: u32, rows: u32, unused: u32,
    }
    ResidualParams = 112 {
        x_in: Address, gather: Address, add: Address, add_norm: Address, x_out: Address, norm: Address, normed: Address,
        act: Activations, rows: u32, n: u32, eps: f32, unused: u32,
    }
    GatedParams = 64 { gate: Address, up: Address, act: Activations, rows: u32, n: u32 }
    BiasParams = 24 { y: Address, bias: Address, rows: u32, n: u32 }
    Row = 24 { stored: u32, hidden_from: u32, hidden_to: u32, entry: u32, place: u32, is_hidden: u32 }
    Entry = 24 { seq: u32, blocks: u32, first_hidden: u32, hidden_base: u32, n_hidden: u32, unused: u32 }
    Tile = 28 { first: u32, n: u32, entry: u32, stored: u32, split: u32, hidden_from: u32, hidden_to: u32 }
    KeyValues = 16 { k: Address, v: Address }
    QkvParams = 136 {
        q: Address, k: Address, v: Address, q_norm: Address, k_norm: Address, rope: Address, rows: Address, enter: Address,
        cache: KeyValues, fresh: KeyValues, n: u32, n_heads: u32, n_kv_heads: u32, head_dim: u32, n_rope: u32, adjacent: u32,
        norm_whole: u32, cache_type: u32, row_bytes: u32, eps: f32,
    }
    AttentionParams = 160 {
        q: Address, rows: Address, enter: Address, keep: Address, tiles: Address, entries: Address, blocks: Address,
        cache: KeyValues, ring: KeyValues, fresh: KeyValues, partial: Address, first: u32, n: u32, n_heads: u32,
        n_kv_heads: u32, head_dim: u32, splits: u32, rows_per_block: u32, ring_capacity: u32, cache_type: u32, row_bytes: u32,
        is_invariant: u32, scale: f32,
    }
    MergeParams = 136 {
        partial: Address, act: Activations, rows: Address, enter: Address, entries: Address, ring: KeyValues, fresh: KeyValues,
        n: u32, n_heads: u32, head_dim: u32, heads: u32, splits: u32, ring_capacity: u32, row_bytes: u32, unused: u32,
    }
    TopParams = 56 {
        logits: Address, keys: Address, tokens: Address, values: Address, parts: Address, totals: Address, n_vocab: u32,
        n_chunks: u32,
    }
}
