// Vectors of 16 floats, threads and per-machine variants: what csrc/layers.cpp is written in.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int kLane = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

// ---- vectors

INLINE vf splat(float x) { return vf{} + x; }
INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

struct BFloat16 {
    uint16_t bits;
};

INLINE vf load(const BFloat16* p) {
    const vh half = *reinterpret_cast<const vh_any*>(p);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

INLINE void store(BFloat16* p, vf x) {
    vu bits = (vu)x;
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const vu nan = (vu)(x != x);
    bits = (bits & ~nan) | (nan & 0x7fc0u);
    *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(bits, vh);
}

INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const BFloat16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
INLINE void store_one(float* p, float x) { *p = x; }
INLINE void store_one(BFloat16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The first `count` (below 16) elements, the others zero.
template <typename T>
INLINE vf load_part(const T* p, int64_t count) {
    vf x{};
    for (int64_t i = 0; i < count; ++i) x[i] = load_one(p + i);
    return x;
}
template <typename T>
INLINE void store_part(T* p, vf x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_one(p + i, x[i]);
}

INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
INLINE float sum(vf x) {
    float total = 0;
    for (int step = kLane / 2; step; step /= 2) {
        for (int i = 0; i < step; ++i) x[i] += x[i + step];
    }
    total = x[0];
    return total;
}
INLINE float largest(vf x) {
    for (int step = kLane / 2; step; step /= 2) {
        for (int i = 0; i < step; ++i) x[i] = std::max(x[i], x[i + step]);
    }
    return x[0];
}

// exp to 2 ulp: 2^n · p(r), r = x - n·ln 2 in two parts, p of degree 6 (Cephes). Below -87.3 it is 0, above 88.3 inf.
INLINE vf exp16(vf x) {
    const vf low = splat(-87.33f), high = splat(88.37f);
    vf y = x < low ? low : x;
    y = y > high ? high : y;
    const vf scaled = y * 1.44269504088896341f + (y < 0.0f ? splat(-0.5f) : splat(0.5f));
    const vi n = __builtin_convertvector(scaled, vi);
    const vf whole = __builtin_convertvector(n, vf);
    const vf r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf result = p * (vf)((n + 127) << 23);
    result = x < low ? splat(0.0f) : result;
    result = x > high ? splat(INFINITY) : result;
    return x != x ? x : result;
}

// ---- threads

using Region = void (*)(void*);
using GompParallel = void (*)(Region, void*, unsigned, unsigned);

struct Tasks {
    void (*run)(void*, int64_t);
    void* problem;
    int64_t count;
    std::atomic<int64_t> next{0};
};

void work(void* argument) {
    Tasks& tasks = *static_cast<Tasks*>(argument);
    for (int64_t i; (i = tasks.next.fetch_add(1)) < tasks.count;) tasks.run(tasks.problem, i);
}

// Run tasks 0 … count - 1, in any order, on the threads of the OpenMP runtime in this process.
void run_tasks(void (*run)(void*, int64_t), void* problem, int64_t count, int64_t threads) {
    static const auto parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Tasks tasks{run, problem, count};
    const auto wanted = static_cast<unsigned>(std::min(threads, count));
    if (wanted > 1 && parallel != nullptr) {
        parallel(work, &tasks, wanted, 0);
    } else {
        work(&tasks);
    }
}

// ---- the same code for several machines

#if defined(__x86_64__)
#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")))
#define TARGET_256 __attribute__((target("avx2,fma,bmi2")))
#define VARIANTS(name)                                                                        \
    template <typename T>                                                                     \
    TARGET_512 void name##_512(void* problem, int64_t task) { name<T>(problem, task); }       \
    template <typename T>                                                                     \
    TARGET_256 void name##_256(void* problem, int64_t task) { name<T>(problem, task); }       \
    template <typename T>                                                                     \
    void name##_any(void* problem, int64_t task) { name<T>(problem, task); }                  \
    template <typename T>                                                                     \
    auto best_##name() {                                                                      \
        if (width() == 512) return name##_512<T>;                                             \
        return width() == 256 ? name##_256<T> : name##_any<T>;                                \
    }

int width() {
    static const int found = [] {
        __builtin_cpu_init();
        const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return fma && wide ? 512 : fma ? 256 : 128;
    }();
    return found;
}
#else
#define VARIANTS(name)                                                       \
    template <typename T>                                                    \
    void name##_any(void* problem, int64_t task) { name<T>(problem, task); } \
    template <typename T>                                                    \
    auto best_##name() { return name##_any<T>; }

int width() { return 128; }
#endif

}  // namespace
