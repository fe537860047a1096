/* Matmuls of small matrices that are in a cache; tiles of the result stay in registers. And a transpose. */
#include "vector.h"

#if LANES == 16
#define MOST_ROWS 8
#define MOST_VECTORS 4
#define FITS(rows, vectors) ((rows) * (vectors) <= 24) /* of 32 registers */
#else
#define MOST_ROWS 6
#define MOST_VECTORS 2
#define FITS(rows, vectors) 1 /* of 16 registers */
#endif

static inline long min(long a, long b) { return a < b ? a : b; }
static inline long rounded(long n) { return (n + LANES - 1) / LANES * LANES; }

/* A tile of `matmul`, rows by vectors, both constant after inlining. */
static inline __attribute__((always_inline)) void tile(
    int rows, int vectors, long depth, const float *a, long row, long step, const float *b, long b_row, float *c,
    long c_row, int add) {
    vec sum[MOST_ROWS][MOST_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? load(c + i * c_row + j * LANES) : (vec){};
    for (long k = 0; k < depth; k++) {
        vec right[MOST_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) right[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            vec left = fill(a[i * row + k * step]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

#define TILE(R, V) \
    case (V) * 16 + (R): \
        tile(R, V, depth, a, row, step, b, b_row, c, c_row, add); \
        break;
#define TILES(V) TILE(1, V) TILE(2, V) TILE(3, V) TILE(4, V) TILE(5, V) TILE(6, V)

static __attribute__((noinline)) void any_tile(
    int rows, int vectors, long depth, const float *a, long row, long step, const float *b, long b_row, float *c,
    long c_row, int add) {
    switch (vectors * 16 + rows) {
        TILES(1)
        TILES(2)
#if LANES == 16
        TILES(3)
        TILES(4)
        TILE(7, 1) TILE(8, 1) TILE(7, 2) TILE(8, 2) TILE(7, 3) TILE(8, 3)
#endif
    }
}

/* c (m, n) = a b, or c += a b with `add`. Element (i, k) of a (m, depth) is a[i * row + k * step], so a may be
 * transposed; b (depth, n) and c have row strides b_row and c_row. n must be a multiple of LANES. */
static inline void matmul(
    long m, long n, long depth, const float *a, long row, long step, const float *b, long b_row, float *c, long c_row,
    int add) {
    long vectors = n / LANES, columns = (vectors + MOST_VECTORS - 1) / MOST_VECTORS;
    for (long column = 0; column < columns; column++) { /* pieces of equal size, to within one */
        long from = column * vectors / columns, width = (column + 1) * vectors / columns - from, most = MOST_ROWS;
        while (!FITS(most, width)) most--;
        long pieces = (m + most - 1) / most;
        for (long piece = 0; piece < pieces; piece++) {
            long first = piece * m / pieces, count = (piece + 1) * m / pieces - first;
            any_tile(
                count, width, depth, a + first * row, row, step, b + from * LANES, b_row,
                c + first * c_row + from * LANES, c_row, add);
        }
    }
}

/* to (n, m) = from (m, n) transposed. Rows of both are padded to whole vectors, and so is m: `from` must have that many
 * rows; padding is copied unchanged. */
static inline void transpose(long m, long n, const float *from, long from_row, float *to, long to_row) {
    for (long i = 0; i < m; i += LANES)
        for (long j = 0; j < n; j += LANES) {
#if defined(__clang__)
            for (long k = 0; k < LANES && j + k < n; k++)
                for (long l = 0; l < LANES; l++) to[(j + k) * to_row + i + l] = from[(i + l) * from_row + j + k];
#else
            vec x[LANES];
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) x[k] = load(from + (i + k) * from_row + j);
#pragma GCC unroll 4
            for (int s = 1; s < LANES; s *= 2) { /* swap the off-diagonal quarters of all blocks of side 2 s */
                ivec upper, lower;
#pragma GCC unroll 16
                for (int l = 0; l < LANES; l++) upper[l] = l & s ? LANES + l - s : l, lower[l] = l & s ? LANES + l : l + s;
#pragma GCC unroll 16
                for (int k = 0; k < LANES; k++)
                    if (!(k & s)) {
                        vec above = x[k], below = x[k | s];
                        x[k] = __builtin_shuffle(above, below, upper);
                        x[k | s] = __builtin_shuffle(above, below, lower);
                    }
            }
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++)
                if (j + k < n) store(to + (j + k) * to_row + i, x[k]);
#endif
        }
}
