// CUDA on the CPU: what kernels/device.cuh offers, for sources compiled by a C++ compiler with this file before them.
//
// A thread is a fiber, a block's fibers take turns in a random order, blocks run one after another. Barriers, shuffles and tensor-core
// instructions wait for everyone who takes part. Shared memory begins as garbage, asynchronous copies arrive when they are waited for.
#pragma once
#define PHD_EMULATED

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int8_t i8;
typedef int32_t i32;
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct Index {
    u32 x, y, z;
};

namespace emulator {

// ---------------------------------------------------------------- fibers

constexpr size_t STACK = 64 << 10;
constexpr u32 MAX_THREADS = 1024;

#ifdef __x86_64__
// Saves the callee-saved registers and the stack's place, and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(.text
.weak emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "the emulator's fibers are written for x86-64"
#endif

struct Copy {
    void* to;
    const void* from;
    u32 group;
};

struct Fiber {
    void* place;
    u8* stack;
    bool is_done;
    u32 group; // of its next asynchronous copy
    std::vector<Copy> copies;
};

struct Barrier {
    u32 waiting;
    u64 round;
};

struct Machine {
    Fiber fibers[MAX_THREADS];
    void* scheduler;
    u32 n_threads, n_done, current;
    Barrier block, warps[MAX_THREADS / 32];
    u32 operands[MAX_THREADS][8]; // what a thread brings to an instruction of its warp
    u8* dynamic_shared;
    size_t dynamic_bytes;
    std::vector<std::pair<void*, size_t>> shared; // static arrays that the kernel has met
    u64 random;
    const char* error; // of a thread, which then goes no further
    void (*body)(void**);
    void** arguments;
};

inline Machine machine = {};

inline u32 random_number() {
    machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
    return machine.random >> 33;
}

inline void pause_fiber() {
    emulator_switch(&machine.fibers[machine.current].place, machine.scheduler);
}

// Ends the launch.
inline void fail(const char* error) {
    machine.error = error;
    for (;;) pause_fiber();
}

inline void run_fiber() {
    machine.body(machine.arguments);
    machine.fibers[machine.current].is_done = true;
    machine.n_done++;
    for (;;) pause_fiber();
}

inline void wait(Barrier& barrier, u32 n) {
    const u64 round = barrier.round;
    if (++barrier.waiting == n) {
        barrier.waiting = 0;
        barrier.round++;
    }
    while (barrier.round == round) pause_fiber();
}

} // namespace emulator

inline Index threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------- device.cuh's names

#define DEVICE static inline
#define KERNEL(name, Params, threads)                                                              \
    static void name##_body(const Params& p);                                                      \
    extern "C" void name##_emulated(void** arguments) { name##_body(*(const Params*)arguments[0]); } \
    extern "C" const u32 name##_facts[2];                                                          \
    const u32 name##_facts[2] = {threads, sizeof(Params)};                                         \
    static void name##_body(const Params& p)
#define SHARED(type, name, count)       \
    static type name##_array[count];    \
    emulator::meet_shared(name##_array, sizeof name##_array); \
    type* const name = name##_array
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulator::machine.dynamic_shared

namespace emulator {
// The first thread of a block to come by fills a static array with garbage.
inline void meet_shared(void* array, size_t bytes) {
    for (auto& known : machine.shared) {
        if (known.first == array) return;
    }
    machine.shared.push_back({array, bytes});
    memset(array, 0xff, bytes);
}
} // namespace emulator

DEVICE void sync_block() {
    emulator::wait(emulator::machine.block, emulator::machine.n_threads);
}
DEVICE void sync_warp() {
    emulator::wait(emulator::machine.warps[threadIdx.x / 32], 32);
}

DEVICE u32 shuffle(u32 x, u32 lane) {
    emulator::machine.operands[threadIdx.x][0] = x;
    sync_warp();
    const u32 y = emulator::machine.operands[threadIdx.x / 32 * 32 + lane % 32][0];
    sync_warp();
    return y;
}
DEVICE u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
DEVICE float shuffle(float x, u32 lane) {
    return bits_float(shuffle(float_bits(x), lane));
}
DEVICE u32 shuffle_xor(u32 x, u32 mask) {
    return shuffle(x, threadIdx.x % 32 ^ mask);
}
DEVICE float shuffle_xor(float x, u32 mask) {
    return shuffle(x, threadIdx.x % 32 ^ mask);
}

DEVICE u16 to_bf16(float x) {
    const u32 bits = float_bits(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE float from_bf16(u16 x) {
    return bits_float((u32)x << 16);
}
DEVICE u16 to_f16(float x) {
    const _Float16 half = (_Float16)fminf(fmaxf(x, -65504.0f), 65504.0f);
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
DEVICE float from_f16(u16 x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return half;
}
DEVICE u32 pack_bf16(float first, float second) {
    return to_bf16(first) | (u32)to_bf16(second) << 16;
}
DEVICE u32 pack_f16(float first, float second) {
    const _Float16 halves[2] = {(_Float16)first, (_Float16)second};
    u32 bits;
    memcpy(&bits, halves, 4);
    return bits;
}
DEVICE u32 add_bf16x2(u32 a, u32 b) {
    return pack_bf16(from_bf16(a) + from_bf16(b), from_bf16(a >> 16) + from_bf16(b >> 16));
}
DEVICE u32 multiply_f16(u32 a, u32 b) {
    return pack_f16(from_f16(a) * from_f16(b), from_f16(a >> 16) * from_f16(b >> 16));
}
DEVICE void int8_to_f16(u32 bytes, u32& first, u32& second) {
    first = pack_f16((i8)bytes, (i8)(bytes >> 8));
    second = pack_f16((i8)(bytes >> 16), (i8)(bytes >> 24));
}

namespace emulator {
// PTX ISA, "Matrix Fragments for mma.m16n8k16", 16-bit types.
template <float (*CONVERT)(u16)>
void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const u32 warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    memcpy(machine.operands[threadIdx.x], a, 16);
    memcpy(machine.operands[threadIdx.x] + 4, b, 8);
    sync_warp();
    for (u32 i = 0; i < 4; i++) {
        const u32 row = i / 2, column = lane % 4 * 2 + i % 2; // row: lane / 4, or 8 below
        for (u32 k = 0; k < 16; k++) {
            const u32 part = k / 8, pair = k % 8 / 2, shift = k % 2 * 16;
            const u32 x = machine.operands[warp + lane / 4 * 4 + pair][row + part * 2];
            const u32 y = machine.operands[warp + column * 4 + pair][4 + part];
            c[i] += CONVERT(x >> shift) * CONVERT(y >> shift);
        }
    }
    sync_warp();
}
// What the lane that is responsible for a matrix's row has as its address.
inline const u8* address_of(const void* row, u32 lane) {
    const u64 bits = (u64)row;
    const u64 high = shuffle((u32)(bits >> 32), lane), low = shuffle((u32)bits, lane);
    return (const u8*)(high << 32 | low);
}
inline void check_aligned(const void* address) {
    if ((u64)address % 16) fail("a misaligned address");
}
} // namespace emulator

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma<from_bf16>(c, a, b);
}
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma<from_f16>(c, a, b);
}
DEVICE void load_matrices(u32 (&m)[4], const void* row) {
    const u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 4; i++) memcpy(&m[i], emulator::address_of(row, i * 8 + lane / 4) + lane % 4 * 4, 4);
}
DEVICE void load_matrices_transposed(u32 (&m)[4], const void* row) {
    const u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 4; i++) {
        u16 pair[2];
        for (u32 j = 0; j < 2; j++) {
            memcpy(&pair[j], emulator::address_of(row, i * 8 + lane % 4 * 2 + j) + lane / 4 * 2, 2);
        }
        m[i] = pair[0] | (u32)pair[1] << 16;
    }
}

DEVICE uint4 load16(const void* from) {
    emulator::check_aligned(from);
    uint4 x;
    memcpy(&x, from, 16);
    return x;
}
DEVICE void copy16_async(void* to_shared, const void* from) {
    emulator::check_aligned(to_shared);
    emulator::check_aligned(from);
    emulator::Fiber& fiber = emulator::machine.fibers[emulator::machine.current];
    fiber.copies.push_back({to_shared, from, fiber.group});
    memset(to_shared, 0xff, 16);
}
DEVICE void copy_commit() {
    emulator::machine.fibers[emulator::machine.current].group++;
}
template <int N>
DEVICE void copy_wait() {
    emulator::Fiber& fiber = emulator::machine.fibers[emulator::machine.current];
    auto is_due = [&](const emulator::Copy& copy) { return copy.group + N < fiber.group; };
    for (const emulator::Copy& copy : fiber.copies) {
        if (is_due(copy)) memcpy(copy.to, copy.from, 16);
    }
    fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), is_due), fiber.copies.end());
}

DEVICE float exp2_approx(float x) {
    return exp2f(x);
}
DEVICE u32 umin(u32 a, u32 b) {
    return a < b ? a : b;
}
DEVICE u32 umax(u32 a, u32 b) {
    return a > b ? a : b;
}

// ---------------------------------------------------------------- launches

namespace emulator {

// Guards the end of a block's dynamic shared memory.
constexpr size_t GUARD = 48;

// Runs a kernel to its end; returns what went wrong, or null.
inline const char* launch(void (*body)(void**), Index grid, u32 n_threads, size_t dynamic_bytes, void** arguments, u64 seed) {
    Machine& m = machine;
    if (n_threads == 0 || n_threads > MAX_THREADS || n_threads % 32) return "an odd number of threads";
    std::vector<u8> memory(dynamic_bytes + GUARD + 16);
    m.dynamic_shared = memory.data() + 16 - (u64)memory.data() % 16;
    m.body = body;
    m.arguments = arguments;
    m.n_threads = n_threads;
    m.random = seed;
    m.error = nullptr;
    gridDim = grid;
    blockDim = {n_threads, 1, 1};
    std::vector<u32> order(n_threads);
    for (u32 i = 0; i < n_threads; i++) {
        order[i] = i;
        if (!m.fibers[i].stack) m.fibers[i].stack = (u8*)aligned_alloc(4096, STACK);
    }
    const u64 n_blocks = (u64)grid.x * grid.y * grid.z;
    for (u64 block = 0; block < n_blocks; block++) {
        blockIdx = {(u32)(block % grid.x), (u32)(block / grid.x % grid.y), (u32)(block / grid.x / grid.y)};
        memset(m.dynamic_shared, 0xff, dynamic_bytes + GUARD);
        m.shared.clear();
        m.n_done = 0;
        m.block.waiting = 0;
        for (Barrier& warp : m.warps) warp.waiting = 0;
        for (u32 i = 0; i < n_threads; i++) {
            Fiber& fiber = m.fibers[i];
            fiber.is_done = false;
            fiber.group = 0;
            fiber.copies.clear();
            // As if run_fiber had been called and left at once: six registers, its address, nowhere to return to.
            void** top = (void**)(fiber.stack + STACK) - 2;
            top[1] = nullptr;
            top[0] = (void*)run_fiber;
            fiber.place = top - 6;
            memset(fiber.place, 0, 6 * sizeof(void*));
        }
        for (u64 before = ~0ull; m.n_done < n_threads;) {
            // Whoever gets on ends or comes to a barrier.
            u64 progress = m.n_done + m.block.round + m.block.waiting;
            for (u32 w = 0; w < n_threads / 32; w++) progress += m.warps[w].round * 32 + m.warps[w].waiting;
            if (progress == before) return "threads wait for others of their block or warp that never come";
            before = progress;
            if (random_number() % 4 == 0) {
                for (u32 i = n_threads - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
            }
            for (u32 i : order) {
                if (m.fibers[i].is_done) continue;
                m.current = i;
                threadIdx = {i, 0, 0};
                emulator_switch(&m.scheduler, m.fibers[i].place);
                if (m.error) return m.error;
            }
        }
        for (size_t i = 0; i < GUARD; i++) {
            if (m.dynamic_shared[dynamic_bytes + i] != 0xff) return "a write beyond the shared memory";
        }
    }
    return nullptr;
}

} // namespace emulator

#ifdef EMULATOR_LIBRARY
// What libcuda.so calls; every library of kernels has a machine of its own.
extern "C" const char* emulator_launch(void (*body)(void**), const u32* grid, u32 n_threads, size_t dynamic_bytes,
                                       void** arguments, u64 seed) {
    return emulator::launch(body, {grid[0], grid[1], grid[2]}, n_threads, dynamic_bytes, arguments, seed);
}
#endif
