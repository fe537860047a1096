/* Causal attention for training, without copies of queries, keys and values in memory: a text part visible to all, then
 * codes that see the earlier ones of their own group (a row or column of the grid). Without codes: plain causal.
 *
 * One thread takes one head of one sample at a time, which fits into the second-level cache. Letters: L positions, P of
 * the text part, G side of the grid, H heads, K width of a head. */
#include <omp.h>

#include "matmul.h"

/* About as many queries' attention weights are held at a time. */
#define CHUNK 48

typedef struct {
    long batch, length, heads, width, text, grid, by_column;
} Shape;

/* Layout of a head's matrices: text positions, then the codes, group by group. Transposed keys have their own layout,
 * where text and groups are padded to whole vectors. */
typedef struct {
    Shape shape;
    long width, text, group, keys; /* padded; keys: row stride of transposed keys */
    long rows, row;                /* maximum queries in a chunk, floats in a row of weights */
    long matrix, transposed;       /* floats in a matrix (L, K), and (K, keys) */
} Plan;

static Plan plan_of(const Shape *shape) {
    Plan p = {.shape = *shape};
    p.width = rounded(shape->width);
    p.text = rounded(shape->text);
    p.group = rounded(shape->grid);
    p.keys = p.text + shape->grid * p.group;
    if (p.keys / LANES % 2 == 0) p.keys += LANES; /* or rows would evict each other from the cache */
    long groups = shape->grid ? (CHUNK + shape->grid - 1) / shape->grid : 0;
    p.rows = groups * shape->grid > CHUNK ? groups * shape->grid : CHUNK;
    p.row = p.text + p.group;
    p.matrix = (shape->length + 2 * LANES) * p.width;
    p.transposed = shape->width * p.keys;
    return p;
}

/* Floats of scratch memory per thread. */
long attention_scratch(const Shape *shape, int backward) {
    Plan p = plan_of(shape);
    return (backward ? 8 : 3) * p.matrix + (backward ? 2 : 1) * p.transposed + (backward ? 2 : 1) * p.rows * p.row +
           p.rows * p.width + 16 * LANES;
}

/* The row of the sequence at row i of a head's matrix. */
static inline long source(const Shape *shape, long i) {
    if (i < shape->text || !shape->by_column) return i;
    long code = i - shape->text;
    return shape->text + code % shape->grid * shape->grid + code / shape->grid;
}

static void gather(const Plan *p, const float *from, long row, float factor, float *to) {
    for (long i = 0; i < p->shape.length; i++) {
        const float *x = from + source(&p->shape, i) * row;
        float *y = to + i * p->width;
        long k = 0;
        for (; k + LANES <= p->shape.width; k += LANES) store(y + k, load(x + k) * factor);
        for (; k < p->shape.width; k++) y[k] = x[k] * factor;
        for (; k < p->width; k++) y[k] = 0;
    }
    memset(to + p->shape.length * p->width, 0, 2 * LANES * p->width * sizeof(float));
}

static void scatter(const Plan *p, const float *from, float factor, float *to, long row) {
    for (long i = 0; i < p->shape.length; i++) {
        const float *x = from + i * p->width;
        float *y = to + source(&p->shape, i) * row;
        long k = 0;
        for (; k + LANES <= p->shape.width; k += LANES) store(y + k, load(x + k) * factor);
        for (; k < p->shape.width; k++) y[k] = x[k] * factor;
    }
}

/* Keys or values transposed, (K, keys). Padding is never used. */
static void transpose_keys(const Plan *p, const float *from, float *to) {
    const Shape *s = &p->shape;
    transpose(s->text, s->width, from, p->width, to, p->keys);
    for (long g = 0; g < s->grid; g++)
        transpose(
            min(s->grid, s->length - s->text - g * s->grid), s->width, from + (s->text + g * s->grid) * p->width,
            p->width, to + p->text + g * p->group, p->keys);
}

/* Queries first .. first + count of a head's matrices: text, or `groups` whole groups of codes from `group` on. */
typedef struct {
    long first, count, keys, group, groups; /* keys: text keys that any of them sees */
} Chunk;

static Chunk chunk_at(const Plan *p, long first) {
    const Shape *s = &p->shape;
    if (first < s->text) {
        long count = min(p->rows, s->text - first);
        return (Chunk){first, count, first + count, 0, 0};
    }
    long group = (first - s->text) / s->grid, groups = min(p->rows / s->grid, s->grid - group);
    return (Chunk){first, min(groups * s->grid, s->length - first), s->text, group, groups};
}

/* Queries in group g < groups of a chunk; the last code of the grid is absent. */
static inline long size_of(const Plan *p, const Chunk *c, long g) {
    return min(p->shape.grid, c->count - g * p->shape.grid);
}

/* x (count, K) times transposed keys or values, for the keys that each query may see: (count, row). */
static void scores_of(const Plan *p, const Chunk *c, const float *x, const float *transposed, float *result) {
    long width = p->shape.width, grid = p->shape.grid;
    matmul(c->count, rounded(c->keys), width, x, p->width, 1, transposed, p->keys, result, p->row, 0);
    for (long g = 0; g < c->groups; g++)
        matmul(
            size_of(p, c, g), p->group, width, x + g * grid * p->width, p->width, 1,
            transposed + p->text + (c->group + g) * p->group, p->keys, result + g * grid * p->row + p->text, p->row, 0);
}

/* Weights (count, row) times keys or values: (count, K). */
static void weighted_sum(const Plan *p, const Chunk *c, const float *weights, const float *matrix, float *result) {
    long grid = p->shape.grid;
    matmul(c->count, p->width, c->keys, weights, p->row, 1, matrix, p->width, result, p->width, 0);
    for (long g = 0; g < c->groups; g++) {
        long size = size_of(p, c, g);
        matmul(
            size, p->width, size, weights + g * grid * p->row + p->text, p->row, 1,
            matrix + (c->first + g * grid) * p->width, p->width, result + g * grid * p->width, p->width, 1);
    }
}

/* The gradient of keys or values (L, K) from x (count, K) and weights, or the gradient of scores, (count, row). */
static void add_key_gradient(const Plan *p, const Chunk *c, const float *weights, const float *x, float *matrix) {
    long grid = p->shape.grid;
    matmul(c->keys, p->width, c->count, weights, 1, p->row, x, p->width, matrix, p->width, 1);
    for (long g = 0; g < c->groups; g++) {
        long size = size_of(p, c, g);
        matmul(
            size, p->width, size, weights + g * grid * p->row + p->text, 1, p->row, x + g * grid * p->width, p->width,
            matrix + (c->first + g * grid) * p->width, p->width, 0);
    }
}

static const int32_t NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Set all but the first `valid` of n scores to -inf. Returns the maximum of each lane. `not_finite` becomes NaN if a
 * score is not finite: comparisons would lose it. */
static inline vec largest(float *scores, long n, long valid, vec *not_finite) {
    vec maximum = fill(-INFINITY);
    for (long i = 0; i < n; i += LANES) {
        vec x = load(scores + i);
        if (i + LANES > valid) {
            ivec lane = *(const ivec *)memcpy(&(ivec){}, NUMBERS, sizeof(ivec)), seen = lane < (int32_t)(valid - i);
            x = (vec)((seen & (ivec)x) | (~seen & (ivec)fill(-INFINITY)));
            *not_finite += (vec)(seen & (ivec)(x * 0.0f));
            store(scores + i, x);
        } else
            *not_finite += x * 0.0f;
        maximum = larger(x, maximum);
    }
    return maximum;
}

static inline float largest_of(vec x) {
#if defined(__clang__)
    float maximum = x[0];
    for (int i = 1; i < LANES; i++) maximum = x[i] > maximum ? x[i] : maximum;
    return maximum;
#else
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int far = LANES / 2; far; far /= 2) x = larger(__builtin_shuffle(x, lane ^ far), x);
    return x[0];
#endif
}

static inline vec exponentials(float *scores, long n, float maximum) {
    vec sum = {};
    for (long i = 0; i < n; i += LANES) {
        vec e = exp_of(load(scores + i) - maximum);
        store(scores + i, e);
        sum += e;
    }
    return sum;
}

/* Softmax of scores (count, row) in place, 0 for masked keys. */
static void softmax(const Plan *p, const Chunk *c, float *scores) {
    long text = rounded(c->keys), group = c->groups ? p->group : 0;
    for (long i = 0; i < c->count; i++) {
        float *own = scores + i * p->row, *near = own + p->text;
        vec not_finite = {};
        vec lanes = largest(own, text, group ? p->shape.text : c->first + i + 1, &not_finite);
        if (group) lanes = larger(lanes, largest(near, group, i % p->shape.grid + 1, &not_finite));
        float maximum = largest_of(lanes);
        vec sum = exponentials(own, text, maximum) + exponentials(near, group, maximum) + not_finite;
        vec part = fill(1.0f / sum_of(sum));
        for (long k = 0; k < text; k += LANES) store(own + k, load(own + k) * part);
        for (long k = 0; k < group; k += LANES) store(near + k, load(near + k) * part);
    }
}

/* The gradient of scores: w (d - sum(w d)), where sum(w d) is sum(gradient * result). In place of d. */
static void softmax_backward(
    const Plan *p, const Chunk *c, const float *weights, const float *gradient, const float *result, float *d) {
    long text = rounded(c->keys), group = c->groups ? p->group : 0;
    for (long i = 0; i < c->count; i++) {
        const float *w = weights + i * p->row;
        float *x = d + i * p->row;
        vec lanes = {};
        for (long k = 0; k < p->width; k += LANES)
            lanes += load(gradient + i * p->width + k) * load(result + i * p->width + k);
        vec sum = fill(sum_of(lanes));
        for (long k = 0; k < text; k += LANES) store(x + k, load(w + k) * (load(x + k) - sum));
        for (long k = p->text; k < p->text + group; k += LANES) store(x + k, load(w + k) * (load(x + k) - sum));
    }
}

static void forward_head(const Plan *p, const float *x, float *result, float *scratch) {
    const Shape *s = &p->shape;
    long inner = s->heads * s->width;
    float *query = scratch, *key = query + p->matrix, *value = key + p->matrix, *transposed = value + p->matrix;
    float *weights = transposed + p->transposed;
    gather(p, x, 3 * inner, 1.0f / sqrtf(s->width), query);
    gather(p, x + inner, 3 * inner, 1, key);
    gather(p, x + 2 * inner, 3 * inner, 1, value);
    transpose_keys(p, key, transposed);
    for (long first = 0; first < s->length;) {
        Chunk c = chunk_at(p, first);
        float *own = query + first * p->width; /* the result overwrites queries that are no longer needed */
        scores_of(p, &c, own, transposed, weights);
        softmax(p, &c, weights);
        weighted_sum(p, &c, weights, value, own);
        first += c.count;
    }
    scatter(p, query, 1, result, inner);
}

static void backward_head(const Plan *p, const float *x, float *grad_output, float *grad_qkv, float *scratch) {
    const Shape *s = &p->shape;
    long inner = s->heads * s->width, size = p->matrix;
    float factor = 1.0f / sqrtf(s->width);
    float *query = scratch, *key = query + size, *value = key + size, *gradient = value + size, *result = gradient + size;
    float *grad_query = result + size, *grad_key = grad_query + size, *grad_value = grad_key + size;
    float *transposed_key = grad_value + size, *transposed_value = transposed_key + p->transposed;
    float *weights = transposed_value + p->transposed, *scores = weights + p->rows * p->row;
    gather(p, x, 3 * inner, factor, query);
    gather(p, x + inner, 3 * inner, 1, key);
    gather(p, x + 2 * inner, 3 * inner, 1, value);
    gather(p, grad_output, inner, 1, gradient);
    transpose_keys(p, key, transposed_key);
    transpose_keys(p, value, transposed_value);
    memset(grad_key, 0, s->text * p->width * sizeof(float));
    memset(grad_value, 0, s->text * p->width * sizeof(float));
    for (long first = 0; first < s->length;) {
        Chunk c = chunk_at(p, first);
        long at = first * p->width;
        scores_of(p, &c, query + at, transposed_key, weights);
        softmax(p, &c, weights);
        weighted_sum(p, &c, weights, value, result + at);
        add_key_gradient(p, &c, weights, gradient + at, grad_value);
        scores_of(p, &c, gradient + at, transposed_value, scores);
        softmax_backward(p, &c, weights, gradient + at, result + at, scores);
        weighted_sum(p, &c, scores, key, grad_query + at);
        add_key_gradient(p, &c, scores, query + at, grad_key);
        first += c.count;
    }
    scatter(p, grad_query, factor, grad_qkv, 3 * inner);
    scatter(p, grad_key, 1, grad_qkv + inner, 3 * inner);
    scatter(p, grad_value, 1, grad_qkv + 2 * inner, 3 * inner);
    scatter(p, result, 1, grad_output, inner);
}

/* qkv (B, L, 3 * H * K) -> result (B, L, H * K). scratch: `per_thread` floats per thread, from `attention_scratch`. */
void attention_forward(
    const Shape *shape, const float *qkv, float *result, float *scratch, long per_thread, int threads) {
    Plan p = plan_of(shape);
    long inner = shape->heads * shape->width;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long i = 0; i < shape->batch * shape->heads; i++) {
        long row = i / shape->heads * shape->length, column = i % shape->heads * shape->width;
        forward_head(
            &p, qkv + row * 3 * inner + column, result + row * inner + column,
            scratch + omp_get_thread_num() * per_thread);
    }
}

/* Write the gradient of qkv to grad_qkv, and overwrite grad_output with the result of `attention_forward`. */
void attention_backward(
    const Shape *shape, const float *qkv, float *grad_output, float *grad_qkv, float *scratch, long per_thread,
    int threads) {
    Plan p = plan_of(shape);
    long inner = shape->heads * shape->width;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long i = 0; i < shape->batch * shape->heads; i++) {
        long row = i / shape->heads * shape->length, column = i % shape->heads * shape->width;
        backward_head(
            &p, qkv + row * 3 * inner + column, grad_output + row * inner + column, grad_qkv + row * 3 * inner + column,
            scratch + omp_get_thread_num() * per_thread);
    }
}
