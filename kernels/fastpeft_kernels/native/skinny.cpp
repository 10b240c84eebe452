// Products of a large matrix y (tokens, features) with matrices of rank width, both from one read of y:
//
//     ds = y b       (tokens, rank)
//     db = y^T s     (features, rank)
//
// A tile of a few rows of y stays in the first-level cache while it is multiplied from the right, sums in registers, and
// from the left, onto a panel of db in the same cache. Sums run over at most SPAN or BLOCK terms before they are added up, so
// that rounding errors grow no faster than those of BLAS.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// Early, so that sums stay in registers.
#define UNROLL _Pragma("GCC unroll 12")

inline Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

constexpr int64_t PANEL = 128;  // features: PANEL x 16 floats of b and of db beside a tile of y in 32 KiB
constexpr int64_t SPAN = 32;    // features summed in registers
constexpr int64_t BLOCK = 120;  // rows, a multiple of the rows of any tile

struct Matrix {
    float* data;
    int64_t row, column;  // strides
    explicit operator bool() const { return data != nullptr; }
    float& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

// Columns of rank width are handled WIDTH at a time, rows of y ROWS at a time: 12 vectors of sums.
template <int VECTORS>
struct Tile {
    static constexpr int64_t WIDTH = VECTORS * LANES;
    static constexpr int ROWS = 12 / VECTORS;

    // sums[ROWS][WIDTH] += y b over `count` features; b (count, WIDTH)
    static void right(const float* const* y, const float* b, int64_t count, float* sums) {
        for (int64_t first = 0; first < count; first += SPAN) {
            const int64_t last = std::min(count, first + SPAN);
            Vector sum[ROWS][VECTORS] = {};
            for (int64_t n = first; n < last; ++n) {
                Vector factor[VECTORS];
                UNROLL for (int v = 0; v < VECTORS; ++v) factor[v] = load(b + n * WIDTH + v * LANES);
                UNROLL for (int m = 0; m < ROWS; ++m) {
                    const Vector value = y[m][n] - Vector{};
                    UNROLL for (int v = 0; v < VECTORS; ++v) sum[m][v] = multiply_add(value, factor[v], sum[m][v]);
                }
            }
            UNROLL for (int m = 0; m < ROWS; ++m)
                UNROLL for (int v = 0; v < VECTORS; ++v) {
                    float* place = sums + m * WIDTH + v * LANES;
                    store(place, load(place) + sum[m][v]);
                }
        }
    }

    // sums[count][WIDTH] += y^T s over ROWS rows; s (ROWS, WIDTH)
    static void left(const float* const* y, const float* s, int64_t count, float* sums) {
        Vector factor[ROWS][VECTORS];
        UNROLL for (int m = 0; m < ROWS; ++m)
            UNROLL for (int v = 0; v < VECTORS; ++v) factor[m][v] = load(s + m * WIDTH + v * LANES);
        for (int64_t n = 0; n < count; ++n) {
            Vector sum[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; ++v) sum[v] = load(sums + n * WIDTH + v * LANES);
            UNROLL for (int m = 0; m < ROWS; ++m) {
                const Vector value = y[m][n] - Vector{};
                UNROLL for (int v = 0; v < VECTORS; ++v) sum[v] = multiply_add(value, factor[m][v], sum[v]);
            }
            UNROLL for (int v = 0; v < VECTORS; ++v) store(sums + n * WIDTH + v * LANES, sum[v]);
        }
    }
};

// [chunk][line][WIDTH] of a matrix (lines, rank), zeros beyond the rank.
void pack(const Matrix& from, int64_t first, int64_t lines, int64_t rank, int64_t width, int64_t chunk_stride, float* to) {
    for (int64_t start = 0; start < rank; start += width, to += chunk_stride)
        for (int64_t line = 0; line < lines; ++line)
            for (int64_t j = 0; j < width; ++j)
                to[line * width + j] = start + j < rank ? from.at(first + line, start + j) : 0.0f;
}

// Floats of memory that a call works in: b packed, and for each thread a part of db and what a block of rows needs.
struct Workspace {
    int64_t packed, db, block, panel;
    Workspace(int64_t features, int64_t rank, int64_t width, bool with_b, bool with_s) {
        const int64_t chunks = (rank + width - 1) / width;
        packed = with_b ? chunks * features * width : 0;
        db = with_s ? chunks * features * width : 0;
        block = chunks * BLOCK * width;
        panel = PANEL * width;
    }
    int64_t each() const { return db + 2 * block + panel + PANEL; }
};

template <int VECTORS>
void rows(const Matrix& y, int64_t begin, int64_t end, int64_t features, int64_t rank, const float* b, const Matrix& ds,
          const Matrix& s, const Workspace& sizes, float* memory) {
    using T = Tile<VECTORS>;
    const int64_t width = T::WIDTH, chunks = (rank + width - 1) / width;
    float *db = memory, *s_block = db + sizes.db, *ds_block = s_block + sizes.block, *db_panel = ds_block + sizes.block;
    float* zeros = db_panel + sizes.panel;
    std::fill_n(db, sizes.db, 0.0f);
    std::fill_n(zeros, PANEL, 0.0f);
    for (int64_t block = begin; block < end; block += BLOCK) {
        const int64_t count = std::min(BLOCK, end - block);
        if (s) {
            std::fill_n(s_block, sizes.block, 0.0f);
            pack(s, block, count, rank, width, BLOCK * width, s_block);
        }
        std::fill_n(ds_block, sizes.block, 0.0f);
        for (int64_t panel = 0; panel < features; panel += PANEL) {
            const int64_t columns = std::min(PANEL, features - panel);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                std::fill_n(db_panel, sizes.panel, 0.0f);
                for (int64_t tile = 0; tile < count; tile += T::ROWS) {
                    const float* lines[T::ROWS];
                    for (int m = 0; m < T::ROWS; ++m)
                        lines[m] = tile + m < count ? &y.at(block + tile + m, panel) : zeros;
                    const int64_t place = (chunk * BLOCK + tile) * width;
                    if (b) T::right(lines, b + (chunk * features + panel) * width, columns, ds_block + place);
                    if (s) T::left(lines, s_block + place, columns, db_panel);
                }
                if (s) {
                    float* sums = db + (chunk * features + panel) * width;
                    for (int64_t i = 0; i < columns * width; ++i) sums[i] += db_panel[i];
                }
            }
        }
        if (b)
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < rank; ++j)
                    ds.at(block + m, j) = ds_block[((j / width) * BLOCK + m) * width + j % width];
    }
}

template <int VECTORS>
void skinny(const Matrix& y, int64_t tokens, int64_t features, int64_t rank, const Matrix& b, const Matrix& ds,
            const Matrix& s, const Matrix& db, float* memory, int threads) {
    const int64_t width = Tile<VECTORS>::WIDTH;
    const int64_t share = (tokens + threads - 1) / threads;
    const Workspace sizes(features, rank, width, bool(b), bool(s));
    float *packed = memory, *parts = memory + sizes.packed;
    if (b) pack(b, 0, features, rank, width, features * width, packed);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread)
        rows<VECTORS>(y, std::min(tokens, thread * share), std::min(tokens, (thread + 1) * share), features, rank,
                      b ? packed : nullptr, ds, s, sizes, parts + thread * sizes.each());
    if (!s) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < features; ++n)
        for (int64_t j = 0; j < rank; ++j) {
            float total = 0.0f;
            for (int thread = 0; thread < threads; ++thread)
                total += parts[thread * sizes.each() + ((j / width) * features + n) * width + j % width];
            db.at(n, j) = total;
        }
}

int64_t width_of(int64_t rank) { return rank <= LANES ? Tile<1>::WIDTH : Tile<2>::WIDTH; }

}  // namespace

// Floats of `memory` that a call with these sizes wants.
extern "C" int64_t fastpeft_skinny_memory(int64_t features, int64_t rank, int with_b, int with_s, int threads) {
    const Workspace sizes(features, rank, width_of(rank), with_b, with_s);
    return sizes.packed + threads * sizes.each();
}

// y (tokens, features), columns contiguous. Either or both of ds = y b and db = y^T s: b (features, rank), ds and
// s (tokens, rank), db (features, rank), each with any strides; null where not wanted. Nothing is allocated here.
extern "C" void fastpeft_skinny(float* y, int64_t y_row, int64_t tokens, int64_t features, int64_t rank,
                                float* b, int64_t b_row, int64_t b_column, float* ds, int64_t ds_row, int64_t ds_column,
                                float* s, int64_t s_row, int64_t s_column, float* db, int64_t db_row, int64_t db_column,
                                float* memory, int threads) {
    const auto run = rank <= LANES ? skinny<1> : skinny<2>;
    run({y, y_row, 1}, tokens, features, rank, {b, b_row, b_column}, {ds, ds_row, ds_column}, {s, s_row, s_column},
        {db, db_row, db_column}, memory, threads);
}
