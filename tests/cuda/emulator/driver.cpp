// libcuda.so.1 for machines without a GPU: what src/backend/cuda calls of the driver, with kernels run by emulated.h.
//
// It is strict where a GPU is merely fast: a stream's work is done when somebody waits for it and not before, every allocation begins
// as garbage and ends at a page that nobody may touch, what must not happen during a capture is refused, what is left when the context
// is let go ends the process. Settings, read at each use:
//   PHD_EMULATOR_DEVICES  0: there is none           PHD_EMULATOR_MEMORY  bytes of device memory (1 GiB)
//   PHD_EMULATOR_FAIL     NAME:N, the N-th call of that function since this was set fails; NAME:N=CODE, with that CUresult
//   PHD_EMULATOR_SEED     of the order of threads
//   PHD_EMULATOR_VERSION  of the driver (13000)      PHD_EMULATOR_NO_OVERLAP  1: launches may not ask to overlap
//   PHD_EMULATOR_ARCH     compute capability (90)
#include "launch.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <fcntl.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

// Of CUresult.
constexpr int OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
              INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500,
              ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900,
              CAPTURE_INVALIDATED = 901, CAPTURE_WRONG_THREAD = 908, UNKNOWN = 999;

constexpr int THREAD_LOCAL = 1; // of CUstreamCaptureMode

// Shared memory that a block may have, static and dynamic: any kernel, and one that has asked for more.
constexpr int MAX_UNASKED = 48 << 10, MAX_SHARED = 227 << 10;

using Work = std::function<int()>;

struct Graph {
    std::vector<Work> work;
    bool is_spoilt = false;
};

struct Stream {
    std::deque<Work> work;
    bool is_busy = false; // some thread does its work
    std::shared_ptr<Graph> capture;
};

struct Event {
    Stream* stream = nullptr;
    uint64_t recorded = 0, passed = 0;
};

struct Module {
    void* library;
};

struct Function {
    Module* module;
    void (*body)(void**);
    const uint32_t* facts; // threads at most, bytes of the parameters
    int max_dynamic = MAX_UNASKED;
};

// Held by every call once, but not while a kernel runs; work that is no kernel may ask what allocations there are.
std::recursive_mutex lock;
std::condition_variable_any changed; // a stream or a worker became free
std::map<uint64_t, std::pair<size_t, size_t>> allocations; // address: (bytes, bytes before it in its mapping)
size_t used = 0;
Stream default_stream; // of whoever names none: fills of memory
// What there is of each kind, which must be gone when the device's context is let go.
long n_retained = 0, n_host = 0, n_events = 0, n_graphs = 0;
std::set<Module*> modules;
std::set<Stream*> streams;
int broken = OK; // after a failed kernel the context is of no more use
thread_local std::vector<void*> contexts;
thread_local Stream* capturing = nullptr;
int the_context;

size_t setting(const char* name, size_t otherwise) {
    const char* value = getenv(name);
    return value ? strtoull(value, nullptr, 10) : otherwise;
}

int arch() {
    return setting("PHD_EMULATOR_ARCH", 90);
}

// The error that this call of `name` is to return, or OK.
int wanted_error(const char* name) {
    static std::map<std::string, size_t> calls; // since `wanted` was set
    static std::string wanted;
    const char* set = getenv("PHD_EMULATOR_FAIL");
    if (wanted != (set ? set : "")) {
        wanted = set ? set : "";
        calls.clear();
    }
    const std::string call = name + (":" + std::to_string(++calls[name]));
    if (wanted == call) return UNKNOWN;
    return wanted.rfind(call + "=", 0) == 0 ? atoi(wanted.c_str() + call.size() + 1) : OK;
}

#define BEGIN                                            \
    std::lock_guard<std::recursive_mutex> guard(lock);   \
    if (const int error = wanted_error(__func__)) return error;
#define BEGIN_IN_CONTEXT                                 \
    BEGIN                                                \
    if (contexts.empty()) return INVALID_CONTEXT;        \
    if (broken) return broken;
// What would wait for, or change, the device while this thread captures.
#define NOT_WHILE_CAPTURING                              \
    if (capturing) {                                     \
        capturing->capture->is_spoilt = true;            \
        return CAPTURE_UNSUPPORTED;                      \
    }

int queue(void* stream, Work work) {
    Stream* s = static_cast<Stream*>(stream);
    if (!s) return INVALID_VALUE; // nobody queues on the default stream; it clears memory
    if (s->capture) {
        s->capture->work.push_back(std::move(work));
    } else {
        s->work.push_back(std::move(work));
    }
    return OK;
}

// Does a stream's work until `is_enough`, or waits for who is at it.
int drain(Stream* s, const std::function<bool()>& is_enough) {
    for (;;) {
        changed.wait(lock, [&] { return !s->is_busy; });
        if (s->work.empty() || is_enough()) return broken;
        Work work = std::move(s->work.front());
        s->work.pop_front();
        s->is_busy = true;
        const int error = broken ? broken : work();
        s->is_busy = false;
        changed.notify_all();
        if (error) return broken = error;
    }
}

// Whether an event's stream, which is gone after a failure perhaps, has yet to come to it.
bool is_pending(const Event* e) {
    return !broken && streams.count(e->stream) && e->passed < e->recorded;
}

bool is_within(uint64_t address, size_t bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return false;
    auto& [begin, size] = *std::prev(next);
    return address + bytes <= begin + size.first;
}

// Queues a copy of device memory, which must be there when its turn comes, too.
int queue_copy(void* stream, uint64_t device, size_t bytes, void* to, const void* from) {
    if (!is_within(device, bytes)) return INVALID_VALUE;
    return queue(stream, [=] {
        if (!is_within(device, bytes)) return ILLEGAL_ADDRESS;
        memcpy(to, from, bytes);
        return OK;
    });
}

// A kernel that touches a guard page comes back here.
thread_local bool is_in_kernel = false;
thread_local sigjmp_buf back;
struct sigaction old_actions[2]; // of SIGSEGV, SIGBUS
void on_fault(int signal) {
    if (is_in_kernel) siglongjmp(back, 1);
    sigaction(signal, &old_actions[signal == SIGBUS], nullptr); // somebody else's: it happens again when this returns
}

int run_kernel(Function* f, const uint32_t* grid, uint32_t threads, uint32_t dynamic, void* parameters) {
    static uint64_t seed = setting("PHD_EMULATOR_SEED", 1);
    static bool is_used[MAX_WORKERS];
    static char handler_stacks[MAX_WORKERS][64 << 10]; // fibers' stacks are small; the handler has its own
    static const bool is_installed = [] {
        struct sigaction action = {};
        action.sa_handler = on_fault;
        action.sa_flags = SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_actions[0]);
        sigaction(SIGBUS, &action, &old_actions[1]);
        return true;
    }();
    (void)is_installed;
    auto run = reinterpret_cast<const char* (*)(const Launch*, uint32_t)>(dlsym(f->module->library, "emulator_run"));
    void* arguments[] = {parameters};
    Launch launch;
    launch.body = f->body;
    launch.arguments = arguments;
    std::copy_n(grid, 3, launch.grid);
    launch.n_threads = threads;
    launch.dynamic_bytes = dynamic;
    launch.shared_limit = f->max_dynamic > MAX_UNASKED ? MAX_SHARED : MAX_UNASKED;
    launch.seed = seed++;
    const auto is_free = [&] { return std::find(is_used, is_used + MAX_WORKERS, false) != is_used + MAX_WORKERS; };
    changed.wait(lock, is_free);
    const uint32_t worker = std::find(is_used, is_used + MAX_WORKERS, false) - is_used;
    is_used[worker] = true;
    lock.unlock(); // other streams work at the same time
    stack_t stack = {}, old;
    stack.ss_sp = handler_stacks[worker];
    stack.ss_size = sizeof handler_stacks[worker];
    sigaltstack(&stack, &old);
    static const char fault[] = "touches memory that is not its own";
    const char* error = fault;
    is_in_kernel = true;
    if (sigsetjmp(back, 1) == 0) error = run(&launch, worker);
    is_in_kernel = false;
    sigaltstack(&old, nullptr);
    lock.lock();
    is_used[worker] = false;
    changed.notify_all();
    if (!error) return OK;
    Dl_info info;
    const char* name = dladdr(reinterpret_cast<void*>(f->body), &info) && info.dli_sname ? info.dli_sname : "a kernel";
    fprintf(stderr, "emulator: %s: %s\n", name, error);
    return error == fault ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
}

size_t page() {
    return sysconf(_SC_PAGESIZE);
}

} // namespace

#define HOOK extern "C" __attribute__((visibility("default")))
HOOK int emulator_queue(void* stream, const std::function<int()>* work) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return broken ? broken : queue(stream, *work);
}
HOOK bool emulator_owns(const void* address, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return is_within(reinterpret_cast<uint64_t>(address), bytes);
}
HOOK bool emulator_has_context() {
    return !contexts.empty();
}
HOOK bool emulator_is_to_fail(const char* function) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return wanted_error(function) != OK;
}

// ---------------------------------------------------------------- devices, contexts

API cuInit(unsigned) {
    BEGIN
    return setting("PHD_EMULATOR_DEVICES", 1) ? OK : NO_DEVICE;
}
API cuDriverGetVersion(int* version) {
    BEGIN
    *version = setting("PHD_EMULATOR_VERSION", 13000);
    return OK;
}
API cuDeviceGetCount(int* n) {
    BEGIN
    *n = setting("PHD_EMULATOR_DEVICES", 1);
    return OK;
}
API cuDeviceGet(int* device, int ordinal) {
    BEGIN
    *device = ordinal;
    return ordinal == 0 ? OK : INVALID_DEVICE;
}
API cuDeviceGetName(char* name, int length, int) {
    BEGIN
    snprintf(name, length, "emulated");
    return OK;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
    BEGIN
    switch (attribute) {
        case 16: *value = 4; return OK;           // multiprocessors
        case 75: *value = arch() / 10; return OK; // compute capability, major
        case 76: *value = arch() % 10; return OK; // and minor
        case 97: *value = MAX_SHARED; return OK;  // shared memory of a block that asks for it
        default: return INVALID_VALUE;
    }
}
API cuDevicePrimaryCtxRetain(void** context, int) {
    BEGIN
    n_retained++;
    *context = &the_context;
    return OK;
}
API cuDevicePrimaryCtxRelease_v2(int) {
    BEGIN
    if (--n_retained) return OK;
    if (!allocations.empty() || n_host || !streams.empty() || n_events || n_graphs || !modules.empty()) {
        fprintf(stderr, "emulator: left behind: %zu allocations, %ld of the host, %zu streams, %ld events, %ld graphs, %zu modules\n",
                allocations.size(), n_host, streams.size(), n_events, n_graphs, modules.size());
        abort();
    }
    return OK;
}
API cuCtxPushCurrent_v2(void* context) {
    BEGIN
    contexts.push_back(context);
    return OK;
}
API cuCtxPopCurrent_v2(void** context) {
    BEGIN
    if (contexts.empty()) return INVALID_CONTEXT;
    *context = contexts.back();
    contexts.pop_back();
    return OK;
}

// ---------------------------------------------------------------- memory

API cuMemGetInfo_v2(size_t* available, size_t* total) {
    BEGIN_IN_CONTEXT
    *total = setting("PHD_EMULATOR_MEMORY", 1 << 30);
    *available = *total > used ? *total - used : 0;
    return OK;
}
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    if (!bytes) return INVALID_VALUE;
    if (bytes > setting("PHD_EMULATOR_MEMORY", 1 << 30) - std::min(used, setting("PHD_EMULATOR_MEMORY", 1 << 30))) {
        return OUT_OF_MEMORY;
    }
    // Its end, rounded up to 16 bytes, is the end of a page.
    const size_t rounded = (bytes + 15) / 16 * 16, mapped = (rounded + page() - 1) / page() * page();
    void* memory = mmap(nullptr, mapped + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(static_cast<char*>(memory) + mapped, page(), PROT_NONE);
    memset(memory, 0xff, mapped);
    *address = reinterpret_cast<uint64_t>(memory) + mapped - rounded;
    allocations[*address] = {bytes, mapped - rounded};
    used += bytes;
    return OK;
}
API cuMemFree_v2(uint64_t address) {
    BEGIN
    NOT_WHILE_CAPTURING
    auto found = allocations.find(address);
    if (found == allocations.end()) return INVALID_VALUE;
    drain(&default_stream, [] { return false; });
    const auto [bytes, before] = found->second;
    const size_t mapped = before + (bytes + 15) / 16 * 16 + page();
    // The addresses are never used again.
    mmap(reinterpret_cast<void*>(address - before), mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    used -= bytes;
    allocations.erase(found);
    return OK;
}
API cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    *memory = bytes < (1ull << 40) ? aligned_alloc(page(), (bytes + page() - 1) / page() * page()) : nullptr;
    if (!*memory) return OUT_OF_MEMORY;
    n_host++;
    memset(*memory, 0xff, bytes);
    return OK;
}
API cuMemFreeHost(void* memory) {
    BEGIN
    free(memory);
    n_host--;
    return OK;
}
API cuMemsetD8_v2(uint64_t address, unsigned char value, size_t bytes) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    if (!bytes || !is_within(address, bytes)) return INVALID_VALUE;
    // Although it is not called asynchronous, nobody waits for it, nor do streams of the kind that is used here.
    default_stream.work.push_back([=] {
        memset(reinterpret_cast<void*>(address), value, bytes);
        return OK;
    });
    return OK;
}
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    BEGIN_IN_CONTEXT
    return queue_copy(stream, to, bytes, reinterpret_cast<void*>(to), from);
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    BEGIN_IN_CONTEXT
    return queue_copy(stream, from, bytes, to, reinterpret_cast<void*>(from));
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    BEGIN_IN_CONTEXT
    const bool overlap = to < from + bytes && from < to + bytes;
    if (!is_within(to, bytes) || !is_within(from, bytes) || overlap) return INVALID_VALUE;
    return queue(stream, [=] {
        if (!is_within(to, bytes) || !is_within(from, bytes)) return ILLEGAL_ADDRESS;
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
        return OK;
    });
}

// ---------------------------------------------------------------- streams, events, graphs

API cuStreamCreate(void** stream, unsigned) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    *stream = *streams.insert(new Stream).first;
    return OK;
}
API cuStreamDestroy_v2(void* stream) {
    BEGIN
    drain(static_cast<Stream*>(stream), [] { return false; });
    if (capturing == stream) capturing = nullptr;
    streams.erase(static_cast<Stream*>(stream));
    delete static_cast<Stream*>(stream);
    return OK;
}
API cuStreamSynchronize(void* stream) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    const int status = drain(stream ? static_cast<Stream*>(stream) : &default_stream, [] { return false; });
    // As late as may be.
    drain(&default_stream, [] { return false; });
    return status;
}
API cuStreamBeginCapture_v2(void* stream, int mode) {
    BEGIN_IN_CONTEXT
    Stream* s = static_cast<Stream*>(stream);
    // Other modes would let other threads' calls spoil the capture.
    if (mode != THREAD_LOCAL) return INVALID_VALUE;
    if (s->capture || capturing) return INVALID_VALUE;
    s->capture = std::make_shared<Graph>();
    capturing = s;
    return OK;
}
API cuStreamEndCapture(void* stream, void** graph) {
    BEGIN
    Stream* s = static_cast<Stream*>(stream);
    if (s->capture && capturing != s) return CAPTURE_WRONG_THREAD;
    std::shared_ptr<Graph> captured = std::move(s->capture);
    s->capture = nullptr;
    capturing = nullptr;
    if (!captured) return INVALID_VALUE;
    if (captured->is_spoilt) return CAPTURE_INVALIDATED;
    *graph = new Graph(*captured);
    n_graphs++;
    return OK;
}
API cuEventCreate(void** event, unsigned) {
    BEGIN_IN_CONTEXT
    *event = new Event;
    n_events++;
    return OK;
}
API cuEventRecord(void* event, void* stream) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING // it would become a part of the graph, which nobody here wants
    Event* e = static_cast<Event*>(event);
    e->stream = static_cast<Stream*>(stream);
    const uint64_t number = ++e->recorded;
    return queue(stream, [=] { return e->passed = number, OK; });
}
API cuEventSynchronize(void* event) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    Event* e = static_cast<Event*>(event);
    return is_pending(e) ? drain(e->stream, [=] { return !is_pending(e); }) : OK;
}
API cuEventDestroy_v2(void* event) {
    BEGIN
    Event* e = static_cast<Event*>(event);
    if (is_pending(e)) drain(e->stream, [=] { return !is_pending(e); });
    delete e;
    n_events--;
    return OK;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, uint64_t) {
    BEGIN_IN_CONTEXT
    *executable = new Graph(*static_cast<Graph*>(graph));
    n_graphs++;
    return OK;
}
API cuGraphLaunch(void* executable, void* stream) {
    BEGIN_IN_CONTEXT
    for (const Work& work : static_cast<Graph*>(executable)->work) queue(stream, work);
    return OK;
}
API cuGraphExecDestroy(void* executable) {
    BEGIN
    delete static_cast<Graph*>(executable);
    n_graphs--;
    return OK;
}
API cuGraphDestroy(void* graph) {
    BEGIN
    delete static_cast<Graph*>(graph);
    n_graphs--;
    return OK;
}

// ---------------------------------------------------------------- modules, kernels

// An image is what nvrtc.cpp returns: "EMULATED sm_ARCH" and a shared library's bytes after their number; or, with compute_ARCH, its
// bytes in hexadecimal, ended by a zero. What was loaded once stays.
API cuModuleLoadData(void** module, const void* image) {
    BEGIN_IN_CONTEXT
    NOT_WHILE_CAPTURING
    static std::map<std::string, void*> libraries;
    const char* text = static_cast<const char*>(image);
    const int major = arch() / 10, minor = arch() % 10;
    char kind[8];
    int of;
    if (sscanf(text, "EMULATED %7[a-z]_%d", kind, &of) != 2) return INVALID_IMAGE;
    const char* from = strchr(text, '\n') + 1;
    std::string bytes;
    if (!strcmp(kind, "sm")) {
        // Code for a GPU runs on those of its generation that are not older.
        if (of / 10 != major || of % 10 > minor) return NO_BINARY_FOR_GPU;
        uint64_t n;
        memcpy(&n, from, 8);
        bytes.assign(from + 8, n);
    } else {
        if (of > arch()) return NO_BINARY_FOR_GPU;
        const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
        for (; from[0] && from[1]; from += 2) bytes += static_cast<char>(digit(from[0]) * 16 + digit(from[1]));
        if (*from) return INVALID_PTX;
    }
    void*& library = libraries[bytes];
    if (!library) {
        char path[] = "/tmp/phd-emulator-XXXXXX";
        const int file = mkstemp(path);
        if (file < 0) return UNKNOWN;
        const bool is_written = write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size());
        close(file);
        library = is_written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
        if (!library) fprintf(stderr, "emulator: %s\n", dlerror());
        unlink(path);
        if (!library) return INVALID_IMAGE;
    }
    *module = new Module{library};
    modules.insert(static_cast<Module*>(*module));
    return OK;
}
API cuModuleUnload(void* module) {
    BEGIN
    if (!modules.erase(static_cast<Module*>(module))) return INVALID_HANDLE;
    delete static_cast<Module*>(module);
    return OK;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
    BEGIN_IN_CONTEXT
    Module* m = static_cast<Module*>(module);
    void* body = dlsym(m->library, (std::string(name) + "_emulated").c_str());
    const void* facts = dlsym(m->library, (std::string(name) + "_facts").c_str());
    if (!body || !facts) return NOT_FOUND;
    *function = new Function{m, reinterpret_cast<void (*)(void**)>(body), static_cast<const uint32_t*>(facts)};
    return OK;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
    BEGIN_IN_CONTEXT
    if (attribute != 8 || value > MAX_SHARED) return INVALID_VALUE; // the largest dynamic shared memory
    static_cast<Function*>(function)->max_dynamic = value;
    return OK;
}
// The one attribute that is used: whether the kernel may begin before the one before it is through.
struct Attribute {
    int id;
    char padding[4];
    int value[16];
};
struct LaunchConfig {
    unsigned x, y, z, threads, threads_y, threads_z, dynamic;
    void* stream;
    const Attribute* attributes;
    unsigned n_attributes;
};
API cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void** extra) {
    BEGIN_IN_CONTEXT
    const auto [x, y, z, threads, threads_y, threads_z, dynamic, stream, attributes, n_attributes] = *config;
    Function* f = static_cast<Function*>(function);
    const bool is_grid = x && y && z && y < 65536 && z < 65536 && threads_y == 1 && threads_z == 1 && !extra;
    if (!modules.count(f->module)) return INVALID_HANDLE;
    if (!is_grid || threads > f->facts[0] || dynamic > static_cast<unsigned>(f->max_dynamic)) return INVALID_VALUE;
    if (n_attributes > 1 || (n_attributes && (attributes->id != 6 || attributes->value[0] != 1))) return INVALID_VALUE;
    if (n_attributes && setting("PHD_EMULATOR_NO_OVERLAP", 0)) return NOT_SUPPORTED;
    // As the driver, it copies the parameters now.
    const uint64_t* from = static_cast<const uint64_t*>(arguments[0]);
    auto parameters = std::make_shared<std::vector<uint64_t>>(from, from + f->facts[1] / 8);
    return queue(stream, [=, grid = std::array<uint32_t, 3>{x, y, z}, threads = threads, dynamic = dynamic] {
        if (!modules.count(f->module)) return INVALID_HANDLE;
        return run_kernel(f, grid.data(), threads, dynamic, parameters->data());
    });
}

// ---------------------------------------------------------------- errors

API cuGetErrorName(int error, const char** name) {
    static const std::map<int, const char*> names = {
        {OK, "CUDA_SUCCESS"},
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
        {INVALID_PTX, "CUDA_ERROR_INVALID_PTX"},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
        {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
        {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
        {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"},
    };
    auto found = names.find(error);
    *name = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second;
    return OK;
}
API cuGetErrorString(int error, const char** text) {
    cuGetErrorName(error, text);
    *text = "as the emulator sees it";
    return OK;
}
