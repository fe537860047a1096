/* Float32 matmuls by the vector instructions for bfloat16 (AVX-512, such as Zen 4): operands are rounded to bfloat16
 * while they are packed, sums and results are float32. PyTorch's matmuls of bfloat16 need a pass over each operand and
 * over the result to convert them, and round the result.
 *
 * The instructions treat subnormal inputs as zero and flush subnormal results. The order of a sum depends only on k:
 * results do not depend on the number of threads. */
#if !defined(__AVX512BF16__)
int multiplies(void) { return 0; }
#else
#include "packing.h"
#include <omp.h>

#define STRIP 16  /* lines packed side by side: a vector of pairs of bfloat16 */
#define ROWS 8    /* of a tile, half a strip */
#define VECTORS 3 /* strips of columns of a tile: 24 sums, in 32 registers */
#define DEPTH 256 /* steps of k at a time: a tile's columns then take 24 KB of the first cache */
#define BLOCK 4   /* strips that a thread packs at a time */

int multiplies(void) { return 1; }

/* `pack` for one strip of lines that are contiguous. */
static void pack_lines(struct matrix x, long line, long from, long to, uint32_t *packed) {
    const float *at = x.at + line * x.line;
    const long lines = x.lines - line;
    for (long k = from; k < to; k += 32, packed += 16 * STRIP) {
        __m512i pairs[16];
        for (int i = 0; i < 16; i++) {
            const float *own = at + (i < lines ? i : 0) * x.line + k;
            const long steps = i < lines ? to - k : 0;
            _mm_prefetch(own + 64, _MM_HINT_T0);
            _mm_prefetch(own + 80, _MM_HINT_T0);
            __m512 low = _mm512_maskz_loadu_ps(first(steps), own);
            __m512 high = _mm512_maskz_loadu_ps(first(steps - 16), own + 16);
            pairs[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        }
        transpose(pairs);
        for (int i = 0; i < 16 && k + 2 * i < to; i++) _mm512_store_si512(packed + i * STRIP, pairs[i]);
    }
}

/* Pack `strips` of 16 lines from `line` on, steps `from` to `to` of k: for each pair of steps, the pairs of all lines.
 * Packed strips are `apart` from each other; what is out of range is zero. */
static void pack(struct matrix x, long line, long strips, long from, long to, uint32_t *packed, long apart) {
    if (x.step == 1) {
        for (long s = 0; s < strips; s++) pack_lines(x, line + s * STRIP, from, to, packed + s * apart);
        return;
    }
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (long k = from; k < to; k += 2, packed += STRIP) /* strips side by side: a step of one is a single cache line */
        for (long s = 0; s < strips; s++) {
            const float *at = x.at + line + s * STRIP + k * x.step;
            const __mmask16 some = first(x.lines - line - s * STRIP);
            __m512 low = _mm512_maskz_loadu_ps(some, at), high = _mm512_setzero_ps();
            if (k + 1 < to) high = _mm512_maskz_loadu_ps(some, at + x.step);
            __m512i pairs = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            _mm512_store_si512(packed + s * apart, pairs);
        }
}

/* A place in C of m rows and n columns; it becomes alpha times the sums, to which what it holds is added with `add`. */
struct place {
    float *at;
    long stride, m, n;
    int add;
    float alpha;
};

/* A tile of 8 rows by `vectors` strips of columns, which are `apart` from each other: for `pairs` pairs of k. */
static inline __attribute__((always_inline)) void tile(
    const int vectors, const uint32_t *rows, const uint32_t *columns, long apart, long pairs, const struct place *c) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sum[i][j] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++, rows += STRIP, columns += STRIP) {
        __m512bh right[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) right[j] = (__m512bh)_mm512_load_si512(columns + j * apart);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(rows[i]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        if (i < c->m)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) {
                float *to = c->at + i * c->stride + j * 16;
                __mmask16 some = first(c->n - j * 16);
                __m512 before = c->add ? _mm512_maskz_loadu_ps(some, to) : _mm512_setzero_ps();
                _mm512_mask_storeu_ps(to, some, _mm512_fmadd_ps(sum[i][j], _mm512_set1_ps(c->alpha), before));
            }
}

static __attribute__((noinline)) void any_tile(
    long vectors, const uint32_t *rows, const uint32_t *columns, long apart, long pairs, const struct place *c) {
    if (vectors == 1) tile(1, rows, columns, apart, pairs, c);
    if (vectors == 2) tile(2, rows, columns, apart, pairs, c);
    if (vectors == 3) tile(3, rows, columns, apart, pairs, c);
}

static __thread void *shared_buffer, *own_buffer;
static __thread size_t shared_buffer_size, own_buffer_size;

/* C = alpha A B, or C + alpha A B with `add`. symmetric: C is, up to rounding, and only half of it is computed. */
struct work {
    struct matrix a, b;
    long k;
    float alpha, *c;
    long stride;
    int add, symmetric;
};

/* Compute rows of C from `row` on, BLOCK strips at most, for steps of k from `from` on, DEPTH at most. `columns` are
 * packed strips of B, `packed` is room for the rows. */
static void multiply(const struct work *w, long row, long from, const uint32_t *columns, uint32_t *packed) {
    const long to = min(w->k, from + DEPTH), pairs = (to - from + 1) / 2, apart = (w->k + 1) / 2 * STRIP;
    const long strips = (min(BLOCK * STRIP, w->a.lines - row) + STRIP - 1) / STRIP;
    const long all = (w->b.lines + STRIP - 1) / STRIP, tiles = (all + VECTORS - 1) / VECTORS;
    pack(w->a, row, strips, from, to, packed, pairs * STRIP);
    struct place place = {.stride = w->stride, .add = w->add || from > 0, .alpha = w->alpha};
    for (long t = 0; t < tiles; t++) { /* of equal width, to within one strip */
        long strip = t * all / tiles, vectors = (t + 1) * all / tiles - strip, column = strip * STRIP;
        for (long half = 0; half < 2 * strips; half++) {
            long own = row + half * ROWS;
            if (own >= w->a.lines || (w->symmetric && column >= own + ROWS)) continue;
            place.at = w->c + own * w->stride + column, place.m = w->a.lines - own, place.n = w->b.lines - column;
            any_tile(vectors, packed + half / 2 * pairs * STRIP + half % 2 * ROWS,
                     columns + strip * apart + from / 2 * STRIP, apart, pairs, &place);
        }
    }
}

/* See struct work: C (m, n), of row stride `stride`, of A (m, k) and B (k, n), whose strides are as in struct matrix.
 * Returns 0, or 1 if there is no memory. */
int matmul(
    long m, long n, long k, const float *a, long a_line, long a_step, const float *b, long b_line, long b_step,
    float alpha, int add, int symmetric, float *c, long stride) {
    const struct work w = {{a, a_line, a_step, m}, {b, b_line, b_step, n}, k, alpha, c, stride, add, symmetric};
    const long strips = (n + STRIP - 1) / STRIP, apart = (k + 1) / 2 * STRIP;
    uint32_t *shared = memory(&shared_buffer, &shared_buffer_size, strips * apart * sizeof(uint32_t));
    int failed = !shared;
    if (failed) return 1;
#pragma omp parallel
    {
        uint32_t *own = memory(&own_buffer, &own_buffer_size, BLOCK * STRIP * (DEPTH / 2) * sizeof(uint32_t));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for
        for (long s = 0; s < strips; s += BLOCK)
            pack(w.b, s * STRIP, min(BLOCK, strips - s), 0, k, shared + s * apart, apart);
#pragma omp for schedule(dynamic)
        for (long row = 0; row < m; row += BLOCK * STRIP)
            for (long from = 0; own && from < k; from += DEPTH) multiply(&w, row, from, shared, own);
#pragma omp for
        for (long i = 0; i < symmetric * m; i++)
            for (long j = i + 1; j < n; j++) c[i * stride + j] = c[j * stride + i];
    }
    return failed;
}
#endif
