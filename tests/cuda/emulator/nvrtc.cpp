// libnvrtc.so for the emulator: compiles CUDA sources with the C++ compiler, launch.h and emulated.h before them. What was compiled
// once lies beside this library. Read at each use:
//   PHD_EMULATOR_NVRTC_ARCH  the architecture that it knows (90)     PHD_EMULATOR_NVRTC_VERSION  (13.0)
//   PHD_EMULATOR_FAIL        as in driver.cpp
#include "launch.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <string>
#include <unistd.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int OK = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6;

struct Program {
    std::string source, log, cubin, ptx; // of the last two one, or none yet
};

int known_arch() {
    const char* arch = getenv("PHD_EMULATOR_NVRTC_ARCH");
    return arch ? atoi(arch) : 90;
}

std::string folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(folder), &info);
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int compile(Program& program, const std::string& target) {
    const std::string here = folder();
    const std::string source = read(here + "/launch.h") + read(here + "/emulated.h") + program.source;
    const std::string flags =
        " -std=c++17 -O3 -march=x86-64-v3 -mno-red-zone -fPIC -shared -Wall -Wno-unknown-pragmas -Wno-unused-function -o ";
    const std::string kept = here + "/kernels-" + std::to_string(std::hash<std::string>()(flags + source)) + ".so";
    if (access(kept.c_str(), R_OK)) {
        static std::atomic<int> number;
        const std::string base = here + "/compiling-" + std::to_string(getpid()) + "-" + std::to_string(number++);
        std::ofstream(base + ".cpp") << source;
        const std::string command = "c++" + flags + base + ".so " + base + ".cpp >" + base + ".log 2>&1";
        const int status = system(command.c_str());
        program.log = read(base + ".log");
        for (const char* end : {".cpp", ".log"}) unlink((base + end).c_str());
        if (status) return COMPILATION;
        if (rename((base + ".so").c_str(), kept.c_str())) return COMPILATION;
    }
    const std::string library = read(kept), head = "EMULATED " + target + "\n";
    if (target.rfind("sm_", 0) == 0) {
        const uint64_t n = library.size();
        program.cubin = head + std::string(reinterpret_cast<const char*>(&n), 8) + library;
    } else {
        // Text, as PTX is.
        program.ptx = head;
        for (unsigned char byte : library) {
            program.ptx += "0123456789abcdef"[byte / 16];
            program.ptx += "0123456789abcdef"[byte % 16];
        }
    }
    return OK;
}

} // namespace

API int nvrtcVersion(int* major, int* minor) {
    const char* version = getenv("PHD_EMULATOR_NVRTC_VERSION");
    return sscanf(version ? version : "13.0", "%d.%d", major, minor) == 2 ? OK : INVALID_INPUT;
}
API int nvrtcGetNumSupportedArchs(int* n) {
    *n = 1;
    return OK;
}
API int nvrtcGetSupportedArchs(int* archs) {
    archs[0] = known_arch();
    return OK;
}
API int nvrtcCreateProgram(void** program, const char* source, const char*, int, const char* const*, const char* const*) {
    *program = new Program{source, "", "", ""};
    return OK;
}
API int nvrtcCompileProgram(void* program, int n, const char* const* options) {
    Program& p = *static_cast<Program*>(program);
    if (emulator_is_to_fail(__func__)) {
        p.log = "an error that somebody wanted";
        return COMPILATION;
    }
    const std::string name = "--gpu-architecture=";
    for (int i = 0; i < n; i++) {
        const std::string option = options[i];
        if (option.rfind(name, 0)) continue;
        const std::string target = option.substr(name.size()), arch = std::to_string(known_arch());
        return target == "sm_" + arch || target == "compute_" + arch ? compile(p, target) : INVALID_OPTION;
    }
    return INVALID_OPTION; // the default is of no use to anybody
}
API int nvrtcGetProgramLogSize(void* program, size_t* n) {
    *n = static_cast<Program*>(program)->log.size() + 1;
    return OK;
}
API int nvrtcGetProgramLog(void* program, char* log) {
    const std::string& from = static_cast<Program*>(program)->log;
    memcpy(log, from.c_str(), from.size() + 1);
    return OK;
}
// Of a real architecture there is a cubin, of a virtual one PTX, with the zero at its end.
API int nvrtcGetCUBINSize(void* program, size_t* n) {
    *n = static_cast<Program*>(program)->cubin.size();
    return OK;
}
API int nvrtcGetCUBIN(void* program, char* image) {
    const std::string& from = static_cast<Program*>(program)->cubin;
    memcpy(image, from.data(), from.size());
    return from.empty() ? INVALID_PROGRAM : OK;
}
API int nvrtcGetPTXSize(void* program, size_t* n) {
    const std::string& from = static_cast<Program*>(program)->ptx;
    *n = from.empty() ? 0 : from.size() + 1;
    return from.empty() ? INVALID_PROGRAM : OK;
}
API int nvrtcGetPTX(void* program, char* text) {
    const std::string& from = static_cast<Program*>(program)->ptx;
    if (from.empty()) return INVALID_PROGRAM;
    memcpy(text, from.c_str(), from.size() + 1);
    return OK;
}
API int nvrtcDestroyProgram(void** program) {
    delete static_cast<Program*>(*program);
    *program = nullptr;
    return OK;
}
API const char* nvrtcGetErrorString(int error) {
    return error == OK ? "success" : error == COMPILATION ? "compilation failed" : "invalid input";
}
