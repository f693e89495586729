// GELU and its gradient (minift/ops/gelu.py), both from x.
//
// erf form, with Phi the normal distribution and phi its density:
//     y = x Phi(x)                   dy/dx = Phi(x) + x phi(x)
// tanh form, with u = sqrt(2 / pi) (x + 0.044715 x^3), (1 + tanh u) / 2 = sigmoid(2 u) = s:
//     y = x s                        dy/dx = s + x s (1 - s) 2 u'

#include "common.h"

namespace {

const int64_t BLOCK = 1 << 12;  // elements of one piece of work: where pieces end does not depend on the threads

// Phi(x), and e = exp(-x^2 / 2). Phi(-a) = e N(a) / D(a), of degrees 4 and 5: the quotient whose largest relative error for
// a in [0, 15] is smallest, 6e-9. No term is negative, so nothing cancels, and the far tail keeps its digits.
inline float phi(float x, float* e) {
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
    *e = exp_(-0.5f * a * a);
    const float tail = *e * n / d;
    return x < 0 ? tail : 1 - tail;
}

struct Erf {
    static float value(float x) {
        float e;
        return x * phi(x, &e);
    }

    static float slope(float x) {
        float e, p = phi(x, &e);
        return p + x * e * 0.398942280f;  // 1 / sqrt(2 pi)
    }
};

struct Tanh {
    static constexpr float A = 1.59576912f, B = 0.0713548163f;  // 2 sqrt(2 / pi), and that times 0.044715

    // sigmoid(2 u) = 1 / (1 + e) for u >= 0, e / (1 + e) below, with e = exp(-|2 u|).
    static float exp_minus(float u2) { return exp_(u2 < 0 ? u2 : -u2); }

    static float value(float x) {
        const float u2 = x * (A + B * x * x), e = exp_minus(u2);
        return x * ((u2 < 0 ? e : 1) / (1 + e));
    }

    static float slope(float x) {
        x = x < -20 ? -20 : x > 20 ? 20 : x;  // it is 0 or 1 beyond, and x^3 cannot overflow
        const float u2 = x * (A + B * x * x), e = exp_minus(u2), r = 1 / (1 + e);
        return (u2 < 0 ? e : 1) * r + x * (A + 3 * B * x * x) * e * r * r;
    }
};

template <class Form, class T>
void forward(const T* x, T* y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(y + i, Form::value(load(x + i)));
}

template <class Form, class T>
void backward(const T* x, const T* dy, T* dx, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(dx + i, load(dy + i) * Form::slope(load(x + i)));
}

// f(start, length) on every block of n elements.
template <class F>
void blocks(int64_t n, const F& f) {
    parallel((n + BLOCK - 1) / BLOCK, GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * BLOCK; i < n && i < end * BLOCK; i += BLOCK) f(i, n - i < BLOCK ? n - i : BLOCK);
    });
}

}  // namespace

// x, y (n,); tanh: 1 for the tanh form, 0 for the erf form
extern "C" void gelu_forward(const void* x, void* y, int64_t n, int64_t tanh, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto from = static_cast<decltype(null)>(const_cast<void*>(x)), to = static_cast<decltype(null)>(y);
        blocks(n, [&](int64_t i, int64_t size) {
            if (tanh) forward<Tanh>(from + i, to + i, size);
            else forward<Erf>(from + i, to + i, size);
        });
    });
}

// x, dy, dx (n,)
extern "C" void gelu_backward(const void* x, const void* dy, void* dx, int64_t n, int64_t tanh, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        typedef decltype(null) P;
        auto xs = static_cast<P>(const_cast<void*>(x)), dys = static_cast<P>(const_cast<void*>(dy));
        auto dxs = static_cast<P>(dx);
        blocks(n, [&](int64_t i, int64_t size) {
            if (tanh) backward<Tanh>(xs + i, dys + i, dxs + i, size);
            else backward<Erf>(xs + i, dys + i, dxs + i, size);
        });
    });
}
