// GELU and its slope in float (minift/ops/gelu.py), and what its kernels are called with.
//
// erf form, with Phi the normal distribution and phi its density:
//     y = x Phi(x)                   dy/dx = Phi(x) + x phi(x)
// tanh form, with u = sqrt(2 / pi) (x + 0.044715 x^3), (1 + tanh u) / 2 = sigmoid(2 u) = s:
//     y = x s                        dy/dx = s + x s (1 - s) 2 u'
//
// Math has the exponential and the divisions that are fast there: exp(x), quotient(x, y) = x / y, and
// scaled_quotient(s, x, y) = s x / y.
#pragma once

#include "shared.h"

struct GeluForward {
    const void* x;  // (n,)
    void* y;        // (n,)
    int64_t n;
    int64_t tanh;  // 1: the tanh form, 0: the erf form
    int64_t dtype;
};

struct GeluBackward {
    const void *x, *dy;  // (n,)
    void* dx;            // (n,)
    int64_t n, tanh, dtype;
};

namespace {

// Phi(x), and e = exp(-x^2 / 2). Phi(-a) = e N(a) / D(a), of degrees 4 and 5: the quotient whose largest relative error for
// a in [0, 15] is smallest, 6e-9. No term is negative, so nothing cancels, and the far tail keeps its digits.
template <class Math>
INLINE float phi(float x, float* e) {
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
    *e = Math::exp(-0.5f * a * a);
    const float tail = Math::scaled_quotient(*e, n, d);
    return x < 0 ? tail : 1 - tail;
}

template <class Math>
struct Erf {
    static INLINE float value(float x) {
        float e;
        return x * phi<Math>(x, &e);
    }

    static INLINE float slope(float x) {
        float e, p = phi<Math>(x, &e);
        return p + x * e * 0.398942280f;  // 1 / sqrt(2 pi)
    }
};

template <class Math>
struct Tanh {
    static constexpr float A = 1.59576912f, B = 0.0713548163f;  // 2 sqrt(2 / pi), and that times 0.044715

    // sigmoid(2 u) = 1 / (1 + e) for u >= 0, e / (1 + e) below, with e = exp(-|2 u|).
    static INLINE float exp_minus(float u2) { return Math::exp(u2 < 0 ? u2 : -u2); }

    static INLINE float value(float x) {
        const float u2 = x * (A + B * x * x), e = exp_minus(u2);
        return x * Math::quotient(u2 < 0 ? e : 1, 1 + e);
    }

    static INLINE float slope(float x) {
        x = x < -20 ? -20 : x > 20 ? 20 : x;  // the slope is 0 or 1 beyond, and x^3 cannot overflow
        const float u2 = x * (A + B * x * x), e = exp_minus(u2), r = Math::quotient(1, 1 + e);
        return (u2 < 0 ? e : 1) * r + x * (A + 3 * B * x * x) * e * r * r;
    }
};

}  // namespace
