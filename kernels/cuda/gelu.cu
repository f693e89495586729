// GELU and its gradient (minift/ops/gelu.py), both from x.
//
// erf form, with Phi the normal distribution and phi its density:
//     y = x Phi(x)                   dy/dx = Phi(x) + x phi(x)
// tanh form, with u = sqrt(2 / pi) (x + 0.044715 x^3), (1 + tanh u) / 2 = sigmoid(2 u) = s:
//     y = x s                        dy/dx = s + x s (1 - s) 2 u'

#include "common.cuh"

namespace {

// Phi(x), and e = exp(-x^2 / 2), by the quotient that kernels/cpu/gelu.cpp explains: the far tail keeps its digits.
__device__ inline float phi(float x, float* e) {
    float a = x < 0 ? -x : x;
    a = a > 15 ? 15 : a;  // where e is 0 already
    float n = 0.00415320872f, d = 0.0104104387f;
    n = n * a + 0.0408809874f;
    n = n * a + 0.183968725f;
    n = n * a + 0.439282876f;
    n = n * a + 0.5f;
    d = d * a + 0.102479556f;
    d = d * a + 0.471407604f;
    d = d * a + 1.20554657f;
    d = d * a + 1.67645076f;
    d = d * a + 1;
    *e = expf(-0.5f * a * a);
    const float tail = *e * __fdividef(n, d);
    return x < 0 ? tail : 1 - tail;
}

struct Erf {
    static __device__ float value(float x) {
        float e;
        return x * phi(x, &e);
    }

    static __device__ float slope(float x) {
        float e, p = phi(x, &e);
        return p + x * e * 0.398942280f;  // 1 / sqrt(2 pi)
    }
};

struct Tanh {
    static constexpr float A = 1.59576912f, B = 0.0713548163f;  // 2 sqrt(2 / pi), and that times 0.044715

    // sigmoid(2 u) = 1 / (1 + e) for u >= 0, e / (1 + e) below, with e = exp(-|2 u|).
    static __device__ float exp_minus(float u2) { return expf(u2 < 0 ? u2 : -u2); }

    static __device__ float value(float x) {
        const float u2 = x * (A + B * x * x), e = exp_minus(u2);
        return x * __fdividef(u2 < 0 ? e : 1, 1 + e);
    }

    static __device__ float slope(float x) {
        x = x < -20 ? -20 : x > 20 ? 20 : x;  // it is 0 or 1 beyond, and x^3 cannot overflow
        const float u2 = x * (A + B * x * x), e = exp_minus(u2), r = __fdividef(1, 1 + e);
        return (u2 < 0 ? e : 1) * r + x * (A + 3 * B * x * x) * e * r * r;
    }
};

// f(Width<W>, i) on all n elements, W from i on.
template <class F>
__device__ void elements(int64_t n, bool four, const F& f) {
    const int64_t whole = four ? n / 4 * 4 : 0;
    for (int64_t i = 4 * thread(); i < whole; i += 4 * threads()) f(Width<4>{}, i);
    for (int64_t i = whole + thread(); i < n; i += threads()) f(Width<1>{}, i);
}

template <class Form, class T>
__device__ void forward(const T* x, T* y, int64_t n) {
    elements(n, aligned(x, y), [&](auto width, int64_t i) {
        constexpr int W = decltype(width)::value;
        auto v = load<W>(x + i);
        for (int k = 0; k < W; k++) v.at[k] = Form::value(v.at[k]);
        store<W>(y + i, v);
    });
}

template <class Form, class T>
__device__ void backward(const T* x, const T* dy, T* dx, int64_t n) {
    elements(n, aligned(x, dy, dx), [&](auto width, int64_t i) {
        constexpr int W = decltype(width)::value;
        const auto v = load<W>(x + i);
        auto d = load<W>(dy + i);
        for (int k = 0; k < W; k++) d.at[k] *= Form::slope(v.at[k]);
        store<W>(dx + i, d);
    });
}

}  // namespace

// x, y (n,); tanh: 1 for the tanh form, 0 for the erf form
// blocks: n / 1024
extern "C" __global__ void gelu_forward(const void* x, void* y, int64_t n, int64_t tanh, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto from = static_cast<decltype(null)>(const_cast<void*>(x)), to = static_cast<decltype(null)>(y);
        if (tanh) forward<Tanh>(from, to, n);
        else forward<Erf>(from, to, n);
    });
}

// x, dy, dx (n,)
// blocks: n / 1024
extern "C" __global__ void gelu_backward(const void* x, const void* dy, void* dx, int64_t n, int64_t tanh,
                                         int64_t dtype) {
    typed(dtype, [&](auto* null) {
        typedef decltype(null) P;
        auto xs = static_cast<P>(const_cast<void*>(x)), dys = static_cast<P>(const_cast<void*>(dy));
        auto dxs = static_cast<P>(dx);
        if (tanh) backward<Tanh>(xs, dys, dxs, n);
        else backward<Erf>(xs, dys, dxs, n);
    });
}
