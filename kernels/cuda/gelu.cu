// GELU and its gradient, both from x; the equations stand in gelu.h.

#include "common.cuh"
#include "gelu.h"

namespace {

struct Math {
    static __device__ inline float exp(float x) { return expf(x); }
    static __device__ inline float quotient(float x, float y) { return __fdividef(x, y); }
    static __device__ inline float scaled_quotient(float s, float x, float y) { return s * __fdividef(x, y); }
};

// f(Width<W>, i) on all n elements, W from i on.
template <class F>
__device__ void elements(int64_t n, bool four, const F& f) {
    const int64_t whole = four ? n / 4 * 4 : 0;
    for (int64_t i = 4 * thread(); i < whole; i += 4 * threads()) f(Width<4>{}, i);
    for (int64_t i = whole + thread(); i < n; i += threads()) f(Width<1>{}, i);
}

template <class Form, class T>
__device__ void values(const T* x, T* y, int64_t n) {
    elements(n, aligned(x, y), [&](auto width, int64_t i) {
        constexpr int W = decltype(width)::value;
        auto v = load<W>(x + i);
        for (int k = 0; k < W; k++) v.at[k] = Form::value(v.at[k]);
        store<W>(y + i, v);
    });
}

template <class Form, class T>
__device__ void gradients(const T* x, const T* dy, T* dx, int64_t n) {
    elements(n, aligned(x, dy, dx), [&](auto width, int64_t i) {
        constexpr int W = decltype(width)::value;
        const auto v = load<W>(x + i);
        auto d = load<W>(dy + i);
        for (int k = 0; k < W; k++) d.at[k] *= Form::slope(v.at[k]);
        store<W>(dx + i, d);
    });
}

template <class T>
__device__ void forward(const GeluForward& a) {
    auto x = static_cast<const T*>(a.x);
    auto y = static_cast<T*>(a.y);
    if (a.tanh) values<Tanh<Math>>(x, y, a.n);
    else values<Erf<Math>>(x, y, a.n);
}

template <class T>
__device__ void backward(const GeluBackward& a) {
    auto x = static_cast<const T*>(a.x), dy = static_cast<const T*>(a.dy);
    auto dx = static_cast<T*>(a.dx);
    if (a.tanh) gradients<Tanh<Math>>(x, dy, dx, a.n);
    else gradients<Erf<Math>>(x, dy, dx, a.n);
}

}  // namespace

// blocks: n / 1024
extern "C" __global__ void gelu_forward(GeluForward a) {
    if (a.dtype == FLOAT32) forward<float>(a);
    else if (a.dtype == BFLOAT16) forward<bf16>(a);
    else forward<fp16>(a);
}

// blocks: n / 1024
extern "C" __global__ void gelu_backward(GeluBackward a) {
    if (a.dtype == FLOAT32) backward<float>(a);
    else if (a.dtype == BFLOAT16) backward<bf16>(a);
    else backward<fp16>(a);
}
