/* The maps of channels of linear.py: for every degree, node and order
 *
 *     out[o] = sum_i weight[o, i] in[i],
 *
 * where the channels i may stand in several tensors, pieces, one after the other. Within a block of nodes features are
 * (C, M, BLOCK), M = 2l+1. */
#include "common.h"

typedef struct {
    int64_t nodes, degrees, threads;
    int64_t weights;               /* numbers of all weights */
    int64_t rows_in, rows_out;     /* the most rows, C·M, of a degree that goes in or comes out */
} Linear;

typedef struct {
    int64_t M, C_in, C_out, pieces;
    int64_t node, channel, order;  /* distances in the gradient of what comes out, which itself is contiguous */
} Degree;

/* to (C_in·M, BLOCK), of all pieces of a degree */
static void load_pieces(
    const Degree *d, const Piece *pieces, const float *const *from, int64_t first, int64_t valid, float *to)
{
    for (int64_t i = 0; i < d->pieces; to += pieces[i].C * d->M * BLOCK, i++)
        load_piece(pieces + i, d->M, from[i], first, valid, to);
}

/* c (4) += the sums over the lanes of four vectors */
static inline __attribute__((always_inline)) void add_lanes(const vector v[4], float *c)
{
    four sum[4], columns[4];
    for (int s = 0; s < 4; s++) {
        sum[s] = (four){0};
        for (int i = 0; i < LANES / 4; i++) sum[s] += ((const four *)(v + s))[i];
    }
    transpose((float *)sum, (float *)(sum + 1), (float *)(sum + 2), (float *)(sum + 3), columns);
    *(four *)c += columns[0] + columns[1] + columns[2] + columns[3];
}

/* c (R x S, with a distance from row to row; S is 1 or 4) += a (R x length) b (S x length) transposed, length a multiple
 * of LANES */
static inline __attribute__((always_inline)) void dots(
    const int R, const int S, int64_t length, const float *a, const float *b, float *c, int64_t c_row)
{
    vector sum[4][4] = {{{0}}};
    for (int64_t i = 0; i < length; i += LANES)
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) sum[r][s] += *(vector *)(a + r * length + i) * *(vector *)(b + s * length + i);
    for (int r = 0; r < R; r++) {
        if (S == 4) add_lanes(sum[r], c + r * c_row);
        else
            for (int lane = 0; lane < LANES; lane++) c[r * c_row] += sum[r][0][lane];
    }
}

/* c (m x n) += a (m x length) b (n x length) transposed */
static void product_of_rows(int64_t m, int64_t n, int64_t length, const float *a, const float *b, float *c)
{
    for (int64_t i = 0, rows; i < m; i += rows) {
        rows = m - i < 4 ? 1 : 4;
        for (int64_t j = 0, columns; j < n; j += columns) {
            columns = n - j < 4 ? 1 : 4;
            const float *ai = a + i * length, *bj = b + j * length;
            float *to = c + i * n + j;
            if (rows == 4 && columns == 4) dots(4, 4, length, ai, bj, to, n);
            else if (rows == 4) dots(4, 1, length, ai, bj, to, n);
            else if (columns == 4) dots(1, 4, length, ai, bj, to, n);
            else dots(1, 1, length, ai, bj, to, n);
        }
    }
}

/* weights[i] (C_out, C_in); out[i] (nodes, C_out, M) are written */
int linear_forward(
    const Linear *l, const Degree *degrees, const Piece *pieces, const float *const *data, const float *const *weights,
    float *const *out)
{
    int failed = 0;
#pragma omp parallel num_threads(l->threads)
    {
        float *in = scratch((l->rows_in + l->rows_out) * BLOCK), *mixed = in + l->rows_in * BLOCK;
        if (!in) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t node = 0; node < l->nodes; node += BLOCK) {
            const int64_t valid = l->nodes - node < BLOCK ? l->nodes - node : BLOCK;
            for (int64_t i = 0, piece = 0; in && i < l->degrees; piece += degrees[i++].pieces) {
                const Degree *d = degrees + i;
                const int64_t width = d->M * BLOCK, size = d->C_out * d->M;
                load_pieces(d, pieces + piece, data + piece, node, valid, in);
                product(width, d->C_out, d->C_in, weights[i], d->C_in, 1, in, width, mixed, 0);
                store(mixed, out[i] + node * size, size, valid, size, 0);
            }
        }
    }
    return failed;
}

/* From the gradients of out those of the pieces, contiguous, which are written, and of the weights: grad_weights
 * (threads, all weights), of which the first is the gradient in the end. */
int linear_backward(
    const Linear *l, const Degree *degrees, const Piece *pieces, const float *const *data, const float *const *weights,
    const float *const *grad, float *const *grad_data, float *grad_weights)
{
    int failed = 0, team = 1;
#pragma omp parallel num_threads(l->threads)
    {
        float *in = scratch((2 * l->rows_in + l->rows_out) * BLOCK), *grad_in = in + l->rows_in * BLOCK;
        float *g = grad_in + l->rows_in * BLOCK, *own = grad_weights + omp_get_thread_num() * l->weights;
        memset(own, 0, l->weights * sizeof(float));
        if (!in) failed = NO_MEMORY;
#pragma omp single
        team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t node = 0; node < l->nodes; node += BLOCK) {
            const int64_t valid = l->nodes - node < BLOCK ? l->nodes - node : BLOCK;
            float *of_weight = own;
            for (int64_t i = 0, piece = 0; in && i < l->degrees; piece += degrees[i++].pieces) {
                const Degree *d = degrees + i;
                const int64_t width = d->M * BLOCK;
                load_pieces(d, pieces + piece, data + piece, node, valid, in);
                load_piece(&(Piece){d->C_out, d->node, d->channel, d->order}, d->M, grad[i], node, valid, g);
                product(width, d->C_in, d->C_out, weights[i], 1, d->C_in, g, width, grad_in, 0);
                product_of_rows(d->C_out, d->C_in, width, g, in, of_weight);
                of_weight += d->C_out * d->C_in;
                const float *from = grad_in;
                for (int64_t j = piece; j < piece + d->pieces; j++) {
                    const int64_t size = pieces[j].C * d->M;
                    store(from, grad_data[j] + node * size, size, valid, size, 0);
                    from += size * BLOCK;
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < l->weights; i++)
            for (int other = 1; other < team; other++) grad_weights[i] += grad_weights[other * l->weights + i];
    }
    return failed;
}
