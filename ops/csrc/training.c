/* The elementwise ops of a training step, each in one pass over memory. Results do not depend on the number of
 * threads. */
#include "vector.h"

static inline void store_some(float *p, vec x, long n) { memcpy(p, &x, n * sizeof(float)); }
static inline vec load_up_to(const float *p, long n) { return n >= LANES ? load(p) : load_some(p, n); }
static inline void store_up_to(float *p, vec x, long n) {
    if (n >= LANES)
        store(p, x);
    else
        store_some(p, x, n);
}

/* A hash of x: C. Wellons' lowbias32. */
#define HASH(x) \
    x = (x ^ x >> 16) * 0x7feb352dU; \
    x = (x ^ x >> 15) * 0x846ca68bU; \
    x = x ^ x >> 16;
static inline uint32_t hashed(uint32_t x) { HASH(x) return x; }
static inline uvec hashed_lanes(uvec x) { HASH(x) return x; }

/* Dropout: each element is zeroed with a probability, else divided by 1 - probability. The choice depends only on the
 * seed and the element's index, so the backward pass needs no mask. */
struct dropout {
    uint32_t low, high, least; /* halves of the seed; the least hash of an element that is kept */
    float kept;
};

static inline struct dropout dropout_of(uint64_t seed, double probability) {
    return (struct dropout){seed, seed >> 32, probability * 4294967296.0, 1.0 / (1.0 - probability)};
}

/* x with dropout; `at` is the index of its first element. */
static inline vec dropped(struct dropout d, uint64_t at, vec x) {
    const uint32_t block_size = 4096;
    uvec i;
    if (!d.least) return x * d.kept;
    for (int lane = 0; lane < LANES; lane++) i[lane] = lane;
    i = (i + (uint32_t)at) % block_size;
    uvec block = (uvec){} + hashed(hashed(at / block_size) ^ d.high);
    if (at % block_size > block_size - LANES)
        block = (uvec)either(i < LANES, (vec)((uvec){} + hashed(hashed(at / block_size + 1) ^ d.high)), (vec)block);
    return x * either(hashed_lanes(hashed_lanes(i ^ d.low) + block) >= d.least, fill(d.kept), (vec){});
}

/* Dropout of x (n), in place. */
void drop(long n, uint64_t seed, double probability, float *x) {
    const struct dropout d = dropout_of(seed, probability);
#pragma omp parallel for
    for (long i = 0; i < n; i += LANES) store_up_to(x + i, dropped(d, i, load_up_to(x + i, n - i)), n - i);
}

/* x + bias, or x if bias is NULL. */
static inline vec shifted(const float *x, const float *bias, long at, long left) {
    vec own = load_up_to(x + at, left);
    return bias ? own + load_up_to(bias + at, left) : own;
}

/* With y = x + bias (NULL for 0): result (rows, n) = y[:, :n] * gelu(y[:, n:]) if gated, else gelu(y), with dropout. x is
 * (rows, 2 n) or (rows, n), bias (2 n) or (n). */
void gelu_forward(long rows, long n, int gated, const float *x, const float *bias, uint64_t seed, double probability,
                  float *result) {
    const float *bias_gate = bias ? bias + gated * n : NULL;
    const struct dropout d = dropout_of(seed, probability);
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *left = x + row * n * (1 + gated), *gate = left + gated * n;
        for (long i = 0; i < n; i += LANES) {
            vec g = shifted(gate, bias_gate, i, n - i), density, active = g * normal_cdf(g, &density);
            if (gated) active *= shifted(left, bias, i, n - i);
            store_up_to(result + row * n + i, dropped(d, row * n + i, active), n - i);
        }
    }
}

/* Add x to n elements of sums, unless it is NULL. */
static inline void add_to(float *sums, vec x, long n) {
    if (sums) store_up_to(sums, load_up_to(sums, n) + x, n);
}

/* Write the gradient of x to grad_input, overwrite grad_output (rows, n) with the result of gelu_forward, and add the
 * gradient of bias, in `chunks` parts, to grad_bias (chunks, 2 n or n), which is zero before, or NULL. */
void gelu_backward(long rows, long n, int gated, const float *x, const float *bias, uint64_t seed, double probability,
                   float *grad_output, float *grad_input, long chunks, float *grad_bias) {
    long width = n * (1 + gated);
    const float *bias_gate = bias ? bias + gated * n : NULL;
    const struct dropout d = dropout_of(seed, probability);
#pragma omp parallel for
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const float *left = x + row * width, *gate = left + gated * n;
            float *grad_left = grad_input + row * width, *grad_gate = grad_left + gated * n;
            float *sum_left = grad_bias ? grad_bias + chunk * width : NULL, *sum_gate = sum_left ? sum_left + gated * n : NULL;
            for (long i = 0; i < n; i += LANES) {
                long at = row * n + i, some = n - i;
                vec g = shifted(gate, bias_gate, i, some), density, probability = normal_cdf(g, &density);
                vec gradient = dropped(d, at, load_up_to(grad_output + at, some)), result = g * probability;
                if (gated) {
                    vec other = shifted(left, bias, i, some), own = gradient * result;
                    store_up_to(grad_left + i, own, some);
                    add_to(sum_left ? sum_left + i : NULL, own, some);
                    gradient *= other;
                    result *= other;
                }
                gradient *= probability + g * density;
                store_up_to(grad_gate + i, gradient, some);
                add_to(sum_gate ? sum_gate + i : NULL, gradient, some);
                store_up_to(grad_output + at, dropped(d, at, result), some);
            }
        }
}

/* Overwrite branch (rows, n) with residual + scale * (branch + bias); scale and bias (n) may be NULL for 1 and 0. */
void add_branch(long rows, long n, const float *residual, const float *scale, const float *bias, float *branch) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *r = residual + row * n;
        float *b = branch + row * n;
        for (long i = 0; i < n; i++) b[i] = r[i] + (scale ? scale[i] : 1.0f) * (b[i] + (bias ? bias[i] : 0.0f));
    }
}

/* sums (rows): the dot products of the rows of x and y (rows, n). Then multiply each row of x by its factor (rows). */
void row_dots_and_scale(long rows, long n, const float *y, const float *factor, float *x, float *sums) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *own = y + row * n;
        vec sum = {}, by = fill(factor[row]);
        for (long i = 0; i < n; i += LANES) {
            vec a = load_up_to(x + row * n + i, n - i);
            sum += a * load_up_to(own + i, n - i);
            store_up_to(x + row * n + i, a * by, n - i);
        }
        sums[row] = sum_of(sum);
    }
}

#ifdef __clang__
static inline vec swapped(vec x) {
    vec y;
    for (int i = 0; i < LANES; i++) y[i] = x[i ^ 1];
    return y;
}
#else
static inline vec swapped(vec x) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i ^ 1;
    return __builtin_shuffle(x, lane);
}
#endif

/* 1 over the root mean square of x (width); eps is added to the mean square. */
static inline float inverse_rms(const float *x, long width, float eps) {
    vec sum = {};
    for (long i = 0; i < width; i += LANES) {
        vec own = load_up_to(x + i, width - i);
        sum += own * own;
    }
    return 1.0f / sqrtf(sum_of(sum) / width + eps);
}

/* Queries and keys of each head, normalised and turned; values as they are. qkv and out (rows, 3, heads, width). scales
 * (2, width) of queries and keys, or NULL: no norm. Channel c of position p = row % positions becomes cosine[p, c] times
 * itself plus sine[p, c] times the other of its pair; cosine and sine (positions, width) or NULL. */
void heads_forward(long rows, long positions, long heads, long width, float eps, const float *scales,
                   const float *cosine, const float *sine, const float *qkv, float *out) {
    long part_size = heads * width;
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *c = cosine + row % positions * width, *s = sine + row % positions * width;
        for (long part = 0; part < 2; part++)
            for (long h = 0; h < heads; h++) {
                long at = (row * 3 + part) * part_size + h * width;
                float by = scales ? inverse_rms(qkv + at, width, eps) : 1;
                for (long i = 0; i < width; i += LANES) {
                    long left = width - i;
                    vec x = load_up_to(qkv + at + i, left) * by;
                    if (scales) x *= load_up_to(scales + part * width + i, left);
                    if (cosine) x = x * load_up_to(c + i, left) + swapped(x) * load_up_to(s + i, left);
                    store_up_to(out + at + i, x, left);
                }
            }
        memcpy(out + (row * 3 + 2) * part_size, qkv + (row * 3 + 2) * part_size, part_size * sizeof(float));
    }
}

/* Write the gradient of qkv to grad_input, and that of scales, in `chunks` parts to be added, to grad_scales (chunks, 2,
 * width), which is zero before. */
void heads_backward(long rows, long positions, long heads, long width, float eps, const float *scales,
                    const float *cosine, const float *sine, const float *qkv, const float *grad_output,
                    float *grad_input, long chunks, float *grad_scales) {
    long part_size = heads * width;
#pragma omp parallel for
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const float *c = cosine + row % positions * width, *s = sine + row % positions * width;
            for (long part = 0; part < 2; part++)
                for (long h = 0; h < heads; h++) {
                    long at = (row * 3 + part) * part_size + h * width;
                    const float *x = qkv + at, *own = scales + part * width;
                    float *grad = grad_input + at, *grad_scale = grad_scales + (chunk * 2 + part) * width;
                    float by = scales ? inverse_rms(x, width, eps) : 1;
                    vec sum = {};
                    for (long i = 0; i < width; i += LANES) {
                        long left = width - i;
                        vec g = load_up_to(grad_output + at + i, left);
                        if (cosine) g = g * load_up_to(c + i, left) + swapped(g * load_up_to(s + i, left));
                        if (scales) {
                            vec normed = load_up_to(x + i, left) * by;
                            store_up_to(grad_scale + i, load_up_to(grad_scale + i, left) + g * normed, left);
                            g *= load_up_to(own + i, left);
                            sum += g * normed;
                        }
                        store_up_to(grad + i, g, left);
                    }
                    float mean = sum_of(sum) / width;
                    for (long i = 0; scales && i < width; i += LANES) {
                        long left = width - i;
                        vec normed = load_up_to(x + i, left) * by;
                        store_up_to(grad + i, (load_up_to(grad + i, left) - normed * mean) * by, left);
                    }
                }
            long values = (row * 3 + 2) * part_size;
            memcpy(grad_input + values, grad_output + values, part_size * sizeof(float));
        }
}

/* The Euclidean norm of several tensors together, `sizes` floats each. sums: scratch, one double per tensor. */
float norm(long count, const float *const *tensors, const long *sizes, double *sums) {
#pragma omp parallel for schedule(dynamic)
    for (long i = 0; i < count; i++) {
        const float *x = tensors[i];
        double total = 0;
        for (long from = 0; from < sizes[i]; from += 256 * LANES) { /* in blocks: a long float sum would lose small terms */
            long to = sizes[i] - from < 256 * LANES ? sizes[i] : from + 256 * LANES, k = from;
            vec sum[4] = {};
            for (; k + 4 * LANES <= to; k += 4 * LANES)
                for (int j = 0; j < 4; j++) {
                    vec a = load(x + k + j * LANES);
                    sum[j] += a * a;
                }
            for (; k < to; k += LANES) {
                vec a = load_up_to(x + k, to - k);
                sum[0] += a * a;
            }
            total += sum_of(sum[0] + sum[1] + (sum[2] + sum[3]));
        }
        sums[i] = total;
    }
    double total = 0;
    for (long i = 0; i < count; i++) total += sums[i];
    return sqrt(total);
}
