/* Float32 matmuls on the processor's matrix unit (AMX), which multiplies only bfloat16, but 16 times as fast.
 *
 * A float (24 bits) is the sum of three bfloat16 parts (8 bits each). Of the nine products of two floats' parts the six
 * largest are summed in float32; the others are below a unit in the last place. So the error of a sum is that of
 * float32 arithmetic. Lower precision takes two parts (16 bits, three products) or one (8 bits, one product); sums are
 * always float32.
 *
 * The unit treats subnormal inputs as zero and flushes subnormal results. So operands are scaled by 2^24: then all parts
 * of all floats are normal, even of subnormal floats, and what is still flushed is below 2^-174. In return sums
 * overflow from 2^79 instead of 2^128: if any result is not finite, the caller has to compute it by other means.
 *
 * A multiplication of tiles takes 16 cycles, in which the rest of the core packs the next operands. (The vector panels
 * could multiply too, but next to the matrix unit they run at half their speed, and slow it down.)
 *
 * The order of a sum depends only on k: results do not depend on the number of threads. */
#if !defined(__AMX_BF16__)
int multiplies(void) { return 0; }
#else
#include "packing.h"
#include <omp.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STRIP 32 /* rows or columns in the matrix unit at a time: two tiles of 16 */
/* Bytes for 32 steps of k of a line (its parts side by side), and of a strip. */
#define LINE(parts) (64 * (parts))
#define TILES(parts) (STRIP * LINE(parts))
#define STRIPS(parts) (12 / (parts)) /* in a panel, the columns that a thread packs at a time */
#define DEPTH 704 /* steps of k at a time: two panels then take 1.1 MB; cores with AMX have 2 MB of cache */
#define MOST_ROWS 1344 /* packed for all threads, and twice (see struct work) if k is larger than DEPTH */

static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} WHOLE = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Whether there is a matrix unit and the system lets this process use it. */
int multiplies(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

/* A float rounded to the nearest of 8 bits: rounding 65537 x drops the lower bits, and 65536 x is exact. */
static inline __m512 rounded(__m512 x) {
    return _mm512_fnmadd_ps(x, _mm512_set1_ps(65536.0f), x * 65537.0f);
}

/* Split 16 floats and the 16 floats 16 steps of k later, both scaled, into up to three parts, in pairs: one row of a
 * tile of each part. */
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

/* Pack 32 steps of 16 lines, some of which may be out of range, as 16 rows of a tile of each part. A row is a line; with
 * `across` (columns of B) it is a step and the one 16 later. */
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

/* Transpose 4 elements of each of 16 rows, `apart` floats from each other, into four vectors of 16. */
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

/* Lines to be packed, in memory order: squares of 16 lines by 32 steps, a quarter (four rows of the tiles) at a time. */
struct job {
    struct matrix x;
    int across;           /* columns of B */
    long from, to, tiles; /* steps of k; tiles of 32 steps */
    long groups;          /* of 16 lines */
    long next, end;       /* squares */
    uint8_t *packed;      /* strips, each of `tiles` times tiles of 32 lines */
    /* The current square, and the next. */
    const float *source, *next_source;
    uint8_t *target, *next_target;
    int quarter;
    __m512i one[4], other[4]; /* the rows of a quarter: first 16 steps, and last 16 */
};

/* Go to the next square that is entirely in range, and pack partial ones on the way: their memory must exist. */
static __attribute__((noinline)) void next_square(struct job *job, long parts) {
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
            job->next_source = x.at + line[1] * x.line + k[1] * x.step, job->next_target = to[1];
            job->quarter = 0;
            return;
        }
        pack_edge(x, line[0], k[0], job->to, job->across, parts, to[0]);
    }
}

static inline int unfinished(const struct job *job) { return job->next < job->end; }

/* One of six stages of a quarter: load both halves, then split a row at a time. Meanwhile the next square is
 * prefetched. */
static inline __attribute__((always_inline)) void pack(struct job *job, const long parts, const int stage) {
    const int by_lines = job->x.step == 1, quarter = job->quarter;
    const long apart = by_lines ? job->x.line : job->x.step;
    if (stage < 2) {
        const float *from = job->source + (!stage ? 0 : by_lines ? 16 : 16 * apart);
        const float *then = job->next_source + (!stage ? 0 : by_lines ? 16 : 16 * apart);
        __m512i *to = stage ? job->other : job->one;
        for (int i = 0; i < 4; i++) __builtin_prefetch(then + (4 * quarter + i) * apart);
        if (by_lines == job->across)
            gather(from + 4 * quarter, apart, to);
        else
            for (int i = 0; i < 4; i++) to[i] = _mm512_loadu_si512(from + (4 * quarter + i) * apart);
    } else {
        const int row = stage - 2;
        const long at = LINE(parts) * (4 * quarter + row);
        for (int p = 0; p < parts; p++) __builtin_prefetch(job->next_target + at + 64 * p, 1);
        put_parts(job->one[row], job->other[row], parts, job->target + at);
    }
    if (stage == 5 && ++job->quarter == 4) {
        job->next++;
        next_square(job, parts);
    }
}

static inline void pack_all(struct job *job, const long parts) {
    while (unfinished(job))
        for (int stage = 0; stage < 6; stage++) pack(job, parts, stage);
}

static void finish(struct job *job, long parts) {
    if (parts == 1) pack_all(job, 1);
    if (parts == 2) pack_all(job, 2);
    if (parts == 3) pack_all(job, 3);
}

/* A block of C: address, size, and how it is written. */
struct place {
    float *at;
    long stride, m, n;
    int transposed, add; /* rows are columns of C; add to C instead of overwriting it */
    int *not_finite;            /* set to 1 if a result is not finite */
};

/* Write 16 rows from `row` and 16 columns from `column` of the place from a block's sums. */
static inline void put(const float *sums, struct place c, long row, long column) {
    __m512i x[16];
    long m = min(c.m - row, 16), n = min(c.n - column, 16);
    float *to = c.at + (c.transposed ? column * c.stride + row : row * c.stride + column);
    __mmask16 not_finite = 0;
    for (int i = 0; i < 16; i++) x[i] = _mm512_load_si512(sums + i * STRIP);
    if (c.transposed) transpose(x);
    for (long i = 0; i < (c.transposed ? n : m); i++) {
        __mmask16 some = first(c.transposed ? m : n);
        __m512 sum = (__m512)x[i] * _mm512_set1_ps(0x1p-48f);
        if (c.add) sum += _mm512_maskz_loadu_ps(some, to + i * c.stride);
        not_finite |= _mm512_mask_fpclass_ps_mask(some, sum, 0x99 /* infinite or NaN */);
        _mm512_mask_storeu_ps(to + i * c.stride, some, sum);
    }
    if (not_finite) __atomic_store_n(c.not_finite, 1, __ATOMIC_RELAXED);
}

/* Prefetch a strip of the place from `column` on, while its sums are computed. */
static inline void prefetch(struct place c, long column) {
    const float *to = c.at + column * (c.transposed ? c.stride : 1);
    for (int i = 0; i < STRIP; i++, to += c.stride) {
        __builtin_prefetch(to, 1);
        __builtin_prefetch(to + STRIP / 2, 1);
    }
}

/* The matrix unit: tiles 0 to 3 are the sums of 32 x 32, 4 and 5 a part of the rows, 6 and 7 a part of the columns. A
 * tile is reloaded as soon as the last multiplication that uses it has started. */
#define LOAD(t, from, part) _tile_loadd(t, (from) + t % 2 * (tile / 2) + 64 * (part), line);
#define ROWS(SLOT, part) \
    _tile_dpbf16ps(0, 4, 6); SLOT() _tile_dpbf16ps(1, 4, 7); SLOT() LOAD(4, a, part) \
    _tile_dpbf16ps(2, 5, 6); SLOT() _tile_dpbf16ps(3, 5, 7); SLOT() LOAD(5, a, part)
#define COLUMNS(SLOT, part) \
    _tile_dpbf16ps(0, 4, 6); SLOT() _tile_dpbf16ps(2, 5, 6); SLOT() LOAD(6, b, part) \
    _tile_dpbf16ps(1, 4, 7); SLOT() _tile_dpbf16ps(3, 5, 7); SLOT() LOAD(7, b, part)
#define BOTH(SLOT, part) \
    _tile_dpbf16ps(0, 4, 6); SLOT() _tile_dpbf16ps(1, 4, 7); SLOT() LOAD(4, next_a, part) \
    _tile_dpbf16ps(2, 5, 6); SLOT() LOAD(6, next_b, 0) \
    _tile_dpbf16ps(3, 5, 7); SLOT() LOAD(5, next_a, part) LOAD(7, next_b, 0)
#define CLEAR _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
/* The six products of three parts for 32 steps, smallest first, each sharing a factor with the one before; the three
 * products of two parts; the one of one. The first tiles are already loaded; those of the next 32 steps are loaded at
 * the end. */
#define SIX(SLOT, DONE) \
    ROWS(SLOT, 1) DONE(0) COLUMNS(SLOT, 1) DONE(1) ROWS(SLOT, 0) DONE(2) \
    COLUMNS(SLOT, 2) DONE(3) COLUMNS(SLOT, 0) DONE(4) BOTH(SLOT, 2) DONE(5)
#define THREE(SLOT, DONE) ROWS(SLOT, 0) DONE(0) DONE(1) COLUMNS(SLOT, 1) DONE(2) DONE(3) BOTH(SLOT, 1) DONE(4) DONE(5)
#define ONE(SLOT, DONE) BOTH(SLOT, 0) DONE(0) DONE(1) DONE(2) DONE(3) DONE(4) DONE(5)

/* Between two multiplications: prefetch lines of the tiles of the next 32 steps, which are in the second-level cache,
 * and of the next strip of rows: a panel of columns fits into that cache, all rows do not. If another thread runs on the
 * same core, this makes the matrix unit up to 1.6 times as fast: a thread that waits for its tiles gets little of it. */
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

/* Multiply a packed strip of rows with a packed panel of columns into its place. `next` are the rows that follow.
 * Meanwhile two packing jobs advance, the first one first. */
static inline __attribute__((always_inline)) void multiply_by(
    const long parts, const uint8_t *rows, const uint8_t *next, const uint8_t *panel, long tiles, struct place c,
    struct job *jobs) {
    const long line = LINE(parts), tile = TILES(parts);
    float block[STRIP * STRIP] __attribute__((aligned(64)));
    const uint8_t *a = rows, *b = panel;
    LOAD(4, a, parts - 1) LOAD(5, a, parts - 1) LOAD(6, b, 0) LOAD(7, b, 0)
    for (long s = 0; s * STRIP < c.n; s++) {
        prefetch(c, STRIP * s);
        CLEAR
        for (long t = tiles; t; t--) {
            const uint8_t *next_a = t > 1 ? a + tile : rows, *next_b = b + tile, *soon_a = next_a, *soon_b = next_b;
            __asm__("" : "+r"(soon_a), "+r"(soon_b)); /* or the compiler keeps a variable for each address */
            struct job *job = unfinished(jobs) ? jobs : unfinished(jobs + 1) ? jobs + 1 : NULL;
            if (parts == 1) {
                ONE(OF_ONE, PACK)
            } else if (parts == 2) {
                THREE(OF_THREE, PACK)
            } else {
                SIX(OF_SIX, PACK)
            }
            a = next_a, b = next_b;
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
    long parts, const uint8_t *rows, const uint8_t *next, const uint8_t *panel, long tiles, struct place c,
    struct job *jobs) {
    if (parts == 1) multiply_by(1, rows, next, panel, tiles, c, jobs);
    if (parts == 2) multiply_by(2, rows, next, panel, tiles, c, jobs);
    if (parts == 3) multiply_by(3, rows, next, panel, tiles, c, jobs);
}

static __thread void *shared_buffer, *own_buffer;
static __thread size_t shared_buffer_size, own_buffer_size;

/* Cells that remain for a thread. */
struct range {
    long begin, end;
};

/* The next cell for thread `me`: its own first one, else the last one of the thread with most left; -1 if none is
 * left. */
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

/* A matmul: all of A is packed for all threads, and each packs the columns of B that it works on. The work is split
 * into cells, a strip of rows by a panel of columns. Cores that are busy with other work do fewer.
 *
 * The next operands are packed during multiplications: the next panel of columns, and a thread's part of the rows for
 * the next steps of k. So both have two buffers. */
struct work {
    struct matrix a, b;
    long k, depth, parts, wide; /* depth: steps of k at a time; wide: columns in a panel */
};

/* Pack the lines of x for the steps from `from` on: part `me` of `all` of the squares. */
static struct job job_of(
    const struct work *w, struct matrix x, int across, long from, uint8_t *packed, long me, long all) {
    long to = min(w->k, from + w->depth), tiles = (to - from + 31) / 32, groups = (x.lines + STRIP - 1) / STRIP * 2;
    struct job job = {
        .x = x, .across = across, .from = from, .to = to, .tiles = tiles, .groups = groups,
        .next = groups * tiles * me / all, .end = groups * tiles * (me + 1) / all, .packed = packed};
    next_square(&job, w->parts);
    return job;
}

/* Pack the rows of thread `me`. */
static struct job rows_job(const struct work *w, long from, uint8_t *packed, long me, long all) {
    return job_of(w, w->a, 0, from, packed, me, all);
}

/* Pack a panel of columns, all of it by one thread. */
static struct job panel_job(const struct work *w, long from, long panel, uint8_t *packed) {
    struct matrix x = w->b;
    x.at += panel * w->wide * x.line;
    x.lines = min(w->wide, x.lines - panel * w->wide); /* the rest belongs to other panels */
    return job_of(w, x, 1, from, packed, 0, 1);
}

static int matmul_rows(struct matrix a, struct matrix b, long k, long parts, float *c, long stride, int transposed) {
    long chunks = (k + DEPTH - 1) / DEPTH, depth = ((k + chunks - 1) / chunks + 31) / 32 * 32, most = depth / 32;
    long strips = (a.lines + STRIP - 1) / STRIP, most_columns = STRIPS(parts) * STRIP;
    long panels = (b.lines + most_columns - 1) / most_columns;
    long wide = ((b.lines + panels - 1) / panels + 15) / 16 * 16, cells = strips * panels;
    const struct work work = {a, b, k, depth, parts, wide};
    struct range left[2][omp_get_max_threads()]; /* of this chunk, and of the next, which some threads reach first */
    size_t rows_size = strips * most * TILES(parts), panel_size = most * STRIPS(parts) * TILES(parts);
    uint8_t *shared = memory(&shared_buffer, &shared_buffer_size, (1 + (chunks > 1)) * rows_size);
    int failed = !shared, not_finite = 0;
    if (failed) return 1;
#pragma omp parallel
    {
        uint8_t saved[64]; /* other users of the matrix unit in this thread find it unchanged */
        _tile_storeconfig(saved);
        _tile_loadconfig(&WHOLE);
        uint8_t *own = memory(&own_buffer, &own_buffer_size, 2 * panel_size + TILES(parts)); /* one read past the end */
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        long me = omp_get_thread_num(), all = omp_get_num_threads();
        long now = 0; /* buffer of the current panel */
        const struct range mine = {cells * me / all, cells * (me + 1) / all};
        long packing = -1; /* panel in the other buffer */
        struct job jobs[2] = {{.next = 0}, rows_job(&work, 0, shared, me, all)};
        for (long from = 0, chunk = 0; from < k; from += depth, chunk++) {
            long kept = -1, tiles = jobs[1].tiles, after = from + depth;
            const uint8_t *packed = shared + chunk % 2 * rows_size;
            finish(&jobs[1], parts);
            left[chunk % 2][me] = mine;
#pragma omp barrier /* all rows are packed, and those of the previous chunk are no longer read */
            if (after < k) jobs[1] = rows_job(&work, after, shared + (chunk + 1) % 2 * rows_size, me, all);
            for (long cell; own && (cell = take(left[chunk % 2], me, all)) >= 0;) {
                long u = cell / strips, s = cell % strips, row = s * STRIP, column = u * wide;
                if (kept != u) {
                    if (packing == u && jobs[0].from == from) {
                        finish(&jobs[0], parts);
                        now = 1 - now;
                        packing = -1;
                    } else { /* a panel taken from another thread, or the first one */
                        struct job job = panel_job(&work, from, u, own + now * panel_size);
                        finish(&job, parts);
                        if (jobs[0].from <= from) packing = -1; /* others took it */
                    }
                    kept = u;
                    if (packing < 0 && cell >= mine.begin && (u + 1) * strips < mine.end)
                        jobs[0] = panel_job(&work, from, packing = u + 1, own + (1 - now) * panel_size);
                    else if (packing < 0 && after < k && mine.begin < mine.end)
                        jobs[0] = panel_job(&work, after, packing = mine.begin / strips, own + (1 - now) * panel_size);
                }
                struct place place = {
                    c + (transposed ? column * stride + row : row * stride + column), stride,
                    min(STRIP, a.lines - row), min(wide, b.lines - column), transposed, from > 0, &not_finite};
                const uint8_t *strip = packed + s * tiles * TILES(parts);
                const uint8_t *next = packed + (s + 1) % strips * tiles * TILES(parts);
                multiply(parts, strip, next, own + now * panel_size, tiles, place, jobs);
            }
        }
        _tile_loadconfig(saved);
    }
    return failed ? 1 : not_finite ? 2 : 0;
}

/* C (m, n) = A (m, k) B (k, n); C has row stride `stride`, strides of A and B are as in struct matrix. `parts`: 1 to 3
 * parts of each float are used. Returns 0, 1 if there is no memory, or 2 if a result is not finite, which may be due to
 * the scaling. For a tall C of a long k the transpose is computed, so that threads share the smaller matrix; for a short k
 * most of the time goes into writing C, which is faster by rows. */
int matmul(
    long m, long n, long k, const float *a, long a_line, long a_step, const float *b, long b_line, long b_step,
    long parts, float *c, long stride) {
    int transposed = m > 2 * n && k >= n, failed = 0;
    struct matrix left = {a, a_line, a_step, m}, right = {b, b_line, b_step, n};
    struct matrix rows = transposed ? right : left, columns = transposed ? left : right;
    for (long from = 0, all = rows.lines; from < all && !failed; from += MOST_ROWS) {
        rows.lines = min(MOST_ROWS, all - from);
        failed = matmul_rows(rows, columns, k, parts, c + (transposed ? from : from * stride), stride, transposed);
        rows.at += MOST_ROWS * rows.line;
    }
    return failed;
}
#endif
