/* Matmuls of few rows on the processor's matrix unit (AMX), which multiplies bfloat16 and int8, while weights are read.
 *
 * bfloat16 weights: a float is the sum of three parts of 8 bits (as in matrix.c), each a row of its own for the unit, whose
 * sums are float32. So the error is that of float32 arithmetic. The unit takes subnormal numbers for zero, so inputs are
 * scaled by 2^24 and weights by 2^7: then all parts of all floats are normal, and products that are lost are below 2^-157.
 *
 * int8 weights: the floats of a row become whole numbers of 30 bits and a sign, the largest without loss, which four bytes
 * hold. Their sums are exact, so the error is at most 2^-30 of the row's largest float times the sum of weights.
 *
 * Rows that are not finite, or so large that sums might overflow, are computed by vectors. A row's sums depend neither on
 * the other rows nor on their number.
 *
 * Letters: B blocks of a panel's depth, the last filled up with zeros; R rows. */
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 1024 /* bytes: 16 lines of 16 words */
#define WORD 4    /* bytes of inputs that are multiplied and added up at once, LANES inputs from each other */

/* Inputs in a block: 32 of bfloat16, 64 of int8. */
static int64_t depth_of_block(int64_t size) { return LANES * WORD / size; }
static int64_t blocks_of(int64_t depth, int64_t size) { return (depth + depth_of_block(size) - 1) / depth_of_block(size); }

/* Where the weight of input k of a lane lies in a panel (B, 2, 16, 16, WORD), in weights of so many bytes. */
static inline int64_t in_tile(int64_t k, int lane, int64_t size) {
    int64_t line = (k / depth_of_block(size) * 2 + lane / LANES) * LANES + k % LANES;
    return (line * LANES + lane % LANES) * (WORD / size) + k % depth_of_block(size) / LANES;
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && LANES == 16
#define HAS_TILES

/* Whether there is a matrix unit and the system lets this process use it. */
int64_t multiplies(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

/* How rows are divided into groups, and the parts of a group into one tile or two. */
typedef struct {
    int64_t parts, groups, count; /* of a row; of all rows; rows of each, or fewer in the last one */
    int64_t tiles, lines;         /* of a group, and of a tile */
} tiling;

static tiling tiling_of(int64_t rows, int64_t size) {
    tiling t = {size == 2 ? 3 : 4};
    int64_t most = 2 * LANES / t.parts;
    t.groups = (rows + most - 1) / most;
    t.count = t.groups ? (rows + t.groups - 1) / t.groups : 0;
    t.tiles = t.parts * t.count > LANES ? 2 : 1;
    t.lines = (t.parts * t.count + t.tiles - 1) / t.tiles;
    return t;
}

/* Floats in which a thread keeps the parts of so many rows. */
static int64_t room_of_parts(int64_t rows, int64_t depth, int64_t size) {
    tiling t = tiling_of(rows, size);
    return t.groups * t.tiles * t.lines * blocks_of(depth, size) * LANES + LANES; /* aligned */
}

static vec some_of(const float *x, int64_t n) { return n >= LANES ? load(x) : n > 0 ? load_some(x, n) : fill(0); }

/* The largest magnitude; not a number is larger than all. */
static float largest_of(const float *x, int64_t n) {
    ivec most = {};
    for (int64_t k = 0; k < n; k += LANES) {
        ivec own = (ivec)magnitude(some_of(x + k, n - k));
        most = (ivec)either(own > most, (vec)own, (vec)most);
    }
    int top = 0;
    for (int i = 1; i < LANES; i++) top = most[i] > most[top] ? i : top;
    return ((vec)most)[top];
}

/* The parts of a row x (depth), each line of a block `step` bytes behind that of the one before. */
static void split(const float *x, int64_t depth, char *const to[3], int64_t step) {
    for (int64_t k = 0, at = 0; k < depth; k += 2 * LANES, at += step) {
        vec a = some_of(x + k, depth - k) * 0x1p24f, b = some_of(x + k + LANES, depth - k - LANES) * 0x1p24f;
        for (int part = 0; part < 3; part++) {
            uvec upper = (uvec)b & 0xffff0000u;
            store((float *)(to[part] + at), (vec)((uvec)a >> 16 | upper));
            a -= (vec)((uvec)a & 0xffff0000u), b -= (vec)upper;
        }
    }
}

/* The same in bytes, the last of which are the highest; x times both scales is below 2^30. */
static void split_whole(const float *x, int64_t depth, const float scale[2], char *const to[4], int64_t step) {
    for (int64_t k = 0, at = 0; k < depth; k += WORD * LANES, at += step) {
        uvec whole[WORD];
        for (int i = 0; i < WORD; i++) {
            vec own = some_of(x + k + i * LANES, depth - k - i * LANES) * scale[0] * scale[1];
            /* Bytes from -128 to 127 whose sum it is, not digits from 0 to 255. */
            whole[i] = ((uvec)_mm512_cvtps_epi32((__m512)own) + 0x808080u) ^ 0x808080u;
        }
        for (int upper = 0; upper < 2; upper++) { /* first halves of words change places, then bytes */
            uvec even = upper ? whole[0] >> 16 | (whole[2] & 0xffff0000u) : (whole[0] & 0xffffu) | whole[2] << 16;
            uvec odd = upper ? whole[1] >> 16 | (whole[3] & 0xffff0000u) : (whole[1] & 0xffffu) | whole[3] << 16;
            store((float *)(to[2 * upper] + at), (vec)((even & 0xff00ffu) | (odd & 0xff00ffu) << 8));
            store((float *)(to[2 * upper + 1] + at), (vec)((even >> 8 & 0xff00ffu) | (odd & 0xff00ff00u)));
        }
    }
}

/* Tiles 0 to 3: sums with the left and right half of a panel; 4 and 5: rows; 6 and 7: weights. */
static void configure(tiling t) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {0}};
    for (int i = 0; i < 8; i++) shape.rows[i] = i < 6 ? t.lines : LANES;
    _tile_loadconfig(&shape);
}

/* Sums of a group with a panel: out (2, 2, 16, 16), of each tile and half. Meanwhile memory is asked for `each` bytes a
 * block from `next` on. `tiles` and `size`, bytes of a weight, are known when this is compiled. */
INLINE void sums_of_tiles(const char *rows, int64_t lines, const char *weight, int64_t blocks, const char *next,
                          int64_t each, int tiles, int size, float *out) {
    int64_t step = lines * 64;
    const char *others = rows + blocks * step;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t b = 0; b < blocks; b++, rows += step, others += step, weight += 2 * TILE) {
        for (const char *end = next + each; next < end; next += 64) __builtin_prefetch(next, 0, 2);
        _tile_loadd(4, rows, 64); _tile_loadd(6, weight, 64); _tile_loadd(7, weight + TILE, 64);
#define ADD(sums, a, b) if (size == 1) { _tile_dpbssd(sums, a, b); } else { _tile_dpbf16ps(sums, a, b); }
        ADD(0, 4, 6) ADD(1, 4, 7)
        if (tiles == 2) {
            _tile_loadd(5, others, 64);
            ADD(2, 5, 6) ADD(3, 5, 7)
        }
#undef ADD
    }
    _tile_stored(0, out, 64); _tile_stored(1, out + TILE / 4, 64);
    if (tiles == 2) { _tile_stored(2, out + 2 * TILE / 4, 64); _tile_stored(3, out + 3 * TILE / 4, 64); }
}

static void sum_tiles(const char *rows, tiling t, const char *weight, int64_t blocks, const char *next, int64_t each,
                      int size, float *out) {
#define CASE(tiles, size)                                                                                             \
    case 10 * tiles + size:                                                                                           \
        sums_of_tiles(rows, t.lines, weight, blocks, next, each, tiles, size, out);                                   \
        break;
    switch (10 * t.tiles + size) { CASE(1, 1) CASE(2, 1) CASE(1, 2) CASE(2, 2) }
#undef CASE
}
#else
int64_t multiplies(void) { return 0; }
static int64_t room_of_parts(int64_t rows, int64_t depth, int64_t size) { return 0; }
#define multiply_tiles(...)
#endif
