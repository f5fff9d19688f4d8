/* Features of a degree l between their place outside, where M = 2l+1 numbers of a channel stand together, and the frame
 * of an edge, where the channels of an order do:
 *
 *     x[e, m, c] = sum_n D[e, n, m] data[item of e, c, n],      D the Wigner blocks of basis.py (E, M, M)
 *
 * Data is that of edges, or of nodes that several edges share. */
#include "common.h"

typedef struct {
    int64_t M, C;
    int64_t block;             /* which of the Wigner blocks; that of degree 0 is not looked at, it is 1 */
    int64_t data, start, step; /* which data, where in an item it begins, from channel to channel; in numbers */
    int64_t x, rows;           /* which x, and where in `rows` the places of its M orders in an edge of x begin */
} Features;

typedef struct {
    int64_t edges, features, threads;
} Rotation;

/* to[i] (+)= sum_j D[i, j] from[j], WIDTH channels from c on; row i of `to` begins at to_rows[i]. */
#define KERNEL(NAME, VECTOR_TYPE)                                                                                     \
    static inline __attribute__((always_inline)) void NAME(                                                           \
        const int64_t M, const float *D, int64_t D_row, int64_t D_column, const float *from, const int64_t *from_rows, \
        float *to, const int64_t *to_rows, int64_t c, int add)                                                        \
    {                                                                                                                 \
        for (int64_t i = 0; i < M; i++) {                                                                             \
            VECTOR_TYPE *row = (VECTOR_TYPE *)(to + to_rows[i] + c), sum = add ? *row : (VECTOR_TYPE){0};             \
            for (int64_t j = 0; j < M; j++)                                                                           \
                sum += D[i * D_row + j * D_column] * *(const VECTOR_TYPE *)(from + from_rows[j] + c);                 \
            *row = sum;                                                                                               \
        }                                                                                                             \
    }
typedef float vector16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vector8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vector4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vector1 __attribute__((vector_size(4), aligned(4), may_alias));
KERNEL(turn_16, vector16)
KERNEL(turn_8, vector8)
KERNEL(turn_4, vector4)
KERNEL(turn_1, vector1)

static inline __attribute__((always_inline)) void turn_all(
    const int64_t M, int64_t C, const float *D, int64_t D_row, int64_t D_column, const float *from,
    const int64_t *from_rows, float *to, const int64_t *to_rows, int add)
{
    int64_t c = 0;
    for (; c + 16 <= C; c += 16) turn_16(M, D, D_row, D_column, from, from_rows, to, to_rows, c, add);
    for (; c + 8 <= C; c += 8) turn_8(M, D, D_row, D_column, from, from_rows, to, to_rows, c, add);
    for (; c + 4 <= C; c += 4) turn_4(M, D, D_row, D_column, from, from_rows, to, to_rows, c, add);
    for (; c < C; c++) turn_1(M, D, D_row, D_column, from, from_rows, to, to_rows, c, add);
}

/* The same for all C channels, with M known to the compiler for low degrees. */
static void turn(
    int64_t M, int64_t C, const float *D, int64_t D_row, int64_t D_column, const float *from, const int64_t *from_rows,
    float *to, const int64_t *to_rows, int add)
{
    static const float one = 1;
    switch (M) {
    case 1: turn_all(1, C, &one, 1, 1, from, from_rows, to, to_rows, add); break;
    case 3: turn_all(3, C, D, D_row, D_column, from, from_rows, to, to_rows, add); break;
    case 5: turn_all(5, C, D, D_row, D_column, from, from_rows, to, to_rows, add); break;
    case 7: turn_all(7, C, D, D_row, D_column, from, from_rows, to, to_rows, add); break;
    default: turn_all(M, C, D, D_row, D_column, from, from_rows, to, to_rows, add);
    }
}

/* turned (M, C) = data, of one item */
static void collect(const Features *f, const float *data, float *turned)
{
    const int64_t C = f->C, step = f->step;
    for (int64_t n = 0; n < f->M; n++, data++, turned += C)
        for (int64_t c = 0; c < C; c++) turned[c] = data[c * step];
}

/* Where the M rows of `turned` begin; `turned` itself follows, in the same memory. */
static float *turned_rows(const Features *f, int64_t **rows)
{
    float *memory = scratch(f->M * (f->C + 2));
    if (!memory) return 0;
    *rows = (int64_t *)memory;
    for (int64_t n = 0; n < f->M; n++) (*rows)[n] = n * f->C;
    return memory + 2 * f->M;
}

/* x of every edge is written. index[i]: the item of data[i] that an edge has, 0 if it is the edge's own; items[i]: how
 * many there are. */
int rotate_in(
    const Rotation *r, const Features *features, const int64_t *places, const float *const *blocks,
    const float *const *data, const int64_t *data_item, const int64_t *items, const int64_t *const *index,
    float *const *x, const int64_t *x_edge)
{
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    for (const Features *f = features; f < features + r->features; f++) {
        const int64_t M = f->M, C = f->C, *rows = places + f->rows, *item = index[f->data];
        int64_t *own_rows;
        float *turned = turned_rows(f, &own_rows);
        if (!turned) failed = NO_MEMORY;
#pragma omp for schedule(static) nowait
        for (int64_t e = 0; e < r->edges; e++) {
            if (!turned) continue;
            if (item && (item[e] < 0 || item[e] >= items[f->data])) {
                failed = NO_ITEM;
                continue;
            }
            const float *D = blocks[f->block] + e * M * M;
            float *to = x[f->x] + e * x_edge[f->x];
            collect(f, data[f->data] + (item ? item[e] : e) * data_item[f->data] + f->start, turned);
            turn(M, C, D, 1, M, turned, own_rows, to, rows, 0);
        }
    }
    return failed;
}

/* The way back, which is also the gradient of `rotate_in` with respect to data: data of every item is written, the sum
 * over its edges. These are order[i][starts[i][item]] and following, or if starts[i] is 0 the one of the same number;
 * items[i]: how many there are. */
int rotate_out(
    const Rotation *r, const Features *features, const int64_t *places, const float *const *blocks,
    float *const *data, const int64_t *data_item, const int64_t *items, const int64_t *const *starts,
    const int64_t *const *order, const float *const *x, const int64_t *x_edge)
{
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    for (const Features *f = features; f < features + r->features; f++) {
        const int64_t M = f->M, C = f->C, *rows = places + f->rows, *start = starts[f->data];
        int64_t *own_rows;
        float *turned = turned_rows(f, &own_rows);
        if (!turned) failed = NO_MEMORY;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < items[f->data]; i++) {
            if (!turned) continue;
            const int64_t first = start ? start[i] : i, end = start ? start[i + 1] : i + 1;
            float *to = data[f->data] + i * data_item[f->data] + f->start;
            if (first == end) memset(turned, 0, M * C * sizeof(float));
            for (int64_t k = first; k < end; k++) {
                const int64_t e = start ? order[f->data][k] : k;
                turn(M, C, blocks[f->block] + e * M * M, M, 1, x[f->x] + e * x_edge[f->x], rows, turned, own_rows, k > first);
            }
            const int64_t step = f->step;
            for (int64_t n = 0; n < M; n++)
                for (int64_t c = 0; c < C; c++) to[c * step + n] = turned[n * C + c];
        }
    }
    return failed;
}

/* The gradients of the Wigner blocks, which are added to: from data and the gradient of x, or the other way round. */
int rotate_blocks(
    const Rotation *r, const Features *features, const int64_t *places, float *const *grad_blocks,
    const float *const *data, const int64_t *data_item, const int64_t *const *index, const float *const *x,
    const int64_t *x_edge)
{
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    for (const Features *f = features; f < features + r->features; f++) {
        const int64_t M = f->M, C = f->C, *rows = places + f->rows, *item = index[f->data];
        if (M == 1) continue;
        float *turned = scratch(M * C);
        if (!turned) failed = NO_MEMORY;
#pragma omp for schedule(static) nowait
        for (int64_t e = 0; e < r->edges; e++) {
            if (!turned) continue;
            float *grad = grad_blocks[f->block] + e * M * M;
            const float *from = x[f->x] + e * x_edge[f->x];
            collect(f, data[f->data] + (item ? item[e] : e) * data_item[f->data] + f->start, turned);
            for (int64_t n = 0; n < M; n++)
                for (int64_t m = 0; m < M; m++) {
                    float sum = 0;
                    for (int64_t c = 0; c < C; c++) sum += turned[n * C + c] * from[rows[m] + c];
                    grad[n * M + m] += sum;
                }
        }
    }
    return failed;
}

/* Counting sort: the edges of item i become order[starts[i]] … order[starts[i + 1] - 1], in rising order. */
int group_edges(const int64_t *sizes, const int64_t *item, int64_t *starts, int64_t *order)
{
    const int64_t edges = sizes[0], items = sizes[1];
    for (int64_t e = 0; e < edges; e++)
        if (item[e] < 0 || item[e] >= items) return NO_ITEM;
    memset(starts, 0, (items + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < edges; e++)
        if (item[e] + 1 < items) starts[item[e] + 2]++; /* one place further on: the next loop but one moves them back */
    for (int64_t i = 1; i < items; i++) starts[i + 1] += starts[i];
    for (int64_t e = 0; e < edges; e++) order[starts[item[e] + 1]++] = e;
    return 0;
}
