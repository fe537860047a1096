/* The ops that dominate a VQGAN on a CPU: 3x3 convolutions, and GroupNorm followed by swish.

   Tensors are channels last: (B, H, W, C) in memory. */
#include "vector.h"
#include <stdlib.h>

/* Winograd's algorithm F(4x4, 3x3) (Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks"): a tile of
   4x4 results takes 36 multiplications a pair of channels instead of 144. Those of many tiles are 36 matmuls; inputs
   and outputs are transformed in the same pass over the maps, while they are in the cache. */
#define TILE 4
#define PATCH 6 /* side of a tile's input */
#define POINTS (PATCH * PATCH)
#define COLUMNS (2 * LANES) /* output channels at a time */
#if LANES == 16
#define ROWS 12 /* tiles at a time: 24 sums, 2 weights and 1 input in 32 registers */
#elif LANES == 8
#define ROWS 6
#else
#define ROWS 8
#endif
#define CACHE 900000 /* bytes of transformed inputs per thread: about half of its second-level cache */

int32_t columns(void) { return COLUMNS; }

/* sums[ROWS][COLUMNS] = a[ROWS][depth] b[depth][COLUMNS] */
static inline void multiply(const float *restrict a, const float *restrict b, float *restrict sums, long depth) {
    vec left[ROWS], right[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) left[i] = right[i] = (vec){};
    for (long k = 0; k < depth; k++) {
        vec first = load(b + k * COLUMNS), second = load(b + k * COLUMNS + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            vec x = fill(a[i * depth + k]);
            left[i] += x * first;
            right[i] += x * second;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
        store(sums + i * COLUMNS, left[i]);
        store(sums + i * COLUMNS + LANES, right[i]);
    }
}

/* B^T d, a column at a time */
static inline void transform_in(const vec *d, vec *r) {
    vec d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4];
    vec even = d4 - 4.0f * d2, odd = d3 - 4.0f * d1, close = d4 - d2, wide = 2.0f * (d3 - d1);
    r[0] = 4.0f * d[0] - 5.0f * d2 + d4;
    r[1] = even + odd;
    r[2] = even - odd;
    r[3] = close + wide;
    r[4] = close - wide;
    r[5] = 4.0f * d1 - 5.0f * d3 + d[5];
}

/* A^T m */
static inline void transform_out(const vec *m, vec *r) {
    vec plus = m[1] + m[2], minus = m[1] - m[2], far_plus = m[3] + m[4], far_minus = m[3] - m[4];
    r[0] = m[0] + plus + far_plus;
    r[1] = minus + 2.0f * far_minus;
    r[2] = plus + 4.0f * far_plus;
    r[3] = minus + 8.0f * far_minus + m[5];
}

/* A tile's patch, (PATCH, PATCH, C), transformed; point p of it goes to result + p * stride. */
static void read_tile(const float *const *pixels, long channels, float *result, long stride) {
    for (long c = 0; c < channels; c += LANES) {
        vec half[PATCH][PATCH];
#pragma GCC unroll 6
        for (int i = 0; i < PATCH; i++) {
            vec column[PATCH], out[PATCH];
#pragma GCC unroll 6
            for (int j = 0; j < PATCH; j++) column[j] = load(pixels[j * PATCH + i] + c);
            transform_in(column, out);
#pragma GCC unroll 6
            for (int j = 0; j < PATCH; j++) half[j][i] = out[j];
        }
#pragma GCC unroll 6
        for (int j = 0; j < PATCH; j++) {
            vec out[PATCH];
            transform_in(half[j], out);
#pragma GCC unroll 6
            for (int i = 0; i < PATCH; i++) store(result + (j * PATCH + i) * stride + c, out[i]);
        }
    }
}

/* The 4x4 results of a tile for LANES channels. */
static inline void sum_tile(const float *sums, long stride, vec result[TILE][TILE]) {
    vec half[TILE][PATCH];
#pragma GCC unroll 6
    for (int i = 0; i < PATCH; i++) {
        vec column[PATCH], out[TILE];
#pragma GCC unroll 6
        for (int j = 0; j < PATCH; j++) column[j] = load(sums + (j * PATCH + i) * stride);
        transform_out(column, out);
#pragma GCC unroll 4
        for (int j = 0; j < TILE; j++) half[j][i] = out[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) transform_out(half[j], result[j]);
}

static long min(long a, long b) { return a < b ? a : b; }

/* y = conv3x3(x) + bias [+ residual], padded with zeros by one pixel.

   x (B, H, W, in), or (B, H/2, W/2, in) of which each pixel counts as 2x2 (doubled = 1); y and residual (B, H, W, out).
   weights: G g G^T as (out/COLUMNS, POINTS, in, COLUMNS). in is a multiple of LANES, out of COLUMNS. Every tile is
   computed in the same order, independent of the rest of the batch and of the number of threads.
   Returns 0, 1 if there is no memory, or 2 if a result is not finite. Plain sums might be finite: intermediates here are
   up to 100 times as large, and infinities spread over a tile. */
int32_t convolve(const float *x, const float *weights, const float *bias, const float *residual, float *y, long batch,
                 long height, long width, long in, long out, int32_t doubled, int32_t threads) {
    const long down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE, tiles = batch * down * across;
    if (tiles == 0) return 0;
    const long fits = CACHE / (POINTS * in * 4) / ROWS * ROWS, share = (tiles + threads - 1) / threads;
    long group = min(fits > ROWS ? fits : ROWS, (share + ROWS - 1) / ROWS * ROWS); /* tiles at a time */
    const long stride = group * in + LANES; /* no power of two: its multiples map to the same cache lines */
    const long rows = group * COLUMNS + LANES, groups = (tiles + group - 1) / group;
    const long source_height = doubled ? height / 2 : height, source_width = doubled ? width / 2 : width;
    int32_t failed = 0;

#pragma omp parallel num_threads(threads)
    {
        float *memory = NULL;
        int32_t any = 0; /* results that are not finite */
        if (posix_memalign((void **)&memory, 64, (POINTS * (stride + rows) + in) * 4)) memory = NULL;
        float *points = memory, *sums = memory + POINTS * stride, *zeros = sums + POINTS * rows;
        if (memory == NULL) {
#pragma omp atomic write
            failed = 1;
        } else {
            memset(zeros, 0, in * 4);
        }
#pragma omp for schedule(dynamic, 1)
        for (long g = 0; g < groups; g++) {
            if (memory == NULL) continue;
            const long first = g * group, count = min(group, tiles - first);
            const long padded = (count + ROWS - 1) / ROWS * ROWS;
            for (long t = 0; t < count; t++) {
                const long tile = first + t, image = tile / (down * across);
                const long top = tile / across % down * TILE - 1, left = tile % across * TILE - 1;
                const float *pixels[POINTS];
                for (int j = 0; j < PATCH; j++)
                    for (int i = 0; i < PATCH; i++) {
                        const long row = top + j, column = left + i;
                        const int inside = row >= 0 && row < height && column >= 0 && column < width;
                        const long place = (image * source_height + (row >> doubled)) * source_width;
                        pixels[j * PATCH + i] = inside ? x + (place + (column >> doubled)) * in : zeros;
                    }
                read_tile(pixels, in, points + t * in, stride);
            }
            for (long t = count; t < padded; t++) /* rows that pad the last matmul */
                for (long p = 0; p < POINTS; p++) memset(points + p * stride + t * in, 0, in * 4);

            for (long n = 0; n < out; n += COLUMNS) {
                for (long p = 0; p < POINTS; p++) {
                    const float *own = weights + (n * POINTS + p * COLUMNS) * in;
                    for (long t = 0; t < padded; t += ROWS)
                        multiply(points + p * stride + t * in, own, sums + p * rows + t * COLUMNS, in);
                }
                for (long t = 0; t < count; t++) {
                    const long tile = first + t, image = tile / (down * across);
                    const long top = tile / across % down * TILE, left = tile % across * TILE;
                    const long high = min(TILE, height - top), wide = min(TILE, width - left);
                    for (int half = 0; half < 2; half++) {
                        const long c = n + half * LANES;
                        const vec shift = bias ? load(bias + c) : (vec){};
                        vec result[TILE][TILE];
                        ivec not_finite = {};
                        sum_tile(sums + t * COLUMNS + half * LANES, rows, result);
                        for (long j = 0; j < high; j++)
                            for (long i = 0; i < wide; i++) {
                                const long place = ((image * height + top + j) * width + left + i) * out + c;
                                vec value = result[j][i] + shift;
                                if (residual) value += load(residual + place);
                                not_finite |= (ivec)magnitude(value) > 0x7f7fffff;
                                store(y + place, value);
                            }
                        for (int lane = 0; lane < LANES; lane++) any |= not_finite[lane];
                    }
                }
            }
        }
        free(memory);
        if (any) {
#pragma omp atomic write
            failed = 2;
        }
    }
    return failed;
}

#define PIECE 256 /* positions summed in single precision */

long scratch(long batch, long positions, long channels) {
    return 2 * channels * batch * ((positions + PIECE - 1) / PIECE + 1);
}

/* y = swish(GroupNorm(x)), or only the norm (swish = 0).

   x, y (B, P, C), y may be x; weight, bias (C); memory: `scratch` floats. C is a multiple of LANES and of groups.
   Sums are taken by pieces, which are added in a fixed order for any number of threads. */
void norm_swish(const float *x, float *y, const float *weight, const float *bias, float *memory, long batch,
                long positions, long channels, long groups, double eps, int32_t swish, int32_t threads) {
    const long pieces = (positions + PIECE - 1) / PIECE, width = channels / groups;
    float *factors = memory, *partial = memory + 2 * batch * channels;

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long piece = 0; piece < batch * pieces; piece++) {
            const long first = piece % pieces * PIECE, count = min(PIECE, positions - first);
            const float *image = x + piece / pieces * positions * channels, *from = image + first * channels;
            float *sums = partial + piece * 2 * channels, *squares = sums + channels;
            memset(sums, 0, 2 * channels * sizeof(float));
            for (long p = 0; p < count; p++)
                for (long c = 0; c < channels; c += LANES) {
                    /* Relative to the first position, so that the variance is no small difference of large numbers. */
                    vec value = load(from + p * channels + c) - load(image + c);
                    store(sums + c, load(sums + c) + value);
                    store(squares + c, load(squares + c) + value * value);
                }
        }
#pragma omp for schedule(static)
        for (long task = 0; task < batch * groups; task++) {
            const long b = task / groups, first = task % groups * width;
            const float *image = x + b * positions * channels;
            double total = 0, square = 0;
            const double pivot = image[first];
            for (long c = first; c < first + width; c++) {
                double sum = 0, squares = 0;
                const double away = image[c] - pivot;
                for (long piece = b * pieces; piece < (b + 1) * pieces; piece++) {
                    sum += partial[piece * 2 * channels + c];
                    squares += partial[piece * 2 * channels + channels + c];
                }
                total += sum + away * positions;
                square += squares + 2 * away * sum + away * away * positions;
            }
            const double mean = total / (width * positions), variance = square / (width * positions) - mean * mean;
            const double factor = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
            for (long c = first; c < first + width; c++) {
                factors[2 * b * channels + c] = mean + pivot;
                factors[(2 * b + 1) * channels + c] = weight[c] * factor;
            }
        }
#pragma omp for schedule(static)
        for (long piece = 0; piece < batch * pieces; piece++) {
            const long b = piece / pieces, first = piece % pieces * PIECE, count = min(PIECE, positions - first);
            const long place = (b * positions + first) * channels;
            const float *center = factors + 2 * b * channels, *scale = center + channels;
            for (long i = 0; i < count * channels; i += channels)
                for (long c = 0; c < channels; c += LANES) {
                    vec value = (load(x + place + i + c) - load(center + c)) * load(scale + c) + load(bias + c);
                    if (swish) value = swish_of(value, 1.0f);
                    store(y + place + i + c, value);
                }
        }
    }
}
