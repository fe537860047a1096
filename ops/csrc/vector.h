/* Vectors of floats as wide as the processor supports, in GCC's portable notation: AVX-512, AVX2, NEON. */
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
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { return *(const loose *)p; }
static inline void store(float *p, vec x) { *(loose *)p = x; }
/* LANES bytes as floats. GCC's portable conversion is scalar. */
static inline vec widened(const int8_t *p) {
#if LANES == 16
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif LANES == 8
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return (vec){p[0], p[1], p[2], p[3]};
#endif
}
/* n < LANES floats, padded with zeros. */
static inline vec load_some(const float *p, long n) {
#if LANES == 16
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p);
#else
    vec x = {};
    memcpy(&x, p, n * sizeof(float));
    return x;
#endif
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
static inline vec folded(vec a, vec b, int far) {
    vec sum;
    for (int i = 0; i < LANES; i++) sum[i] = i & far ? b[i] + b[i ^ far] : a[i] + a[i ^ far];
    return sum;
}
#else
static inline float sum_of(vec x) { /* add halves until all lanes are equal */
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int far = LANES / 2; far; far /= 2) x += __builtin_shuffle(x, lane ^ far);
    return x[0];
}
/* Each lane and the one `far` from it: of b where `far` is in the lane's number, else of a. */
static inline __attribute__((always_inline)) vec folded(vec a, vec b, int far) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    ivec second = (ivec)((lane & far) != 0) & LANES;
    return __builtin_shuffle(a, b, lane | second) + __builtin_shuffle(a, b, (lane ^ far) | second);
}
#endif

static inline vec either(ivec choose, vec a, vec b) { return (vec)((choose & (ivec)a) | (~choose & (ivec)b)); }
static inline vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }

/* e^x to about one unit in the last place, for x up to 88; 0 below -87.3, where it would be subnormal. NaN stays NaN. */
static inline vec exp_of(vec x) {
    vec bounded = smaller(fill(88.0f), larger(fill(-87.3f), x)); /* NaN compares false: the second operand */
    vec scaled = bounded * 1.44269504f;
    const vec magic = fill(12582912.0f + 127.0f); /* adding 1.5 * 2^23 rounds to a whole number n; 127: see `power` */
    vec whole = scaled + magic;
    vec power = (vec)((ivec)whole << 23); /* 2^n: its exponent is n + 127 */
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
    ivec tiny = x < -87.3f;
    return (vec)(~tiny & (ivec)(p * power));
}

/* The normal distribution's cumulative probability and density at x. The tail is e^(-x^2 / 2) times a polynomial in
 * t = 1 / (1 + p |x|), fitted to a relative error of 2e-8 up to |x| = 14. */
static inline vec normal_cdf(vec x, vec *density) {
    vec t = 1.0f / (1.0f + 0.21f * magnitude(x)), power = exp_of(x * x * -0.5f);
    vec p = fill(-0.0716544717f);
    p = p * t + 0.283579858f;
    p = p * t - 0.330235675f;
    p = p * t + 0.349380852f;
    p = p * t - 0.0939111757f;
    p = p * t + 0.124866618f;
    p = p * t + 0.0691937933f;
    p = p * t + 0.0850686175f;
    p = p * t + 0.0837115908f;
    vec tail = power * t * p;
    *density = power * 0.398942280f;
    return either(x > 0.0f, 1.0f - tail, tail);
}

static inline vec gelu_of(vec x) {
    vec density;
    return x * normal_cdf(x, &density);
}

/* x / (1 + e^-(slope x)), without overflow of the power. */
static inline vec swish_of(vec x, float slope) {
    vec power = exp_of(magnitude(x) * -slope);
    return x * either(x > 0.0f, fill(1.0f), power) / (1.0f + power);
}
