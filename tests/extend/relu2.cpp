// Squared ReLU and its gradient (minift/ops/relu2.py): y = r^2 and dx = 2 r dy, with r = max(x, 0).

#include "common.h"

struct Relu2Forward {
    const void* x;  // (n,)
    void* y;        // (n,)
    int64_t n;
    int64_t dtype;
};

struct Relu2Backward {
    const void *x, *dy;  // (n,)
    void* dx;            // (n,)
    int64_t n, dtype;
};

namespace {

// max(x, 0), written so that a NaN stays.
inline float positive(float x) { return x < 0 ? 0 : x; }

template <class T>
void forward(const Relu2Forward& a) {
    auto x = static_cast<const T*>(a.x);
    auto y = static_cast<T*>(a.y);
    parallel(a.n, GRAIN, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; i++) {
            const float r = positive(load(x + i));
            store(y + i, r * r);
        }
    });
}

template <class T>
void backward(const Relu2Backward& a) {
    auto x = static_cast<const T*>(a.x), dy = static_cast<const T*>(a.dy);
    auto dx = static_cast<T*>(a.dx);
    parallel(a.n, GRAIN, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; i++) store(dx + i, load(dy + i) * (2 * positive(load(x + i))));
    });
}

}  // namespace

extern "C" void relu2_forward(const Relu2Forward* a) {
    if (a->dtype == FLOAT32) forward<float>(*a);
    else forward<bf16>(*a);
}

extern "C" void relu2_backward(const Relu2Backward* a) {
    if (a->dtype == FLOAT32) backward<float>(*a);
    else backward<bf16>(*a);
}
