/* The contraction of contraction.py, with the radial weights of a block of edges in the cache and never in memory. For
 * every edge e, every |m|:
 *
 *     R[e] = matrix · hidden[e]                                         radial weights (K, P, Q)
 *     out[e, q] = sum_k R[e, k, 0, q] x[e, k]                           m = 0, P = 1
 *     out[e, ±, q] = sum_k R[e, k, 0, q] x[e, ±, k] ∓ R[e, k, 1, q] x[e, ∓, k]      m > 0, P = 2
 *
 * `group` edges that follow each other share a row of `hidden`. The x of one block of rows after the other, and of each
 * the edges that are first in their group, then those that are second, are (rows of x, BLOCK); so is what comes out.
 */
#include "common.h"

enum { TILE = 512 }; /* radial weights of a row at a time */

/* One |m| of one radial network. Offsets and distances in memory are in numbers; what has no distance is contiguous. */
typedef struct {
    int64_t P, K, Q;                          /* P parts of the matrix, and signs of m */
    int64_t matrix;                           /* offset of its matrix */
    int64_t hidden;                           /* offset of its hidden layer in a row of `hidden` */
    int64_t x, x_offset, x_sign;              /* which x, its first row there, +m to -m */
    int64_t out, out_offset, out_sign;
} Term;

typedef struct {
    int64_t rows, group;                      /* rows of hidden, edges that share one */
    int64_t hidden_row, terms, threads;       /* row to row of hidden */
} Sizes;

#define AT(pointer) (*(vector *)((pointer) + lane))
#define EACH for (int p = 0, lane = start; p < PARTS; p++, lane += LANES)

/* out (P, Q, BLOCK) += radial (ks, P, Q, BLOCK) x (P, ks, BLOCK) */
static void apply(const Term *s, int64_t ks, const float *radial, const float *x, float *out)
{
    const int64_t Q = s->Q, step = s->P * Q * BLOCK, minus_x = s->x_sign * BLOCK, minus_out = s->out_sign * BLOCK;
    for (int64_t q = 0; q < Q; q++, radial += BLOCK, out += BLOCK)
        for (int start = 0; start < BLOCK; start += WIDTH) {
            const float *a = radial, *b = radial + Q * BLOCK, *xk = x;
            vector plus[PARTS], minus[PARTS], from_a[PARTS], from_b[PARTS];
            EACH plus[p] = AT(out);
            if (s->P == 1) {
                for (int64_t k = 0; k < ks; k++, a += step, xk += BLOCK) EACH plus[p] += AT(a) * AT(xk);
                EACH AT(out) = plus[p];
                continue;
            }
            EACH minus[p] = AT(out + minus_out);
            EACH from_a[p] = from_b[p] = (vector){0}; /* sums of their own, to have more of them at a time */
            for (int64_t k = 0; k < ks; k++, a += step, b += step, xk += BLOCK)
                EACH {
                    plus[p] += AT(a) * AT(xk);
                    from_b[p] += AT(b) * AT(xk + minus_x);
                    minus[p] += AT(a) * AT(xk + minus_x);
                    from_a[p] += AT(b) * AT(xk);
                }
            EACH AT(out) = plus[p] - from_b[p];
            EACH AT(out + minus_out) = minus[p] + from_a[p];
        }
}

/* The gradients of `apply`, from grad (P, Q, BLOCK): grad_x (P, ks, BLOCK) is added to, and grad_radial (ks, P, Q,
 * BLOCK) written, or added to. */
static void apply_backward(
    const Term *s, int64_t ks, const float *radial, const float *x, const float *grad, float *grad_x,
    float *grad_radial, const int add)
{
    const int64_t Q = s->Q, minus_x = s->x_sign * BLOCK, minus = Q * BLOCK, minus_grad = s->out_sign * BLOCK;
    for (int64_t k = 0; k < ks; k++, x += BLOCK, grad_x += BLOCK, radial += s->P * minus, grad_radial += s->P * minus)
        for (int start = 0; start < BLOCK; start += WIDTH) {
            const float *a = radial, *g = grad;
            float *grad_a = grad_radial;
            vector plus[PARTS], minus_sum[PARTS], x_plus[PARTS], x_minus[PARTS];
            EACH plus[p] = minus_sum[p] = (vector){0};
            EACH x_plus[p] = AT(x);
            if (s->P == 1) {
                for (int64_t q = 0; q < Q; q++, a += BLOCK, grad_a += BLOCK, g += BLOCK)
                    EACH {
                        plus[p] += AT(a) * AT(g);
                        const vector of_a = x_plus[p] * AT(g);
                        if (add) AT(grad_a) += of_a; else AT(grad_a) = of_a;
                    }
                EACH AT(grad_x) += plus[p];
                continue;
            }
            EACH x_minus[p] = AT(x + minus_x);
            for (int64_t q = 0; q < Q; q++, a += BLOCK, grad_a += BLOCK, g += BLOCK)
                EACH {
                    const vector g_plus = AT(g), g_minus = AT(g + minus_grad);
                    plus[p] += AT(a) * g_plus + AT(a + minus) * g_minus;
                    minus_sum[p] += AT(a) * g_minus - AT(a + minus) * g_plus;
                    const vector of_a = x_plus[p] * g_plus + x_minus[p] * g_minus;
                    const vector of_b = x_plus[p] * g_minus - x_minus[p] * g_plus;
                    if (add) AT(grad_a) += of_a; else AT(grad_a) = of_a;
                    if (add) AT(grad_a + minus) += of_b; else AT(grad_a + minus) = of_b;
                }
            EACH AT(grad_x) += plus[p];
            EACH AT(grad_x + minus_x) += minus_sum[p];
        }
}

/* How many k of radial weights are made at a time: TILE of them, or the weights of one k. */
static int64_t tile_length(const Term *s)
{
    int64_t length = TILE / (s->P * s->Q);
    return length < 1 ? 1 : length < s->K ? length : s->K;
}

/* x[i] (blocks, group, x_rows[i], BLOCK), hidden (rows, hidden_row), matrices; out[i] (blocks, group, out_rows[i], BLOCK)
 * is added to. Returns 0 unless there is no memory. */
int contraction_forward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_rows, const float *hidden,
    const float *matrices, float *const *out, const int64_t *out_rows)
{
    const int64_t G = sizes->group, rows = sizes->rows;
    int failed = 0;
#pragma omp parallel num_threads(sizes->threads)
    for (const Term *t = terms; t < terms + sizes->terms; t++) {
        const int64_t K = t->K, columns = t->P * t->Q, tile = tile_length(t);
        const int64_t x_edge = x_rows[t->x] * BLOCK, out_edge = out_rows[t->out] * BLOCK;
        float *h = scratch((HIDDEN + tile * columns) * BLOCK), *radial = h + HIDDEN * BLOCK;
        if (!h) failed = NO_MEMORY;
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows; row += BLOCK) {
            if (!h) continue;
            const int64_t valid = rows - row < BLOCK ? rows - row : BLOCK, first = row / BLOCK * G;
            const float *xs = x[t->x] + first * x_edge + t->x_offset * BLOCK;
            float *sums = out[t->out] + first * out_edge + t->out_offset * BLOCK;
            load(hidden + row * sizes->hidden_row + t->hidden, sizes->hidden_row, valid, HIDDEN, h);
            for (int64_t k = 0; k < K; k += tile) {
                const int64_t ks = K - k < tile ? K - k : tile;
                const float *part = matrices + t->matrix + k * columns * HIDDEN;
                product(BLOCK, ks * columns, HIDDEN, part, HIDDEN, 1, h, BLOCK, radial, 0);
                for (int64_t g = 0; g < G; g++)
                    apply(t, ks, radial, xs + g * x_edge + k * BLOCK, sums + g * out_edge);
            }
        }
    }
    return failed;
}

/* From the gradient of out those of x and hidden, which are added to, and of the matrices. Threads other
 * than the first add up their share of a matrix's gradient in spare (threads - 1, spare_size: the largest matrix). */
int contraction_backward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_rows, const float *hidden,
    const float *matrices, const float *const *grad, const int64_t *out_rows, float *const *grad_x, float *grad_hidden,
    float *grad_matrices, float *spare, int64_t spare_size)
{
    const int64_t G = sizes->group, rows = sizes->rows;
    int failed = 0, team = 1;
#pragma omp parallel num_threads(sizes->threads)
    for (const Term *t = terms; t < terms + sizes->terms; t++) {
        const int64_t K = t->K, columns = t->P * t->Q, tile = tile_length(t), size = K * columns * HIDDEN;
        const int64_t x_edge = x_rows[t->x] * BLOCK, out_edge = out_rows[t->out] * BLOCK;
        float *h = scratch((2 * HIDDEN + 2 * tile * columns) * BLOCK), *grad_h = h + HIDDEN * BLOCK;
        float *radial = grad_h + HIDDEN * BLOCK, *grad_radial = radial + tile * columns * BLOCK;
        const int thread = omp_get_thread_num();
        float *grad_matrix = grad_matrices + t->matrix, *own = thread ? spare + (thread - 1) * spare_size : grad_matrix;
        memset(own, 0, size * sizeof(float));
        if (!h) failed = NO_MEMORY;
#pragma omp single
        team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += BLOCK) {
            if (!h) continue;
            const int64_t valid = rows - row < BLOCK ? rows - row : BLOCK, first = row / BLOCK * G;
            const int64_t x_place = first * x_edge + t->x_offset * BLOCK;
            const float *grads = grad[t->out] + first * out_edge + t->out_offset * BLOCK;
            const float *h_rows = hidden + row * sizes->hidden_row + t->hidden;
            load(h_rows, sizes->hidden_row, valid, HIDDEN, h);
            for (int64_t k = 0; k < K; k += tile) {
                const int64_t ks = K - k < tile ? K - k : tile;
                const float *part = matrices + t->matrix + k * columns * HIDDEN;
                product(BLOCK, ks * columns, HIDDEN, part, HIDDEN, 1, h, BLOCK, radial, 0);
                for (int64_t g = 0; g < G; g++) {
                    const int64_t place = x_place + g * x_edge + k * BLOCK;
                    apply_backward(t, ks, radial, x[t->x] + place, grads + g * out_edge, grad_x[t->x] + place,
                                   grad_radial, g > 0);
                }
                product(BLOCK, HIDDEN, ks * columns, part, 1, HIDDEN, grad_radial, BLOCK, grad_h, k > 0);
                product(HIDDEN, ks * columns, valid, grad_radial, BLOCK, 1, h_rows, sizes->hidden_row,
                        own + k * columns * HIDDEN, 1);
            }
            store(grad_h, grad_hidden + row * sizes->hidden_row + t->hidden, sizes->hidden_row, valid, HIDDEN, 1);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < size; i++)
            for (int other = 1; other < team; other++) grad_matrix[i] += spare[(other - 1) * spare_size + i];
    }
    return failed;
}
