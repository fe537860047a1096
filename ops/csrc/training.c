/* What surrounds the matrix products of a training step, each in one pass over memory. Results do not depend on the
 * number of threads. */
#include "vector.h"

static inline void store_some(float *p, vec x, long n) { memcpy(p, &x, n * sizeof(float)); }
static inline vec load_up_to(const float *p, long n) { return n >= LANES ? load(p) : load_some(p, n); }
static inline void store_up_to(float *p, vec x, long n) {
    if (n >= LANES)
        store(p, x);
    else
        store_some(p, x, n);
}

/* x, or x + bias where there is one. */
static inline vec shifted(const float *x, const float *bias, long at, long left) {
    vec own = load_up_to(x + at, left);
    return bias ? own + load_up_to(bias + at, left) : own;
}

/* With y = x + bias (NULL for 0): result (rows, n) = y[:, :n] * gelu(y[:, n:]), or gelu(y) where there is no gate. x is
 * (rows, 2 n) or (rows, n), and so is bias wide. */
void gelu_forward(long rows, long n, int gated, const float *x, const float *bias, float *result) {
    const float *bias_gate = bias ? bias + gated * n : NULL;
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *left = x + row * n * (1 + gated), *gate = left + gated * n;
        for (long i = 0; i < n; i += LANES) {
            vec g = shifted(gate, bias_gate, i, n - i), density, active = g * share_below(g, &density);
            store_up_to(result + row * n + i, gated ? active * shifted(left, bias, i, n - i) : active, n - i);
        }
    }
}

/* incoming (rows, n), the gradient of what gelu_forward gives, becomes that result; for_x gets the gradient for x. */
void gelu_backward(
    long rows, long n, int gated, const float *x, const float *bias, float *incoming, float *for_x) {
    long width = n * (1 + gated);
    const float *bias_gate = bias ? bias + gated * n : NULL;
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *left = x + row * width, *gate = left + gated * n;
        float *for_left = for_x + row * width, *for_gate = for_left + gated * n;
        for (long i = 0; i < n; i += LANES) {
            vec g = shifted(gate, bias_gate, i, n - i), density, share = share_below(g, &density);
            vec gradient = load_up_to(incoming + row * n + i, n - i), result = g * share;
            if (gated) {
                vec other = shifted(left, bias, i, n - i);
                store_up_to(for_left + i, gradient * result, n - i);
                gradient *= other;
                result *= other;
            }
            store_up_to(for_gate + i, gradient * (share + g * density), n - i);
            store_up_to(incoming + row * n + i, result, n - i);
        }
    }
}

/* branch (rows, n) becomes residual + scale * (branch + bias); scale and bias (n) may be NULL for 1 and 0. */
void add_branch(long rows, long n, const float *residual, const float *scale, const float *bias, float *branch) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const float *r = residual + row * n;
        float *b = branch + row * n;
        for (long i = 0; i < n; i++) b[i] = r[i] + (scale ? scale[i] : 1.0f) * (b[i] + (bias ? bias[i] : 0.0f));
    }
}

/* sums (rows) of a row's products of x and y (rows, n); then each row of x is multiplied by its factor (rows). */
void sum_products_and_scale(long rows, long n, const float *y, const float *factor, float *x, float *sums) {
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

/* A number whose bits hang on all bits of x: C. Wellons' lowbias32. */
static inline uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352dU;
    x = (x ^ x >> 15) * 0x846ca68bU;
    return x ^ x >> 16;
}

/* Dropout: each of n numbers becomes 0 with so much probability, else it is divided by the rest of it. What becomes of
 * a number hangs on the seed and its place only, so that the backward pass needs no mask. */
void drop(long n, uint64_t seed, double probability, float *x) {
    const long some = 4096;
    const uint32_t least = probability * 4294967296.0, low = seed, high = seed >> 32;
    const float kept = 1.0 / (1.0 - probability);
#pragma omp parallel for
    for (long from = 0; from < n; from += some) {
        long to = n - from < some ? n - from : some;
        uint32_t block = mixed(mixed(from / some) ^ high);
        for (uint32_t i = 0; i < to; i++) x[from + i] *= mixed(mixed(i ^ low) + block) >= least ? kept : 0.0f;
    }
}

/* The square root of the sum of squares of several tensors, `sizes` floats each. sums: a number for each tensor. */
float norm(long count, const float *const *tensors, const long *sizes, double *sums) {
#pragma omp parallel for schedule(dynamic)
    for (long i = 0; i < count; i++) {
        const float *x = tensors[i];
        double total = 0;
        for (long from = 0; from < sizes[i]; from += 256 * LANES) { /* floats would lose the small ones in a long sum */
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
