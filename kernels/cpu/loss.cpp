// Cross-entropy of rows of logits and its gradient, in place (minift/ops/loss.py). M rows, V classes or vocabulary.
//
//     z = z + bias        lse = log(sum_v exp(z_v))        loss = lse - (1 - e) z_target - e mean(z)
//     dz = exp(z - lse) - (1 - e) onehot(target) - e / V
//
// Each row is read three times, of which two find it in the cache.

#include "loss.h"

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

template <class T>
void all_rows(const CrossEntropy& a) {
    auto zs = static_cast<T*>(a.z);
    const int64_t V = a.V;
    parallel(a.M, at_least_1(GRAIN / at_least_1(V)), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            T* z = zs + m * a.stride;
            const int64_t target = a.targets[m];
            if (target < 0) {
                a.loss[m] = a.hits[m] = 0;
                if (a.grad) std::memset(z, 0, V * sizeof *z);
            } else if (a.bias) {
                row<true>(z, a.bias, target, a.smoothing, a.loss + m, a.hits + m, a.grad != 0, V);
            } else {
                row<false>(z, a.bias, target, a.smoothing, a.loss + m, a.hits + m, a.grad != 0, V);
            }
        }
    });
}

}  // namespace

extern "C" void cross_entropy(const CrossEntropy* a) {
    if (a->dtype == FLOAT32) all_rows<float>(*a);
    else all_rows<bf16>(*a);
}
