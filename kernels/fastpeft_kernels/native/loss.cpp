// The steps of a fused loss on CPU, as loss/steps.py defines them: raw logits of a row are in the caches from the first
// look at them to the last. All arithmetic is fp32, but for sums over words, which are in fp64.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // see activation.cpp
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 512;  // elements

// tanh(x): near zero by a polynomial (Cephes), so that small numbers keep their digits.
inline float hyperbolic_tangent(float x) {
    const float magnitude = std::fabs(x), square = x * x, e = exponential(-2.0f * magnitude);
    float p = multiply_add(-5.70498872745e-3f, square, 2.06390887954e-2f);
    p = multiply_add(p, square, -5.37397155531e-2f);
    p = multiply_add(p, square, 1.33314422036e-1f);
    p = multiply_add(p, square, -3.33332819422e-1f);
    const float small = multiply_add(p * square, x, x), large = 1.0f - 2.0f * e / (1.0f + e);
    return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

// From raw logits to logits: cap(scale * (raw + bias)). `factor` is scale, over the cap where there is one.
struct Map {
    const float* bias;  // or null
    float factor, cap;  // cap 0: none
    bool capped() const { return cap != 0.0f; }
};

template <typename T>
void logits(const T* raw, const Map& map, int64_t first, int64_t count, float* z) {
    const float* x = read(raw + first, count, z);
    if (map.bias != nullptr) {
        const float* bias = map.bias + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = x[i] + bias[i];
        x = z;
    }
    const float factor = map.factor, cap = map.cap;
    if (map.capped()) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = cap * hyperbolic_tangent(factor * x[i]);
    } else if (factor != 1.0f || x != z) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = factor * x[i];
    }
}

// The cap's derivative where it gave z.
inline void slopes_of(const float* z, float cap, float* slopes, int64_t count) {
    const float inverse = 1.0f / (cap * cap);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) slopes[i] = 1.0f - z[i] * z[i] * inverse;
}

inline void multiply(float* values, const float* by, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] *= by[i];
}

inline void add(float* values, float factor, const float* classes, int64_t count) {
    if (classes == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] += factor;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] += factor * classes[i];
    }
}

// Weighted by `classes` unless that is null. In fp64: vectors of few fp32 lanes add many numbers each.
inline double sum(const float* z, const float* classes, int64_t count) {
    double total = 0.0;
    if (classes == nullptr) {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; ++i) total += z[i];
    } else {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; ++i) total += classes[i] * z[i];
    }
    return total;
}

inline float largest(const float* z, int64_t count) {
    float found = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : found)
    for (int64_t i = 0; i < count; ++i) found = z[i] > found ? z[i] : found;
    return found;
}

// z becomes factor * exp(z - top).
inline void exponentials(float* z, float top, float factor, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = factor * exponential(z[i] - top);
}

template <typename Block>
void for_each_block(int64_t count, const Block& block) {
    for (int64_t first = 0; first < count; first += BLOCK) block(first, std::min(BLOCK, count - first));
}

// Of the threads in a parallel region, from 0 on.
inline int64_t own_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Of fp32 the row is its own room.
inline float* room_of(float* row, float*, int64_t) { return row; }
template <typename T>
float* room_of(T*, float* rooms, int64_t words) {
    return rooms + own_number() * words;
}

struct Running {  // (tokens,) each; total may be null
    float *top, *others, *label, *factor, *total;
};

template <typename T>
void online_row(T* raw, float* z, int64_t words, int64_t label, const Map& map, const float* classes, float slack,
                const Running& running, int64_t row) {
    float high = -std::numeric_limits<float>::infinity();
    double total = 0.0, others = 0.0;
    for_each_block(words, [&](int64_t first, int64_t count) {
        logits(raw, map, first, count, z + first);
        high = std::max(high, largest(z + first, count));
        if (running.total != nullptr) total += sum(z + first, classes == nullptr ? nullptr : classes + first, count);
    });
    if (running.total != nullptr) running.total[row] += static_cast<float>(total);
    const float before = running.top[row], top = high > before + slack ? high : before;
    const float factor = std::exp(std::max(before - top, -1e4f));
    const bool inside = label >= 0 && label < words;
    if (inside) {
        running.label[row] = z[label];
        z[label] = -std::numeric_limits<float>::infinity();  // no part of the sum
    }
    for_each_block(words, [&](int64_t first, int64_t count) {
        alignas(64) float slopes[BLOCK];
        if (map.capped()) slopes_of(z + first, map.cap, slopes, count);
        exponentials(z + first, top, 1.0f, count);
        others += sum(z + first, nullptr, count);
        if (map.capped()) multiply(z + first, slopes, count);
        if (inside && label >= first && label < first + count) z[label] = 0.0f;
        write(z + first, raw + first, count);
    });
    running.top[row] = top;
    running.factor[row] = factor;
    running.others[row] = static_cast<float>(others + static_cast<double>(factor) * running.others[row]);
}

template <typename T>
void online(T* raw, int64_t stride, int64_t tokens, int64_t words, int64_t first, const int64_t* labels, Map map,
            const float* classes, float slack, Running running, float* rooms, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < tokens; ++row) {
        T* own = raw + row * stride;
        online_row(own, room_of(own, rooms, words), words, labels[row] - first, map, classes, slack, running, row);
    }
}

struct Known {  // (tokens,) each; a gradient may be null, for zeros
    const float *top, *inverse, *others, *d_nll, *d_lse, *d_total;
};

template <typename T>
void gradient_row(T* raw, int64_t words, int64_t label, const Map& map, const float* classes, const Known& known,
                  int64_t row) {
    const auto of = [row](const float* values) { return values == nullptr ? 0.0f : values[row]; };
    const float top = known.top[row], d_nll = of(known.d_nll), d_lse = of(known.d_lse), d_total = of(known.d_total);
    const float factor = (d_nll + d_lse) * known.inverse[row];
    alignas(64) float buffer[BLOCK], slopes[BLOCK];
    for_each_block(words, [&](int64_t first, int64_t count) {
        float* z = target(raw + first, buffer);
        logits(raw, map, first, count, z);
        const bool inside = label >= first && label < first + count;
        const float p = inside ? exponential(z[label - first] - top) * known.inverse[row] : 0.0f;
        if (map.capped()) slopes_of(z, map.cap, slopes, count);
        exponentials(z, top, factor, count);
        if (inside) z[label - first] = (known.d_lse == nullptr ? 0.0f : d_lse * p) - d_nll * known.others[row];
        if (d_total != 0.0f) add(z, d_total, classes == nullptr ? nullptr : classes + first, count);
        if (map.capped()) multiply(z, slopes, count);
        write(z, raw + first, count);
    });
}

template <typename T>
void gradient(T* raw, int64_t stride, int64_t tokens, int64_t words, int64_t first, const int64_t* labels, Map map,
              const float* classes, Known known, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < tokens; ++row) {
        gradient_row(raw + row * stride, words, labels[row] - first, map, classes, known, row);
    }
}

}  // namespace

// raw: (tokens, words) with a row stride in elements, of the words from `first` on, overwritten.
// rooms: (threads, words) where raw is not fp32.
#define FASTPEFT_LOSS(T, NAME)                                                                                        \
    void fastpeft_loss_online_##NAME(T* raw, int64_t stride, int64_t tokens, int64_t words, int64_t first,             \
                                     const int64_t* labels, const float* bias, float factor, float cap,               \
                                     const float* classes, float slack, float* top, float* others, float* label,      \
                                     float* old, float* total, float* rooms, int threads) {                           \
        online<T>(raw, stride, tokens, words, first, labels, {bias, factor, cap}, classes, slack,                     \
                  {top, others, label, old, total}, rooms, threads);                                                  \
    }                                                                                                                 \
    void fastpeft_loss_gradient_##NAME(T* raw, int64_t stride, int64_t tokens, int64_t words, int64_t first,           \
                                       const int64_t* labels, const float* bias, float factor, float cap,             \
                                       const float* classes, const float* top, const float* inverse,                  \
                                       const float* others, const float* d_nll, const float* d_lse,                   \
                                       const float* d_total, int threads) {                                           \
        gradient<T>(raw, stride, tokens, words, first, labels, {bias, factor, cap}, classes,                          \
                    {top, inverse, others, d_nll, d_lse, d_total}, threads);                                          \
    }

extern "C" {
FASTPEFT_LOSS(float, float32)
FASTPEFT_LOSS(BFloat16, bfloat16)
FASTPEFT_LOSS(Half, float16)
}
