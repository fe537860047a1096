/* What matrix.c asks of AMX and AVX-512, and rows.c of AMX (ONLY_TILES), in portable C: so their arithmetic is tested on
 * processors without them.
 *
 * A product of tiles is as in Intel's manual (TDPBF16PS): subnormal inputs count as zero, each multiplication and addition
 * rounds once, to the nearest, and subnormal results become zero. */
#define __AMX_INT8__ 1
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define syscall(...) 0 /* the system's leave to use the unit */

#ifndef ONLY_TILES
typedef float emulated_floats __attribute__((vector_size(64)));
typedef long long emulated_bits __attribute__((vector_size(64)));
typedef int32_t emulated_words __attribute__((vector_size(64)));
#define __m512 emulated_floats
#define __m512i emulated_bits
#define __mmask16 uint16_t

#define EMULATED static inline __attribute__((always_inline))

EMULATED emulated_bits emulated_load(const void *from, uint16_t mask) {
    emulated_words x = {};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) memcpy((char *)&x + 4 * i, (const char *)from + 4 * i, 4);
    return (emulated_bits)x;
}
EMULATED emulated_bits emulated_whole(const void *from) {
    emulated_bits x;
    memcpy(&x, from, 64);
    return x;
}
EMULATED void emulated_store(void *to, uint16_t mask, emulated_floats x) {
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) memcpy((char *)to + 4 * i, (char *)&x + 4 * i, 4);
}
EMULATED emulated_floats emulated_fnmadd(emulated_floats a, emulated_floats b, emulated_floats c) {
    for (int i = 0; i < 16; i++) c[i] = fmaf(-a[i], b[i], c[i]);
    return c;
}
EMULATED uint16_t emulated_not_finite(uint16_t mask, emulated_floats x) {
    uint16_t result = 0;
    for (int i = 0; i < 16; i++) result |= !isfinite(x[i]) << i;
    return result & mask;
}
EMULATED emulated_bits emulated_insert(emulated_bits x, __m128i quarter, int at) {
    x[2 * at] = quarter[0], x[2 * at + 1] = quarter[1];
    return x;
}
/* Of each quarter of two vectors two words, or one double word: the first ones, or with `high` the last ones. */
EMULATED emulated_bits emulated_unpack32(emulated_bits a, emulated_bits b, int high) {
    emulated_words x = (emulated_words)a, y = (emulated_words)b, r;
    for (int q = 0; q < 16; q += 4)
        for (int i = 0; i < 2; i++) r[q + 2 * i] = x[q + 2 * high + i], r[q + 2 * i + 1] = y[q + 2 * high + i];
    return (emulated_bits)r;
}
EMULATED emulated_bits emulated_unpack64(emulated_bits a, emulated_bits b, int high) {
    emulated_bits r;
    for (int q = 0; q < 8; q += 2) r[q] = a[q + high], r[q + 1] = b[q + high];
    return r;
}
EMULATED emulated_bits emulated_shuffle(emulated_bits a, emulated_bits b, int choice) {
    emulated_bits r;
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 2; i++) r[2 * q + i] = (q < 2 ? a : b)[2 * (choice >> 2 * q & 3) + i];
    return r;
}

#define _mm512_castsi128_si512(x) emulated_insert((emulated_bits){}, x, 0)
#define _mm512_fnmadd_ps(a, b, c) emulated_fnmadd(a, b, c)
#define _mm512_inserti32x4(x, quarter, at) emulated_insert(x, quarter, at)
#define _mm512_load_si512(p) emulated_whole(p)
#define _mm512_loadu_si512(p) emulated_whole(p)
#define _mm512_mask_fpclass_ps_mask(mask, x, kinds) emulated_not_finite(mask, x)
#define _mm512_mask_storeu_ps(p, mask, x) emulated_store(p, mask, x)
#define _mm512_maskz_loadu_epi32(mask, p) emulated_load(p, mask)
#define _mm512_maskz_loadu_ps(mask, p) ((emulated_floats)emulated_load(p, mask))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_set1_ps(x) ((x) - (emulated_floats){})
#define _mm512_shuffle_i32x4(a, b, choice) emulated_shuffle(a, b, choice)
#define _mm512_srli_epi32(x, n) ((emulated_bits)((__attribute__((vector_size(64))) uint32_t)(x) >> (n)))
#define _mm512_store_si512(p, x) emulated_store(p, 0xffff, (emulated_floats)(x))
#define _mm512_unpackhi_epi32(a, b) emulated_unpack32(a, b, 1)
#define _mm512_unpackhi_epi64(a, b) emulated_unpack64(a, b, 1)
#define _mm512_unpacklo_epi32(a, b) emulated_unpack32(a, b, 0)
#define _mm512_unpacklo_epi64(a, b) emulated_unpack64(a, b, 0)

#endif

/* Eight tiles of up to 16 rows of 64 bytes; their numbers of rows stand in the configuration. */
static __thread uint32_t emulated_tiles[8][16][16];
static __thread uint8_t emulated_configuration[64];

static inline float emulated_flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline float emulated_part(uint32_t pair, int second) {
    uint32_t bits = second ? pair & 0xffff0000u : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return emulated_flushed(x);
}
static __attribute__((noinline)) void emulated_product(int to, int a, int b) {
    float right[2][16][16];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++)
            for (int s = 0; s < 2; s++) right[s][k][n] = emulated_part(emulated_tiles[b][k][n], s);
    for (int m = 0; m < 16; m++) {
        float sums[2][16] = {{0}};
        for (int k = 0; k < 16; k++)
            for (int s = 0; s < 2; s++) {
                float left = emulated_part(emulated_tiles[a][m][k], s);
                for (int n = 0; n < 16; n++) sums[s][n] = emulated_flushed(fmaf(left, right[s][k][n], sums[s][n]));
            }
        float *row = (float *)emulated_tiles[to][m];
        for (int n = 0; n < 16; n++) row[n] = emulated_flushed(row[n] + emulated_flushed(sums[0][n] + sums[1][n]));
    }
}
static __attribute__((noinline)) void emulated_whole_product(int to, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++)
            for (int k = 0; k < 64; k++)
                emulated_tiles[to][m][n] +=
                    (int8_t)(emulated_tiles[a][m][k / 4] >> k % 4 * 8) * (int8_t)(emulated_tiles[b][k / 4][n] >> k % 4 * 8);
}
static inline void emulated_tile_load(int t, const void *from, long stride) {
    for (int i = 0; i < emulated_configuration[48 + t]; i++) memcpy(emulated_tiles[t][i], (const char *)from + i * stride, 64);
}
static inline void emulated_tile_store(int t, void *to, long stride) {
    for (int i = 0; i < emulated_configuration[48 + t]; i++) memcpy((char *)to + i * stride, emulated_tiles[t][i], 64);
}

#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#define _tile_dpbf16ps(to, a, b) emulated_product(to, a, b);
#define _tile_dpbssd(to, a, b) emulated_whole_product(to, a, b);
#define _tile_loadconfig(p) memcpy(emulated_configuration, p, 64)
#define _tile_loadd(t, from, stride) emulated_tile_load(t, from, stride)
#define _tile_storeconfig(p) memcpy(p, emulated_configuration, 64)
#define _tile_stored(t, to, stride) emulated_tile_store(t, to, stride)
#define _tile_zero(t) memset(emulated_tiles[t], 0, sizeof emulated_tiles[t])
