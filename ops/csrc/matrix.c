/* Products of float32 matrices by a processor's matrix unit (AMX), which multiplies bfloat16 only, 16 times as fast.
 *
 * A float of 24 bits is the sum of three bfloat16 numbers of 8. Of the nine products of the parts of two floats the
 * six largest are added up, in float32; the others are less than a unit in the last place of the product. So the error
 * of a sum is that of float32 arithmetic. Who can do with less takes two parts (16 bits, three products) or one (8 bits,
 * one product): sums are float32 in any case.
 *
 * The unit takes subnormal numbers for zero, and returns none. So all that is multiplied is scaled by 2^24: then every
 * part of every float is normal, subnormal floats included, and what the unit still flushes is below 2^-174. In return
 * sums overflow from 2^79 on instead of 2^128: where a result is not finite, whatever the reason, the caller is told
 * to multiply by other means.
 *
 * A product of tiles takes 16 cycles, in which a core's other parts pack what is multiplied next. (The vector units
 * could multiply too. But next to the matrix unit they are half as fast as alone, and slow it down.)
 *
 * The order of a sum depends on k only: results do not depend on the number of threads. */
#if !defined(__AMX_BF16__)
int multiplies(void) { return 0; }
#else
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STRIP 32 /* rows, or columns, that the matrix unit takes at a time: two tiles of 16 */
/* Bytes for 32 steps of k: of a line, its parts side by side; of a strip. */
#define LINE(parts) (64 * (parts))
#define TILES(parts) (STRIP * LINE(parts))
#define STRIPS(parts) (12 / (parts)) /* of columns that a thread packs at a time: a unit */
#define DEPTH 704 /* steps of k at a time: two units then take 1.1 MB, and AMX comes with 2 MB of cache */
#define MOST_ROWS 1344 /* that lie packed for all threads, for two times as many steps where k is larger than that */

/* Line i of a matrix (a row of A, a column of B), index k, lies at at[i * line + k * step]; line or step is 1. */
struct matrix {
    const float *at;
    long line, step, lines;
};

static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} WHOLE = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Whether there is a matrix unit and the system lets this process use it. */
int multiplies(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

static long smaller(long a, long b) { return a < b ? a : b; }

static inline __mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* A float rounded to 8 bits, to the nearest: the lower ones are lost when 65537 x is rounded, and 65536 x is exact. */
static inline __m512 rounded(__m512 x) {
    return _mm512_fnmadd_ps(x, _mm512_set1_ps(65536.0f), x * 65537.0f);
}

/* Three parts or fewer of 16 floats at 16 steps of k, and of 16 at the steps 16 later, in pairs: one row of a tile of
 * each part. Both scaled. */
static inline void put_parts(__m512i one, __m512i other, long parts, uint8_t *to) {
    __m512 x = (__m512)one * _mm512_set1_ps(0x1p24f), y = (__m512)other * _mm512_set1_ps(0x1p24f);
    for (int p = 0; p < parts; p++) {
        __m512 a = p < 2 ? rounded(x) : x, b = p < 2 ? rounded(y) : y;
        __m512i pairs = _mm512_or_si512(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
        _mm512_store_si512((void *)(to + 64 * p), pairs);
        x -= a;
        y -= b;
    }
}

/* Transpose 16 x 16 numbers of 32 bits. */
static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0x88);
            t[8 * i + 4 + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

/* 32 steps of 16 lines, of which some may not be there, as 16 rows of a tile of each part. In a row is a line, or where
 * it goes `across` a step and that 16 later, as the columns of B are multiplied. */
static void pack_edge(struct matrix x, long line, long k, long depth, int across, long parts, uint8_t *to) {
    const float *from = x.at + line * x.line + k * x.step;
    long lines = x.lines - line, steps = depth - k;
    __m512i one[16], other[16];
    if (x.step == 1)
        for (int i = 0; i < 16; i++) {
            one[i] = _mm512_maskz_loadu_epi32(i < lines ? first(steps) : 0, from + i * x.line);
            other[i] = _mm512_maskz_loadu_epi32(i < lines ? first(steps - 16) : 0, from + i * x.line + 16);
        }
    else
        for (int i = 0; i < 16; i++) {
            one[i] = _mm512_maskz_loadu_epi32(i < steps ? first(lines) : 0, from + i * x.step);
            other[i] = _mm512_maskz_loadu_epi32(i + 16 < steps ? first(lines) : 0, from + (i + 16) * x.step);
        }
    if ((x.step == 1) == across) {
        transpose(one);
        transpose(other);
    }
    for (int i = 0; i < 16; i++) put_parts(one[i], other[i], parts, to + LINE(parts) * i);
}

/* Four numbers of each of 16 rows of memory, `apart` floats from each other, as four vectors of 16. */
static inline void gather(const float *from, long apart, __m512i to[4]) {
    __m512i x[4], y[4];
    for (int i = 0; i < 4; i++) {
        const float *at = from + i * apart;
        x[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)at));
        x[i] = _mm512_inserti32x4(x[i], _mm_loadu_si128((const void *)(at + 4 * apart)), 1);
        x[i] = _mm512_inserti32x4(x[i], _mm_loadu_si128((const void *)(at + 8 * apart)), 2);
        x[i] = _mm512_inserti32x4(x[i], _mm_loadu_si128((const void *)(at + 12 * apart)), 3);
    }
    for (int i = 0; i < 2; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        to[2 * i] = _mm512_unpacklo_epi64(y[i], y[2 + i]);
        to[2 * i + 1] = _mm512_unpackhi_epi64(y[i], y[2 + i]);
    }
}

/* Lines to be packed, in the order of memory: squares of 16 lines by 32 steps, a quarter at a time, four rows of the
 * tiles. */
struct job {
    struct matrix x;
    int across;           /* columns of B */
    long from, to, tiles; /* steps of k; how often 32 */
    long groups;          /* of 16 lines */
    long next, end;       /* squares */
    uint8_t *packed;      /* strips, each of `tiles` times tiles of 32 lines */
    /* The square at hand, and the one after it. */
    const float *source, *then_source;
    uint8_t *target, *then_target;
    int quarter;
    __m512i one[4], other[4]; /* a row of a quarter in each: first halves of the steps, and second */
};

/* Find a square of which all is there. Those that come before are packed at once: there must be room for them. */
static __attribute__((noinline)) void go_on(struct job *job, long parts) {
    const struct matrix x = job->x;
    for (; job->next < job->end; job->next++) {
        long line[2], k[2];
        uint8_t *to[2];
        for (int i = 0; i < 2; i++) {
            long square = job->next + i, by_lines = x.step == 1;
            long group = by_lines ? square / job->tiles : square % job->groups;
            long tile = by_lines ? square % job->tiles : square / job->groups;
            line[i] = 16 * group, k[i] = job->from + 32 * tile;
            to[i] = job->packed + (2 * (group / 2 * job->tiles + tile) + group % 2) * (TILES(parts) / 2);
        }
        if (line[0] + 16 <= x.lines && k[0] + 32 <= job->to) {
            job->source = x.at + line[0] * x.line + k[0] * x.step, job->target = to[0];
            job->then_source = x.at + line[1] * x.line + k[1] * x.step, job->then_target = to[1];
            job->quarter = 0;
            return;
        }
        pack_edge(x, line[0], k[0], job->to, job->across, parts, to[0]);
    }
}

static inline int undone(const struct job *job) { return job->next < job->end; }

/* A stage of a quarter: get both halves, then split a row at a time. What the next square needs comes from memory
 * meanwhile. */
static inline __attribute__((always_inline)) void pack(struct job *job, const long parts, const int stage) {
    const int by_lines = job->x.step == 1, quarter = job->quarter;
    const long apart = by_lines ? job->x.line : job->x.step;
    if (stage < 2) {
        const float *from = job->source + (!stage ? 0 : by_lines ? 16 : 16 * apart);
        const float *then = job->then_source + (!stage ? 0 : by_lines ? 16 : 16 * apart);
        __m512i *to = stage ? job->other : job->one;
        for (int i = 0; i < 4; i++) __builtin_prefetch(then + (4 * quarter + i) * apart);
        if (by_lines == job->across)
            gather(from + 4 * quarter, apart, to);
        else
            for (int i = 0; i < 4; i++) to[i] = _mm512_loadu_si512(from + (4 * quarter + i) * apart);
    } else {
        const int row = stage - 2;
        const long at = LINE(parts) * (4 * quarter + row);
        for (int p = 0; p < parts; p++) __builtin_prefetch(job->then_target + at + 64 * p, 1);
        put_parts(job->one[row], job->other[row], parts, job->target + at);
    }
    if (stage == 5 && ++job->quarter == 4) {
        job->next++;
        go_on(job, parts);
    }
}

static inline void pack_all(struct job *job, const long parts) {
    while (undone(job))
        for (int stage = 0; stage < 6; stage++) pack(job, parts, stage);
}

static void finish(struct job *job, long parts) {
    if (parts == 1) pack_all(job, 1);
    if (parts == 2) pack_all(job, 2);
    if (parts == 3) pack_all(job, 3);
}

/* Where a block of C lies, how much of it there is, and what becomes of it. */
struct place {
    float *at;
    long stride, m, n;
    int turned, add; /* row i lies where column i of C would; to what is there */
    int *odd;        /* becomes 1 where a result is not finite */
};

/* Rows `row` to `row` + 16 of the place, columns `column` to `column` + 16, from a block's sums. */
static inline void put(const float *sums, struct place c, long row, long column) {
    __m512i x[16];
    long m = smaller(c.m - row, 16), n = smaller(c.n - column, 16);
    float *to = c.at + (c.turned ? column * c.stride + row : row * c.stride + column);
    __mmask16 odd = 0;
    for (int i = 0; i < 16; i++) x[i] = _mm512_load_si512(sums + i * STRIP);
    if (c.turned) transpose(x);
    for (long i = 0; i < (c.turned ? n : m); i++) {
        __mmask16 some = first(c.turned ? m : n);
        __m512 sum = (__m512)x[i] * _mm512_set1_ps(0x1p-48f);
        if (c.add) sum += _mm512_maskz_loadu_ps(some, to + i * c.stride);
        odd |= _mm512_mask_fpclass_ps_mask(some, sum, 0x99 /* infinite, or not a number */);
        _mm512_mask_storeu_ps(to + i * c.stride, some, sum);
    }
    if (odd) __atomic_store_n(c.odd, 1, __ATOMIC_RELAXED);
}

/* Ask for a strip of rows of the place at some columns: they come from memory while their sums are computed. */
static inline void ask_for(struct place c, long column) {
    const float *to = c.at + column * (c.turned ? c.stride : 1);
    for (int i = 0; i < STRIP; i++, to += c.stride) {
        __builtin_prefetch(to, 1);
        __builtin_prefetch(to + STRIP / 2, 1);
    }
}

/* The matrix unit: tiles 0 to 3 are sums of 32 x 32, 4 and 5 a part of the rows, 6 and 7 a part of the columns. A tile
 * is loaded as soon as the last product with what it was has begun. */
#define LOAD(t, from, part) _tile_loadd(t, (from) + t % 2 * (tile / 2) + 64 * (part), line);
#define ROWS(SLOT, part) \
    _tile_dpbf16ps(0, 4, 6); SLOT() _tile_dpbf16ps(1, 4, 7); SLOT() LOAD(4, a, part) \
    _tile_dpbf16ps(2, 5, 6); SLOT() _tile_dpbf16ps(3, 5, 7); SLOT() LOAD(5, a, part)
#define COLUMNS(SLOT, part) \
    _tile_dpbf16ps(0, 4, 6); SLOT() _tile_dpbf16ps(2, 5, 6); SLOT() LOAD(6, b, part) \
    _tile_dpbf16ps(1, 4, 7); SLOT() _tile_dpbf16ps(3, 5, 7); SLOT() LOAD(7, b, part)
#define BOTH(SLOT, part) \
    _tile_dpbf16ps(0, 4, 6); SLOT() _tile_dpbf16ps(1, 4, 7); SLOT() LOAD(4, then_a, part) \
    _tile_dpbf16ps(2, 5, 6); SLOT() LOAD(6, then_b, 0) \
    _tile_dpbf16ps(3, 5, 7); SLOT() LOAD(5, then_a, part) LOAD(7, then_b, 0)
#define CLEAR _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
/* The six products of parts for 32 steps, small ones first, which differ in one factor; those of two parts, and that of
 * one. The tiles of the first are there already, and those of the next 32 steps are loaded at last. */
#define SIX(SLOT, DONE) \
    ROWS(SLOT, 1) DONE(0) COLUMNS(SLOT, 1) DONE(1) ROWS(SLOT, 0) DONE(2) \
    COLUMNS(SLOT, 2) DONE(3) COLUMNS(SLOT, 0) DONE(4) BOTH(SLOT, 2) DONE(5)
#define THREE(SLOT, DONE) ROWS(SLOT, 0) DONE(0) DONE(1) COLUMNS(SLOT, 1) DONE(2) DONE(3) BOTH(SLOT, 1) DONE(4) DONE(5)
#define ONE(SLOT, DONE) BOTH(SLOT, 0) DONE(0) DONE(1) DONE(2) DONE(3) DONE(4) DONE(5)

/* Between two products of tiles: ask for some lines of the tiles of the next 32 steps, which are in the cache of the
 * core, but no longer in its first; and for some of the strip of rows that comes next: a unit of columns fits in the
 * core's cache, all rows do not. Where another thread works on the same core, one that only waits for its tiles gets
 * little of it: the matrix unit is then up to 1.6 times as fast as without. */
#define SOON(lines) \
    for (int i = 0; i < (lines); i++) { \
        _mm_prefetch(soon_a + 64 * i, _MM_HINT_T0); \
        _mm_prefetch(soon_b + 64 * i, _MM_HINT_T0); \
    } \
    soon_a += 64 * (lines); soon_b += 64 * (lines); \
    _mm_prefetch(next, _MM_HINT_T1); next += 64;
#define OF_SIX() SOON(4)
#define OF_THREE() SOON(6)
#define OF_ONE() SOON(8)
#define PACK(stage) if (job) pack(job, parts, stage);

/* The product of a packed strip of rows and a packed unit of columns to its place. `next` are the rows that come then;
 * two jobs are gone on with meanwhile, first the first. */
static inline __attribute__((always_inline)) void multiply_by(
    const long parts, const uint8_t *rows, const uint8_t *next, const uint8_t *unit, long tiles, struct place c,
    struct job *jobs) {
    const long line = LINE(parts), tile = TILES(parts);
    float block[STRIP * STRIP] __attribute__((aligned(64)));
    const uint8_t *a = rows, *b = unit;
    LOAD(4, a, parts - 1) LOAD(5, a, parts - 1) LOAD(6, b, 0) LOAD(7, b, 0)
    for (long s = 0; s * STRIP < c.n; s++) {
        ask_for(c, STRIP * s);
        CLEAR
        for (long t = tiles; t; t--) {
            const uint8_t *then_a = t > 1 ? a + tile : rows, *then_b = b + tile, *soon_a = then_a, *soon_b = then_b;
            __asm__("" : "+r"(soon_a), "+r"(soon_b)); /* or each address would be a variable of its own */
            struct job *job = undone(jobs) ? jobs : undone(jobs + 1) ? jobs + 1 : NULL;
            if (parts == 1) {
                ONE(OF_ONE, PACK)
            } else if (parts == 2) {
                THREE(OF_THREE, PACK)
            } else {
                SIX(OF_SIX, PACK)
            }
            a = then_a, b = then_b;
        }
        _tile_stored(0, block, 4 * STRIP);
        _tile_stored(1, block + 16, 4 * STRIP);
        _tile_stored(2, block + 16 * STRIP, 4 * STRIP);
        _tile_stored(3, block + 16 * STRIP + 16, 4 * STRIP);
        for (int quarter = 0; quarter < 4; quarter++) {
            int row = quarter / 2 * 16, column = quarter % 2 * 16;
            put(block + row * STRIP + column, c, row, STRIP * s + column);
        }
    }
}

static void multiply(
    long parts, const uint8_t *rows, const uint8_t *next, const uint8_t *unit, long tiles, struct place c,
    struct job *jobs) {
    if (parts == 1) multiply_by(1, rows, next, unit, tiles, c, jobs);
    if (parts == 2) multiply_by(2, rows, next, unit, tiles, c, jobs);
    if (parts == 3) multiply_by(3, rows, next, unit, tiles, c, jobs);
}

/* Memory for packed numbers that a thread keeps: new memory costs as much as filling it thrice. */
static uint8_t *memory(uint8_t **kept, size_t *size, size_t wanted) {
    if (*size < wanted) {
        free(*kept);
        *kept = aligned_alloc(64, wanted);
        *size = *kept ? wanted : 0;
    }
    return *kept;
}
static __thread uint8_t *for_all, *for_one;
static __thread size_t for_all_size, for_one_size;

/* Cells that are left to a thread. */
struct range {
    long begin, end;
};

/* The next cell of thread `me`: its own first one, or the last one of who has most left; -1 where none is left. */
static long take(struct range *left, long me, long all) {
    long cell = -1, most = me;
#pragma omp critical(matrix_cells)
    {
        if (left[me].begin == left[me].end)
            for (long i = 0; i < all; i++)
                if (left[i].end - left[i].begin > left[most].end - left[most].begin) most = i;
        if (left[most].begin < left[most].end) cell = most == me ? left[me].begin++ : --left[most].end;
    }
    return cell;
}

/* A product, where all of A lies packed for all threads, and each packs the columns of B that it works on. The work is
 * cut into cells, a strip of rows by a unit of columns. Cores that also do other work do fewer.
 *
 * What comes next is packed while something is multiplied: the next unit of columns, and a thread's share of the rows
 * for the next steps of k. So there is room for two of either. */
struct work {
    struct matrix a, b;
    long k, depth, parts, wide; /* depth: steps of k at a time; wide: columns in a unit */
};

/* Lines of x, for the steps from `from` on: of the squares what is part `me` of `all`. */
static struct job job_of(
    const struct work *w, struct matrix x, int across, long from, uint8_t *packed, long me, long all) {
    long to = smaller(w->k, from + w->depth), tiles = (to - from + 31) / 32, groups = (x.lines + STRIP - 1) / STRIP * 2;
    struct job job = {
        .x = x, .across = across, .from = from, .to = to, .tiles = tiles, .groups = groups,
        .next = groups * tiles * me / all, .end = groups * tiles * (me + 1) / all, .packed = packed};
    go_on(&job, w->parts);
    return job;
}

/* What thread `me` packs of the rows. */
static struct job rows_job(const struct work *w, long from, uint8_t *packed, long me, long all) {
    return job_of(w, w->a, 0, from, packed, me, all);
}

/* A unit of columns, which one thread packs. */
static struct job unit_job(const struct work *w, long from, long unit, uint8_t *packed) {
    struct matrix x = w->b;
    x.at += unit * w->wide * x.line;
    x.lines = smaller(w->wide, x.lines - unit * w->wide); /* what follows belongs to another unit */
    return job_of(w, x, 1, from, packed, 0, 1);
}

static int product_of(struct matrix a, struct matrix b, long k, long parts, float *c, long stride, int turned) {
    long chunks = (k + DEPTH - 1) / DEPTH, depth = ((k + chunks - 1) / chunks + 31) / 32 * 32, most = depth / 32;
    long strips = (a.lines + STRIP - 1) / STRIP, most_columns = STRIPS(parts) * STRIP;
    long units = (b.lines + most_columns - 1) / most_columns;
    long wide = ((b.lines + units - 1) / units + 15) / 16 * 16, cells = strips * units;
    const struct work work = {a, b, k, depth, parts, wide};
    struct range left[2][omp_get_max_threads()]; /* those of one chunk, and of the next: some threads are there first */
    size_t for_rows = strips * most * TILES(parts), for_unit = most * STRIPS(parts) * TILES(parts);
    uint8_t *shared = memory(&for_all, &for_all_size, (1 + (chunks > 1)) * for_rows);
    int failed = !shared, odd = 0;
    if (failed) return 1;
#pragma omp parallel
    {
        uint8_t saved[64]; /* whoever else in this thread uses the matrix unit finds it as it was */
        _tile_storeconfig(saved);
        _tile_loadconfig(&WHOLE);
        uint8_t *own = memory(&for_one, &for_one_size, 2 * for_unit + TILES(parts)); /* one is read beyond the end */
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        long me = omp_get_thread_num(), all = omp_get_num_threads();
        long now = 0; /* which room has the unit at hand */
        const struct range mine = {cells * me / all, cells * (me + 1) / all};
        long packing = -1; /* the unit in the other room */
        struct job jobs[2] = {{.next = 0}, rows_job(&work, 0, shared, me, all)};
        for (long from = 0, chunk = 0; from < k; from += depth, chunk++) {
            long kept = -1, tiles = jobs[1].tiles, after = from + depth;
            const uint8_t *packed = shared + chunk % 2 * for_rows;
            finish(&jobs[1], parts);
            left[chunk % 2][me] = mine;
#pragma omp barrier /* all rows are packed, and nobody reads those of the chunk before any more */
            if (after < k) jobs[1] = rows_job(&work, after, shared + (chunk + 1) % 2 * for_rows, me, all);
            for (long cell; own && (cell = take(left[chunk % 2], me, all)) >= 0;) {
                long u = cell / strips, s = cell % strips, row = s * STRIP, column = u * wide;
                if (kept != u) {
                    if (packing == u && jobs[0].from == from) {
                        finish(&jobs[0], parts);
                        now = 1 - now;
                        packing = -1;
                    } else { /* a unit that others left, or the very first */
                        struct job job = unit_job(&work, from, u, own + now * for_unit);
                        finish(&job, parts);
                        if (jobs[0].from <= from) packing = -1; /* others took it */
                    }
                    kept = u;
                    if (packing < 0 && cell >= mine.begin && (u + 1) * strips < mine.end)
                        jobs[0] = unit_job(&work, from, packing = u + 1, own + (1 - now) * for_unit);
                    else if (packing < 0 && after < k && mine.begin < mine.end)
                        jobs[0] = unit_job(&work, after, packing = mine.begin / strips, own + (1 - now) * for_unit);
                }
                struct place place = {
                    c + (turned ? column * stride + row : row * stride + column), stride,
                    smaller(STRIP, a.lines - row), smaller(wide, b.lines - column), turned, from > 0, &odd};
                const uint8_t *strip = packed + s * tiles * TILES(parts);
                const uint8_t *next = packed + (s + 1) % strips * tiles * TILES(parts);
                multiply(parts, strip, next, own + now * for_unit, tiles, place, jobs);
            }
        }
        _tile_loadconfig(saved);
    }
    return failed ? 1 : odd ? 2 : 0;
}

/* C (m, n) = A (m, k) B (k, n); C's rows lie `stride` floats apart, steps are as in struct matrix. `parts` of each
 * number, 1 to 3, are multiplied. Returns 0, 1 where there is no memory, or 2 where a result is not finite, although it
 * might be by other means. Of a tall C the transpose is computed: what all threads share is the smaller matrix then. */
int product(
    long m, long n, long k, const float *a, long a_line, long a_step, const float *b, long b_line, long b_step,
    long parts, float *c, long stride) {
    int turned = m > 2 * n, failed = 0;
    struct matrix left = {a, a_line, a_step, m}, right = {b, b_line, b_step, n};
    struct matrix rows = turned ? right : left, columns = turned ? left : right;
    for (long from = 0, all = rows.lines; from < all && !failed; from += MOST_ROWS) {
        rows.lines = smaller(MOST_ROWS, all - from);
        failed = product_of(rows, columns, k, parts, c + (turned ? from : from * stride), stride, turned);
        rows.at += MOST_ROWS * rows.line;
    }
    return failed;
}
#endif
