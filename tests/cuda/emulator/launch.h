// What the emulated driver says to a library of kernels, and cuBLASLt to the driver. No part of CUDA.
#ifndef EMULATOR_LAUNCH
#define EMULATOR_LAUNCH
#include <cstddef>
#include <cstdint>
#include <functional>

// Kernels that run at the same time, each on the thread that waits for it.
constexpr uint32_t MAX_WORKERS = 16;

struct Launch {
    void (*body)(void**);
    void** arguments;
    uint32_t grid[3], n_threads;
    size_t dynamic_bytes, shared_limit; // the limit is for static and dynamic shared memory together
    uint64_t seed;
};

// Of a library of kernels: runs one to its end; says what went wrong, or null. A worker does one thing at a time.
extern "C" const char* emulator_run(const Launch* launch, uint32_t worker);

// Of the driver: queues work on a stream, or captures it; the work says what became of it. Returns a CUresult.
extern "C" int emulator_queue(void* stream, const std::function<int()>* work);
// Whether bytes lie within one allocation of device memory.
extern "C" bool emulator_owns(const void* address, size_t bytes);
// Whether a context is current on this thread.
extern "C" bool emulator_has_context();
// Whether this call of a function is the one that PHD_EMULATOR_FAIL names.
extern "C" bool emulator_is_to_fail(const char* function);

#endif
