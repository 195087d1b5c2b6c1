// What the kernels are written in: fixed-width types, the GPU's instructions by name. PHD_EMULATED puts the emulator's versions
// (tests/cuda/emulator/emulated.h) in their place; sm_80 is the oldest architecture.

#ifndef PHD_EMULATED

typedef unsigned char u8;
typedef unsigned short u16; // also the bits of f16 and bf16 values
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;

#define DEVICE __device__ __forceinline__
// An entry point; every one takes a struct by value. It waits for the kernel before it, see below.
#define KERNEL(name, Params, threads)                                                              \
    DEVICE void name##_body(const Params& p);                                                      \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p) { \
        let_next_start();                                                                          \
        wait_for_previous();                                                                       \
        name##_body(p);                                                                            \
    }                                                                                              \
    DEVICE void name##_body(const Params& p)
// One that calls wait_for_previous() itself.
#define KERNEL_THAT_WAITS(name, Params, ...)                                                       \
    DEVICE void name##_body(const Params& p);                                                      \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Params p) {     \
        let_next_start();                                                                          \
        name##_body(p);                                                                            \
    }                                                                                              \
    DEVICE void name##_body(const Params& p)
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(16) u8 dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)

// Programmatic dependent launch (sm_90 and newer; launches ask for it, see src/backend/cuda/driver.rs): once all blocks of a kernel
// have called let_next_start(), blocks of the next one may begin where there is room. wait_for_previous() returns when the kernel
// before is through and what it wrote can be seen.
//
// Every thread of every kernel calls wait_for_previous(), before it returns and before it reads or writes anything that another
// kernel writes or reads; weights, which none writes, may be read before. So no kernel is through before the one before it is, and
// whoever has waited comes after all kernels before, not the last one alone: it may also write what any of them read.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void sync_block() {
    __syncthreads();
}
DEVICE void sync_warp() {
    __syncwarp();
}

// The whole warp takes part in these.
DEVICE float shuffle_xor(float x, u32 mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
DEVICE u32 shuffle_xor(u32 x, u32 mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
DEVICE float shuffle(float x, u32 lane) {
    return __shfl_sync(~0u, x, lane);
}
DEVICE u32 shuffle(u32 x, u32 lane) {
    return __shfl_sync(~0u, x, lane);
}

DEVICE float bits_float(u32 bits) {
    return __uint_as_float(bits);
}

DEVICE u32 float_bits(float x) {
    return __float_as_uint(x);
}

// To the nearest, ties to even.
DEVICE u16 to_bf16(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEVICE float from_bf16(u16 x) {
    return __uint_as_float((u32)x << 16);
}
// Saturates to +-65504.
DEVICE u16 to_f16(float x) {
    u16 y;
    x = fminf(fmaxf(x, -65504.0f), 65504.0f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEVICE float from_f16(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// Two values, the first in the low half.
DEVICE u32 pack_bf16(float first, float second) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
}
DEVICE u32 pack_f16(float first, float second) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
}
// Adds both halves. sm_80 has no addition of bf16x2.
DEVICE u32 add_bf16x2(u32 a, u32 b) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return y;
}

// c += a b, a 16 x 16 by rows, b 16 x 8 by columns, 16-bit values; PTX's m16n8k16 says which lane holds what.
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes that are read once: weights. Volatile, so that it stays before a wait_for_previous() that it was written before.
DEVICE uint4 load16(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// Copies that go on while the thread does; copy_wait<N> waits for all but the last N groups of its own.
DEVICE void copy16_async(void* to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((u32)__cvta_generic_to_shared(to_shared)), "l"(from)
                 : "memory");
}
DEVICE void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE u32 umin(u32 a, u32 b) {
    return min(a, b);
}
DEVICE u32 umax(u32 a, u32 b) {
    return max(a, b);
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + j has the address of row j of matrix i, 16 bytes,
// aligned. m[i] becomes row lane / 4, columns lane % 4 * 2 and the next, of matrix i, or of its transpose.
DEVICE void load_matrices(u32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
// Four signed bytes as two pairs of f16, exactly: the bits of 1024 + (x + 128), less 1152.
DEVICE void int8_to_f16(u32 bytes, u32& first, u32& second) {
    bytes ^= 0x80808080;
    first = __byte_perm(bytes, 0x64646464, 0x4140);
    second = __byte_perm(bytes, 0x64646464, 0x4342);
    asm("sub.f16x2 %0, %0, %1;" : "+r"(first) : "r"(0x64806480));
    asm("sub.f16x2 %0, %0, %1;" : "+r"(second) : "r"(0x64806480));
}
// Two f16 products.
DEVICE u32 multiply_f16(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

DEVICE float warp_sum(float x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
DEVICE float warp_max(float x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
#endif
