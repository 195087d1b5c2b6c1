// CUDA on the CPU: what kernels/device.cuh offers, for sources compiled by a C++ compiler with launch.h and this file before them.
//
// A thread is a fiber. A warp's fibers take turns in an order that changes all the time, warps take turns at random, blocks run
// one after another. Barriers, shuffles and tensor-core instructions wait for everyone who takes part. Shared memory begins as
// garbage, asynchronous copies arrive when they are waited for. Shared memory and stacks end at pages that nobody may touch.
#define PHD_EMULATED

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
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

// A fiber stays on the host's thread on which it began.
#define EMULATOR_OF_THREAD static thread_local __attribute__((tls_model("initial-exec")))

EMULATOR_OF_THREAD Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// ---------------------------------------------------------------- fibers

constexpr size_t STACK = 64 << 10, PAGE = 4096;
constexpr size_t MAX_SHARED = 227 << 10; // bytes of a block, as on sm_90
constexpr size_t SHARED_PAGES = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
constexpr size_t MAX_ARRAY = 48 << 10; // of static shared memory
constexpr u32 MAX_THREADS = 1024, MAX_ARRAYS = 8;

#ifdef __x86_64__
#define EMULATOR_INLINE inline __attribute__((always_inline))
// Notes the stack's place and where to go on, and goes on where `to` was left. The compiler saves what it needs of the registers. Not a
// call that returns elsewhere: CPUs predict that a return goes to its own call. No red zone: see nvrtc.cpp.
EMULATOR_INLINE void switch_stack(void** from, void* to) {
    asm volatile(R"(
        leaq 1f(%%rip), %%rax
        pushq %%rbp
        pushq %%rax
        movq %%rsp, (%%rdi)
        movq %%rsi, %%rsp
        popq %%rcx
        jmpq *%%rcx
     1: popq %%rbp
    )"
                 : "+D"(from), "+S"(to)
                 :
                 : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3",
                   "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory",
                   "cc");
}
#else
#error "the emulator's fibers are written for x86-64"
#endif

struct Copy {
    void* to;
    const void* from;
    u32 group;
};

// Lanes have places in the warp's order: the one at place i is first + i * step, modulo 32.
struct alignas(64) Warp {
    u32 waiting, blocked, done; // by place: in an instruction of the warp, in one of the block, at their end
    u32 base, first, step;      // `base` is the first thread's number
    u32 round;                  // instructions of the warp that are through
    const char* what;           // the instruction that `waiting` wait in
    // What lanes bring to an instruction. Lanes that are through look at it while others are at the next one: there are two, in turn.
    u32 operands[2][32];
    const u8* addresses[2][32];
    // Of products: operands by row, column, and what comes of them. By the time of the next product all have taken their results.
    alignas(32) u16 a[16][16], b[16][8]; // (row, k), (k, column)
    alignas(32) float product[16][8];

    u32 runnable() const { return ~(waiting | blocked | done); }
    u32 thread(u32 place) const { return base + (first + place * step) % 32; }
};

// Memory between pages that nobody may touch.
inline u8* guarded(size_t bytes) {
    u8* memory = (u8*)mmap(nullptr, PAGE + bytes + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + PAGE, bytes, PROT_READ | PROT_WRITE)) abort();
    return memory + PAGE;
}

struct Array {
    const void* name;
    u8* memory; // of MAX_ARRAY bytes
    size_t bytes;
};

struct Machine {
    // Of each thread: where it goes on, or null if it has not begun; its stack then; asynchronous copies that have not arrived.
    void* places[MAX_THREADS];
    u8* stacks[MAX_THREADS];
    std::vector<Copy> copies[MAX_THREADS];
    u32 groups[MAX_THREADS]; // of its next asynchronous copy
    bool has_copies;         // anybody
    bool has_waited[MAX_THREADS]; // for the kernel before
    // Those that nobody has, the last one the most recently used; made when they are first needed.
    u8* free_stacks[MAX_THREADS];
    u32 n_free, n_stacks;
    Warp warps[MAX_THREADS / 32];
    void* scheduler;
    Warp* warp; // of the running thread
    u32 place;  // of the running thread in it
    u32 n_threads, n_done, n_blocked;
    u8 *shared, *dynamic_shared; // all there is; its end, as much as the launch asks for
    Array arrays[MAX_ARRAYS];    // static ones that the block has met
    u32 n_arrays;
    size_t shared_bytes, shared_limit; // of the block, static arrays included
    u64 random;
    const char* error; // of a thread, which then goes no further
    const Launch* launch;
};

static Machine machines[MAX_WORKERS];
EMULATOR_OF_THREAD Machine* machine;

inline u32 random_number() {
    machine->random = machine->random * 6364136223846793005ull + 1442695040888963407ull;
    return machine->random >> 33;
}

void run_fiber();

// Lets a stack begin.
inline __attribute__((noinline)) void* begin_fiber(u32 thread) {
    Machine& m = *machine;
    if (!m.n_free) {
        // At different places of their pages, for the sake of the caches.
        m.free_stacks[m.n_free++] = guarded(STACK) + STACK - m.n_stacks++ % 12 * 320;
    }
    u8* stack = m.stacks[thread] = m.free_stacks[--m.n_free];
    void** top = (void**)stack - 2;
    top[1] = nullptr; // run_fiber has nowhere to return to
    top[0] = (void*)run_fiber;
    return top;
}

// To a thread of the warp, from where `from` is to note the place of what runs now.
EMULATOR_INLINE void switch_to(void** from, const Warp& warp, u32 place) {
    Machine& m = *machine;
    m.place = place;
    const u32 thread = threadIdx.x = warp.thread(place);
    void* to = m.places[thread];
    switch_stack(from, to ? to : begin_fiber(thread));
}

EMULATOR_INLINE void to_scheduler() {
    switch_stack(&machine->places[threadIdx.x], machine->scheduler);
}

// The next of the warp, from a place on, that can go on.
EMULATOR_INLINE u32 next_place(const Warp& warp, u32 from) {
    const u32 runnable = warp.runnable();
    return (from + __builtin_ctz(runnable >> from | (runnable << (31 - from) << 1))) % 32;
}

// Lets others run.
EMULATOR_INLINE void pause_fiber() {
    Machine& m = *machine;
    const Warp& warp = *m.warp;
    if (!warp.runnable()) return to_scheduler();
    switch_to(&m.places[threadIdx.x], warp, next_place(warp, m.place));
}

// Ends the launch.
inline __attribute__((noinline, cold)) void fail(const char* error) {
    machine->error = error;
    for (;;) to_scheduler();
}

inline void run_fiber() {
    machine->launch->body(machine->launch->arguments);
    Machine& m = *machine;
    if (!m.has_waited[threadIdx.x]) fail("a thread ends that has not waited for the kernel before");
    m.warp->done |= 1u << m.place;
    m.n_done++;
    // Whoever begins next may have the stack: what is on it is not needed any more.
    m.free_stacks[m.n_free++] = m.stacks[threadIdx.x];
    pause_fiber();
}

inline void reorder(Warp& warp) {
    const u32 x = random_number();
    warp.first = x % 32;
    warp.step = x / 32 % 16 * 2 + 1;
}

// An instruction of the whole warp: the last one to arrive does `work` for all, and goes on at once.
template <class Work>
EMULATOR_INLINE void wait_for_warp(const char* what, Work work) {
    Machine& m = *machine;
    Warp& warp = *m.warp;
    if (warp.waiting && warp.what != what) fail("threads of a warp wait for each other in different instructions");
    warp.what = what;
    const u32 bit = 1u << m.place;
    if ((warp.waiting | bit) != ~0u) {
        warp.waiting |= bit;
        return pause_fiber();
    }
    work();
    warp.waiting = 0;
    warp.round++;
    // Now and then another warp comes before, and this one's lanes take another order.
    if (random_number() % 32 == 0) {
        reorder(warp);
        to_scheduler();
    }
}

EMULATOR_INLINE void wait_for_block() {
    Machine& m = *machine;
    m.warp->blocked |= 1u << m.place;
    if (++m.n_blocked < m.n_threads) return pause_fiber();
    m.n_blocked = 0;
    for (u32 i = 0; i < m.n_threads / 32; i++) {
        m.warps[i].blocked = 0;
        reorder(m.warps[i]);
    }
    to_scheduler();
}

} // namespace emulator

// ---------------------------------------------------------------- device.cuh's names

#define DEVICE static EMULATOR_INLINE
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
#define SHARED(type, name, count)      \
    static const char name##_is_here = 0; \
    type* const name = (type*)emulator::shared_array(&name##_is_here, sizeof(type) * (count))
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulator::machine->dynamic_shared

namespace emulator {
// The first thread of a block to come by makes a static array, of garbage; its end is the end of a page.
inline u8* shared_array(const void* name, size_t bytes) {
    Machine& m = *machine;
    bytes = (bytes + 15) / 16 * 16;
    u32 i = 0;
    while (i < m.n_arrays && m.arrays[i].name != name) i++;
    if (i == m.n_arrays) {
        m.shared_bytes += bytes;
        if (i == MAX_ARRAYS || bytes > MAX_ARRAY || m.shared_bytes > m.shared_limit) {
            fail("static and dynamic shared memory exceed what the kernel may have");
        }
        if (!m.arrays[i].memory) m.arrays[i].memory = guarded(MAX_ARRAY);
        m.arrays[i].name = name;
        m.n_arrays++;
        memset(m.arrays[i].memory + MAX_ARRAY - bytes, 0xff, bytes);
    }
    return m.arrays[i].memory + MAX_ARRAY - bytes;
}
} // namespace emulator

DEVICE void wait_for_previous() {
    emulator::machine->has_waited[threadIdx.x] = true;
}

DEVICE void sync_block() {
    emulator::wait_for_block();
}
DEVICE void sync_warp() {
    emulator::wait_for_warp("sync_warp", [] {});
}

DEVICE u32 shuffle(u32 x, u32 lane) {
    emulator::Warp& warp = *emulator::machine->warp;
    u32* operands = warp.operands[warp.round % 2];
    operands[threadIdx.x % 32] = x;
    emulator::wait_for_warp("shuffle", [] {});
    return operands[lane % 32];
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

namespace emulator {
// One instruction instead of the five shuffles that it is on a GPU, with the same results: `combine` is symmetric, so all lanes get
// the same.
template <class Combine>
EMULATOR_INLINE float reduce(const char* what, float x, Combine combine) {
    Warp& warp = *machine->warp;
    u32* operands = warp.operands[warp.round % 2];
    operands[threadIdx.x % 32] = float_bits(x);
    wait_for_warp(what, [&] {
        float values[32];
        memcpy(values, operands, sizeof values);
        for (u32 n = 16; n > 0; n /= 2) {
            for (u32 i = 0; i < n; i++) values[i] = combine(values[i], values[i + n]);
        }
        operands[0] = float_bits(values[0]);
    });
    return bits_float(operands[0]);
}
} // namespace emulator
DEVICE float warp_sum(float x) {
    return emulator::reduce("warp_sum", x, [](float a, float b) { return a + b; });
}
DEVICE float warp_max(float x) {
    return emulator::reduce("warp_max", x, [](float a, float b) { return fmaxf(a, b); });
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
    return _cvtsh_ss(x);
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
DEVICE __m256 floats_of_bf16(const u16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_load_si128((const __m128i*)from)), 16));
}
DEVICE __m256 floats_of_f16(const u16* from) {
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i*)from));
}
// PTX ISA, "Matrix Fragments for mma.m16n8k16", 16-bit types.
template <__m256 (*FLOATS)(const u16*)>
__attribute__((noinline)) void multiply(Warp& warp) {
    alignas(32) float x[16][16];
    __m256 y[16];
    for (u32 row = 0; row < 16; row++) {
        _mm256_store_ps(x[row], FLOATS(warp.a[row]));
        _mm256_store_ps(x[row] + 8, FLOATS(warp.a[row] + 8));
    }
    for (u32 k = 0; k < 16; k++) y[k] = FLOATS(warp.b[k]);
    for (u32 row = 0; row < 16; row += 4) {
        __m256 sums[4] = {};
        for (u32 k = 0; k < 16; k++) {
            for (u32 i = 0; i < 4; i++) sums[i] += x[row + i][k] * y[k];
        }
        for (u32 i = 0; i < 4; i++) _mm256_store_ps(warp.product[row + i], sums[i]);
    }
}
template <__m256 (*FLOATS)(const u16*)>
EMULATOR_INLINE void mma(const char* instruction, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    Warp& warp = *machine->warp;
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 4; i++) memcpy(&warp.a[g + i % 2 * 8][t * 2 + i / 2 * 8], &a[i], 4);
    for (u32 i = 0; i < 4; i++) warp.b[t * 2 + i % 2 + i / 2 * 8][g] = b[i / 2] >> i % 2 * 16;
    wait_for_warp(instruction, [&] { multiply<FLOATS>(warp); });
    for (u32 i = 0; i < 4; i++) c[i] += warp.product[g + i / 2 * 8][t * 2 + i % 2];
}
inline void check_aligned(const void* address) {
    if ((u64)address % 16) fail("a misaligned address");
}
// The addresses that the lanes of a warp bring.
inline const u8* const* meet(const char* instruction, const void* address) {
    check_aligned(address);
    Warp& warp = *machine->warp;
    const u8** addresses = warp.addresses[warp.round % 2];
    addresses[threadIdx.x % 32] = (const u8*)address;
    wait_for_warp(instruction, [] {});
    return addresses;
}
} // namespace emulator

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma<emulator::floats_of_bf16>("mma_bf16", c, a, b);
}
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma<emulator::floats_of_f16>("mma_f16", c, a, b);
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
    emulator::Machine& m = *emulator::machine;
    m.has_copies = true;
    m.copies[threadIdx.x].push_back({to_shared, from, m.groups[threadIdx.x]});
    memset(to_shared, 0xff, 16);
}
DEVICE void copy_commit() {
    emulator::machine->groups[threadIdx.x]++;
}
template <int N>
DEVICE void copy_wait() {
    std::vector<emulator::Copy>& copies = emulator::machine->copies[threadIdx.x];
    auto is_due = [&](const emulator::Copy& copy) { return copy.group + N < emulator::machine->groups[threadIdx.x]; };
    for (const emulator::Copy& copy : copies) {
        if (is_due(copy)) memcpy(copy.to, copy.from, 16);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), is_due), copies.end());
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

// Computes a block; returns what went wrong, or null.
inline const char* run_block(Machine& m, u64 block) {
    const Launch& launch = *m.launch;
    const size_t rounded = (launch.dynamic_bytes + 15) / 16 * 16;
    blockIdx = {(u32)(block % launch.grid[0]), (u32)(block / launch.grid[0] % launch.grid[1]),
                (u32)(block / launch.grid[0] / launch.grid[1])};
    memset(m.dynamic_shared, 0xff, rounded);
    m.random = launch.seed + block * 0x9e3779b97f4a7c15ull;
    m.error = nullptr;
    m.shared_bytes = rounded;
    m.n_arrays = m.n_done = m.n_blocked = 0;
    for (u32 i = 0; i < m.n_threads / 32; i++) {
        Warp& warp = m.warps[i];
        warp.waiting = warp.blocked = warp.done = warp.round = 0;
        warp.base = i * 32;
        reorder(warp);
    }
    std::fill_n(m.places, m.n_threads, nullptr);
    if (m.has_copies) {
        for (auto& copies : m.copies) copies.clear();
        m.has_copies = false;
    }
    std::fill_n(m.groups, m.n_threads, 0);
    std::fill_n(m.has_waited, m.n_threads, false);
    const u32 n_warps = m.n_threads / 32;
    while (m.n_done < m.n_threads) {
        const u32 x = random_number();
        u32 i = 0;
        while (i < n_warps && !m.warps[(x + i) % n_warps].runnable()) i++;
        if (i == n_warps) return "threads wait for others of their block or warp that never come";
        m.warp = &m.warps[(x + i) % n_warps];
        switch_to(&m.scheduler, *m.warp, next_place(*m.warp, x / 1024 % 32));
        if (m.error) return m.error;
    }
    for (size_t i = launch.dynamic_bytes; i < rounded; i++) {
        if (m.dynamic_shared[i] != 0xff) return "a write beyond the shared memory";
    }
    return nullptr;
}

} // namespace emulator

extern "C" const char* emulator_run(const Launch* launch, u32 worker) {
    using namespace emulator;
    const u32 n_threads = launch->n_threads;
    if (n_threads == 0 || n_threads > MAX_THREADS || n_threads % 32) return "an odd number of threads";
    if (launch->dynamic_bytes > MAX_SHARED) return "too much shared memory";
    Machine& m = machines[worker];
    machine = &m;
    if (!m.shared) m.shared = guarded(SHARED_PAGES);
    m.dynamic_shared = m.shared + SHARED_PAGES - (launch->dynamic_bytes + 15) / 16 * 16;
    m.shared_limit = launch->shared_limit;
    m.launch = launch;
    m.n_threads = n_threads;
    gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
    blockDim = {n_threads, 1, 1};
    threadIdx = {0, 0, 0};
    const u64 n_blocks = (u64)gridDim.x * gridDim.y * gridDim.z;
    for (u64 block = 0; block < n_blocks; block++) {
        if (const char* error = run_block(m, block)) return error;
    }
    return nullptr;
}
