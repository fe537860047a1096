/* Causal attention for training, without copies of queries, keys and values: a text part that all see, then codes that
 * see the earlier ones of their own group (a row or column of the grid). With no codes it is plain causal attention.
 *
 * One thread takes one head of one sample at a time: all of it fits into the processor's second cache. Letters: L
 * positions, P of the text part, G side of the grid, H heads, K width of a head. */
#include <omp.h>

#include "product.h"

/* Queries whose weights are held at the same time, about. */
#define CHUNK 48

typedef struct {
    long batch, length, heads, width, text, grid, by_column;
} Shape;

/* Positions in the order in which a head's matrices hold them, groups of codes one after the other: text, then for each
 * group its codes. Keys have places of their own, where text and groups are padded to whole vectors. */
typedef struct {
    Shape of;
    long width, text, group, places; /* padded; places: all keys */
    long rows, row;                  /* most queries in a chunk, floats in a row of weights */
    long matrix, turned;             /* floats in a matrix (L, K), and (K, places) */
} Plan;

static Plan plan_of(const Shape *shape) {
    Plan p = {.of = *shape};
    p.width = rounded(shape->width);
    p.text = rounded(shape->text);
    p.group = rounded(shape->grid);
    p.places = p.text + shape->grid * p.group;
    if (p.places / LANES % 2 == 0) p.places += LANES; /* rows at equal places of the cache would throw each other out */
    long groups = shape->grid ? (CHUNK + shape->grid - 1) / shape->grid : 0;
    p.rows = groups * shape->grid > CHUNK ? groups * shape->grid : CHUNK;
    p.row = p.text + p.group;
    p.matrix = (shape->length + 2 * LANES) * p.width;
    p.turned = shape->width * p.places;
    return p;
}

/* Floats of scratch memory that a thread needs. */
long attention_scratch(const Shape *shape, int backward) {
    Plan p = plan_of(shape);
    return (backward ? 8 : 3) * p.matrix + (backward ? 2 : 1) * p.turned + (backward ? 2 : 1) * p.rows * p.row +
           p.rows * p.width + 16 * LANES;
}

/* The row of the sequence that lies at position i of a head's matrix. */
static inline long source(const Shape *shape, long i) {
    if (i < shape->text || !shape->by_column) return i;
    long code = i - shape->text;
    return shape->text + code % shape->grid * shape->grid + code / shape->grid;
}

static void gather(const Plan *p, const float *from, long row, float factor, float *to) {
    for (long i = 0; i < p->of.length; i++) {
        const float *x = from + source(&p->of, i) * row;
        float *y = to + i * p->width;
        long k = 0;
        for (; k + LANES <= p->of.width; k += LANES) store(y + k, load(x + k) * factor);
        for (; k < p->of.width; k++) y[k] = x[k] * factor;
        for (; k < p->width; k++) y[k] = 0;
    }
    memset(to + p->of.length * p->width, 0, 2 * LANES * p->width * sizeof(float));
}

static void scatter(const Plan *p, const float *from, float factor, float *to, long row) {
    for (long i = 0; i < p->of.length; i++) {
        const float *x = from + i * p->width;
        float *y = to + source(&p->of, i) * row;
        long k = 0;
        for (; k + LANES <= p->of.width; k += LANES) store(y + k, load(x + k) * factor);
        for (; k < p->of.width; k++) y[k] = x[k] * factor;
    }
}

/* Keys or values the other way round, (K, places). What lies in padded places is never made use of. */
static void turn(const Plan *p, const float *from, float *to) {
    const Shape *s = &p->of;
    transpose(s->text, s->width, from, p->width, to, p->places);
    for (long g = 0; g < s->grid; g++)
        transpose(
            least(s->grid, s->length - s->text - g * s->grid), s->width, from + (s->text + g * s->grid) * p->width,
            p->width, to + p->text + g * p->group, p->places);
}

/* Some queries: positions first .. first + count of a head's matrices. Codes are whole groups from `group` on. */
typedef struct {
    long first, count, keys, group, groups; /* keys: of the text, those that any of them sees */
} Chunk;

static Chunk chunk_at(const Plan *p, long first) {
    const Shape *s = &p->of;
    if (first < s->text) {
        long count = least(p->rows, s->text - first);
        return (Chunk){first, count, first + count, 0, 0};
    }
    long group = (first - s->text) / s->grid, groups = least(p->rows / s->grid, s->grid - group);
    return (Chunk){first, least(groups * s->grid, s->length - first), s->text, group, groups};
}

/* Queries in group g of a chunk, 0 .. groups; the last code of the grid is absent. */
static inline long size_of(const Plan *p, const Chunk *c, long g) {
    return least(p->of.grid, c->count - g * p->of.grid);
}

/* x (count, K) times what lies turned, for all keys that each query may see: (count, row). */
static void on_keys(const Plan *p, const Chunk *c, const float *x, const float *turned, float *result) {
    long width = p->of.width, grid = p->of.grid;
    product(c->count, rounded(c->keys), width, x, p->width, 1, turned, p->places, result, p->row, 0);
    for (long g = 0; g < c->groups; g++)
        product(
            size_of(p, c, g), p->group, width, x + g * grid * p->width, p->width, 1,
            turned + p->text + (c->group + g) * p->group, p->places, result + g * grid * p->row + p->text, p->row, 0);
}

/* Weights (count, row) times keys or values: (count, K). */
static void over_keys(const Plan *p, const Chunk *c, const float *weights, const float *matrix, float *result) {
    long grid = p->of.grid;
    product(c->count, p->width, c->keys, weights, p->row, 1, matrix, p->width, result, p->width, 0);
    for (long g = 0; g < c->groups; g++) {
        long size = size_of(p, c, g);
        product(
            size, p->width, size, weights + g * grid * p->row + p->text, p->row, 1,
            matrix + (c->first + g * grid) * p->width, p->width, result + g * grid * p->width, p->width, 1);
    }
}

/* The gradient for keys or values (L, K) from weights (count, row), or the gradient for scores, and x (count, K). */
static void to_keys(const Plan *p, const Chunk *c, const float *weights, const float *x, float *matrix) {
    long grid = p->of.grid;
    product(c->keys, p->width, c->count, weights, 1, p->row, x, p->width, matrix, p->width, 1);
    for (long g = 0; g < c->groups; g++) {
        long size = size_of(p, c, g);
        product(
            size, p->width, size, weights + g * grid * p->row + p->text, 1, p->row, x + g * grid * p->width, p->width,
            matrix + (c->first + g * grid) * p->width, p->width, 0);
    }
}

static const int32_t NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* The first `valid` of n scores may be seen: the rest becomes -inf. Returns the largest of each lane. `odd` gets a nan
 * if one of them is no number: comparisons would lose it. */
static inline vec largest(float *scores, long n, long valid, vec *odd) {
    vec most = fill(-INFINITY);
    for (long i = 0; i < n; i += LANES) {
        vec x = load(scores + i);
        if (i + LANES > valid) {
            ivec lane = *(const ivec *)memcpy(&(ivec){}, NUMBERS, sizeof(ivec)), seen = lane < (int32_t)(valid - i);
            x = (vec)((seen & (ivec)x) | (~seen & (ivec)fill(-INFINITY)));
            *odd += (vec)(seen & (ivec)(x * 0.0f));
            store(scores + i, x);
        } else
            *odd += x * 0.0f;
        most = larger(x, most);
    }
    return most;
}

static inline float largest_of(vec x) {
#if defined(__clang__)
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#else
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int far = LANES / 2; far; far /= 2) x = larger(__builtin_shuffle(x, lane ^ far), x);
    return x[0];
#endif
}

static inline vec exponentials(float *scores, long n, float most) {
    vec sum = {};
    for (long i = 0; i < n; i += LANES) {
        vec e = exp_of(load(scores + i) - most);
        store(scores + i, e);
        sum += e;
    }
    return sum;
}

/* Scores (count, row) become weights, 0 for what may not be seen. */
static void weigh(const Plan *p, const Chunk *c, float *scores) {
    long text = rounded(c->keys), group = c->groups ? p->group : 0;
    for (long i = 0; i < c->count; i++) {
        float *own = scores + i * p->row, *near = own + p->text;
        vec odd = {};
        vec lanes = largest(own, text, group ? p->of.text : c->first + i + 1, &odd);
        if (group) lanes = larger(lanes, largest(near, group, i % p->of.grid + 1, &odd));
        float most = largest_of(lanes);
        vec sum = exponentials(own, text, most) + exponentials(near, group, most) + odd;
        vec part = fill(1.0f / sum_of(sum));
        for (long k = 0; k < text; k += LANES) store(own + k, load(own + k) * part);
        for (long k = 0; k < group; k += LANES) store(near + k, load(near + k) * part);
    }
}

/* The gradient for scores: w (d - sum(w d)), where sum(w d) is sum(gradient * result). In the place of d. */
static void unweigh(
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
    const Shape *s = &p->of;
    long inner = s->heads * s->width;
    float *query = scratch, *key = query + p->matrix, *value = key + p->matrix, *turned = value + p->matrix;
    float *weights = turned + p->turned;
    gather(p, x, 3 * inner, 1.0f / sqrtf(s->width), query);
    gather(p, x + inner, 3 * inner, 1, key);
    gather(p, x + 2 * inner, 3 * inner, 1, value);
    turn(p, key, turned);
    for (long first = 0; first < s->length;) {
        Chunk c = chunk_at(p, first);
        float *own = query + first * p->width; /* the result takes the place of queries that nobody asks for any more */
        on_keys(p, &c, own, turned, weights);
        weigh(p, &c, weights);
        over_keys(p, &c, weights, value, own);
        first += c.count;
    }
    scatter(p, query, 1, result, inner);
}

static void backward_head(const Plan *p, const float *x, float *incoming, float *for_x, float *scratch) {
    const Shape *s = &p->of;
    long inner = s->heads * s->width, size = p->matrix;
    float factor = 1.0f / sqrtf(s->width);
    float *query = scratch, *key = query + size, *value = key + size, *gradient = value + size, *result = gradient + size;
    float *for_query = result + size, *for_key = for_query + size, *for_value = for_key + size;
    float *turned_key = for_value + size, *turned_value = turned_key + p->turned;
    float *weights = turned_value + p->turned, *scores = weights + p->rows * p->row;
    gather(p, x, 3 * inner, factor, query);
    gather(p, x + inner, 3 * inner, 1, key);
    gather(p, x + 2 * inner, 3 * inner, 1, value);
    gather(p, incoming, inner, 1, gradient);
    turn(p, key, turned_key);
    turn(p, value, turned_value);
    memset(for_key, 0, s->text * p->width * sizeof(float));
    memset(for_value, 0, s->text * p->width * sizeof(float));
    for (long first = 0; first < s->length;) {
        Chunk c = chunk_at(p, first);
        long at = first * p->width;
        on_keys(p, &c, query + at, turned_key, weights);
        weigh(p, &c, weights);
        over_keys(p, &c, weights, value, result + at);
        to_keys(p, &c, weights, gradient + at, for_value);
        on_keys(p, &c, gradient + at, turned_value, scores);
        unweigh(p, &c, weights, gradient + at, result + at, scores);
        over_keys(p, &c, scores, key, for_query + at);
        to_keys(p, &c, scores, query + at, for_key);
        first += c.count;
    }
    scatter(p, for_query, factor, for_x, 3 * inner);
    scatter(p, for_key, 1, for_x + inner, 3 * inner);
    scatter(p, for_value, 1, for_x + 2 * inner, 3 * inner);
    scatter(p, result, 1, incoming, inner);
}

/* qkv (B, L, 3 * H * K) -> result (B, L, H * K). scratch: `each` floats, as `attention_scratch` says, for so many
 * threads. */
void attention_forward(
    const Shape *shape, const float *qkv, float *result, float *scratch, long each, int threads) {
    Plan p = plan_of(shape);
    long inner = shape->heads * shape->width;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long i = 0; i < shape->batch * shape->heads; i++) {
        long row = i / shape->heads * shape->length, column = i % shape->heads * shape->width;
        forward_head(
            &p, qkv + row * 3 * inner + column, result + row * inner + column, scratch + omp_get_thread_num() * each);
    }
}

/* Writes the gradient for qkv to for_qkv, and the result of `attention_forward` over the gradient that came in. */
void attention_backward(
    const Shape *shape, const float *qkv, float *incoming, float *for_qkv, float *scratch, long each, int threads) {
    Plan p = plan_of(shape);
    long inner = shape->heads * shape->width;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long i = 0; i < shape->batch * shape->heads; i++) {
        long row = i / shape->heads * shape->length, column = i % shape->heads * shape->width;
        backward_head(
            &p, qkv + row * 3 * inner + column, incoming + row * inner + column, for_qkv + row * 3 * inner + column,
            scratch + omp_get_thread_num() * each);
    }
}
