/* The contraction of contraction.py, with the radial weights of a block of edges in the cache and never in memory. For
 * every edge e, every |m|:
 *
 *     R[e] = matrix · hidden[e]                                         radial weights (K, P, Q)
 *     out[e, q] = sum_k R[e, k, 0, q] x[e, k]                           m = 0, P = 1
 *     out[e, ±, q] = sum_k R[e, k, 0, q] x[e, ±, k] ∓ R[e, k, 1, q] x[e, ∓, k]      m > 0, P = 2
 *
 * `group` edges that follow each other share a row of `hidden`.
 */
#include "common.h"

enum { TILE = 512 }; /* radial weights of a row at a time */

/* One |m| of one radial network. Offsets and distances in memory are in numbers; what has no distance is contiguous. */
typedef struct {
    int64_t P, K, Q;                          /* P parts of the matrix, and signs of m */
    int64_t matrix;                           /* offset of its matrix */
    int64_t hidden;                           /* offset of its hidden layer in a row of `hidden` */
    int64_t x, x_offset, x_sign;              /* which x, offset in an edge of it, +m to -m */
    int64_t out, out_offset, out_sign;
} Term;

typedef struct {
    int64_t rows, group;                      /* rows of hidden, edges that share one */
    int64_t hidden_row, terms, threads;       /* row to row of hidden */
} Sizes;

#define AT(pointer) (*(vector *)((pointer) + lane))
#define EACH for (int p = 0, lane = start; p < PARTS; p++, lane += LANES)

/* out (P, Q, BLOCK) += radial (ks, P, Q, BLOCK) x (P, ks of K, BLOCK) */
static void apply(const Term *s, int64_t ks, const float *radial, const float *x, float *out)
{
    const int64_t Q = s->Q, step = s->P * Q * BLOCK, minus_x = s->K * BLOCK, minus_out = Q * BLOCK;
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

/* The gradients of `apply`, from grad (P, Q, BLOCK): grad_x (P, ks of K, BLOCK) is written, and grad_radial (ks, P, Q,
 * BLOCK) written, or added to. */
static void apply_backward(
    const Term *s, int64_t ks, const float *radial, const float *x, const float *grad, float *grad_x,
    float *grad_radial, const int add)
{
    const int64_t Q = s->Q, minus_x = s->K * BLOCK, minus = Q * BLOCK;
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
                EACH AT(grad_x) = plus[p];
                continue;
            }
            EACH x_minus[p] = AT(x + minus_x);
            for (int64_t q = 0; q < Q; q++, a += BLOCK, grad_a += BLOCK, g += BLOCK)
                EACH {
                    const vector g_plus = AT(g), g_minus = AT(g + minus);
                    plus[p] += AT(a) * g_plus + AT(a + minus) * g_minus;
                    minus_sum[p] += AT(a) * g_minus - AT(a + minus) * g_plus;
                    const vector of_a = x_plus[p] * g_plus + x_minus[p] * g_minus;
                    const vector of_b = x_plus[p] * g_minus - x_minus[p] * g_plus;
                    if (add) AT(grad_a) += of_a; else AT(grad_a) = of_a;
                    if (add) AT(grad_a + minus) += of_b; else AT(grad_a + minus) = of_b;
                }
            EACH AT(grad_x) = plus[p];
            EACH AT(grad_x + minus_x) = minus_sum[p];
        }
}

/* How many k of radial weights are made at a time: TILE of them, or the weights of one k. */
static int64_t tile_length(const Term *s)
{
    int64_t length = TILE / (s->P * s->Q);
    return length < 1 ? 1 : length < s->K ? length : s->K;
}

/* x[i] (rows·group, x_edge[i]), hidden (rows, hidden_row), matrices; out[i] (rows·group, out_edge[i]) is added to.
 * Returns 0 unless there is no memory. */
int contraction_forward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_edge, const float *hidden,
    const float *matrices, float *const *out, const int64_t *out_edge)
{
    const int64_t G = sizes->group, rows = sizes->rows;
    int failed = 0;
#pragma omp parallel num_threads(sizes->threads)
    for (const Term *t = terms; t < terms + sizes->terms; t++) {
        const int64_t P = t->P, K = t->K, Q = t->Q, tile = tile_length(t);
        const int64_t x_row = x_edge[t->x], out_row = out_edge[t->out];
        const float *matrix = matrices + t->matrix, *from = x[t->x] + t->x_offset;
        float *to = out[t->out] + t->out_offset;
        float *h = scratch((HIDDEN + G * P * (K + Q) + tile * P * Q) * BLOCK);
        float *xs = h + HIDDEN * BLOCK, *sums = xs + G * P * K * BLOCK, *radial = sums + G * P * Q * BLOCK;
        if (!h) failed = NO_MEMORY;
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows; row += BLOCK) {
            if (!h) continue;
            const int64_t valid = rows - row < BLOCK ? rows - row : BLOCK;
            load(hidden + row * sizes->hidden_row + t->hidden, sizes->hidden_row, valid, HIDDEN, h);
            for (int64_t i = 0; i < G * P; i++)
                load(from + (row * G + i / P) * x_row + i % P * t->x_sign, G * x_row, valid, K, xs + i * K * BLOCK);
            memset(sums, 0, G * P * Q * BLOCK * sizeof(float));
            for (int64_t k = 0; k < K; k += tile) {
                const int64_t ks = K - k < tile ? K - k : tile;
                product(BLOCK, ks * P * Q, HIDDEN, matrix + k * P * Q * HIDDEN, HIDDEN, 1, h, radial, 0);
                for (int64_t g = 0; g < G; g++)
                    apply(t, ks, radial, xs + (g * P * K + k) * BLOCK, sums + g * P * Q * BLOCK);
            }
            for (int64_t i = 0; i < G * P; i++)
                store(sums + i * Q * BLOCK, to + (row * G + i / P) * out_row + i % P * t->out_sign, G * out_row, valid,
                      Q);
        }
    }
    return failed;
}

/* From the gradient of out those of x (if wanted) and hidden, which are added to, and of the matrices. Threads other
 * than the first add up their share of a matrix's gradient in spare (threads - 1, spare_size: the largest matrix). */
int contraction_backward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_edge, const float *hidden,
    const float *matrices, const float *const *grad, const int64_t *out_edge, float *const *grad_x, float *grad_hidden,
    float *grad_matrices, float *spare, int64_t spare_size)
{
    const int64_t G = sizes->group, rows = sizes->rows;
    int failed = 0, team = 1;
#pragma omp parallel num_threads(sizes->threads)
    for (const Term *t = terms; t < terms + sizes->terms; t++) {
        const int64_t P = t->P, K = t->K, Q = t->Q, tile = tile_length(t), size = K * P * Q * HIDDEN;
        const int64_t x_row = x_edge[t->x], out_row = out_edge[t->out];
        const float *matrix = matrices + t->matrix, *from = x[t->x] + t->x_offset, *to = grad[t->out] + t->out_offset;
        float *h = scratch((3 * HIDDEN + G * P * (2 * K + Q) + 2 * tile * P * Q) * BLOCK), *h_rows = h + HIDDEN * BLOCK;
        float *grad_h = h_rows + HIDDEN * BLOCK, *xs = grad_h + HIDDEN * BLOCK, *grad_xs = xs + G * P * K * BLOCK;
        float *grads = grad_xs + G * P * K * BLOCK, *radial = grads + G * P * Q * BLOCK;
        float *grad_radial = radial + tile * P * Q * BLOCK, *grad_matrix = grad_matrices + t->matrix;
        const int thread = omp_get_thread_num();
        float *own_grad_matrix = thread ? spare + (thread - 1) * spare_size : grad_matrix;
        memset(own_grad_matrix, 0, size * sizeof(float));
        if (!h) failed = NO_MEMORY;
#pragma omp single
        team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += BLOCK) {
            if (!h) continue;
            const int64_t valid = rows - row < BLOCK ? rows - row : BLOCK;
            load(hidden + row * sizes->hidden_row + t->hidden, sizes->hidden_row, valid, HIDDEN, h);
            memset(h_rows, 0, HIDDEN * BLOCK * sizeof(float));
            store(h, h_rows, HIDDEN, BLOCK, HIDDEN);
            for (int64_t i = 0; i < G * P; i++) {
                const int64_t edge = row * G + i / P, sign = i % P;
                load(from + edge * x_row + sign * t->x_sign, G * x_row, valid, K, xs + i * K * BLOCK);
                load(to + edge * out_row + sign * t->out_sign, G * out_row, valid, Q, grads + i * Q * BLOCK);
            }
            for (int64_t k = 0; k < K; k += tile) {
                const int64_t ks = K - k < tile ? K - k : tile, columns = ks * P * Q;
                const float *part = matrix + k * P * Q * HIDDEN;
                product(BLOCK, columns, HIDDEN, part, HIDDEN, 1, h, radial, 0);
                for (int64_t g = 0; g < G; g++)
                    apply_backward(t, ks, radial, xs + (g * P * K + k) * BLOCK, grads + g * P * Q * BLOCK,
                                   grad_xs + (g * P * K + k) * BLOCK, grad_radial, g > 0);
                product(BLOCK, HIDDEN, columns, part, 1, HIDDEN, grad_radial, grad_h, k > 0);
                product(HIDDEN, columns, BLOCK, grad_radial, BLOCK, 1, h_rows, own_grad_matrix + k * P * Q * HIDDEN, 1);
            }
            store(grad_h, grad_hidden + row * sizes->hidden_row + t->hidden, sizes->hidden_row, valid, HIDDEN);
            for (int64_t i = 0; grad_x && i < G * P; i++)
                store(grad_xs + i * K * BLOCK,
                      grad_x[t->x] + t->x_offset + (row * G + i / P) * x_row + i % P * t->x_sign, G * x_row, valid, K);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < size; i++)
            for (int other = 1; other < team; other++) grad_matrix[i] += spare[(other - 1) * spare_size + i];
    }
    return failed;
}
