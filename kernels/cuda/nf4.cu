// Four bits a weight, there and back (minift/ops/nf4.py), to the bit what the reference there gives. n weights.
//
//     a = max |w|        c = the level nearest to w / a        w ~ levels[c] * a             in blocks of 64
//     a ~ second[d] * b + m                                    double quantisation           in blocks of 256 of a
//
// The tables come from Python, for there should be one of each.

#include "common.cuh"

namespace {

const int64_t BLOCK = 64, GROUP = BLOCK * 256;

// The scale of a block, in two roundings.
__device__ inline float scale(const float* absmax, const uint8_t* d, const float* b, const float* m,
                              const float* second, int64_t block) {
    if (absmax) return absmax[block];
    return __fadd_rn(__fmul_rn(second[d[block]], b[block * BLOCK / GROUP]), *m);
}

}  // namespace

// codes (ceil(n / 2),), pairs (256, 2), out (n,). The scales a: `absmax` (ceil(n / 64),) float, or, where that is null,
// from d (ceil(n / 64),), b (ceil(n / 16384),), m (1,) and second (256,). A thread takes eight weights.
// blocks: n / 2048
extern "C" __global__ void dequantize(const void* codes, const float* pairs, const float* absmax, const void* d,
                                      const float* b, const float* m, const float* second, void* out, int64_t n,
                                      int64_t dtype) {
    __shared__ float level[16];
    for (int c = threadIdx.x; c < 16; c += blockDim.x) level[c] = pairs[2 * c + 1];  // of a byte whose low half is c
    __syncthreads();
    auto bytes = static_cast<const uint8_t*>(codes);
    typed(dtype, [&](auto* null) {
        auto to = static_cast<decltype(null)>(out);
        const bool four = aligned(bytes, to);
        for (int64_t i = 8 * thread(); i < n; i += 8 * threads()) {
            const float a = scale(absmax, static_cast<const uint8_t*>(d), b, m, second, i / BLOCK);
            if (four && i + 8 <= n) {
                const auto found = fetch<4>(bytes + i / 2);
                for (int k = 0; k < 8; k += 4) {
                    const int first = found.at[k / 2], next = found.at[k / 2 + 1];
                    store<4>(to + i + k, {{level[first >> 4] * a, level[first & 15] * a, level[next >> 4] * a,
                                           level[next & 15] * a}});
                }
            } else {
                for (int64_t j = i; j < n && j < i + 8; j++)
                    assign(to + j, level[j % 2 ? bytes[j / 2] & 15 : bytes[j / 2] >> 4] * a);
            }
        }
    });
}

// w (n,), codes (ceil(n / 2),), absmax (ceil(n / 64),), middles (15,): between the levels. A warp takes a block, a lane
// two weights, which share a byte.
// blocks: n / 512
extern "C" __global__ void quantize(const void* w, const float* middles, void* codes, float* absmax, int64_t n,
                                    int64_t dtype) {
    auto bytes = static_cast<uint8_t*>(codes);
    float middle[15];
    for (int k = 0; k < 15; k++) middle[k] = middles[k];
    typed(dtype, [&](auto* null) {
        auto from = static_cast<decltype(null)>(const_cast<void*>(w));
        for (int64_t i = thread() / WARP; i * BLOCK < n; i += threads() / WARP) {
            const int64_t at = i * BLOCK + 2 * lane();
            const bool whole = (i + 1) * BLOCK <= n;
            const float x[2] = {at < n ? value(from[at]) : 0, at + 1 < n ? value(from[at + 1]) : 0};
            uint32_t most = 0;  // |w| as bits has the order of |w|, with NaN above all
            for (int k = 0; k < 2; k++) {
                const uint32_t size = to_bits(x[k]) & 0x7FFFFFFF;
                most = size > most ? size : most;
            }
            for (int s = WARP / 2; s; s /= 2) {
                const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, most, s);
                most = other > most ? other : most;
            }
            const float a = from_bits(most), least = a < 1e-38f ? 1e-38f : a, inverse = 1 / least;
            int code[2];
            for (int k = 0; k < 2; k++) {
                const float scaled = whole ? x[k] * inverse : x[k] / least;  // bitsandbytes divides in a last block
                code[k] = 0;
                for (int j = 0; j < 15; j++) code[k] += !(scaled <= middle[j]);
            }
            if (at + 1 == n) code[1] = 7;  // level 7 is 0
            if (at < n) bytes[at / 2] = uint8_t(code[0] << 4 | code[1]);
            if (lane() == 0) absmax[i] = whole ? a : least;
        }
    });
}
