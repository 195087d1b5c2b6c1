// libcublasLt.so for the emulator: what src/backend/cuda/gemm.rs calls of cuBLASLt, computed on the CPU.
//
// Products are queued on their stream like all of the emulator's work. It refuses what the documentation of cuBLASLt forbids, and
// what it leaves to chance: pointers that are aligned less than the heuristic was told (256 bytes if it was told nothing), algorithms
// that were found for another problem, matrices that do not lie in device memory. Read at each use:
//   PHD_EMULATOR_ALGORITHMS  0: the heuristic finds none; refused: those that it finds will not do
//   PHD_EMULATOR_FAIL        as in driver.cpp
#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

// Of cublasStatus_t, cudaDataType_t, cublasComputeType_t; of CUresult.
constexpr int OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15;
constexpr int R_32F = 0, R_16BF = 14;
constexpr int COMPUTE_32F = 68;
constexpr int ILLEGAL_ADDRESS = 700;

// The library's handles. Those that live are known: others are refused.
struct Handle {};
struct Layout {
    int type;
    uint64_t rows, columns; // column after column
    int64_t pitch;          // from one to the next, in elements
};
struct Description {
    int compute, scale;
    int32_t transposed[2] = {0, 0}; // A, B
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256}; // A, B, C, D
};

std::mutex lock;
std::set<const void*> alive;

template <class T>
int create(T** handle, T value) {
    if (!handle) return INVALID_VALUE;
    *handle = new T(value);
    alive.insert(*handle);
    return OK;
}
template <class T>
int destroy(T* handle) {
    if (!alive.erase(handle)) return INVALID_VALUE;
    delete handle;
    return OK;
}
bool all_alive(std::initializer_list<const void*> handles) {
    for (const void* handle : handles) {
        if (!alive.count(handle)) return false;
    }
    return true;
}
int set(void* attribute, size_t size, const void* from, size_t bytes) {
    if (!from || bytes != size) return INVALID_VALUE;
    memcpy(attribute, from, bytes);
    return OK;
}

#define BEGIN                                \
    std::lock_guard<std::mutex> guard(lock); \
    if (emulator_is_to_fail(__func__)) return INTERNAL_ERROR;

// D (m, n) = alpha op(A) op(B) + beta C, op(A) being (m, k).
struct Problem {
    int type, transposed[2], unused;
    uint64_t m, n, k;
    int64_t pitch[4];
    uint32_t alignment[4];
    uint64_t workspace; // that the algorithm needs
};

// cublasLtMatmulAlgo_t: 64 bytes that nobody looks into. This one has a number that tells what it was found for.
struct Algorithm {
    uint64_t magic, number, unused[6];
};
constexpr uint64_t MAGIC = 0x454d554c41544544;
std::vector<Problem> found;

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

// What is to be computed, or why not.
int problem_of(const Description& what, const Layout* const (&layouts)[4], Problem& p) {
    const Layout &a = *layouts[0], &b = *layouts[1], &c = *layouts[2], &d = *layouts[3];
    for (const Layout* layout : layouts) {
        if (!layout->rows || !layout->columns || layout->pitch < static_cast<int64_t>(layout->rows)) return INVALID_VALUE;
    }
    p = {};
    p.type = a.type;
    for (int i : {0, 1}) p.transposed[i] = what.transposed[i];
    p.m = what.transposed[0] ? a.columns : a.rows;
    p.k = what.transposed[0] ? a.rows : a.columns;
    p.n = what.transposed[1] ? b.rows : b.columns;
    for (int i = 0; i < 4; i++) p.pitch[i] = layouts[i]->pitch;
    const bool fits = (what.transposed[1] ? b.columns : b.rows) == p.k && d.rows == p.m && d.columns == p.n;
    if (!fits || c.rows != d.rows || c.columns != d.columns) return INVALID_VALUE;
    // Sums in f32, of f32 or bf16; the documentation's table has more.
    const bool has_types = (a.type == R_32F || a.type == R_16BF) && b.type == a.type && c.type == R_32F && d.type == R_32F;
    if (what.compute != COMPUTE_32F || what.scale != R_32F || !has_types) return NOT_SUPPORTED;
    // Tensor cores read 16 bytes at a time.
    const bool is_aligned = a.pitch % 8 == 0 && b.pitch % 8 == 0;
    return a.type == R_16BF && !is_aligned ? NOT_SUPPORTED : OK;
}

// The matrix's values, f32: (result row, k) of A, (result column, k) of B; so both are read along k.
std::vector<float> values(const void* from, int type, bool is_along, uint64_t n, uint64_t k, int64_t pitch) {
    std::vector<float> to(n * k);
    for (uint64_t i = 0; i < n; i++) {
        for (uint64_t j = 0; j < k; j++) {
            const uint64_t at = is_along ? i * pitch + j : j * pitch + i;
            uint32_t bits;
            if (type == R_32F) {
                memcpy(&bits, static_cast<const uint32_t*>(from) + at, 4);
            } else {
                bits = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16;
            }
            memcpy(&to[i * k + j], &bits, 4);
        }
    }
    return to;
}

void multiply(const Problem& p, float alpha, const void* a, const void* b, float beta, const float* c, float* d) {
    const std::vector<float> x = values(a, p.type, p.transposed[0], p.m, p.k, p.pitch[0]);
    const std::vector<float> y = values(b, p.type, !p.transposed[1], p.n, p.k, p.pitch[1]);
    constexpr uint64_t LANES = 16;
    for (uint64_t column = 0; column < p.n; column++) {
        for (uint64_t row = 0; row < p.m; row++) {
            const float *u = &x[row * p.k], *v = &y[column * p.k];
            float sums[LANES] = {}, sum = 0;
            uint64_t k = 0;
            for (; k + LANES <= p.k; k += LANES) {
                for (uint64_t i = 0; i < LANES; i++) sums[i] += u[k + i] * v[k + i];
            }
            for (; k < p.k; k++) sum += u[k] * v[k];
            for (float s : sums) sum += s;
            const float before = beta == 0 ? 0 : beta * c[column * p.pitch[2] + row];
            d[column * p.pitch[3] + row] = alpha * sum + before;
        }
    }
}

size_t extent(const Layout& layout) {
    return (layout.pitch * (layout.columns - 1) + layout.rows) * (layout.type == R_32F ? 4 : 2);
}

} // namespace

API cublasLtCreate(Handle** handle) {
    BEGIN
    // A handle belongs to the device whose context is current.
    if (!emulator_has_context()) return NOT_INITIALIZED;
    return create(handle, Handle{});
}
API cublasLtDestroy(Handle* handle) {
    BEGIN
    if (!emulator_has_context()) return NOT_INITIALIZED;
    return destroy(handle);
}
API cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
    BEGIN
    return create(layout, Layout{type, rows, columns, pitch});
}
API cublasLtMatrixLayoutDestroy(Layout* layout) {
    BEGIN
    return destroy(layout);
}
API cublasLtMatmulDescCreate(Description** description, int compute, int scale) {
    BEGIN
    return create(description, Description{compute, scale});
}
API cublasLtMatmulDescDestroy(Description* description) {
    BEGIN
    return destroy(description);
}
API cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* from, size_t bytes) {
    BEGIN
    if (!all_alive({description})) return INVALID_VALUE;
    if (attribute != 3 && attribute != 4) return INVALID_VALUE; // how A, B are transposed
    int32_t& transposed = description->transposed[attribute - 3];
    const int status = set(&transposed, sizeof transposed, from, bytes);
    return status || transposed == 0 || transposed == 1 ? status : INVALID_VALUE;
}
API cublasLtMatmulPreferenceCreate(Preference** preference) {
    BEGIN
    return create(preference, Preference{});
}
API cublasLtMatmulPreferenceDestroy(Preference* preference) {
    BEGIN
    return destroy(preference);
}
API cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* from, size_t bytes) {
    BEGIN
    if (!all_alive({preference})) return INVALID_VALUE;
    if (attribute == 1) return set(&preference->workspace, sizeof preference->workspace, from, bytes);
    if (attribute < 5 || attribute > 8) return INVALID_VALUE;
    uint32_t& alignment = preference->alignment[attribute - 5];
    const int status = set(&alignment, sizeof alignment, from, bytes);
    return status || (alignment && !(alignment & (alignment - 1))) ? status : INVALID_VALUE;
}
API cublasLtMatmulAlgoGetHeuristic(Handle* handle, Description* what, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int wanted, Heuristic* result, int* n) {
    BEGIN
    if (!all_alive({handle})) return NOT_INITIALIZED;
    if (!all_alive({what, a, b, c, d, preference}) || wanted < 1 || !result || !n) return INVALID_VALUE;
    *n = 0;
    memset(result, 0xff, wanted * sizeof *result);
    Problem p;
    if (int status = problem_of(*what, {a, b, c, d}, p)) return status;
    const char* algorithms = getenv("PHD_EMULATOR_ALGORITHMS");
    if (algorithms && !strcmp(algorithms, "0")) return NOT_SUPPORTED;
    memcpy(p.alignment, preference->alignment, sizeof p.alignment);
    p.workspace = std::min<uint64_t>(preference->workspace, 1 << 20);
    found.push_back(p);
    result[0] = {{MAGIC, found.size() - 1, {}}, p.workspace, OK, 1, {}};
    *n = 1;
    return OK;
}
API cublasLtMatmul(Handle* handle, Description* what, const void* alpha, const void* a, Layout* of_a, const void* b, Layout* of_b,
                   const void* beta, const void* c, Layout* of_c, void* d, Layout* of_d, const Algorithm* algorithm,
                   void* workspace, size_t workspace_bytes, void* stream) {
    BEGIN
    if (!all_alive({handle}) || !emulator_has_context()) return NOT_INITIALIZED;
    if (!all_alive({what, of_a, of_b, of_c, of_d}) || !alpha || !beta || !algorithm) return INVALID_VALUE;
    Problem p;
    if (int status = problem_of(*what, {of_a, of_b, of_c, of_d}, p)) return status;
    const char* algorithms = getenv("PHD_EMULATOR_ALGORITHMS");
    if (algorithms && !strcmp(algorithms, "refused")) return NOT_SUPPORTED;
    if (algorithm->magic != MAGIC || algorithm->number >= found.size()) return INVALID_VALUE;
    const Problem& known = found[algorithm->number];
    memcpy(p.alignment, known.alignment, sizeof p.alignment);
    p.workspace = known.workspace;
    if (memcmp(&p, &known, sizeof p)) return INVALID_VALUE;
    const Layout* const layouts[] = {of_a, of_b, of_c, of_d};
    const void* const matrices[] = {a, b, c, d};
    std::vector<std::pair<const void*, size_t>> touched;
    for (int i = 0; i < 4; i++) {
        if (!matrices[i] || reinterpret_cast<uintptr_t>(matrices[i]) % p.alignment[i]) return INVALID_VALUE;
        touched.push_back({matrices[i], extent(*layouts[i])});
    }
    const bool has_workspace = workspace && workspace_bytes >= p.workspace && reinterpret_cast<uintptr_t>(workspace) % 256 == 0;
    if (p.workspace && !has_workspace) return INVALID_VALUE;
    if (p.workspace) touched.push_back({workspace, p.workspace});
    for (auto [memory, bytes] : touched) {
        if (!emulator_owns(memory, bytes)) return INVALID_VALUE;
        // Nothing may lie in the result but C, which then is D.
        const char *begin = static_cast<const char*>(memory), *result = static_cast<const char*>(d);
        const bool overlaps = begin < result + extent(*of_d) && result < begin + bytes;
        if (overlaps && memory != d) return INVALID_VALUE;
    }
    if (a == d || b == d || (c == d && of_c->pitch != of_d->pitch)) return INVALID_VALUE;
    float factors[2];
    memcpy(&factors[0], alpha, 4);
    memcpy(&factors[1], beta, 4);
    const std::function<int()> work = [=] {
        for (auto [memory, bytes] : touched) {
            if (!emulator_owns(memory, bytes)) return ILLEGAL_ADDRESS;
        }
        if (p.workspace) memset(workspace, 0xff, p.workspace); // partial sums, say
        multiply(p, factors[0], a, b, factors[1], static_cast<const float*>(c), static_cast<float*>(d));
        return 0;
    };
    return emulator_queue(stream, &work) ? EXECUTION_FAILED : OK;
}
