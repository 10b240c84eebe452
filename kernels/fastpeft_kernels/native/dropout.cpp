// Counter-based dropout on CPU: the bits of common/random.py, one pass, vectorised by the compiler.
#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t C1 = 0x7FEB352Du, C2 = 0x846CA68Bu;
constexpr uint32_t ROW_STEP = 0x9E3779B1u, STREAM_STEP = 0x85EBCA77u, COLUMN_STEP = 0xC2B2AE3Du;

inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * C1;
    x = (x ^ (x >> 15)) * C2;
    return x ^ (x >> 16);
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void round_to(float value, float& out) { out = value; }
inline void round_to(float value, uint16_t& out) {  // bfloat16, to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

template <typename T>
void dropout(const T* x, T* out, int64_t rows, int64_t columns, int64_t x_stride, int64_t out_stride, int64_t seed,
             int64_t stream, int32_t threshold, float scale, int threads) {
    const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const uint32_t first = mix(static_cast<uint32_t>(row) * ROW_STEP + low + static_cast<uint32_t>(stream) * STREAM_STEP);
        const uint32_t second = mix(first ^ high ^ mix(static_cast<uint32_t>(row >> 32) + low));
        const T* from = x + row * x_stride;
        T* to = out + row * out_stride;
        for (int64_t column = 0; column < columns; ++column) {
            uint32_t bits = static_cast<uint32_t>(column) * COLUMN_STEP + first;
            bits = ((bits ^ (bits >> 16)) * C1) ^ second;
            bits = (bits ^ (bits >> 15)) * C2;
            bits ^= bits >> 16;
            const float value = to_float(from[column]) * scale;
            round_to(static_cast<int32_t>(bits) >= threshold ? value : 0.0f, to[column]);
        }
    }
}

}  // namespace

extern "C" {

void fastpeft_dropout_float32(const float* x, float* out, int64_t rows, int64_t columns, int64_t x_stride,
                              int64_t out_stride, int64_t seed, int64_t stream, int32_t threshold, float scale,
                              int threads) {
    dropout(x, out, rows, columns, x_stride, out_stride, seed, stream, threshold, scale, threads);
}

void fastpeft_dropout_bfloat16(const uint16_t* x, uint16_t* out, int64_t rows, int64_t columns, int64_t x_stride,
                               int64_t out_stride, int64_t seed, int64_t stream, int32_t threshold, float scale,
                              int threads) {
    dropout(x, out, rows, columns, x_stride, out_stride, seed, stream, threshold, scale, threads);
}
}
