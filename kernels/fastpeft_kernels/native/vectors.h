// What loops over fp32 and 16-bit numbers share; all arithmetic is fp32, and without branches, so that it is vectorised.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16, magnitude = word + word;
    const float normal = from_bits((magnitude >> 4) + (0xE0u << 23)) * 0x1p-112f;
    const float subnormal = from_bits((magnitude >> 17) | (126u << 23)) - 0.5f;
    return from_bits((word & 0x80000000u) | (magnitude < (1u << 27) ? bits_of(subnormal) : bits_of(normal)));
}

// To nearest even; NaN stays NaN.
inline void round_to(float value, BFloat16& out) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
inline void round_to(float value, Half& out) {
    const uint32_t word = bits_of(value), magnitude = word + word;
    // Too large becomes infinity; adding a power of two then rounds where fp16's last bit is, subnormal or not.
    const float clipped = (std::fabs(value) * 0x1p+112f) * 0x1p-110f;
    const uint32_t exponent = std::max(magnitude & 0xFF000000u, 0x71000000u);
    const uint32_t bits = bits_of(from_bits((exponent >> 1) + 0x07800000u) + clipped);
    const uint32_t half = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    out.bits = static_cast<uint16_t>(((word >> 16) & 0x8000u) | (magnitude > 0xFF000000u ? 0x7E00u : half));
}

// In one instruction where there is one, whatever the compiler may contract; never a call.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline float power_of_two(int32_t n) { return from_bits(static_cast<uint32_t>(n + 127) << 23); }

// exp(x) for x <= 88, within 1 ulp, down to the smallest subnormal (polynomial: Cephes).
inline float exponential(float x) {
    constexpr float magic = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    x = x < -104.0f ? -104.0f : x;      // NaN stays
    const float shifted = multiply_add(x, 1.44269504f, magic);
    const int32_t n = static_cast<int32_t>(bits_of(shifted) - bits_of(magic));
    const float whole = shifted - magic;
    const float r = multiply_add(whole, 2.12194440e-4f, multiply_add(whole, -0.693359375f, x));
    float p = multiply_add(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    const int32_t half = n >> 1;  // 2^n may be subnormal: in two steps
    return p * power_of_two(half) * power_of_two(n - half);
}

// fp32 is computed where it lies, 16-bit types in a buffer. `to` null: nobody wants the result.
inline const float* read(const float* from, int64_t, float*) { return from; }
template <typename T>
const float* read(const T* from, int64_t count, float* buffer) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(from[i]);
    return buffer;
}
inline float* target(float* to, float* buffer) { return to == nullptr ? buffer : to; }
template <typename T>
float* target(T*, float* buffer) {
    return buffer;
}
inline void write(const float*, float*, int64_t) {}
template <typename T>
void write(const float* buffer, T* to, int64_t count) {
    if (to == nullptr) return;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) round_to(buffer[i], to[i]);
}

}  // namespace
