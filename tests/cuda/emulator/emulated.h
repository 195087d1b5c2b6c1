// CUDA on the CPU: what kernels/device.cuh offers, for sources compiled by a C++ compiler with this file before them.
//
// A thread is a fiber, a block's fibers take turns in a random order, blocks run one after another. Barriers, shuffles and tensor-core
// instructions wait for everyone who takes part. Shared memory begins as garbage, asynchronous copies arrive when they are waited for.
// Shared memory and stacks end at pages that nobody may touch.
#pragma once
#define PHD_EMULATED

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
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

// Of each library of kernels; GCC would share what is merely inline among all libraries of a process.
#define EMULATOR_GLOBAL inline __attribute__((visibility("hidden")))

EMULATOR_GLOBAL Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// ---------------------------------------------------------------- fibers

constexpr size_t STACK = 64 << 10, PAGE = 4096;
constexpr size_t MAX_SHARED = 227 << 10; // bytes of a block, as on sm_90
constexpr size_t SHARED_PAGES = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
constexpr u32 MAX_THREADS = 1024;

#ifdef __x86_64__
// Saves the callee-saved registers and the stack's place, and goes on where `to` was left: by a jump, since CPUs predict that a
// return goes to its own call.
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
    popq %rcx
    jmp *%rcx
)");
#else
#error "the emulator's fibers are written for x86-64"
#endif

struct Copy {
    void* to;
    const void* from;
    u32 group;
};

struct Barrier {
    u32 waiting;
    u64 round;
    const char* what; // the instruction that they wait in
};

struct Fiber {
    void* place;
    u8* stack;
    bool is_done, has_waited;
    const Barrier* waits_for; // to go on to another round than this
    u64 round;
    u32 turn;  // of its next instruction of the whole warp
    u32 group; // of its next asynchronous copy
    std::vector<Copy> copies;
};

// Memory between pages that nobody may touch.
inline u8* guarded(size_t bytes) {
    u8* memory = (u8*)mmap(nullptr, PAGE + bytes + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + PAGE, bytes, PROT_READ | PROT_WRITE)) abort();
    return memory + PAGE;
}
inline void free_guarded(u8* memory, size_t bytes) {
    if (memory) munmap(memory - PAGE, PAGE + bytes + PAGE);
}

struct Machine {
    // When a library of kernels is unloaded.
    ~Machine() {
        for (Fiber& fiber : fibers) free_guarded(fiber.stack, STACK);
        free_guarded(shared, SHARED_PAGES);
    }

    Fiber fibers[MAX_THREADS];
    void* scheduler;
    u32 n_threads, n_done, current;
    Barrier block, warps[MAX_THREADS / 32];
    // What threads bring to an instruction of their warp, and what comes of it. A thread may be one instruction ahead of another, so
    // there are two of each, in turn.
    u32 operands[2][MAX_THREADS][6];
    const u8* addresses[2][MAX_THREADS];
    float products[2][MAX_THREADS / 32][16][8];
    u8 *shared, *dynamic_shared;       // all there is; its end, as much as the launch asks for
    size_t shared_bytes, shared_limit; // of the block, static arrays included
    std::vector<void*> arrays;         // static ones that the block has met
    u64 random;
    const char* error; // of a thread, which then goes no further
    void (*body)(void**);
    void** arguments;
};

EMULATOR_GLOBAL Machine machine = {};

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
    if (!machine.fibers[machine.current].has_waited) fail("a thread ends that has not waited for the kernel before");
    machine.fibers[machine.current].is_done = true;
    machine.n_done++;
    for (;;) pause_fiber();
}

// The last one to arrive does `work` for all.
template <class Work>
void wait(const char* what, Barrier& barrier, u32 n, Work work) {
    if (barrier.waiting && barrier.what != what) fail("threads of a warp wait for each other in different instructions");
    barrier.what = what;
    Fiber& fiber = machine.fibers[machine.current];
    fiber.waits_for = &barrier;
    fiber.round = barrier.round;
    if (++barrier.waiting == n) {
        work();
        barrier.waiting = 0;
        barrier.round++;
    }
    pause_fiber();
}

} // namespace emulator

// ---------------------------------------------------------------- device.cuh's names

#define DEVICE static inline
#define KERNEL(name, Params, threads) EMULATED_KERNEL(name, Params, threads, wait_for_previous())
#define FIRST_OF(first, ...) first
#define KERNEL_THAT_WAITS(name, Params, ...) EMULATED_KERNEL(name, Params, (FIRST_OF(__VA_ARGS__, 0)), (void)0)
#define EMULATED_KERNEL(name, Params, threads, first)                                              \
    static void name##_body(const Params& p);                                                      \
    extern "C" void name##_emulated(void** arguments) {                                            \
        first;                                                                                     \
        name##_body(*(const Params*)arguments[0]);                                                 \
    }                                                                                              \
    extern "C" const u32 name##_facts[2];                                                          \
    const u32 name##_facts[2] = {threads, sizeof(Params)};                                         \
    static void name##_body(const Params& p)
#define SHARED(type, name, count)                \
    alignas(16) static type name##_array[count]; \
    emulator::meet_shared(name##_array, sizeof name##_array); \
    type* const name = name##_array
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulator::machine.dynamic_shared

namespace emulator {
// The first thread of a block to come by fills a static array with garbage.
inline void meet_shared(void* array, size_t bytes) {
    for (void* known : machine.arrays) {
        if (known == array) return;
    }
    machine.arrays.push_back(array);
    machine.shared_bytes += (bytes + 15) / 16 * 16;
    if (machine.shared_bytes > machine.shared_limit) fail("static and dynamic shared memory exceed what the kernel may have");
    memset(array, 0xff, bytes);
}
} // namespace emulator

DEVICE void wait_for_previous() {
    emulator::machine.fibers[emulator::machine.current].has_waited = true;
}

DEVICE void sync_block() {
    emulator::wait("sync_block", emulator::machine.block, emulator::machine.n_threads, [] {});
}
DEVICE void sync_warp() {
    emulator::wait("sync_warp", emulator::machine.warps[threadIdx.x / 32], 32, [] {});
}

DEVICE u32 shuffle(u32 x, u32 lane) {
    auto& operands = emulator::machine.operands[emulator::machine.fibers[threadIdx.x].turn++ % 2];
    operands[threadIdx.x][0] = x;
    emulator::wait("shuffle", emulator::machine.warps[threadIdx.x / 32], 32, [] {});
    return operands[threadIdx.x / 32 * 32 + lane % 32][0];
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
    // The exponent's bias is 112 more, which a product repairs, in subnormal values too; infinity and NaN have all bits.
    const u32 sign = (u32)(x & 0x8000) << 16, rest = (u32)(x & 0x7fff) << 13;
    if (rest >= 0x0f800000) return bits_float(sign | 0x7f800000 | rest);
    return bits_float(sign | float_bits(bits_float(rest) * 0x1p112f));
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
void mma(const char* instruction, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 turn = machine.fibers[thread].turn++ % 2;
    auto& operands = machine.operands[turn];
    auto& products = machine.products[turn][warp];
    memcpy(operands[thread], a, 16);
    memcpy(operands[thread] + 4, b, 8);
    wait(instruction, machine.warps[warp], 32, [&] {
        float x[16][16], y[16][8]; // (row, k), (k, column)
        for (u32 l = 0; l < 32; l++) {
            const u32* o = operands[warp * 32 + l];
            for (u32 i = 0; i < 8; i++) {
                const u32 row = l / 4 + i / 2 % 2 * 8, k = l % 4 * 2 + i % 2 + i / 4 * 8;
                x[row][k] = CONVERT(o[i / 2] >> i % 2 * 16);
            }
            for (u32 i = 0; i < 4; i++) y[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = CONVERT(o[4 + i / 2] >> i % 2 * 16);
        }
        memset(products, 0, sizeof products);
        for (u32 row = 0; row < 16; row++) {
            for (u32 k = 0; k < 16; k++) {
                for (u32 column = 0; column < 8; column++) products[row][column] += x[row][k] * y[k][column];
            }
        }
    });
    for (u32 i = 0; i < 4; i++) c[i] += products[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}
inline void check_aligned(const void* address) {
    if ((u64)address % 16) fail("a misaligned address");
}
// The addresses that the lanes of a warp bring.
inline const u8* const* meet(const char* instruction, const void* address) {
    check_aligned(address);
    auto& addresses = machine.addresses[machine.fibers[threadIdx.x].turn++ % 2];
    addresses[threadIdx.x] = (const u8*)address;
    wait(instruction, machine.warps[threadIdx.x / 32], 32, [] {});
    return addresses + threadIdx.x / 32 * 32;
}
} // namespace emulator

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma<from_bf16>("mma_bf16", c, a, b);
}
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma<from_f16>("mma_f16", c, a, b);
}
DEVICE void load_matrices(u32 (&m)[4], const void* row) {
    const u8* const* rows = emulator::meet("load_matrices", row);
    const u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 4; i++) memcpy(&m[i], rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
}
DEVICE void load_matrices_transposed(u32 (&m)[4], const void* row) {
    const u8* const* rows = emulator::meet("load_matrices_transposed", row);
    const u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 4; i++) {
        u16 pair[2];
        for (u32 j = 0; j < 2; j++) memcpy(&pair[j], rows[i * 8 + lane % 4 * 2 + j] + lane / 4 * 2, 2);
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

// Runs a kernel to its end; returns what went wrong, or null. `shared_limit` is for static and dynamic shared memory together.
inline const char* launch(void (*body)(void**), Index grid, u32 n_threads, size_t dynamic_bytes, void** arguments, u64 seed,
                          size_t shared_limit = MAX_SHARED) {
    Machine& m = machine;
    if (n_threads == 0 || n_threads > MAX_THREADS || n_threads % 32) return "an odd number of threads";
    if (dynamic_bytes > MAX_SHARED) return "too much shared memory";
    if (!m.shared) m.shared = guarded(SHARED_PAGES);
    const size_t rounded = (dynamic_bytes + 15) / 16 * 16;
    m.dynamic_shared = m.shared + SHARED_PAGES - rounded;
    m.shared_limit = shared_limit;
    m.body = body;
    m.arguments = arguments;
    m.n_threads = n_threads;
    m.random = seed;
    m.error = nullptr;
    gridDim = grid;
    blockDim = {n_threads, 1, 1};
    for (u32 i = 0; i < n_threads; i++) {
        if (!m.fibers[i].stack) m.fibers[i].stack = guarded(STACK);
    }
    const u64 n_blocks = (u64)grid.x * grid.y * grid.z;
    for (u64 block = 0; block < n_blocks; block++) {
        blockIdx = {(u32)(block % grid.x), (u32)(block / grid.x % grid.y), (u32)(block / grid.x / grid.y)};
        memset(m.dynamic_shared, 0xff, rounded);
        m.arrays.clear();
        m.shared_bytes = rounded;
        m.n_done = 0;
        m.block.waiting = 0;
        for (Barrier& warp : m.warps) warp.waiting = 0;
        for (u32 i = 0; i < n_threads; i++) {
            Fiber& fiber = m.fibers[i];
            fiber.is_done = fiber.has_waited = false;
            fiber.waits_for = nullptr;
            fiber.turn = 0;
            fiber.group = 0;
            fiber.copies.clear();
            // As if run_fiber had been called and left at once: six registers, its address, nowhere to return to. At different
            // places of their pages, for the sake of the caches.
            void** top = (void**)(fiber.stack + STACK - i % 12 * 320) - 2;
            top[1] = nullptr;
            top[0] = (void*)run_fiber;
            fiber.place = top - 6;
            memset(fiber.place, 0, 6 * sizeof(void*));
        }
        while (m.n_done < n_threads) {
            bool is_stuck = true;
            // Another order each time: from anywhere, in steps that have no divisor in common with the number of threads,
            // a power of two, or three of them.
            const u32 first = random_number() % n_threads, step = random_number() % 16 * 6 + 1;
            for (u32 turn = 0; turn < n_threads; turn++) {
                const u32 i = (first + turn * step) % n_threads;
                const Fiber& fiber = m.fibers[i];
                if (fiber.is_done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
                is_stuck = false;
                m.current = i;
                threadIdx = {i, 0, 0};
                emulator_switch(&m.scheduler, m.fibers[i].place);
                if (m.error) return m.error;
            }
            if (is_stuck) return "threads wait for others of their block or warp that never come";
        }
        for (size_t i = dynamic_bytes; i < rounded; i++) {
            if (m.dynamic_shared[i] != 0xff) return "a write beyond the shared memory";
        }
    }
    return nullptr;
}

} // namespace emulator

#ifdef EMULATOR_LIBRARY
// What libcuda.so calls; every library of kernels has a machine of its own.
extern "C" const char* emulator_launch(void (*body)(void**), const u32* grid, u32 n_threads, size_t dynamic_bytes,
                                       void** arguments, u64 seed, size_t shared_limit) {
    return emulator::launch(body, {grid[0], grid[1], grid[2]}, n_threads, dynamic_bytes, arguments, seed, shared_limit);
}
#endif
