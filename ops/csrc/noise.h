/* Gumbel noise of whole numbers, the same bits as ops/noise.py gives on any device: a fixed sequence of float32 operations,
 * none of which may be fused with another. */

/* Hides a result from the compiler, which would make one operation of a multiplication and an addition. */
static inline vec rounded(vec x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__AVX2__)
    __asm__("" : "+x"(x));
#else
    __asm__("" : "+w"(x));
#endif
    return x;
}

/* Of `state`, state + GOLDEN, ...: the upper 31 bits of the numbers that SplitMix64 gives next. */
#define GOLDEN 0x9E3779B97F4A7C15u
static inline ivec numbers_from(uint64_t state) {
    int32_t numbers[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        uint64_t z = state + (lane + 1) * (uint64_t)GOLDEN;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        numbers[lane] = (int32_t)((z ^ (z >> 31)) >> 33);
    }
    ivec result;
    memcpy(&result, numbers, sizeof result);
    return result;
}

/* log x to about 1e-5 of it: the exponent, and a polynomial in t = mantissa - 1, between the roots of 1/2 and 2. `t` is
 * given where the exponent is 0, because x may have lost bits of it. */
static inline vec rough_log(vec x, vec t) {
    ivec exponent = ((ivec)x - 0x3f3504f3) >> 23;
    vec own = (vec)((ivec)x - (exponent << 23)) - 1.0f;
    t = either(exponent == 0, t, own);
    vec p = fill(-0.14292079210281372f);
    p = rounded(p * t) + 0.22055938839912415f;
    p = rounded(p * t) - 0.254032701253891f;
    p = rounded(p * t) + 0.33258023858070374f;
    p = rounded(p * t) - 0.4999021887779236f;
    p = rounded(p * t) + 1.000004529953003f;
    return rounded(p * t) + rounded(__builtin_convertvector(exponent, vec) * 0.6931471824645996f);
}

/* -log(-log(1 - v)) for v = (number + 1/2) / 2^31, below 1. */
static inline vec gumbel_of(ivec numbers) {
    vec v = rounded(rounded(__builtin_convertvector(numbers, vec) + 0.5f) * 4.656612873077393e-10f);
    v = smaller(v, fill(0.999999940395355224609375f));
    vec x = rounded(1.0f - v), exponential = rounded(-rough_log(x, -v));
    return -rough_log(exponential, exponential - 1.0f);
}
