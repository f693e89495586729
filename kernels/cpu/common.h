// What all CPU kernels share: element types, torch's threads, a dropped row, exp. Everything is internal to one file.
//
// A kernel is one .cpp file that includes this one and offers `extern "C" void f(const Arguments* a)`: see README.md. Loops
// are plain, for the compiler to vectorise; `#pragma omp simd` (no OpenMP runtime) promises that no element is written that
// another one of the loop reads, and permits the reductions named there, and no others, to be reordered.
#pragma once

#include "shared.h"

namespace {

// ---- element types: float and bf16, computed in float

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }

inline float load(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }

inline void store(float* p, float x) { *p = x; }

// Rounds to nearest, ties to even; a NaN stays one.
inline void store(bf16* p, float x) {
    uint32_t u = to_bits(x), rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    p->bits = uint16_t(x != x ? 0x7FC0 : rounded);
}

// ---- threads: torch's own, whose `torch_parallel_for` minift/ops/compile.py hands in; without it one thread does all

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
ParallelFor torch_parallel_for = nullptr;

// f(begin, end) on pieces of 0..n, each of `grain` or more. Results must not depend on where pieces end.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
    Body body = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    if (torch_parallel_for) torch_parallel_for(0, n, grain, body, const_cast<F*>(&f));
    else if (n > 0) f(0, n);
}

const int64_t GRAIN = 1 << 15;  // elements worth a thread of their own

inline int64_t at_least_1(int64_t n) { return n > 1 ? n : 1; }

// One row of dropout, (C,): y = drop(x) for token i.
template <class T>
void drop_row(const T* x, T* y, int64_t i, Drop drop, int64_t C) {
    const int32_t row = drop.row[i], *col = drop.col;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(y + c, load(x + c) * kept(row, col[c], drop.threshold, drop.scale));
}

// ---- exp

// e^x for x <= 16 (softmax and sigmoid need no more), relative error near 1e-7; 0 at -inf, NaN at NaN, rounded once where
// the result is subnormal. x = n ln 2 + r with |r| <= ln 2 / 2; e^r by Taylor's polynomial, its end adjusted; times
// 2^(n + 64), whose exponent bits are n + 191, times 2^-64.
inline float exp_(float x) {
    const float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    const float MAGIC = 12582912.0f + 191.0f;  // added to n it has n + 191 in its low bits: 1.5 * 2^23 leaves no fraction
    x = -104.0f > x ? -104.0f : x;             // written so that a NaN stays
    float shifted = x * LOG2E + MAGIC;
    float n = shifted - MAGIC;
    float r = x - n * LN2_HIGH - n * LN2_LOW;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 5.0000000e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits(to_bits(shifted) << 23) * 5.42101086e-20f;
}

}  // namespace

extern "C" void set_parallel_for(void* f) { torch_parallel_for = reinterpret_cast<ParallelFor>(f); }
