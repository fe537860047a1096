/* Products of float32 matrices by a processor's matrix unit (AMX), which multiplies bfloat16 only, 16 times as fast.
 *
 * A float of 24 bits is the sum of three bfloat16 numbers of 8. Of the nine products of the parts of two floats the
 * six largest are added up, in float32; the others are less than a unit in the last place of the product. So the error
 * of a sum is that of float32 arithmetic. Numbers below 1e-33 lose their last bits; above 1e33 results are NaN. Who can
 * do with less takes two parts (16 bits, three products) or one (8 bits, one product): sums are float32 in any case.
 *
 * The vector units are idle meanwhile: of each 208 columns 48 are multiplied by them, in between. Where other work
 * slows the matrix unit down, as on a core that two machines share, the two stay ahead of the vector units alone. With
 * fewer parts the matrix unit does all.
 *
 * Which unit computes a number depends on C's shape and the number's place, and the order of a sum on k only: results
 * do not depend on the number of threads. */
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

#define STRIP 32  /* rows, or columns, that the matrix unit takes at a time: two tiles of 16 */
#define ALL 3     /* parts of a float */
/* Bytes for 32 steps of k: of a line, its parts side by side; of a strip; of a strip of rows, with what the vector
 * units take of it, as floats, where all parts are multiplied. */
#define LINE(parts) (64 * (parts))
#define TILES(parts) (STRIP * LINE(parts))
#define ROWS_OF(parts) (TILES(parts) + ((parts) == ALL ? STRIP * 32 * 4 : 0))
#define PANEL 48  /* columns that the vector units take at a time, with 8 rows: 24 sums in registers */
#define STRIPS 5  /* to each panel: the vector units do 3.75 of its 4 parts of a strip of rows meanwhile */
#define UNIT(parts) ((parts) == ALL ? STRIPS * STRIP + PANEL : 8 * STRIP) /* columns that a thread packs at a time */
#define DEPTH 704 /* steps of k at a time: a unit's columns then take 811 KB, and AMX comes with 2 MB of cache */
#define MOST_ROWS 1344 /* that lie packed for all threads */

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

/* Three parts or fewer of 16 floats at 16 steps of k, and of 16 at the steps 16 later, in pairs. */
static inline void split(__m512i one, __m512i other, long parts, __m512i to[3]) {
    __m512 x = (__m512)one, y = (__m512)other;
    for (int p = 0; p < parts; p++) {
        __m512 a = p < 2 ? rounded(x) : x, b = p < 2 ? rounded(y) : y;
        to[p] = _mm512_or_si512(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
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

/* 32 steps of 16 lines, the first and the second half of the steps. By lines: a vector for each line's half; by steps:
 * a vector for each step. */
struct square {
    __m512i one[16], other[16];
};

/* Zeros stand for what is not there. */
static inline void fetch(struct matrix x, long line, long k, long depth, struct square *to) {
    const float *from = x.at + line * x.line + k * x.step;
    long lines = x.lines - line, steps = depth - k;
    if (x.step == 1)
        for (int i = 0; i < 16; i++) {
            to->one[i] = _mm512_maskz_loadu_epi32(i < lines ? first(steps) : 0, from + i * x.line);
            to->other[i] = _mm512_maskz_loadu_epi32(i < lines ? first(steps - 16) : 0, from + i * x.line + 16);
        }
    else
        for (int i = 0; i < 16; i++) {
            to->one[i] = _mm512_maskz_loadu_epi32(i < steps ? first(lines) : 0, from + i * x.step);
            to->other[i] = _mm512_maskz_loadu_epi32(i + 16 < steps ? first(lines) : 0, from + (i + 16) * x.step);
        }
}

static inline void turn(struct square *x) {
    transpose(x->one);
    transpose(x->other);
}

/* A tile of each part, of pairs of steps: of a square by lines rows of A, of one by steps columns of B. */
static inline void pack_tiles(const struct square *x, long parts, uint8_t *to) {
    for (int i = 0; i < 16; i++) {
        __m512i part[3];
        split(x->one[i], x->other[i], parts, part);
        for (int p = 0; p < parts; p++) _mm512_store_si512((void *)(to + LINE(parts) * i + 64 * p), part[p]);
    }
}

/* Squares, in the order of memory: those that are part `me` of `all`. */
#define EACH_SQUARE(groups) \
    for (long by_lines = x.step == 1, count = (groups), i = count * tiles * me / all, \
              end = count * tiles * (me + 1) / all, t, g; \
         i < end && (t = by_lines ? i % tiles : i / count, g = by_lines ? i / tiles : i % count, 1); i++)

/* Whether the vector units can take a strip of rows from where it is: all of it is there, row by row. */
static inline int in_place(struct matrix x, long row, long from, long depth) {
    return x.step == 1 && row + STRIP <= x.lines && (depth - from) % 32 == 0;
}

/* Strips of rows, each as tiles and, where they are not taken in place, behind them as floats, four times 8 rows. */
static void pack_rows(
    struct matrix x, long parts, long strips, long from, long depth, long tiles, uint8_t *to, long me, long all) {
    EACH_SQUARE(2 * strips) {
        struct square square;
        uint8_t *strip = to + g / 2 * tiles * ROWS_OF(parts), *tile = strip + (2 * t + g % 2) * TILES(parts) / 2;
        float *floats = (float *)(strip + tiles * TILES(parts)) + g % 2 * 512 * tiles + t * 256;
        fetch(x, 16 * g, from + 32 * t, depth, &square);
        if (!by_lines && parts < ALL) turn(&square);
        if (by_lines || parts < ALL) pack_tiles(&square, parts, tile);
        if (parts < ALL || in_place(x, g / 2 * STRIP, from, depth)) continue;
        if (by_lines) turn(&square);
        for (int i = 0; i < 32; i++) {
            __m512i step = (i < 16 ? square.one : square.other)[i % 16];
            _mm256_store_si256((void *)(floats + 8 * i), _mm512_castsi512_si256(step));
            _mm256_store_si256((void *)(floats + 8 * i + 256 * tiles), _mm512_extracti64x4_epi64(step, 1));
        }
        if (!by_lines) {
            turn(&square);
            pack_tiles(&square, parts, tile);
        }
    }
}

/* How many strips a unit of some columns has; what is left goes to the panel. */
static inline long strips_of(long columns, long parts) {
    return ((columns <= 2 * STRIP || parts < ALL ? columns : columns - PANEL) + STRIP - 1) / STRIP;
}

/* A unit of columns: strips as tiles, behind them a panel as floats if there is one. */
static void pack_unit(
    struct matrix x, long parts, long line, long wide, long from, long depth, long tiles, uint8_t *to) {
    const long me = 0, all = 1;
    long strips = strips_of(wide, parts), panel = strips * STRIP < wide ? PANEL / 16 : 0;
    x.lines = line + wide; /* what follows belongs to another unit */
    EACH_SQUARE(2 * strips + panel) {
        struct square square;
        fetch(x, line + 16 * g, from + 32 * t, depth, &square);
        if (by_lines) turn(&square);
        if (g < 2 * strips) {
            pack_tiles(&square, parts, to + (2 * (g / 2 * tiles + t) + g % 2) * TILES(parts) / 2);
            continue;
        }
        float *floats = (float *)(to + strips * tiles * TILES(parts)) + 32 * t * PANEL + 16 * (g - 2 * strips);
        for (int i = 0; i < 32; i++)
            _mm512_store_si512((void *)(floats + i * PANEL), (i < 16 ? square.one : square.other)[i % 16]);
    }
}

/* A strip of rows for the vector units: how far apart are rows, steps, and groups of eight rows. */
struct floats {
    const float *at;
    long line, step, eight;
};

/* Where a block of C lies, how much of it there is, and what becomes of it. */
struct place {
    float *at;
    long stride, m, n;
    int turned, add; /* row i lies where column i of C would; to what is there */
};

/* Rows `row` to `row` + 16 of the place, columns `column` to `column` + 16, from sums (16, width). */
static inline void put(const float *sums, long width, struct place c, long row, long column, long rows) {
    __m512i x[16];
    long m = smaller(c.m - row, rows), n = smaller(c.n - column, 16);
    float *to = c.at + (c.turned ? column * c.stride + row : row * c.stride + column);
    for (int i = 0; i < 16; i++) x[i] = i < rows ? _mm512_load_si512(sums + i * width) : _mm512_setzero_si512();
    if (c.turned) transpose(x);
    for (long i = 0; i < (c.turned ? n : m); i++) {
        __mmask16 some = first(c.turned ? m : n);
        __m512 sum = (__m512)x[i];
        if (c.add) sum += _mm512_maskz_loadu_ps(some, to + i * c.stride);
        _mm512_mask_storeu_ps(to + i * c.stride, some, sum);
    }
}

/* Ask for a strip of rows of the place at some columns: they come from memory while their sums are computed. */
static inline void ask_for(struct place c, long column) {
    const float *to = c.at + column * (c.turned ? c.stride : 1);
    for (int i = 0; i < STRIP; i++, to += c.stride) {
        __builtin_prefetch(to, 1);
        __builtin_prefetch(to + STRIP / 2, 1);
    }
}

/* The matrix unit: tiles 0 to 3 are sums of 32 x 32, 4 and 5 a part of the rows, 6 and 7 a part of the columns. */
#define ROWS(part) _tile_loadd(4, a + 64 * (part), line); _tile_loadd(5, a + tile / 2 + 64 * (part), line);
#define COLUMNS(part) _tile_loadd(6, b + 64 * (part), line); _tile_loadd(7, b + tile / 2 + 64 * (part), line);
#define CLEAR _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
/* The six products of parts for 32 steps, small ones first, each with one load less than two. */
#define SIX(MULTIPLY) \
    ROWS(2) COLUMNS(0) MULTIPLY ROWS(1) MULTIPLY COLUMNS(1) MULTIPLY \
    ROWS(0) MULTIPLY COLUMNS(2) MULTIPLY COLUMNS(0) MULTIPLY
/* Those of two parts, and that of one. */
#define THREE(MULTIPLY) ROWS(1) COLUMNS(0) MULTIPLY ROWS(0) MULTIPLY COLUMNS(1) MULTIPLY
#define ONE(MULTIPLY) ROWS(0) COLUMNS(0) MULTIPLY

/* The vector units: sums of 8 x 48, x from 8 rows that lie `apart`, y from 48 columns. */
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define DECLARE(i) __m512 s##i##0 = _mm512_setzero_ps(), s##i##1 = s##i##0, s##i##2 = s##i##0;
#define RESET(i) s##i##0 = s##i##1 = s##i##2 = _mm512_setzero_ps();
#define SAVE(i) \
    _mm512_store_ps(sums + PANEL * i, s##i##0); _mm512_store_ps(sums + PANEL * i + 16, s##i##1); \
    _mm512_store_ps(sums + PANEL * i + 32, s##i##2);
#define ADD(i) { \
    __m512 v = _mm512_set1_ps(x[i * apart]); \
    s##i##0 = _mm512_fmadd_ps(v, y0, s##i##0); s##i##1 = _mm512_fmadd_ps(v, y1, s##i##1); \
    s##i##2 = _mm512_fmadd_ps(v, y2, s##i##2); }
#define STEP { \
    __m512 y0 = _mm512_load_ps(y), y1 = _mm512_load_ps(y + 16), y2 = _mm512_load_ps(y + 32); \
    EACH_ROW(ADD) x += advance; y += PANEL; }
#define NEXT_ROWS { \
    EACH_ROW(SAVE) EACH_ROW(RESET) \
    for (int part = 0; part < PANEL; part += 16) put(sums + part, PANEL, c, done, STRIP * strips + part, 8); \
    done += 8; x = floats.at + done / 8 * floats.eight; y = panel; left = 8 * tiles; }

#define MULTIPLY_ALONE \
    _tile_dpbf16ps(0, 4, 6); ASK _tile_dpbf16ps(1, 4, 7); ASK _tile_dpbf16ps(2, 5, 6); ASK _tile_dpbf16ps(3, 5, 7); ASK
#define MULTIPLY_BOTH \
    _tile_dpbf16ps(0, 4, 6); STEP ASK _tile_dpbf16ps(1, 4, 7); STEP ASK \
    _tile_dpbf16ps(2, 5, 6); STEP ASK _tile_dpbf16ps(3, 5, 7); STEP ASK \
    if (!--left) NEXT_ROWS
/* Ask for some of the strip of rows that comes next: a unit of columns fits in the cache of a core, all rows do not. */
#define ASK _mm_prefetch(next, _MM_HINT_T1); next += 64;

/* The product of a strip of rows, as tiles and as floats, and a packed unit of columns to its place. `next` are the
 * tiles that come then. */
static inline __attribute__((always_inline)) void multiply_by(
    const long parts, const uint8_t *rows, struct floats floats, const uint8_t *next, const uint8_t *unit, long tiles,
    struct place c) {
    const long line = LINE(parts), tile = TILES(parts);
    float sums[8 * PANEL] __attribute__((aligned(64))), block[STRIP * STRIP] __attribute__((aligned(64)));
    long strips = strips_of(c.n, parts), done = 0, left = 8 * tiles;
    int both = c.n > STRIP * strips;
    const float *x = floats.at, *panel = (const float *)(unit + strips * tiles * tile), *y = panel;
    const long advance = floats.step, apart = floats.line;
    EACH_ROW(DECLARE)
    for (long s = 0; s < strips; s++) {
        const uint8_t *a = rows, *b = unit + s * tiles * tile, *end = a + tiles * tile;
        ask_for(c, STRIP * s);
        CLEAR
        if (parts == 1)
            for (; a < end; a += tile, b += tile) { ONE(MULTIPLY_ALONE) }
        else if (parts == 2)
            for (; a < end; a += tile, b += tile) { THREE(MULTIPLY_ALONE) }
        else if (both)
            for (; a < end; a += tile, b += tile) { SIX(MULTIPLY_BOTH) }
        else
            for (; a < end; a += tile, b += tile) { SIX(MULTIPLY_ALONE) }
        _tile_stored(0, block, 4 * STRIP);
        _tile_stored(1, block + 16, 4 * STRIP);
        _tile_stored(2, block + 16 * STRIP, 4 * STRIP);
        _tile_stored(3, block + 16 * STRIP + 16, 4 * STRIP);
        for (int quarter = 0; quarter < 4; quarter++) {
            int row = quarter / 2 * 16, column = quarter % 2 * 16;
            put(block + row * STRIP + column, STRIP, c, row, STRIP * s + column, 16);
        }
    }
    while (both && done < STRIP) {
        for (; left; left--) { STEP STEP STEP STEP }
        NEXT_ROWS
    }
}

static void multiply(
    long parts, const uint8_t *rows, struct floats floats, const uint8_t *next, const uint8_t *unit, long tiles,
    struct place c) {
    if (parts == 1) multiply_by(1, rows, floats, next, unit, tiles, c);
    if (parts == 2) multiply_by(2, rows, floats, next, unit, tiles, c);
    if (parts == ALL) multiply_by(ALL, rows, floats, next, unit, tiles, c);
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

/* C = A B, where all of A lies packed for all threads, and each packs the columns of B that it works on. The work is
 * cut into cells, a strip of rows by a unit of columns. Cores that also do other work do fewer. */
static int product_of(struct matrix a, struct matrix b, long k, long parts, float *c, long stride, int turned) {
    long chunks = (k + DEPTH - 1) / DEPTH, depth = ((k + chunks - 1) / chunks + 31) / 32 * 32, most = depth / 32;
    long strips = (a.lines + STRIP - 1) / STRIP, units = (b.lines + UNIT(parts) - 1) / UNIT(parts);
    long wide = ((b.lines + units - 1) / units + 15) / 16 * 16, cells = strips * units;
    struct range left[omp_get_max_threads()];
    uint8_t *shared = memory(&for_all, &for_all_size, strips * most * ROWS_OF(parts));
    int failed = !shared;
    if (failed) return failed;
#pragma omp parallel
    {
        uint8_t saved[64]; /* whoever else in this thread uses the matrix unit finds it as it was */
        _tile_storeconfig(saved);
        _tile_loadconfig(&WHOLE);
        uint8_t *own = memory(&for_one, &for_one_size, most * TILES(parts) * (UNIT(parts) / STRIP));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        long me = omp_get_thread_num(), all = omp_get_num_threads();
        for (long from = 0; from < k; from += depth) {
            long to = smaller(k, from + depth), tiles = (to - from + 31) / 32, kept = -1;
            pack_rows(a, parts, strips, from, to, tiles, shared, me, all);
            left[me] = (struct range){cells * me / all, cells * (me + 1) / all};
#pragma omp barrier
            for (long cell; own && (cell = take(left, me, all)) >= 0;) {
                long u = cell / strips, s = cell % strips, row = s * STRIP, column = u * wide;
                struct place place = {
                    c + (turned ? column * stride + row : row * stride + column), stride,
                    smaller(STRIP, a.lines - row), smaller(wide, b.lines - column), turned, from > 0};
                if (kept != u) pack_unit(b, parts, column, place.n, from, to, tiles, own);
                kept = u;
                const uint8_t *strip = shared + s * tiles * ROWS_OF(parts);
                const uint8_t *next = shared + (s + 1) % strips * tiles * ROWS_OF(parts);
                struct floats floats = {(const float *)(strip + tiles * TILES(parts)), 1, 8, 256 * tiles};
                if (in_place(a, row, from, to))
                    floats = (struct floats){a.at + row * a.line + from, a.line, 1, 8 * a.line};
                multiply(parts, strip, floats, next, own, tiles, place);
            }
#pragma omp barrier
        }
        _tile_loadconfig(saved);
    }
    return failed;
}

/* C (m, n) = A (m, k) B (k, n); C's rows lie `stride` floats apart, steps are as in struct matrix. `parts` of each
 * number, 1 to 3, are multiplied. Returns 1 where there is no memory. Of a tall C the transpose is computed: what all
 * threads share is the smaller matrix then. */
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
