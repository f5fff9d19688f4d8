/* What the compiled parts of the model have in common. Everything is in single precision, but for products in tiles.h;
 * see native.py, which calls it.
 *
 * Most of it goes through blocks of BLOCK rows (edges, groups of them, or nodes). Within a block the row is the last axis
 * of everything, so that a vector register holds one number of several rows, whatever the other sizes are. What the
 * backward functions need of the forward pass they compute again. Functions that Python calls return 0, or one of the
 * faults below. */

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NO_MEMORY = 1, NO_ITEM = 2 }; /* faults: no memory for buffers; an index that is out of range */
enum { BLOCK = 32, HIDDEN = 32 }; /* rows at a time; hidden units of the radial networks */

#if defined(__AVX512F__)
enum { VECTOR = 64, ROWS = 8, WIDTH = 32 }; /* bytes of a register; accumulators of `product`: ROWS x WIDTH numbers */
#elif defined(__AVX__)
enum { VECTOR = 32, ROWS = 4, WIDTH = 16 };
#else
enum { VECTOR = 16, ROWS = 4, WIDTH = 16 };
#endif
enum { LANES = VECTOR / 4, PARTS = WIDTH / LANES };
typedef float vector __attribute__((vector_size(VECTOR), aligned(4), may_alias));

/* sum (count x WIDTH) += a (count x n) b (n x WIDTH), count a constant; distances between rows and columns. */
static inline __attribute__((always_inline)) void accumulate(
    const int count, int64_t n, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
    vector sum[][PARTS])
{
    for (int64_t i = 0; i < n; i++, a += a_column, b += b_row) {
        vector right[PARTS];
        for (int p = 0; p < PARTS; p++) right[p] = *(vector *)(b + p * LANES);
        for (int r = 0; r < count; r++)
            for (int p = 0; p < PARTS; p++) sum[r][p] += a[r * a_row] * right[p];
    }
}

/* c (count x WIDTH) (+)= a (count x n) b (n x WIDTH) */
static inline __attribute__((always_inline)) void panel(
    const int count, int64_t n, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
    float *c, int64_t c_row, int add)
{
    vector sum[ROWS][PARTS];
    for (int r = 0; r < count; r++)
        for (int p = 0; p < PARTS; p++) sum[r][p] = (vector){0};
    if (add) { /* unrolled, which helps here, and not below */
#pragma GCC unroll 4
        for (int64_t i = 0; i < n; i++, a += a_column, b += b_row)
            accumulate(count, 1, a, a_row, a_column, b, b_row, sum);
    } else {
        for (int r = 2 * count; r < 3 * count; r++) /* the panel after the next, of a matrix too large for the cache */
            for (int64_t i = 0; a_column == 1 && i < n; i += 16) __builtin_prefetch(a + r * a_row + i);
        accumulate(count, n, a, a_row, a_column, b, b_row, sum);
    }
    for (int r = 0; r < count; r++)
        for (int p = 0; p < PARTS; p++) {
            vector *to = (vector *)(c + r * c_row + p * LANES);
            if (add) *to += sum[r][p];
            else *to = sum[r][p];
        }
}

/* c (m x width) (+)= a (m x n) b (n x width), width a multiple of WIDTH */
static inline __attribute__((always_inline)) void product(
    const int width, int64_t m, int64_t n, const float *a, int64_t a_row, int64_t a_column, const float *b,
    int64_t b_row, float *c, int add)
{
    int64_t r = 0;
    for (; r + ROWS <= m; r += ROWS)
        for (int i = 0; i < width; i += WIDTH)
            panel(ROWS, n, a + r * a_row, a_row, a_column, b + i, b_row, c + r * width + i, width, add);
    for (; r < m; r++)
        for (int i = 0; i < width; i += WIDTH)
            panel(1, n, a + r * a_row, a_row, a_column, b + i, b_row, c + r * width + i, width, add);
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(sizeof(a))))){__VA_ARGS__})
#endif

/* The columns of four rows of four. */
static inline __attribute__((always_inline)) void transpose(
    const float *a, const float *b, const float *c, const float *d, four columns[4])
{
    const four ac = SHUFFLE(*(four *)a, *(four *)c, 0, 4, 1, 5), CA = SHUFFLE(*(four *)a, *(four *)c, 2, 6, 3, 7);
    const four bd = SHUFFLE(*(four *)b, *(four *)d, 0, 4, 1, 5), DB = SHUFFLE(*(four *)b, *(four *)d, 2, 6, 3, 7);
    columns[0] = SHUFFLE(ac, bd, 0, 4, 1, 5), columns[1] = SHUFFLE(ac, bd, 2, 6, 3, 7);
    columns[2] = SHUFFLE(CA, DB, 0, 4, 1, 5), columns[3] = SHUFFLE(CA, DB, 2, 6, 3, 7);
}

/* to (columns, valid), with a distance from column to column, = `valid` rows (columns) transposed */
static inline __attribute__((always_inline)) void turn_rows(
    const float *const *rows, int64_t valid, int64_t columns, float *to, const int64_t distance)
{
    int64_t r = 0;
    for (; r + 4 <= valid; r += 4) {
        const float *a = rows[r], *b = rows[r + 1], *c = rows[r + 2], *d = rows[r + 3];
        float *column = to + r;
        int64_t i = 0;
        for (; i + 4 <= columns; i += 4) {
            four turned[4];
            transpose(a + i, b + i, c + i, d + i, turned);
            for (int j = 0; j < 4; j++, column += distance) *(four *)column = turned[j];
        }
        for (; i < columns; i++, column += distance) *(four *)column = (four){a[i], b[i], c[i], d[i]};
    }
    for (; r < valid; r++)
        for (int64_t i = 0; i < columns; i++) to[i * distance + r] = rows[r][i];
}

/* The same to (columns, BLOCK), zeros behind the valid ones. */
static inline void load_rows(const float *const *rows, int64_t valid, int64_t columns, float *to)
{
    if (valid < BLOCK) memset(to, 0, columns * BLOCK * sizeof(float));
    turn_rows(rows, valid, columns, to, BLOCK);
}

/* The same from (valid, columns), with a distance from row to row. */
static inline void load(const float *from, int64_t row, int64_t valid, int64_t columns, float *to)
{
    const float *rows[BLOCK];
    for (int64_t r = 0; r < valid; r++) rows[r] = from + r * row;
    load_rows(rows, valid, columns, to);
}

/* `valid` rows (columns) (+)= from (columns, valid), with a distance from column to column, transposed */
static inline __attribute__((always_inline)) void store_rows(
    const float *from, const int64_t distance, float *const *rows, int64_t valid, int64_t columns, const int add)
{
    int64_t r = 0;
    for (; r + 4 <= valid; r += 4) {
        const float *column = from + r;
        int64_t i = 0;
        for (; i + 4 <= columns; i += 4, column += 4 * distance) {
            four turned[4];
            transpose(column, column + distance, column + 2 * distance, column + 3 * distance, turned);
            for (int j = 0; j < 4; j++) {
                four *place = (four *)(rows[r + j] + i);
                if (add) turned[j] += *place;
                *place = turned[j];
            }
        }
        for (; i < columns; i++, column += distance)
            for (int j = 0; j < 4; j++) rows[r + j][i] = add ? rows[r + j][i] + column[j] : column[j];
    }
    for (; r < valid; r++)
        for (int64_t i = 0; i < columns; i++) rows[r][i] = (add ? rows[r][i] : 0) + from[i * distance + r];
}

/* The same from (columns, BLOCK) to (valid, columns), with a distance from row to row. */
static inline __attribute__((always_inline)) void store(
    const float *from, float *to, int64_t row, int64_t valid, int64_t columns, const int add)
{
    float *rows[BLOCK];
    for (int64_t r = 0; r < valid; r++) rows[r] = to + r * row;
    store_rows(from, BLOCK, rows, valid, columns, add);
}

/* One tensor (nodes, C, M), with its distances. */
typedef struct {
    int64_t C, node, channel, order;
} Piece;

/* to (C·M, BLOCK), of the nodes from `first` on */
static inline void load_piece(const Piece *p, int64_t M, const float *from, int64_t first, int64_t valid, float *to)
{
    const int64_t size = p->C * M, run = M > 1 && p->order != 1 ? 1 : p->channel == M ? size : M; /* side by side */
    for (int64_t i = 0; i < size; i += run)
        load(from + first * p->node + i / M * p->channel + i % M * p->order, p->node, valid, run, to + i * BLOCK);
}

/* Memory of the calling thread, kept for its next call; 0 if there is none. */
static inline float *scratch(int64_t numbers)
{
    static _Thread_local void *memory = 0;
    static _Thread_local int64_t length = 0;
    if (numbers > length) {
        free(memory);
        length = posix_memalign(&memory, 64, numbers * sizeof(float)) ? 0 : numbers;
        if (!length) memory = 0;
    }
    return memory;
}
