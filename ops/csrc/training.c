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

/* x + bias, or x if bias is NULL. */
static inline vec shifted(const float *x, const float *bias, long at, long left) {
    vec own = load_up_to(x + at, left);
    return bias ? own + load_up_to(bias + at, left) : own;
}

/* With y = x + bias (NULL for 0): result (rows, n) = y[:, :n] * gelu(y[:, n:]) if gated, else gelu(y). x is (rows, 2 n)
 * or (rows, n), bias (2 n) or (n). */
void gelu_forward(long rows, long n, int gated, const float *x, const float *bias, float *result) {
    const float *bias_gate = bias ? bias + gated * n : NULL;
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *left = x + row * n * (1 + gated), *gate = left + gated * n;
        for (long i = 0; i < n; i += LANES) {
            vec g = shifted(gate, bias_gate, i, n - i), density, active = g * normal_cdf(g, &density);
            store_up_to(result + row * n + i, gated ? active * shifted(left, bias, i, n - i) : active, n - i);
        }
    }
}

/* Write the gradient of x to grad_input, and overwrite grad_output (rows, n) with the result of gelu_forward. */
void gelu_backward(
    long rows, long n, int gated, const float *x, const float *bias, float *grad_output, float *grad_input) {
    long width = n * (1 + gated);
    const float *bias_gate = bias ? bias + gated * n : NULL;
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *left = x + row * width, *gate = left + gated * n;
        float *grad_left = grad_input + row * width, *grad_gate = grad_left + gated * n;
        for (long i = 0; i < n; i += LANES) {
            vec g = shifted(gate, bias_gate, i, n - i), density, probability = normal_cdf(g, &density);
            vec gradient = load_up_to(grad_output + row * n + i, n - i), result = g * probability;
            if (gated) {
                vec other = shifted(left, bias, i, n - i);
                store_up_to(grad_left + i, gradient * result, n - i);
                gradient *= other;
                result *= other;
            }
            store_up_to(grad_gate + i, gradient * (probability + g * density), n - i);
            store_up_to(grad_output + row * n + i, result, n - i);
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

/* A hash of x: C. Wellons' lowbias32. */
static inline uint32_t hashed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352dU;
    x = (x ^ x >> 15) * 0x846ca68bU;
    return x ^ x >> 16;
}

/* Dropout: each of n elements is zeroed with this probability, else divided by 1 - probability. The choice depends only
 * on the seed and the element's index, so the backward pass needs no mask. */
void drop(long n, uint64_t seed, double probability, float *x) {
    const long block_size = 4096;
    const uint32_t least = probability * 4294967296.0, low = seed, high = seed >> 32;
    const float kept = 1.0 / (1.0 - probability);
#pragma omp parallel for
    for (long from = 0; from < n; from += block_size) {
        long to = n - from < block_size ? n - from : block_size;
        uint32_t block = hashed(hashed(from / block_size) ^ high);
        for (uint32_t i = 0; i < to; i++) x[from + i] *= hashed(hashed(i ^ low) + block) >= least ? kept : 0.0f;
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
