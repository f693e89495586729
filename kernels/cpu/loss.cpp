// Cross-entropy of rows of logits and its gradient, in place (minift/ops/loss.py). M rows, V classes or vocabulary.
//
//     z = z + bias        lse = log(sum_v exp(z_v))        loss = lse - (1 - e) z_target - e mean(z)
//     dz = exp(z - lse) - (1 - e) onehot(target) - e / V
//
// Each row is read three times, of which two find it in the cache.

#include <cmath>

#include "common.h"

namespace {

const int64_t CHUNK = 1024;  // summed by itself: one long sum loses digits, more so the fewer lanes a vector has

template <bool biased, class T>
inline float logit(const T* z, const float* bias, int64_t v) {
    return biased ? load(z + v) + bias[v] : load(z + v);
}

// Whether the target is the first of the largest logits, which are `high`.
template <bool biased, class T>
bool first_largest(const T* z, const float* bias, int64_t target, float high) {
    if (logit<biased>(z, bias, target) != high) return false;
    for (int64_t v = 0; v < target; v++)
        if (logit<biased>(z, bias, v) == high) return false;
    return true;
}

template <bool biased, class T>
void row(T* z, const float* bias, int64_t target, float smoothing, float* loss, float* hit, bool grad, int64_t V) {
    float high = -INFINITY, total = 0, sum = 0;
#pragma omp simd reduction(max : high)
    for (int64_t v = 0; v < V; v++) high = logit<biased>(z, bias, v) > high ? logit<biased>(z, bias, v) : high;
    for (int64_t begin = 0; begin < V; begin += CHUNK) {
        const int64_t end = V - begin < CHUNK ? V : begin + CHUNK;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t v = begin; v < end; v++) part += exp_(logit<biased>(z, bias, v) - high);
        sum += part;
    }
    if (smoothing != 0) {
#pragma omp simd reduction(+ : total)
        for (int64_t v = 0; v < V; v++) total += logit<biased>(z, bias, v);
    }
    const float lse = high + std::log(sum), at_target = logit<biased>(z, bias, target), each = smoothing / float(V);
    *loss = lse - (1 - smoothing) * at_target - each * total;
    *hit = first_largest<biased>(z, bias, target, high);
    if (!grad) return;
    const float d = exp_(at_target - lse) - each - (1 - smoothing);
#pragma omp simd
    for (int64_t v = 0; v < V; v++) store(z + v, exp_(logit<biased>(z, bias, v) - lse) - each);
    store(z + target, d);
}

}  // namespace

// z (M, V), with grad overwritten by dz; bias (V,) float or null; targets (M,) in [0, V), or -1: not asked about, all 0;
// loss, hits (M,) float
extern "C" void cross_entropy(void* z, const float* bias, const int64_t* targets, float smoothing, float* loss,
                              float* hits, int64_t grad, int64_t M, int64_t V, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto zs = static_cast<decltype(null)>(z);
        parallel(M, at_least_1(GRAIN / at_least_1(V)), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; m++) {
                if (targets[m] < 0) {
                    loss[m] = hits[m] = 0;
                    if (grad) std::memset(zs + m * V, 0, V * sizeof *zs);
                } else if (bias) row<true>(zs + m * V, bias, targets[m], smoothing, loss + m, hits + m, grad != 0, V);
                else row<false>(zs + m * V, bias, targets[m], smoothing, loss + m, hits + m, grad != 0, V);
            }
        });
    });
}
