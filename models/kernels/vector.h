/* Vectors of floats as wide as the processor has them, in GCC's portable notation: AVX-512, AVX2, NEON. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16 /* floats in a vector; 32 registers */
#elif defined(__AVX2__)
#define LANES 8 /* 16 registers */
#elif defined(__ARM_NEON)
#define LANES 4 /* 32 registers */
#else
#error "the processor has no AVX2: PyTorch's operators are faster there"
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* at any address */
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { return *(const loose *)p; }
static inline void store(float *p, vec x) { *(loose *)p = x; }
/* LANES bytes as floats. GCC's portable conversion takes bytes one by one. */
static inline vec widened(const int8_t *p) {
#if LANES == 16
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif LANES == 8
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return (vec){p[0], p[1], p[2], p[3]};
#endif
}
/* Fewer floats than a vector has; zeros behind them. */
static inline vec load_some(const float *p, long n) {
    vec x = {};
    memcpy(&x, p, n * sizeof(float));
    return x;
}
static inline vec fill(float x) { return x - (vec){}; }
static inline vec larger(vec a, vec b) { ivec m = a > b; return (vec)((m & (ivec)a) | (~m & (ivec)b)); }
static inline vec smaller(vec a, vec b) { ivec m = a < b; return (vec)((m & (ivec)a) | (~m & (ivec)b)); }
#ifdef __clang__
static inline float sum_of(vec x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}
#else
static inline float sum_of(vec x) { /* each half to the other, until all are the same */
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int far = LANES / 2; far; far /= 2) x += __builtin_shuffle(x, lane ^ far);
    return x[0];
}
#endif

/* e^x to about one unit in the last place; 0 below -87, and no more than e^88 above. Not a number stays one. */
static inline vec exp_of(vec x) {
    vec bounded = smaller(fill(88.0f), larger(fill(-87.3f), x)); /* the second where they do not compare */
    vec scaled = bounded * 1.44269504f;
    const vec magic = fill(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vec whole = scaled + magic;
    ivec power = (ivec)whole << 23;
    whole -= magic;
    vec r = bounded - whole * 0.693359375f; /* ln 2 in two parts */
    r = r + whole * 2.12194440e-4f;
    vec p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec result = (vec)((ivec)p + power);
    ivec tiny = x < -87.3f;
    return (vec)(~tiny & (ivec)result);
}

/* x times the share of a normal distribution below x. Its tail by Abramowitz and Stegun 7.1.26, to 1e-7. */
static inline vec gelu_of(vec x) {
    vec z = larger(x, -x) * 0.70710678f;
    vec t = 1.0f / (z * 0.3275911f + 1.0f);
    vec p = fill(0.5f * 1.061405429f);
    p = p * t - 0.5f * 1.453152027f;
    p = p * t + 0.5f * 1.421413741f;
    p = p * t - 0.5f * 0.284496736f;
    p = p * t + 0.5f * 0.254829592f;
    vec tail = p * t * exp_of(-z * z);
    ivec above = x > 0.0f;
    vec share = (vec)((above & (ivec)(1.0f - tail)) | (~above & (ivec)tail));
    return x * share;
}

/* x / (1 + e^-1.702x) */
static inline vec quick_gelu_of(vec x) { return x / (exp_of(x * -1.702f) + 1.0f); }
