/* What matrix.c and bfloat16.c need to pack operands of a matmul. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

/* Element k of line i of a matrix (a row of A, a column of B) is at[i * line + k * step]; line or step is 1. */
struct matrix {
    const float *at;
    long line, step, lines;
};

static long min(long a, long b) { return a < b ? a : b; }

static inline __mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* Transpose 16 x 16 elements of 32 bits. */
static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0x88);
            t[8 * i + 4 + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

/* A thread's buffer for packed operands, kept between calls: new memory costs as much as filling it three times. */
static void *memory(void **kept, size_t *size, size_t wanted) {
    if (!*kept || *size < wanted) {
        free(*kept);
        *kept = aligned_alloc(64, wanted);
        *size = *kept ? wanted : 0;
    }
    return *kept;
}
