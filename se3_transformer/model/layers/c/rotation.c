/* Features of a degree l between their place outside, where M = 2l+1 numbers of a channel stand together, and the frame
 * of an edge, where the channels of an order do:
 *
 *     x[e, m, c] = sum_n D[e, n, m] data[item of e, c, n],      D the Wigner blocks of basis.py (E, M, M)
 *
 * Data is that of edges, or of nodes that several edges share. x is laid out as in contraction.c. */
#include "common.h"

typedef struct {
    int64_t M, C;
    int64_t block;             /* which of the Wigner blocks; that of degree 0 is not looked at, it is 1 */
    int64_t data, start, step; /* which data, where in an item it begins, from channel to channel; in numbers */
    int64_t x, rows;           /* which x, and where in `rows` the rows of its M orders begin */
} Features;

/* Features of the same data follow each other. */
typedef struct {
    int64_t edges, group, features, threads;
    int64_t numbers, M;        /* of the largest item of data; the largest M */
} Rotation;

/* Edges that stand side by side: `valid` of them, from `first` on each `group`th. */
typedef struct {
    int64_t first, valid;
} Lanes;

static int64_t num_blocks(const Rotation *r)
{
    return (r->edges / r->group + BLOCK - 1) / BLOCK * r->group;
}

static Lanes lanes_of(const Rotation *r, int64_t block)
{
    const int64_t row = block / r->group * BLOCK, rows = r->edges / r->group - row;
    return (Lanes){row * r->group + block % r->group, rows < BLOCK ? rows : BLOCK};
}

/* Items (numbers, BLOCK) of some edges; item: see `rotate_in`. */
static int load_items(
    const Rotation *r, Lanes lanes, const float *data, int64_t numbers, int64_t items, const int64_t *item, float *to)
{
    const float *rows[BLOCK];
    for (int64_t i = 0, e = lanes.first; i < lanes.valid; i++, e += r->group) {
        const int64_t own = item ? item[e] : e;
        if (own < 0 || own >= items) return NO_ITEM;
        rows[i] = data + own * numbers;
    }
    load_rows(rows, lanes.valid, numbers, to);
    return 0;
}

/* Their Wigner blocks D (M, M, BLOCK). */
static void load_blocks(const Rotation *r, Lanes lanes, const Features *f, const float *const *blocks, float *D)
{
    const int64_t size = f->M * f->M;
    if (size > 1) load(blocks[f->block] + lanes.first * size, r->group * size, lanes.valid, size, D);
    else for (int i = 0; i < BLOCK; i++) D[i] = 1;
}

#define AT(pointer) (*(vector *)((pointer) + lane))
#define EACH for (int p = 0, lane = start; p < PARTS; p++, lane += LANES)

/* to[i, c] = sum_j D[i, j] from[j, c] of C channels. Distances, in rows of BLOCK numbers: of D; those where the first
 * channels begin, and from channel to channel. */
static inline __attribute__((always_inline)) void turn_all(
    const int64_t M, int64_t C, const float *D, int64_t D_row, int64_t D_column, const float *from,
    const int64_t *from_rows, int64_t from_step, float *to, const int64_t *to_rows, int64_t to_step)
{
    for (int64_t c = 0; c < C; c++, from += from_step * BLOCK, to += to_step * BLOCK)
        for (int start = 0; start < BLOCK; start += WIDTH)
            for (int64_t i = 0; i < M; i++) {
                vector sum[PARTS];
                EACH sum[p] = (vector){0};
                for (int64_t j = 0; j < M; j++)
                    EACH sum[p] += AT(D + (i * D_row + j * D_column) * BLOCK) * AT(from + from_rows[j] * BLOCK);
                EACH AT(to + to_rows[i] * BLOCK) = sum[p];
            }
}

/* The same, with M known to the compiler for low degrees. */
static void turn(
    int64_t M, int64_t C, const float *D, int64_t D_row, int64_t D_column, const float *from, const int64_t *from_rows,
    int64_t from_step, float *to, const int64_t *to_rows, int64_t to_step)
{
#define TURN(SIZE) turn_all(SIZE, C, D, D_row, D_column, from, from_rows, from_step, to, to_rows, to_step)
    switch (M) {
    case 1: TURN(1); break;
    case 3: TURN(3); break;
    case 5: TURN(5); break;
    case 7: TURN(7); break;
    default: TURN(M);
    }
}

/* Memory of a thread: an item of data, Wigner blocks, and the numbers 0, 1, 2, … 0 if there is none. */
static float *buffers(const Rotation *r, float **D, int64_t **ascending)
{
    float *item = scratch((r->numbers + r->M * r->M) * BLOCK + 2 * r->M);
    if (!item) return 0;
    *D = item + r->numbers * BLOCK;
    *ascending = (int64_t *)(*D + r->M * r->M * BLOCK);
    for (int64_t i = 0; i < r->M; i++) (*ascending)[i] = i;
    return item;
}

/* x[i] (blocks, group, x_rows[i], BLOCK) are written. index[i]: the item of data[i] that an edge has, 0 if it is the
 * edge's own; items[i]: how many there are, of numbers[i] each. */
int rotate_in(
    const Rotation *r, const Features *features, const int64_t *places, const float *const *blocks,
    const float *const *data, const int64_t *numbers, const int64_t *items, const int64_t *const *index,
    float *const *x, const int64_t *x_rows)
{
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    {
        int64_t *ascending;
        float *D, *item = buffers(r, &D, &ascending);
        if (!item) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < num_blocks(r); block++) {
            const Lanes lanes = lanes_of(r, block);
            for (const Features *f = features; item && f < features + r->features; f++) {
                const int64_t d = f->data;
                if ((f == features || f[-1].data != d)
                    && load_items(r, lanes, data[d], numbers[d], items[d], index[d], item)) {
                    failed = NO_ITEM;
                    break;
                }
                load_blocks(r, lanes, f, blocks, D);
                turn(f->M, f->C, D, 1, f->M, item + f->start * BLOCK, ascending, f->step,
                     x[f->x] + block * x_rows[f->x] * BLOCK, places + f->rows, 1);
            }
        }
    }
    return failed;
}

/* The way back, which is also the gradient of `rotate_in` with respect to the items of edges: data[i] (edges,
 * numbers[i]) are written. */
int rotate_out(
    const Rotation *r, const Features *features, const int64_t *places, const float *const *blocks,
    float *const *data, const int64_t *numbers, const float *const *x, const int64_t *x_rows)
{
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    {
        int64_t *ascending;
        float *D, *item = buffers(r, &D, &ascending);
        if (!item) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < num_blocks(r); block++) {
            const Lanes lanes = lanes_of(r, block);
            for (const Features *f = features, *end = f + r->features; item && f < end; f++) {
                const int64_t d = f->data, size = numbers[d];
                load_blocks(r, lanes, f, blocks, D);
                turn(f->M, f->C, D, f->M, 1, x[f->x] + block * x_rows[f->x] * BLOCK, places + f->rows, 1,
                     item + f->start * BLOCK, ascending, f->step);
                if (f + 1 == end || f[1].data != d)
                    store(item, data[d] + lanes.first * size, r->group * size, lanes.valid, size, 0);
            }
        }
    }
    return failed;
}

/* The gradients of the Wigner blocks, which are added to: from data and the gradient of x, or the other way round. */
int rotate_blocks(
    const Rotation *r, const Features *features, const int64_t *places, float *const *grad_blocks,
    const float *const *data, const int64_t *numbers, const int64_t *items, const int64_t *const *index,
    const float *const *x, const int64_t *x_rows)
{
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    {
        int64_t *ascending;
        float *grad, *item = buffers(r, &grad, &ascending);
        if (!item) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < num_blocks(r); block++) {
            const Lanes lanes = lanes_of(r, block);
            for (const Features *f = features; item && f < features + r->features; f++) {
                const int64_t d = f->data, M = f->M, size = M * M, *rows = places + f->rows;
                if ((f == features || f[-1].data != d)
                    && load_items(r, lanes, data[d], numbers[d], items[d], index[d], item)) {
                    failed = NO_ITEM;
                    break;
                }
                if (M == 1) continue;
                const float *from = x[f->x] + block * x_rows[f->x] * BLOCK;
                for (int64_t i = 0; i < size; i++)
                    for (int start = 0; start < BLOCK; start += WIDTH) {
                        const float *a = item + (f->start + i / M) * BLOCK, *b = from + rows[i % M] * BLOCK;
                        vector sum[PARTS];
                        EACH sum[p] = (vector){0};
                        for (int64_t c = 0; c < f->C; c++, a += f->step * BLOCK, b += BLOCK) EACH sum[p] += AT(a) * AT(b);
                        EACH AT(grad + i * BLOCK) = sum[p];
                    }
                store(grad, grad_blocks[f->block] + lanes.first * size, r->group * size, lanes.valid, size, 1);
            }
        }
    }
    return failed;
}

/* out (items, numbers) = the sum over the edges of an item: rows order[starts[item]] … of data (edges, numbers) */
int sum_edges(const int64_t *sizes, const int64_t *starts, const int64_t *order, const float *data, float *out)
{
    const int64_t items = sizes[0], numbers = sizes[1], threads = sizes[2];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < items; item++) {
        float *to = out + item * numbers;
        memset(to, 0, numbers * sizeof(float));
        for (int64_t k = starts[item]; k < starts[item + 1]; k++)
            for (int64_t i = 0; i < numbers; i++) to[i] += data[order[k] * numbers + i];
    }
    return 0;
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
