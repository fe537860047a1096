/* A code of each image, or a window of several, through the whole transformer, for the few rows that sampling has: memory
 * is read once, for the weights, and what happens between two matmuls stays in the caches.
 *
 * A weight (N, D) lies as panels (N / PANEL, D, PANEL): what is read next lies next. Threads divide the rows of
 * all panels. A sum goes over D in order whatever the number of rows or threads is, so neither changes an image.
 *
 * Letters: S sequences in the cache (images, twice as many with guidance), R rows (codes of a step), D width, H heads, K
 * width of a head, P text positions, N codes of an image.
 */
#include <omp.h>
#include <stddef.h>

#include "vector.h"
#include "noise.h"

#define PANEL (2 * LANES)
#if LANES == 8
#define MOST 6 /* rows whose sums for a panel fit into 16 registers */
#else
#define MOST 12
#endif
#define PLACES 8 /* of a panel, read in turn */
#define AHEAD 12 /* inputs between what is computed and what is asked for */
#define INLINE static inline __attribute__((always_inline))

enum { GEGLU, GELU, QUICK_GELU, SWIGLU, RELU2 };
#define GATED(activation) ((activation) == GEGLU || (activation) == SWIGLU)

typedef struct {
    const void *weight; /* panels, of float32, bfloat16, int8 or QUADS, or of tiles */
    const float *bias;  /* (panels * PANEL) in the order of the panels, and so is scale */
    const float *scale; /* what int8 weights are multiplied by; NULL for others */
    int64_t depth, panels, size; /* bytes of a weight, or QUADS */
    int64_t tiled;       /* for the matrix unit: see tiles.h */
    float limit, shrink; /* the largest input that it may take; what its weights are multiplied by to get the right ones */
} linear;

#define QUADS 0 /* four int8 weights a word, behind a first word: -128 times the sum of all; see `roughly` */

typedef struct {
    const float *weight, *bias; /* NULL: there is none; without a bias: RMSNorm */
    float eps;
} norm;

typedef struct {
    norm before, after;  /* `after`: of a branch's output, where it has one */
    linear first, second; /* queries, keys and values, and out; or up and down */
    const float *scale;  /* (D) */
    float *history;      /* (S, G + N, D): inputs behind a row of zeros, where tokens are shifted */
} branch;

typedef struct {
    branch attention, feed_forward;
    norm query, key; /* of a head, where these are normalised */
    const float *value_mix; /* the share of the first layer's values, or NULL */
    float *text_key, *text_value;       /* (S / images, H, P, K), of each prompt and head `text_lane` floats */
    float *image_key, *image_value;     /* (S, H, N, K), of each sequence and head `lane` floats */
    int64_t text_lane, lane;
    const int32_t *starts, *seen; /* position i sees the codes seen[starts[i]] up to seen[starts[i + 1]] */
} layer;

typedef struct {
    int64_t sequences, rows, images, codes, dim, heads, width, text_len, grid, hidden, activation, layers, threads, turned;
    int64_t stable; /* whether the stream is divided by its largest float at the end */
    int64_t turns_values; /* whether rotary embedding turns them too */
    const float *table, *positions; /* (codes, D); (N, D) or NULL */
    const float *cosines, *sines;   /* (N, turned) of rotary embedding, behind those of the text part, or NULL */
    norm last;
    linear head;
    const layer *stack;
    float *scratch; /* room_of floats */
} model; /* `rows`: the most that a step has */

/* The codes of a step: row r is in place r % places of the window of sequence of[r / places], at positions[r]. A window's
 * positions ascend. Or the text parts of some prompts: positions -P to -1 in the window of a prompt's first sequence. */
typedef struct {
    int64_t rows, places;
    const int64_t *of, *positions;
} chunk;

static int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#include "tiles.h"

/* What a matmul takes: input k of row r is at[r * row + k * step]. */
typedef struct {
    float *at;
    int64_t row, step;
} inputs;

/* Rows side by side, or for the matrix unit one after the other. */
static inputs inputs_of(const linear *matmul, float *at, int64_t rows) {
    return matmul->tiled ? (inputs){at, up_to(matmul->depth, PANEL), 1} : (inputs){at, 1, rows};
}

/* ---- matmuls */

int64_t panel_width(void) { return PANEL; }

/* Weight (n, depth) -> panels. gated: each panel has LANES rows of the first half and the same of the second. PLACE says
 * where in a panel input k of a lane lies. `padded`: the depth of a panel. */
#define PACK(name, type, PLACE)                                                                                   \
    void name(const type *weight, int64_t n, int64_t depth, int64_t padded, int64_t gated, type *out, int64_t threads) { \
        int64_t half = gated ? n / 2 : 0, step = gated ? LANES : PANEL, each = gated ? half : n;                  \
        int64_t panels = (each + step - 1) / step;                                                                \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                         \
        for (int64_t panel = 0; panel < panels; panel++) {                                                        \
            type *to = out + panel * padded * PANEL;                                                              \
            const type *row[PANEL];                                                                               \
            for (int lane = 0; lane < PANEL; lane++) {                                                            \
                int second = gated && lane >= LANES;                                                              \
                int64_t index = panel * step + lane - (second ? LANES : 0);                                       \
                row[lane] = index < each ? weight + (index + (second ? half : 0)) * depth : NULL;                 \
            }                                                                                                     \
            for (int64_t first = 0; first < padded; first += LANES) /* whole lines are read, those written stay near */ \
                for (int lane = 0; lane < PANEL; lane++) {                                                        \
                    int64_t end = first + LANES < padded ? first + LANES : padded, some = end < depth ? end : depth, k = first; \
                    for (; row[lane] && k < some; k++) to[PLACE(k, lane)] = row[lane][k];                         \
                    for (; k < end; k++) to[PLACE(k, lane)] = 0;                                                  \
                }                                                                                                 \
        }                                                                                                         \
    }

#define IN_TURN(k, lane) ((k) * PANEL + (lane))
#define IN_PAIRS(k, lane) ((k) * PANEL + (lane) % LANES * 2 + (lane) / LANES)
#define IN_TILES(k, lane) in_tile(k, lane, sizeof *to)
PACK(pack, float, IN_TURN)
PACK(pack_bytes, int8_t, IN_TURN)
PACK(pack_halves, uint16_t, IN_PAIRS)
PACK(pack_tiles, uint16_t, IN_TILES)
PACK(pack_byte_tiles, int8_t, IN_TILES)

/* A panel's weights of input k. Two bfloat16 numbers share a word, each of which is the upper half of a float. `size` is
 * known when this is compiled. */
INLINE void weights_at(const char *panel, int64_t k, int size, vec *left, vec *right) {
    const char *line = panel + k * PANEL * size;
    if (size == 2) {
        ivec words;
        memcpy(&words, line, sizeof words);
        *left = (vec)(words << 16);
        *right = (vec)(words & (int32_t)0xffff0000);
    } else if (size == 1) {
        *left = widened((const int8_t *)line);
        *right = widened((const int8_t *)line + LANES);
    } else {
        *left = load((const float *)line);
        *right = load((const float *)line + LANES);
    }
}

/* What to ask memory for while place p of a panel is read at k: PANEL weights or LANES, from `from` + p * step + k times
 * as many on; all in bytes. For the second of two panels the same, one panel on. */
typedef struct {
    const char *from;
    int64_t step, each;
} wanted;

/* Add to the sums of `rows` rows what input `i` of one or two panels gives, and ask memory for what lies at `ask`. */
INLINE void one(const float *x, const char *weight, int64_t i, int64_t apart, const char *ask, int wide, int rows,
                int panels, int size, vec sums[][2]) {
#pragma GCC unroll 2
    for (int panel = 0; panel < panels; panel++, ask += apart) {
        __builtin_prefetch(ask, 0, 2);
        if (wide) __builtin_prefetch(ask + 64, 0, 2);
        vec left, right;
        weights_at(weight + panel * apart, i, size, &left, &right);
        left = rounded(left), right = rounded(right); /* or the compiler loads them again for each row */
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vec value = fill(x[r]);
            sums[panel * rows + r][0] += value * left;
            sums[panel * rows + r][1] += value * right;
        }
    }
}

/* Sums of `rows` rows for inputs from `begin` to `end` of each place of one or two panels, added to what they are. Several
 * places are read in turn: a core that reads at one place alone gets two thirds as much from memory; and with few rows two
 * panels of few bytes, or each addition would wait for the one before it. `rows`, `panels` and `size`, bytes of a weight,
 * are known when this is compiled, so that sums are in registers. x (depth, stride): the rows lie side by side. */
INLINE void places(const float *x, int64_t stride, const char *weight, int64_t depth, int64_t apart, int64_t begin,
                   int64_t end, wanted next, int rows, int panels, int size, vec sums[][2]) {
    int64_t part = depth / PLACES;
    int wide = next.each > 64;
    vec own[MOST][2];
    for (int r = 0; r < panels * rows; r++) own[r][0] = sums[r][0], own[r][1] = sums[r][1];
#define PLACE                                                                                                        \
    one(x + (place * part + k) * stride, weight, place * part + k, apart, next.from + place * next.step + k * next.each, \
        wide, rows, panels, size, own)
    for (int64_t k = begin; k < end; k++) {
        if (rows > 4) { /* enough between jumps, and an eighth as much to compile */
#pragma GCC unroll 1
            for (int place = 0; place < PLACES; place++) PLACE;
        } else {
#pragma GCC unroll 8
            for (int place = 0; place < PLACES; place++) PLACE;
        }
    }
    for (int r = 0; r < panels * rows; r++) sums[r][0] = own[r][0], sums[r][1] = own[r][1];
}

#define OF(rows, panels, size) places(x, stride, weight, depth, depth * PANEL * size, begin, end, next, rows, panels, size, sums)
#define CASE(n)                                                               \
    case n:                                                                   \
        size == 1 ? OF(n, 1, 1) : size == 2 ? OF(n, 1, 2) : OF(n, 1, 4);      \
        break;
#define PAIR(n)                                                               \
    case MOST + n:                                                            \
        size == 1 ? OF(n, 2, 1) : OF(n, 2, 2);                                \
        break;

static void few(const float *x, int64_t stride, const char *weight, int64_t depth, int64_t begin, int64_t end,
                wanted next, int rows, int panels, int size, vec sums[][2]) {
    switch (panels == 2 ? MOST + rows : rows) {
        PAIR(1) PAIR(2) PAIR(3)
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MOST > 6
        PAIR(4) PAIR(5) PAIR(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* Sums of `rows` rows for one or two panels, which are gone through `times` times, this being number `time`. Those of the
 * second panel follow those of the first. */
static void sums_of(const float *x, int64_t stride, const char *weight, int64_t depth, int64_t times, int64_t time,
                    int rows, int panels, int size, vec sums[][2]) {
    int64_t ahead = AHEAD * 4 / size, part = depth / PLACES, last = part > ahead ? part - ahead : 0;
    int64_t each = PANEL * size; /* bytes of an input's weights */
    const char *after = weight + panels * depth * each; /* the next panels */
    for (int r = 0; r < panels * rows; r++) sums[r][0] = sums[r][1] = fill(0);
    if (times == 1) {
        wanted soon = {weight + ahead * each, part * each, each}, then = {after - last * each, part * each, each};
        few(x, stride, weight, depth, 0, last, soon, rows, panels, size, sums);
        few(x, stride, weight, depth, last, part, then, rows, panels, size, sums);
    } else { /* memory would wait while a panel in the cache is gone through again: half of the next one each time */
        wanted half = {after + time % 2 * (PLACES / 2) * part * each, part * each / 2, each / 2};
        few(x, stride, weight, depth, 0, part, half, rows, panels, size, sums);
    }
    for (int panel = 0; panel < panels; panel++, weight += depth * each)
        for (int64_t k = PLACES * part; k < depth; k++) {
            vec left, right;
            weights_at(weight, k, size, &left, &right);
            for (int r = 0; r < rows; r++) {
                sums[panel * rows + r][0] += x[k * stride + r] * left;
                sums[panel * rows + r][1] += x[k * stride + r] * right;
            }
        }
}

enum { PLAIN, RESIDUAL, ACTIVE };

typedef struct {
    int kind;            /* PLAIN: out = sums; RESIDUAL: out += scale * sums; ACTIVE: next = activation of sums */
    float *out;          /* (rows, stride) */
    int64_t stride;      /* at least panels * PANEL */
    const float *scale;  /* or NULL */
    int64_t activation;
    inputs next;
} ending;

INLINE vec active(vec x, int64_t activation) {
    if (activation == GEGLU || activation == GELU) return gelu_of(x);
    if (activation == RELU2) return either(x < 0.0f, fill(0), x * x);
    return swish_of(x, activation == SWIGLU ? 1.0f : 1.702f);
}

static void finish(const ending *end, const linear *matmul, int64_t panel, int64_t row, int count, vec sums[][2]) {
    int64_t column = panel * PANEL;
    vec left = load(matmul->bias + column), right = load(matmul->bias + column + LANES);
    if (matmul->scale) {
        vec first = load(matmul->scale + column), second = load(matmul->scale + column + LANES);
        for (int r = 0; r < count; r++) {
            sums[r][0] *= first;
            sums[r][1] *= second;
        }
    }
    for (int r = 0; r < count; r++) {
        vec a = sums[r][0] + left, b = sums[r][1] + right;
        if (end->kind == ACTIVE) {
            sums[r][1] = active(b, end->activation);
            sums[r][0] = GATED(end->activation) ? a * sums[r][1] : active(a, end->activation);
            continue;
        }
        float *to = end->out + (row + r) * end->stride + column;
        if (end->kind == RESIDUAL) {
            if (end->scale) {
                a *= load(end->scale + column);
                b *= load(end->scale + column + LANES);
            }
            a += load(to);
            b += load(to + LANES);
        }
        store(to, a);
        store(to + LANES, b);
    }
    if (end->kind == ACTIVE) {
        int wide = GATED(end->activation) ? LANES : PANEL;
        const float *from = (const float *)sums;
        inputs to = end->next;
        to.at += row * to.row + panel * wide * to.step;
        for (int r = 0; to.step == 1 && r < count; r++)
            memcpy(to.at + r * to.row, from + r * PANEL, wide * sizeof(float));
        for (int lane = 0; to.step > 1 && lane < wide; lane++)
            for (int r = 0; r < count; r++) to.at[lane * to.step + r] = from[r * PANEL + lane];
    }
}

/* Matmuls whose inputs are rounded to a byte too, with four times the arithmetic in a cycle: for guesses. */
#ifdef __AVX512VNNI__
#define TOGETHER 4 /* panels, or each addition would wait for the one before it, and memory for one place */
#define TURNS 2 /* rows for which a line is read once */

/* Inputs x (depth) of a row, each `stride` floats on, as bytes plus 128; returns what they have to be multiplied by. */
static float bytes_of(const float *x, int64_t stride, int64_t depth, int64_t padded, uint8_t *out) {
    float own[padded];
    for (int64_t k = 0; k < padded; k++) own[k] = k < depth ? x[k * stride] : 0;
    vec tops = fill(1e-30f);
    for (int64_t k = 0; k < padded; k += LANES) tops = larger(tops, magnitude(load(own + k)));
    float top = _mm512_reduce_max_ps((__m512)tops);
    for (int64_t k = 0; k < padded; k += LANES) {
        __m128i whole = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)(load(own + k) * (127.0f / top))));
        _mm_storeu_si128((__m128i *)(out + k), _mm_xor_si128(whole, _mm_set1_epi8(-128)));
    }
    return top / 127.0f;
}

/* Sums of `rows` rows of bytes, `apart` bytes from each other, for some panels of so many lines, the first of sums. far:
 * memory is asked for what comes next; where weights stay in a cache, the processor does so in time, and asking costs an
 * eighth more. */
INLINE void quads(const uint8_t *x, int64_t apart, const char *const *panels, int64_t lines, int rows, int far,
                  __m512i sums[][TURNS][2]) {
    __m512i own[TOGETHER][TURNS][2];
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER * rows * 2; i++)
        own[i / 2 / rows][i / 2 % rows][i % 2] = _mm512_loadu_si512(panels[i / 2 / rows] + i % 2 * 4 * LANES);
    /* The next panels, unless so much would not stay in the cache. */
    int64_t ahead = PANEL * 4 * (TOGETHER * lines < 2048 ? TOGETHER * lines : AHEAD);
    for (int64_t k = 1; k < lines; k++, x += 4) {
#pragma GCC unroll 4
        for (int p = 0; p < TOGETHER; p++) {
            const char *line = panels[p] + k * PANEL * 4;
            __m512i left = _mm512_loadu_si512(line), right = _mm512_loadu_si512(line + 4 * LANES);
            if (far) __builtin_prefetch(line + ahead, 0, 2);
            if (far) __builtin_prefetch(line + ahead + 64, 0, 2);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * apart, sizeof four);
                own[p][r][0] = _mm512_dpbusd_epi32(own[p][r][0], _mm512_set1_epi32(four), left);
                own[p][r][1] = _mm512_dpbusd_epi32(own[p][r][1], _mm512_set1_epi32(four), right);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER * rows * 2; i++) sums[i / 2 / rows][i / 2 % rows][i % 2] = own[i / 2 / rows][i / 2 % rows][i % 2];
}

static void roughly(const linear *matmul, const float *x, int64_t rows, const ending *end, int64_t from, int64_t to) {
    int64_t lines = 1 + (matmul->depth + 3) / 4, padded = up_to(matmul->depth, LANES);
    int far = matmul->panels * lines * PANEL * 4 > 1 << 20; /* bytes of a layer whose model is too large for caches */
    uint8_t bytes[rows][padded];
    float step[rows];
    for (int64_t r = 0; r < rows; r++) step[r] = bytes_of(x + r, rows, matmul->depth, padded, bytes[r]);
    for (int64_t panel = from; panel < to; panel += TOGETHER) {
        const char *panels[TOGETHER];
        for (int p = 0; p < TOGETHER; p++) /* the last ones may be the same */
            panels[p] = (const char *)matmul->weight + (panel + p < to ? panel + p : panel) * lines * PANEL * 4;
        for (int64_t row = 0; row < rows; row += TURNS) {
            int count = rows - row < TURNS ? rows - row : TURNS;
            __m512i whole[TOGETHER][TURNS][2];
            if (count == 1 && far)
                quads(bytes[row], padded, panels, lines, 1, 1, whole);
            else if (count == 1)
                quads(bytes[row], padded, panels, lines, 1, 0, whole);
            else
                quads(bytes[row], padded, panels, lines, TURNS, 1, whole);
            for (int64_t p = 0; p < TOGETHER && panel + p < to; p++) {
                vec sums[TURNS][2];
                for (int half = 0; half < 2 * count; half++)
                    sums[half / 2][half % 2] = (vec)_mm512_cvtepi32_ps(whole[p][half / 2][half % 2]) * step[row + half / 2];
                finish(end, matmul, panel + p, row, count, sums);
            }
        }
    }
}

int64_t guesses(void) { return 1; }
#else
#define roughly(...)
int64_t guesses(void) { return 0; } /* whether there are matmuls for them */
#endif

#ifdef HAS_TILES
/* Sums of a row with a panel of tiles, by vectors. */
static void sums_by_vectors(const linear *matmul, const float *x, const char *weight, vec sums[2]) {
    int64_t size = matmul->size;
    for (int half = 0; half < 2; half++) {
        sums[half] = fill(0);
        for (int64_t k = 0; k < matmul->depth; k++) {
            int64_t at = in_tile(k, half * LANES, size) * size;
            uvec words = (uvec)load((const float *)(weight + at / WORD * WORD));
            words <<= 8 * (WORD - size - at % WORD); /* its upper bytes are the weights */
            vec own = size == 2 ? (vec)(words & 0xffff0000u) : (vec)_mm512_cvtepi32_ps((__m512i)((ivec)words >> 24));
            sums[half] += x[k] * (own * matmul->shrink);
        }
    }
}

/* What the sums of a row's parts have to be multiplied by; 0 if it is to be computed by vectors. */
static float split_row(const linear *matmul, const float *x, char *const parts[4], int64_t step) {
    float top = largest_of(x, matmul->depth);
    if (!(top <= matmul->limit)) return 0;
    if (matmul->size == 2) {
        split(x, matmul->depth, parts, step);
        return 0x1p-24f * matmul->shrink;
    }
    int exponent = top < 0x1p-126f ? -126 : ilogbf(top), half = (29 - exponent) / 2;
    float scale[2] = {ldexpf(1.0f, half), ldexpf(1.0f, 29 - exponent - half)};
    split_whole(x, matmul->depth, scale, parts, step);
    return ldexpf(1.0f, exponent - 29 + 24);
}

static void multiply_tiles(const linear *matmul, inputs x, int64_t rows, const ending *end, int64_t from, int64_t to,
                           float *room) {
    int64_t size = matmul->size, blocks = blocks_of(matmul->depth, size);
    tiling t = tiling_of(rows, size);
    char *all = (char *)up_to((int64_t)room, 64), saved[64];
    int64_t step = t.lines * 64, of_group = t.tiles * blocks * step, each = 2 * TILE / t.groups;
    float factors[rows], sums[4][LANES][LANES] __attribute__((aligned(64)));
    if (rows == 0 || from == to) return;
    for (int64_t r = 0; r < rows; r++) {
        char *parts[4];
        for (int64_t part = 0; part < t.parts; part++) {
            int64_t line = part * t.count + r % t.count;
            parts[part] = all + r / t.count * of_group + line / t.lines * blocks * step + line % t.lines * 64;
        }
        factors[r] = split_row(matmul, x.at + r * x.row, parts, step);
    }
    _tile_storeconfig(saved); /* other users of the matrix unit in this thread find it unchanged */
    configure(t);
    for (int64_t panel = from; panel < to; panel++) {
        const char *weight = (const char *)matmul->weight + panel * blocks * 2 * TILE;
        for (int64_t row = 0; row < rows; row += t.count) {
            int64_t count = rows - row < t.count ? rows - row : t.count;
            /* While the panel is gone through for each group, the next one is read. */
            const char *next = weight + (t.groups > 1 ? (blocks * t.groups + row / t.count * blocks) * each : 8 * TILE);
            sum_tiles(all + row / t.count * of_group, t, weight, blocks, next, panel + 1 < to ? each : 0, size, sums[0][0]);
            vec found[2 * LANES][2];
            for (int64_t r = 0; r < count; r++) {
                for (int half = 0; half < 2; half++) {
                    vec own[4];
                    for (int64_t part = 0; part < t.parts; part++) {
                        int64_t line = part * t.count + r;
                        own[part] = load(sums[2 * (line / t.lines) + half][line % t.lines]);
                        if (size == 1) own[part] = (vec)_mm512_cvtepi32_ps((__m512i)own[part]);
                    }
                    vec sum = size == 2 ? own[2] + own[1] + own[0]
                                        : own[0] * 0x1p-24f + own[1] * 0x1p-16f + own[2] * 0x1p-8f + own[3];
                    found[r][half] = sum * factors[row + r];
                }
                if (factors[row + r] == 0) sums_by_vectors(matmul, x.at + (row + r) * x.row, weight, found[r]);
            }
            finish(end, matmul, panel, row, count, found);
        }
    }
    _tile_loadconfig(saved);
}
#endif

/* This thread's part of a matmul. room: for the parts of rows (see tiles.h). */
static void multiply(const linear *matmul, inputs x, int64_t rows, const ending *end, float *room) {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t from = matmul->panels * thread / threads, to = matmul->panels * (thread + 1) / threads;
    if (matmul->tiled) {
        multiply_tiles(matmul, x, rows, end, from, to, room);
        return;
    }
    if (matmul->size == QUADS) {
        roughly(matmul, x.at, rows, end, from, to);
        return;
    }
    /* Threads divide the rows of all panels: of 7 panels, one of two threads would otherwise compute 4, the other 3. */
    int size = matmul->size;
    int64_t all = matmul->panels * rows, last = all * (thread + 1) / threads;
    vec sums[MOST][2];
    for (int64_t i = all * thread / threads, panels, some; i < last; i += panels * some) {
        int64_t panel = i / rows, first = i % rows, left = last - panel * rows;
        some = (left < rows ? left : rows) - first;
        const char *weight = (const char *)matmul->weight + panel * matmul->depth * PANEL * size;
        panels = size < 4 && first == 0 && 2 * rows <= MOST && left >= 2 * rows ? 2 : 1;
        int64_t times = (some + MOST - 1) / MOST;
        for (int64_t time = 0; time < times; time++) {
            int64_t row = first + some * time / times;
            int count = first + some * (time + 1) / times - row;
            sums_of(x.at + row, rows, weight, matmul->depth, times, time, count, panels, size, sums);
            for (int64_t j = 0; j < panels; j++) finish(end, matmul, panel + j, row, count, sums + j * count);
        }
    }
}

/* Floats of room that `multiply_rows` needs. */
int64_t room_of_rows(const linear *matmul, int64_t rows, int64_t threads) {
    return matmul->depth * rows + (matmul->tiled ? threads * room_of_parts(rows, matmul->depth, matmul->size) : 0);
}

/* x (rows, depth) -> out (rows, panels * PANEL) */
void multiply_rows(const linear *matmul, float *x, int64_t rows, float *out, float *room, int64_t threads) {
    int64_t depth = matmul->depth;
    inputs own = {x, depth, 1}, turned = {room, 1, rows};
    for (int64_t r = 0; !matmul->tiled && r < rows; r++)
        for (int64_t k = 0; k < depth; k++) room[k * rows + r] = x[r * depth + k];
    ending end = {PLAIN, out, matmul->panels * PANEL};
#pragma omp parallel num_threads(threads)
    multiply(matmul, matmul->tiled ? own : turned, rows, &end,
             room + depth * rows + omp_get_thread_num() * (matmul->tiled ? room_of_parts(rows, depth, matmul->size) : 0));
}

/* The sum of n floats, at all places where threads read matmuls' weights: how fast memory can be read at all. */
double read_all(const float *x, int64_t n, int64_t threads) {
    int64_t part = n / (threads * PLACES * LANES) * LANES;
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t thread = 0; thread < threads; thread++) {
        vec sums[PLACES];
        for (int place = 0; place < PLACES; place++) sums[place] = fill(0);
        for (int64_t i = 0; i < part; i += LANES)
#pragma GCC unroll 8
            for (int place = 0; place < PLACES; place++) {
                const float *from = x + (thread * PLACES + place) * part + i;
                __builtin_prefetch(from + 4 * LANES * PLACES, 0, 2);
                sums[place] += load(from);
            }
        for (int place = 0; place < PLACES; place++) total += sum_of(sums[place]);
    }
    for (int64_t i = part * PLACES * threads; i < n; i++) total += x[i];
    return total;
}

/* ---- norms */

static void normalise(const norm *by, const float *x, int64_t n, float *out) {
    int64_t whole = n / LANES * LANES;
    vec sum = fill(0);
    for (int64_t i = 0; by->bias && i < whole; i += LANES) sum += load(x + i);
    sum += load_some(x + whole, n - whole);
    float mean = by->bias ? sum_of(sum) / n : 0.0f;
    sum = fill(0);
    for (int64_t i = 0; i < whole; i += LANES) {
        vec difference = load(x + i) - mean;
        sum += difference * difference;
    }
    float squares = sum_of(sum);
    for (int64_t i = whole; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / sqrtf(squares / n + by->eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        vec own = (load(x + i) - mean) * factor * load(by->weight + i);
        store(out + i, by->bias ? own + load(by->bias + i) : own);
    }
    for (int64_t i = whole; i < n; i++) out[i] = (x[i] - mean) * factor * by->weight[i] + (by->bias ? by->bias[i] : 0.0f);
}

/* Where row r lies normalised while tokens are shifted: with those of the codes before it, or of the text part, in
 * `between` (R, D). */
INLINE float *shifted(const model *m, const chunk *c, const branch *b, int64_t r, float *between) {
    int64_t dim = m->dim, grid = m->grid, position = c->positions[r];
    if (position < 0) return between + r * dim;
    return b->history + (c->of[r / c->places] * (grid + grid * grid) + grid + position) * dim;
}

/* All rows normalised, and shifted where tokens are: x (R, stride) -> out, a copy of each thread. row: room for D
 * floats. */
static void prepare(const model *m, const chunk *c, const branch *b, const float *x, int64_t stride, float *between,
                    float *row, inputs out) {
    int64_t dim = m->dim, rows = c->rows, grid = m->grid, quarter = dim / 4, step = out.step;
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t r = 0; r < rows; r++) {
        if (b->history && r % threads != thread) continue;
        float *to = out.at + r * out.row, *own = b->history ? shifted(m, c, b, r, between) : step == 1 ? to : row;
        normalise(&b->before, x + r * stride, dim, own);
        for (int64_t k = 0; own == row && k < dim; k++) to[k * step] = own[k];
    }
    if (!b->history) return;
#pragma omp barrier
    for (int64_t r = 0; r < rows; r++) {
        const float *own = shifted(m, c, b, r, between);
        float *to = out.at + r * out.row;
        int64_t position = c->positions[r];
        for (int64_t k = 0; position < 0 && k < dim; k++)
            to[k * step] = k >= 2 * quarter ? own[k] : position == -m->text_len ? 0.0f : own[k - dim];
        if (position < 0) continue;
        int first = position % grid == 0;
        for (int64_t k = 0; k < quarter; k++) to[k * step] = own[k - grid * dim];
        for (int64_t k = quarter; k < 2 * quarter; k++) to[k * step] = first ? 0.0f : own[k - dim];
        for (int64_t k = 2 * quarter; k < dim; k++) to[k * step] = own[k];
    }
}

/* ---- attention */

INLINE vec products(const float *a, const float *b, int64_t n) {
    int64_t i = 0;
    vec sum = fill(0);
#pragma GCC unroll 16
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    if (i < n) sum += load_some(a + i, n - i) * load_some(b + i, n - i);
    return sum;
}

/* The products of a query with the vector whose dot product is in the end in the lane of this leaf. */
INLINE vec leaf_of(const float *query, const float *keys, const int32_t *seen, int64_t first, int64_t count,
                   int64_t width, int leaf) {
    int64_t i = first;
    for (int far = LANES / 2; far; far /= 2, leaf /= 2) i += leaf % 2 * far;
    if (i >= count) i = count - 1;
    return products(query, keys + (seen ? seen[i] : i) * width, width);
}

/* Dot products of a query with `count` of some vectors, those that `seen` says or the first ones, to out (in whole
 * vectors). LANES at once are added up in a tree, in the order of `sum_of`. */
INLINE void dots(const float *query, const float *keys, const int32_t *seen, int64_t count, int64_t width, float *out) {
    for (int64_t first = 0; first < count; first += LANES) {
#define LEAF(i) leaf_of(query, keys, seen, first, count, width, i)
#define TWO(i) folded(LEAF(i), LEAF(i + 1), LANES / 2)
#define FOUR(i) folded(TWO(i), TWO(i + 2), LANES / 4)
#define EIGHT(i) folded(FOUR(i), FOUR(i + 4), LANES / 8)
#if LANES == 16
        store(out + first, folded(EIGHT(0), EIGHT(8), 1));
#elif LANES == 8
        store(out + first, EIGHT(0));
#else
        store(out + first, FOUR(0));
#endif
    }
}

INLINE vec part_of(const float *p, int some) { return some < LANES ? load_some(p, some) : load(p); }

/* sums += weights[i] * some of the values, columns in `count` registers, the last of which has only `some` floats */
INLINE void mix_columns(const float *weights, const float *values, const int32_t *seen, int64_t n, int64_t width,
                        int count, int some, float *sums) {
    vec own[4];
    for (int c = 0; c < count; c++) own[c] = load(sums + c * LANES);
    for (int64_t i = 0; i < n; i++) {
        const float *value = values + (seen ? seen[i] : i) * width;
#pragma GCC unroll 4
        for (int c = 0; c < count; c++)
            own[c] += weights[i] * (c < count - 1 ? load(value + c * LANES) : part_of(value + c * LANES, some));
    }
    for (int c = 0; c < count; c++) store(sums + c * LANES, own[c]);
}

INLINE void mix(const float *weights, const float *values, const int32_t *seen, int64_t n, int64_t width, float *sums) {
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES)
        mix_columns(weights, values + c, seen, n, width, 4, LANES, sums + c);
    if (c + 3 * LANES < width) {
        mix_columns(weights, values + c, seen, n, width, 4, width - c - 3 * LANES, sums + c);
        c = width;
    }
    for (; c < width; c += LANES)
        mix_columns(weights, values + c, seen, n, width, 1, width - c < LANES ? width - c : LANES, sums + c);
}

static void turn(float *x, const float *cosines, const float *sines, int64_t turned) {
    for (int64_t i = 0; i + 1 < turned; i += 2) {
        float even = x[i], odd = x[i + 1];
        x[i] = even * cosines[i] - odd * sines[i];
        x[i + 1] = odd * cosines[i + 1] + even * sines[i + 1];
    }
}

/* Head h of row r: normalise and turn query and key, keep key and value of the code there, and scale the query. */
static void keep(const model *m, const chunk *c, const layer *l, int64_t r, int64_t h, float *qkv, int64_t stride) {
    int64_t width = m->width, inner = m->heads * width, position = c->positions[r];
    float *query = qkv + r * stride + h * width, *key = query + inner, *value = key + inner;
    int64_t text = position < 0, sequence = c->of[r / c->places];
    int64_t place = text ? (sequence / m->images * m->heads + h) * l->text_lane + (m->text_len + position) * width
                         : (sequence * m->heads + h) * l->lane + position * width;
    if (l->query.weight) {
        normalise(&l->query, query, width, query);
        normalise(&l->key, key, width, key);
    }
    if (m->cosines) {
        const float *cosines = m->cosines + position * m->turned, *sines = m->sines + position * m->turned;
        turn(query, cosines, sines, m->turned);
        turn(key, cosines, sines, m->turned);
        if (m->turns_values) turn(value, cosines, sines, m->turned);
    }
    if (l->value_mix) {
        const float *first = (text ? m->stack->text_value : m->stack->image_value) + place;
        for (int64_t i = 0; i < width; i++) value[i] += *l->value_mix * (first[i] - value[i]);
    }
    memcpy((text ? l->text_key : l->image_key) + place, key, width * sizeof(float));
    memcpy((text ? l->text_value : l->image_value) + place, value, width * sizeof(float));
    float scale = 1.0f / sqrtf(width);
    for (int64_t i = 0; i < width; i++) query[i] *= scale;
}

/* x (count), and as many -inf as whole vectors have room for, becomes e^(x - largest). Returns 1 / their sum. */
static float exponentials(float *x, int64_t count) {
    int64_t padded = up_to(count, LANES);
    for (int64_t i = count; i < padded; i++) x[i] = -INFINITY;
    vec top = load(x), sum = fill(0);
    for (int64_t i = LANES; i < padded; i += LANES) top = larger(top, load(x + i));
    float highest = top[0];
    for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
    for (int64_t i = 0; i < padded; i += LANES) {
        vec e = exp_of(load(x + i) - highest);
        store(x + i, e);
        sum += e;
    }
    return 1.0f / sum_of(sum);
}

#define BESIDE 16 /* rows that attend together */
#define NEAR 32   /* keys or values that stay in the nearest cache while these rows take their turns */

/* Floats that a row needs for its attention: weights, in vectors of texts and of codes, and the sums. */
static int64_t room_of_attention(const model *m) {
    return up_to(m->width, LANES) + up_to(m->text_len + m->grid * m->grid, LANES) + LANES;
}

/* Head h of `rows` rows from `first` on: attend from their queries. `width` is m->width, known when this is compiled where
 * it is the usual one. */
INLINE void attend(const model *m, const chunk *ch, const layer *l, int64_t first, int64_t rows, int64_t h,
                   const float *qkv, int64_t stride, int64_t width, float *room, inputs out) {
    struct {
        const float *query, *text_key, *text_value, *image_key, *image_value;
        const int32_t *seen;
        int64_t texts, shown;
        float *sums, *weights, factor;
    } all[BESIDE], *own = all;
    int64_t texts = 0, shown = 0;
    for (int64_t r = first; r < first + rows; r++, own++) {
        int64_t sequence = ch->of[r / ch->places], position = ch->positions[r], codes = position >= 0;
        int64_t text = (sequence / m->images * m->heads + h) * l->text_lane, image = (sequence * m->heads + h) * l->lane;
        own->query = qkv + r * stride + h * width;
        own->text_key = l->text_key + text, own->text_value = l->text_value + text;
        own->image_key = l->image_key + image, own->image_value = l->image_value + image;
        own->texts = m->text_len + (codes ? 0 : position + 1);
        own->shown = codes ? l->starts[position + 1] - l->starts[position] : 0;
        own->seen = l->seen + (codes ? l->starts[position] : 0);
        own->sums = room + (r - first) * room_of_attention(m), own->weights = own->sums + up_to(width, LANES);
        texts = most(texts, own->texts), shown = most(shown, own->shown);
        for (int64_t c = 0; c < width; c += LANES) store(own->sums + c, fill(0));
    }
#define EACH(n, from) \
    for (int64_t from = 0; from < n; from += NEAR) \
        for (own = all; own < all + rows; own++)
#define COUNT(n, from) (n - from < NEAR ? n - from : NEAR)
    EACH(texts, i) dots(own->query, own->text_key + i * width, NULL, COUNT(own->texts, i), width, own->weights + i);
    EACH(shown, i)
        dots(own->query, own->image_key, own->seen + i, COUNT(own->shown, i), width, own->weights + own->texts + i);
    for (own = all; own < all + rows; own++) own->factor = exponentials(own->weights, own->texts + own->shown);
    EACH(texts, i) mix(own->weights + i, own->text_value + i * width, NULL, COUNT(own->texts, i), width, own->sums);
    EACH(shown, i)
        mix(own->weights + own->texts + i, own->image_value, own->seen + i, COUNT(own->shown, i), width, own->sums);
    for (own = all; own < all + rows; own++) {
        float *to = out.at + (first + own - all) * out.row + h * width * out.step;
        for (int64_t c = 0; c < width; c++) to[c * out.step] = own->sums[c] * own->factor;
    }
}

/* ---- sampling from logits */

static uint32_t rank_of(float x) { /* whole numbers in the order of floats; not a number is the largest */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The rank of the k-th largest of n floats, bit by bit. */
static uint32_t rank_of_kth(const float *x, int64_t n, int64_t k) {
    uint32_t prefix = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        int count = 0;
        for (int64_t i = 0; i < n; i++) count += rank_of(x[i]) >= (prefix | bit);
        if (count >= k) prefix |= bit;
    }
    return prefix;
}

/* The rank of the float from which on, going down from the largest, the sum reaches `enough`. Digit by digit. */
static uint32_t reached(const float *x, int64_t n, double enough) {
    uint32_t prefix = 0, mask = 0;
    double above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        double weight[256] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t rank = rank_of(x[i]);
            if ((rank & mask) == prefix) weight[rank >> shift & 255] += x[i];
        }
        int digit = 255;
        while (digit > 0 && !(above + weight[digit] >= enough)) above += weight[digit--];
        prefix |= (uint32_t)digit << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

static float largest(const float *x, int64_t n) { /* not a number if one is none */
    vec tops = fill(-INFINITY);
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        vec own = load(x + i);
        tops = either((own > tops) | (own != own), own, tops);
    }
    float top = -INFINITY;
    for (int i = 0; i < LANES; i++) top = tops[i] > top || isnan(tops[i]) ? tops[i] : top;
    for (int64_t i = whole; i < n; i++) top = x[i] > top || isnan(x[i]) ? x[i] : top;
    return top;
}

/* x = e^(x - top) / their sum, where `top` is the largest; returns log of that sum, plus the largest. Padded to LANES with
 * -inf. */
static double softmax(float *x, int64_t n, int64_t padded, float top) {
    for (int64_t i = n; i < padded; i++) x[i] = -INFINITY;
    vec sums = fill(0);
    for (int64_t i = 0; i < padded; i += LANES) {
        vec e = exp_of(load(x + i) - top);
        store(x + i, e);
        sums += e;
    }
    float sum = sum_of(sums);
    for (int64_t i = 0; i < padded; i += LANES) store(x + i, load(x + i) / sum);
    return top + log(sum);
}

/* The noise of whole numbers; n is a multiple of LANES. */
void gumbel(const int32_t *numbers, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += LANES) {
        ivec own;
        memcpy(&own, numbers + i, sizeof own);
        store(out + i, gumbel_of(own));
    }
}

static int any(ivec choose) {
    uint64_t parts[sizeof(ivec) / 8], all = 0;
    memcpy(parts, &choose, sizeof parts);
    for (unsigned i = 0; i < sizeof(ivec) / 8; i++) all |= parts[i];
    return all != 0;
}

/* The token whose x plus noise is the largest, the first of several: a sample of softmax(x). x is -inf for tokens that are
 * not allowed and for the last ones, up to a multiple of LANES. The noise of token i is number i from `state` on. */
static int64_t largest_with_noise(const float *x, int64_t padded, uint64_t state) {
    vec best = fill(-INFINITY);
    ivec where = {}, lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int64_t i = 0; i < padded; i += LANES) {
        vec own = load(x + i);
        if (!any(own > -INFINITY)) continue;
        own += gumbel_of(numbers_from(state + i * (uint64_t)GOLDEN));
        ivec more = own > best;
        best = either(more, own, best);
        where = (more & (lane + (int32_t)i)) | (~more & where);
    }
    int top = 0;
    for (int i = 1; i < LANES; i++)
        if (best[i] > best[top] || (best[i] == best[top] && where[i] < where[top])) top = i;
    return where[top];
}

/* How the token of a row is chosen: temperature 0 takes the likeliest, top_k 0 and top_p 1 keep all. */
typedef struct {
    double temperature, top_p;
    int64_t top_k;
    uint64_t state; /* of the noise of its first token */
} choice;

/* own (n) -> a token; room and chances (n), in whole vectors, are overwritten. */
static int64_t chosen(const float *own, int64_t n, float top, const choice *by, float *room, float *chances) {
    int64_t padded = up_to(n, LANES), k = by->top_k;
    uint32_t last = k && k < n ? rank_of_kth(own, n, k) : 0;
    /* The largest is subtracted first, or a low temperature would let logits overflow. */
    for (int64_t i = 0; i < n; i++)
        room[i] = rank_of(own[i]) < last ? -INFINITY : (own[i] - top) / (float)by->temperature;
    for (int64_t i = n; i < padded; i++) room[i] = -INFINITY;
    for (int64_t i = 0; !(fabsf(top) < INFINITY) && i < n; i++)
        if (isnan(room[i])) return i; /* broken logits */
    if (by->top_p < 1) { /* those before which less than top_p is reached; of equal ones the first */
        memcpy(chances, room, padded * sizeof(float));
        softmax(chances, n, padded, largest(chances, n));
        double more = 0;
        last = reached(chances, n, by->top_p);
        for (int64_t i = 0; i < n; i++) more += rank_of(chances[i]) > last ? chances[i] : 0;
        for (int64_t i = 0; i < n; i++) {
            if (rank_of(chances[i]) < last || (rank_of(chances[i]) == last && more >= by->top_p))
                room[i] = -INFINITY;
            else if (rank_of(chances[i]) == last)
                more += chances[i];
        }
    }
    return largest_with_noise(room, padded, by->state);
}

/* A token from logits (n), and its log-likelihood without any filter, if wanted. space: twice n floats, in whole vectors. */
static int64_t sampled(const float *own, int64_t n, const choice *by, float *space, float *score) {
    int64_t padded = up_to(n, LANES), token = 0;
    float top = largest(own, n);
    double whole = 0;
    if (score) {
        memcpy(space, own, n * sizeof(float));
        whole = softmax(space, n, padded, top);
    }
    if (by->temperature == 0) {
        for (int64_t i = 1; i < n; i++)
            if (own[i] > own[token] || (isnan(own[i]) && !isnan(own[token]))) token = i;
    } else {
        token = chosen(own, n, top, by, space, space + padded);
    }
    if (score) *score = own[token] - whole;
    return token;
}

/* Of each row of logits (rows, stride) a token and its log-likelihood. `state` (rows): of the noise. space: for each row as
 * above. */
void sample_rows(const float *logits, int64_t rows, int64_t stride, int64_t n, const int64_t *state,
                 const double *temperature, const int64_t *top_k, const double *top_p, int64_t *tokens, float *scores,
                 float *space, int64_t threads) {
    int64_t padded = up_to(n, LANES);
#pragma omp parallel for num_threads(threads) if (rows * n >= 4096)
    for (int64_t r = 0; r < rows; r++) {
        choice by = {temperature[r], top_p[r], top_k[r], state[r]};
        tokens[r] = sampled(logits + r * stride, n, &by, space + 2 * r * padded, scores + r);
    }
}

/* ---- the step */

typedef struct {
    int64_t stream, branch, qkv, heads, hidden, logits, space, own, total; /* where each begins in the scratch, in floats */
    int64_t wide, wide_qkv, wide_head, parts, of_thread; /* parts: where those of a matmul begin in a thread's own */
} plan;

/* Floats in which a thread keeps the parts of the inputs of any matmul. */
static int64_t room_of_all_parts(const model *m, int64_t rows) {
    int64_t room = 0;
    for (const layer *l = m->stack; l <= m->stack + m->layers; l++) {
        const linear *all[] = {&l->attention.first, &l->attention.second, &l->feed_forward.first, &l->feed_forward.second};
        if (l == m->stack + m->layers) all[0] = all[1] = all[2] = all[3] = &m->head;
        for (int i = 0; i < 4; i++)
            if (all[i]->tiled) room = most(room, room_of_parts(rows, all[i]->depth, all[i]->size));
    }
    return room;
}

static plan plan_of(const model *m, int64_t rows) {
    plan at;
    int64_t inner = m->heads * m->width;
    at.wide = up_to(m->dim, PANEL);
    at.wide_qkv = up_to(3 * inner, PANEL);
    at.stream = 0;
    at.branch = at.stream + rows * at.wide;
    at.qkv = at.branch + rows * at.wide;
    at.heads = at.qkv + rows * at.wide_qkv;
    at.hidden = at.heads + up_to(inner, PANEL) * rows;
    at.wide_head = m->head.panels * PANEL;
    at.logits = at.hidden + up_to(m->hidden, PANEL) * rows;
    at.space = at.logits + rows * at.wide_head;
    at.own = at.space + 2 * rows * at.wide_head;
    /* Each thread: its copy of the input of a matmul, then a row, or what a head needs; and the parts of rows. */
    at.parts = at.wide * rows + most(at.wide, (rows < BESIDE ? rows : BESIDE) * room_of_attention(m));
    at.of_thread = at.parts + room_of_all_parts(m, rows);
    at.of_thread = up_to(at.of_thread, 64);
    at.own = up_to(at.own, 64);
    at.total = at.own + m->threads * at.of_thread;
    return at;
}

int64_t room_of(const model *m) { return plan_of(m, m->rows).total; }

/* What thread `thread` has for itself. */
static float *own_of(const model *m, const plan *at, int64_t thread) { return m->scratch + at->own + thread * at->of_thread; }

/* stream += scale * second(x), or with a norm in between. Ends with all threads done. */
static void add(const model *m, const branch *b, const plan *at, int64_t rows, inputs x, float *row) {
    float *stream = m->scratch + at->stream, *between = m->scratch + at->branch;
    ending end = {RESIDUAL, stream, at->wide, b->scale};
    if (b->after.weight) end = (ending){PLAIN, between, at->wide};
    multiply(&b->second, x, rows, &end, own_of(m, at, omp_get_thread_num()) + at->parts);
#pragma omp barrier
    if (b->after.weight) {
        for (int64_t r = omp_get_thread_num(); r < rows; r += omp_get_num_threads()) {
            normalise(&b->after, between + r * at->wide, m->dim, row);
            for (int64_t i = 0; i < m->dim; i++) stream[r * at->wide + i] += (b->scale ? b->scale[i] : 1.0f) * row[i];
        }
#pragma omp barrier
    }
}

static void through(const model *m, const chunk *c, const layer *l, const plan *at) {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    float *stream = m->scratch + at->stream, *qkv = m->scratch + at->qkv, *between = m->scratch + at->branch;
    float *own = own_of(m, at, thread), *room = own + at->wide * c->rows, *parts = own + at->parts;
    inputs heads = inputs_of(&l->attention.second, m->scratch + at->heads, c->rows);
    inputs hidden = inputs_of(&l->feed_forward.second, m->scratch + at->hidden, c->rows);

    inputs normed = inputs_of(&l->attention.first, own, c->rows);
    prepare(m, c, &l->attention, stream, at->wide, between, room, normed);
    ending end = {PLAIN, qkv, at->wide_qkv};
    multiply(&l->attention.first, normed, c->rows, &end, parts);
#pragma omp barrier
    int64_t windows = c->rows / c->places, items = m->heads * windows, end_item = items * (thread + 1) / threads;
    for (int64_t i = items * thread / threads, next; i < end_item; i = next) {
        int64_t h = i / windows;
        next = (h + 1) * windows < end_item ? (h + 1) * windows : end_item;
        int64_t first = i % windows * c->places, last = first + (next - i) * c->places;
        /* In a window each code sees those before it. */
        for (int64_t r = first; r < last; r++) keep(m, c, l, r, h, qkv, at->wide_qkv);
        for (int64_t r = first; r < last; r += BESIDE) {
            int64_t rows = last - r < BESIDE ? last - r : BESIDE;
            if (m->width == 64)
                attend(m, c, l, r, rows, h, qkv, at->wide_qkv, 64, room, heads);
            else
                attend(m, c, l, r, rows, h, qkv, at->wide_qkv, m->width, room, heads);
        }
    }
#pragma omp barrier
    add(m, &l->attention, at, c->rows, heads, room);

    normed = inputs_of(&l->feed_forward.first, own, c->rows);
    prepare(m, c, &l->feed_forward, stream, at->wide, between, room, normed);
    end = (ending){ACTIVE, .activation = m->activation, .next = hidden};
    multiply(&l->feed_forward.first, normed, c->rows, &end, parts);
#pragma omp barrier
    add(m, &l->feed_forward, at, c->rows, hidden, room);
}

/* What is out of range: 1 a code, 2 a position, 3 a sequence, 4 the number of rows; 0: nothing. */
static int64_t wrong(const model *m, const chunk *c, const int64_t *codes) {
    if (c->rows > m->rows || c->places < 1 || c->rows % c->places) return 4;
    for (int64_t r = 0; r < c->rows; r++) {
        if (codes[r] < 0 || codes[r] >= m->codes) return 1;
        if (c->positions[r] < 0 || c->positions[r] >= m->grid * m->grid) return 2;
        if (c->of[r / c->places] < 0 || c->of[r / c->places] >= m->sequences) return 3;
    }
    return 0;
}

static void embed(const model *m, const chunk *c, const plan *at, const int64_t *codes) {
    int64_t dim = m->dim;
    for (int64_t r = 0; r < c->rows; r++) {
        float *to = m->scratch + at->stream + r * at->wide;
        memcpy(to, m->table + codes[r] * dim, dim * sizeof(float));
        for (int64_t i = 0; m->positions && i < dim; i++) to[i] += m->positions[c->positions[r] * dim + i];
    }
}

/* Row r of the stream as the head takes it, out (D). */
static void finished(const model *m, const plan *at, int64_t r, float *out) {
    const float *own = m->scratch + at->stream + r * at->wide;
    if (m->stable) {
        float top = largest(own, m->dim);
        for (int64_t i = 0; i < m->dim; i++) out[i] = own[i] / top;
        own = out;
    }
    normalise(&m->last, own, m->dim, out);
}

/* What was embedded, through all layers. */
static void run(const model *m, const chunk *c, const plan *at, float *out) {
#pragma omp parallel num_threads(m->threads)
    for (int64_t i = 0; i < m->layers; i++) through(m, c, m->stack + i, at);
    for (int64_t r = 0; r < c->rows; r++) finished(m, at, r, out + r * m->dim);
}

/* Read text parts, embedded (prompts, P, D), of a number of prompts from `first` on; integers: room for 2 * R. out (R, D):
 * what the head takes. */
void read_text(const model *m, int64_t first, int64_t prompts, const float *embedded, int64_t *integers, float *out) {
    int64_t rows = prompts * m->text_len, *of = integers + rows;
    for (int64_t r = 0; r < rows; r++) integers[r] = r % m->text_len - m->text_len;
    for (int64_t i = 0; i < prompts; i++) of[i] = (first + i) * m->images;
    chunk c = {rows, m->text_len, of, integers};
    plan at = plan_of(m, rows);
    for (int64_t r = 0; r < rows; r++)
        memcpy(m->scratch + at.stream + r * at.wide, embedded + r * m->dim, m->dim * sizeof(float));
    run(m, &c, &at, out);
}

/* Feed codes (R) to some sequences; out (R, D): what the head takes. Returns what `wrong` does. */
int64_t step(const model *m, int64_t rows, int64_t places, const int64_t *of, const int64_t *codes,
             const int64_t *positions, float *out) {
    chunk c = {rows, places, of, positions};
    int64_t failed = wrong(m, &c, codes);
    if (failed) return failed;
    plan at = plan_of(m, rows);
    embed(m, &c, &at, codes);
    run(m, &c, &at, out);
    return 0;
}

/* ---- windows */

/* The images of a batch while they are sampled: B images, N codes of each and room for the last window. */
typedef struct {
    int64_t images, num_codes, stride;
    int64_t *codes, *fronts; /* (B, stride): sampled ones, and guesses; (B): the last position that stays as it is */
    float *scores;           /* (B, stride) log-likelihoods */
    const int64_t *kept;     /* (B, stride) codes to keep, or -1 */
    const int64_t *nulls;    /* (B) the sequence that has an image without its caption, or -1 */
    const int64_t *keys;     /* (B) of the noise */
    const double *temperature, *top_p, *scale; /* (B), and so is top_k; `scale`: of guidance */
    const int64_t *top_k;
} canvas;

/* The code at a position of an image: the one that is kept, or a sample from the logits of row r. */
static int64_t code_at(const model *m, const canvas *v, const plan *at, int64_t image, int64_t position, int64_t r,
                       float *score) {
    float *own = m->scratch + at->logits + r * at->wide_head, *space = m->scratch + at->space + 2 * r * at->wide_head;
    if (score) *score = 0;
    int64_t kept = v->kept[image * v->stride + position];
    if (kept >= 0) return kept;
    uint64_t state = v->keys[image] + (uint64_t)(position * m->codes) * GOLDEN;
    choice by = {v->temperature[image], v->top_p[image], v->top_k[image], state};
    return sampled(own, m->codes, &by, space, score);
}

static void guide(const model *m, const plan *at, float scale, int64_t r, int64_t null) {
    float *own = m->scratch + at->logits + r * at->wide_head;
    const float *without = m->scratch + at->logits + null * at->wide_head;
    for (int64_t i = 0; i < m->codes; i++) own[i] = without[i] + (own[i] - without[i]) * scale;
}

/* The windows of a pass: rows / width of them belong to images, with guidance as many others to the same ones. */
typedef struct {
    int64_t active, rows;
    int64_t *of, *codes, *positions, *tokens, *images, *nulls; /* nulls: the first row without the caption, or -1 */
} windows;

/* Windows of each image that lacks codes, which begin so many places behind its front. integers: room for 6 * R. */
static windows windows_of(const model *m, const canvas *v, int64_t width, int64_t behind, int64_t *integers) {
    int64_t last = v->num_codes - 1, guided = 0;
    windows w = {0};
    for (int64_t i = 0; i < v->images; i++)
        if (v->fronts[i] < last) w.active++, guided += v->nulls[i] >= 0;
    w.rows = (w.active + guided) * width;
    if (w.rows > m->rows) return w;
    w.of = integers, w.codes = w.of + w.rows, w.positions = w.codes + w.rows, w.tokens = w.positions + w.rows;
    w.images = w.tokens + w.rows, w.nulls = w.images + w.rows;
    for (int64_t i = 0, window = 0, next = w.active; i < v->images; i++) {
        if (v->fronts[i] >= last) continue;
        w.images[window] = w.of[window] = i;
        w.nulls[window] = v->nulls[i] < 0 ? -1 : next * width;
        if (v->nulls[i] >= 0) w.of[next++] = v->nulls[i];
        for (int64_t place = 0; place < width; place++) {
            int64_t r = window * width + place, null = w.nulls[window] + place, position = v->fronts[i] + behind + place;
            w.codes[r] = v->codes[i * v->stride + position];
            w.positions[r] = position < last ? position : last; /* what is fed there does not count */
            if (w.nulls[window] >= 0) w.codes[null] = w.codes[r], w.positions[null] = w.positions[r];
        }
        window++;
    }
    return w;
}

/* Feed windows that begin so many places behind the fronts, and choose the code behind each place: tokens, and scores where
 * they are wanted. Returns what `wrong` does. */
static int64_t choose(const model *m, const canvas *v, int64_t width, int64_t behind, const windows *w, float *scores) {
    int64_t rows = w->rows, last = v->num_codes - 1;
    chunk c = {rows, width, w->of, w->positions};
    if (rows > m->rows) return 4;
    int64_t failed = wrong(m, &c, w->codes);
    if (failed) return failed;
    plan at = plan_of(m, rows);
    embed(m, &c, &at, w->codes);
#pragma omp parallel num_threads(m->threads)
    {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        float *own = own_of(m, &at, thread), *row = own + at.wide * rows;
        inputs taken = inputs_of(&m->head, own, rows);
        for (int64_t i = 0; i < m->layers; i++) through(m, &c, m->stack + i, &at);
        for (int64_t r = 0; r < rows; r++) {
            finished(m, &at, r, row);
            for (int64_t k = 0; k < m->dim; k++) taken.at[r * taken.row + k * taken.step] = row[k];
        }
        ending end = {PLAIN, m->scratch + at.logits, at.wide_head};
        multiply(&m->head, taken, rows, &end, own + at.parts);
#pragma omp barrier
        for (int64_t r = thread; r < w->active * width; r += threads) {
            int64_t image = w->images[r / width], position = v->fronts[image] + behind + r % width + 1;
            if (position > last) continue;
            int64_t null = w->nulls[r / width];
            if (null >= 0) guide(m, &at, v->scale[image], r, null + r % width);
            w->tokens[r] = code_at(m, v, &at, image, position, r, scores ? scores + r : NULL);
        }
    }
    return 0;
}

/* Guess the codes of a window of each image one by one, by a model whose matmuls are rough: it keeps keys and values where
 * the pass that follows overwrites them. integers: as below. Returns what `wrong` does. */
int64_t guess(const model *m, const canvas *v, int64_t width, int64_t *integers) {
    for (int64_t behind = 0; behind < width - 1; behind++) {
        windows w = windows_of(m, v, 1, behind, integers);
        int64_t failed = choose(m, v, 1, behind, &w, NULL);
        if (failed) return failed;
        for (int64_t i = 0; i < w.active; i++) {
            int64_t position = v->fronts[w.images[i]] + behind + 1;
            if (position < v->num_codes) v->codes[w.images[i] * v->stride + position] = w.tokens[i];
        }
    }
    return 0;
}

/* Feed a window of each image that lacks codes, choose the code behind each of its places, and move the image's front on
 * over those that were guessed right, and one more. guessed: `guess` will guess for the next. integers: room for 6 * R.
 * Returns what `wrong` does. */
int64_t advance(const model *m, const canvas *v, int64_t width, int64_t guessed, int64_t *integers) {
    windows w = windows_of(m, v, width, 0, integers);
    float scores[w.rows > 0 && w.rows <= m->rows ? w.rows : 1];
    int64_t last = v->num_codes - 1, failed = choose(m, v, width, 0, &w, scores);
    if (failed) return failed;
    plan at = plan_of(m, w.rows);
    for (int64_t window = 0; window < w.active; window++) {
        int64_t image = w.images[window], front = v->fronts[image], accepted = 0, right = 1;
        for (int64_t place = 0; place < width && front + place < last; place++) {
            int64_t *code = v->codes + image * v->stride + front + place + 1, token = w.tokens[window * width + place];
            accepted += right;
            right &= *code == token;
            *code = token;
            v->scores[image * v->stride + front + place + 1] = scores[window * width + place];
        }
        v->fronts[image] = front + accepted;
        /* Guesses for what the next window sees first: what the last logits give with the noise there. */
        for (int64_t place = width + 1; !guessed && place < width + accepted && front + place <= last; place++)
            v->codes[image * v->stride + front + place] =
                code_at(m, v, &at, image, front + place, window * width + width - 1, NULL);
    }
    return 0;
}
