// A CUDA device for tests. Threads of a block are contexts of one CPU thread, which take turns at barriers and shuffles;
// blocks come one after the other. test_cuda.py puts each .cu file below this one, and compiles all as C++ into one
// library that has the functions of the driver which minift/ops/cuda.py calls.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __shared__ static

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Barrier {  // of `size` threads
    unsigned size = 0, arrived = 0, round = 0;
};

inline ucontext_t scheduler;
inline std::vector<ucontext_t> contexts;
inline std::vector<char> done;
inline std::vector<uint32_t> slots;
inline std::vector<Barrier> warps;
inline Barrier block;
inline bool moved;  // whether any thread got on in this turn
inline std::function<void()> body;
inline unsigned threads = 64, most = 3;  // of a block; blocks: fewer than asked for, to be quick
inline bool backwards;                   // whether the last thread goes first: a missing barrier shows

inline void wait(Barrier& b) {
    const unsigned round = b.round;
    if (++b.arrived == b.size) b.arrived = 0, b.round++, moved = true;
    while (b.round == round) swapcontext(&contexts[threadIdx.x], &scheduler);
}

inline void enter() {
    body();
    done[threadIdx.x] = moved = true;
}

inline void run_block() {
    static std::vector<std::vector<char>> stacks(256, std::vector<char>(1 << 15));
    contexts.assign(threads, ucontext_t()), done.assign(threads, false), slots.assign(threads, 0);
    warps.assign(threads / 32, Barrier{32}), block = {threads};
    for (unsigned t = 0; t < threads; t++) {
        getcontext(&contexts[t]);
        contexts[t].uc_stack.ss_sp = stacks[t].data(), contexts[t].uc_stack.ss_size = stacks[t].size();
        contexts[t].uc_link = &scheduler;
        makecontext(&contexts[t], enter, 0);
    }
    for (unsigned left = threads; left;) {
        moved = false, left = 0;
        for (unsigned i = 0; i < threads; i++) {
            const unsigned t = backwards ? threads - 1 - i : i;
            if (!done[t]) threadIdx.x = t, swapcontext(&scheduler, &contexts[t]), left += !done[t];
        }
        if (left && !moved) fprintf(stderr, "threads wait at different barriers\n"), abort();
    }
}

// ---- the driver: a function is what calls a kernel with the arguments at these addresses

typedef void (*Call)(void** params);
inline std::map<std::string, Call> functions;

struct Register {
    Register(const char* name, Call call) { functions[name] = call; }
};

}  // namespace emulated

extern "C" {
#define OFFERED __attribute__((weak)) int  // every .cu brings a copy
OFFERED cuDeviceGet(int* device, int number) { return *device = number, 0; }
OFFERED cuDevicePrimaryCtxRetain(void**, int) { return 0; }
OFFERED cuCtxSetCurrent(void*) { return 0; }
OFFERED cuModuleLoadData(void**, const void*) { return 0; }
OFFERED cuGetErrorString(int, const char** words) { return *words = "in an emulated driver", 0; }

OFFERED cuModuleGetFunction(emulated::Call* found, void*, const char* name) {
    return (*found = emulated::functions[name]) ? 0 : 500;
}

OFFERED cuLaunchKernel(emulated::Call f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void* stream, void** params, void** extra) {
    if (!x || y != 1 || z != 1 || bx != 256 || by != 1 || bz != 1 || shared || extra) return 1;
    emulated::body = [=] { f(params); };
    blockDim.x = emulated::threads, gridDim.x = x < emulated::most ? x : emulated::most;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) emulated::run_block();
    return 0;
}

OFFERED shape(int64_t threads, int64_t most, int64_t backwards) {
    return emulated::threads = threads, emulated::most = most, emulated::backwards = backwards, 0;
}
}

// ---- what CUDA has without a header

static void __syncthreads() { emulated::wait(emulated::block); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    static_assert(sizeof(T) == 4, "");
    auto& warp = emulated::warps[threadIdx.x / 32];
    std::memcpy(&emulated::slots[threadIdx.x], &x, 4);
    emulated::wait(warp);
    std::memcpy(&x, &emulated::slots[threadIdx.x ^ unsigned(mask)], 4);
    emulated::wait(warp);
    return x;
}

static float __uint_as_float(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

static uint32_t __float_as_uint(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

static float __fdividef(float x, float y) { return x / y; }
static float __fmul_rn(float x, float y) { return x * y; }
static float __fadd_rn(float x, float y) { return x + y; }

static float from_half(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return float(x);
}

static uint16_t to_half(float x) {
    const _Float16 y = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}
