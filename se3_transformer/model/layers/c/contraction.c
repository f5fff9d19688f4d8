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

enum { TILE = 512, CHUNK = 4 }; /* radial weights of a row, and blocks of rows, at a time */

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

/* A block of rows in the backward pass of a term. */
typedef struct {
    int64_t valid;                            /* rows that there are */
    const float *x, *grad, *hidden;
    float *grad_x, *grad_hidden;
    float *h, *grad_h, *sum;                  /* hidden, its gradient (HIDDEN, BLOCK); grad[+] + grad[-] (Q, BLOCK) */
} Block;

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

/* grad_x (P, ks, BLOCK) += the gradient of `apply` with respect to x, from grad (P, Q, BLOCK) */
static void apply_to_gradient(const Term *s, int64_t ks, const float *radial, const float *grad, float *grad_x)
{
    const int64_t Q = s->Q, minus_x = s->x_sign * BLOCK, minus = Q * BLOCK, minus_grad = s->out_sign * BLOCK;
    for (int64_t k = 0; k < ks; k++, grad_x += BLOCK, radial += s->P * minus)
        for (int start = 0; start < BLOCK; start += WIDTH) {
            const float *a = radial, *g = grad;
            vector plus[PARTS], minus_sum[PARTS];
            EACH plus[p] = minus_sum[p] = (vector){0};
            if (s->P == 1) {
                for (int64_t q = 0; q < Q; q++, a += BLOCK, g += BLOCK) EACH plus[p] += AT(a) * AT(g);
                EACH AT(grad_x) += plus[p];
                continue;
            }
            for (int64_t q = 0; q < Q; q++, a += BLOCK, g += BLOCK)
                EACH {
                    const vector g_plus = AT(g), g_minus = AT(g + minus_grad);
                    plus[p] += AT(a) * g_plus + AT(a + minus) * g_minus;
                    minus_sum[p] += AT(a) * g_minus - AT(a + minus) * g_plus;
                }
            EACH AT(grad_x) += plus[p];
            EACH AT(grad_x + minus_x) += minus_sum[p];
        }
}

/* grad_radial (ks, P, Q, BLOCK) (+)= the gradient of `apply` with respect to radial, from x and grad */
static inline __attribute__((always_inline)) void gradient_of_radial(
    const Term *s, int64_t ks, const float *x, const float *grad, float *grad_radial, const int add)
{
    const int64_t Q = s->Q, minus_x = s->x_sign * BLOCK, minus = Q * BLOCK, minus_grad = s->out_sign * BLOCK;
    for (int64_t k = 0; k < ks; k++, x += BLOCK, grad_radial += s->P * minus)
        for (int start = 0; start < BLOCK; start += WIDTH) {
            const float *g = grad;
            float *to = grad_radial;
            vector x_plus[PARTS], x_minus[PARTS];
            EACH x_plus[p] = AT(x);
            if (s->P == 1) {
                for (int64_t q = 0; q < Q; q++, to += BLOCK, g += BLOCK)
                    EACH {
                        const vector of_a = x_plus[p] * AT(g);
                        if (add) AT(to) += of_a; else AT(to) = of_a;
                    }
                continue;
            }
            EACH x_minus[p] = AT(x + minus_x);
            for (int64_t q = 0; q < Q; q++, to += BLOCK, g += BLOCK)
                EACH {
                    const vector g_plus = AT(g), g_minus = AT(g + minus_grad);
                    const vector of_a = x_plus[p] * g_plus + x_minus[p] * g_minus;
                    const vector of_b = x_plus[p] * g_minus - x_minus[p] * g_plus;
                    if (add) AT(to) += of_a; else AT(to) = of_a;
                    if (add) AT(to + minus) += of_b; else AT(to + minus) = of_b;
                }
        }
}

/* For m > 0 and one k: mixed (2, Q, HIDDEN) = -A - B and B - A, of the matrix (A, B), for `gradients_of_factors`. */
static void mix(const Term *s, const float *matrix, float *mixed)
{
    const int64_t size = s->Q * HIDDEN;
    for (int64_t i = 0; i < size; i++) {
        mixed[i] = -matrix[i] - matrix[i + size];
        mixed[i + size] = matrix[i + size] - matrix[i];
    }
}

/* For one k, the gradient of the outer product of x and the hidden layer, of some hidden units at a time, and from it
 * those of its factors, which are added to grad_x (P, BLOCK) and grad_h (HIDDEN, BLOCK). With the transposed matrices A
 * (and B) it is, of grad (P, Q, BLOCK), A grad, or
 *
 *     outer[+] = A grad[+] + B grad[-] = A (grad[+] + grad[-]) + (B - A) grad[-]
 *     outer[-] = A grad[-] - B grad[+] = A (grad[+] + grad[-]) - (A + B) grad[+],       three products for four.
 *
 * `shared` is grad, or the sum of its two parts. */
static inline __attribute__((always_inline)) void gradients_of_factors(
    const int P, const Term *s, const float *matrix, const float *mixed, const float *grad, const float *shared,
    const float *x, const float *h, float *grad_x, float *grad_h)
{
    enum { UNITS = ROWS / 2 }; /* so that the accumulators of both parts are as many as those of `panel` */
    const int count = P == 1 ? ROWS : UNITS;
    const int64_t Q = s->Q, minus_x = s->x_sign * BLOCK;
    for (int start = 0; start < BLOCK; start += WIDTH) {
        vector x_plus[PARTS], x_minus[PARTS], of_plus[PARTS], of_minus[PARTS];
        EACH of_plus[p] = of_minus[p] = (vector){0};
        EACH x_plus[p] = AT(x);
        if (P == 2) EACH x_minus[p] = AT(x + minus_x);
        for (int unit = 0; unit < HIDDEN; unit += count) {
            vector plus[ROWS][PARTS], minus[UNITS][PARTS];
            for (int r = 0; r < count; r++) EACH plus[r][p] = (vector){0};
            accumulate(count, Q, matrix + unit, 1, HIDDEN, shared + start, BLOCK, plus);
            if (P == 2) {
                const float *a = mixed + Q * HIDDEN + unit, *b = mixed + unit, *g = grad + start;
                for (int r = 0; r < count; r++) EACH minus[r][p] = plus[r][p];
#pragma GCC unroll 2
                for (int64_t q = 0; q < Q; q++, a += HIDDEN, b += HIDDEN, g += BLOCK) {
                    accumulate(count, 1, a, 1, HIDDEN, g + s->out_sign * BLOCK, BLOCK, plus);
                    accumulate(count, 1, b, 1, HIDDEN, g, BLOCK, minus);
                }
            }
            const float *hi = h + unit * BLOCK;
            float *to = grad_h + unit * BLOCK;
            for (int r = 0; r < count; r++, hi += BLOCK, to += BLOCK)
                EACH {
                    of_plus[p] += plus[r][p] * AT(hi);
                    AT(to) += plus[r][p] * x_plus[p];
                    if (P == 1) continue;
                    of_minus[p] += minus[r][p] * AT(hi);
                    AT(to) += minus[r][p] * x_minus[p];
                }
        }
        EACH AT(grad_x) += of_plus[p];
        if (P == 2) EACH AT(grad_x + minus_x) += of_minus[p];
    }
}

/* How many k of radial weights are made at a time: TILE of them, or the weights of one k. */
static int64_t tile_length(const Term *s)
{
    int64_t length = TILE / (s->P * s->Q);
    return length < 1 ? 1 : length < s->K ? length : s->K;
}

/* x[i] (blocks, group, x_rows[i], BLOCK), hidden (rows, hidden_row), matrices; out[i] (blocks, group, out_rows[i],
 * BLOCK) is added to. Returns 0 unless there is no memory. */
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

/* From the gradient of out those of x and hidden, which are added to, and of the matrices. Edges that share radial
 * weights make them again, for all of them; an edge that has its own takes fewer products by the gradient of the outer
 * product of x and hidden. A thread goes through a matrix once for a chunk of blocks, as matrices do not fit into its
 * cache. In spare (threads, spare_size: the largest matrix) threads other than the first add up their share of a
 * matrix's gradient, and the last row has `mix` of the matrix. */
int contraction_backward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_rows, const float *hidden,
    const float *matrices, const float *const *grad, const int64_t *out_rows, float *const *grad_x, float *grad_hidden,
    float *grad_matrices, float *spare, int64_t spare_size)
{
    const int64_t G = sizes->group, rows = sizes->rows, blocks = (rows + BLOCK - 1) / BLOCK;
    float *mixed = spare + (sizes->threads - 1) * spare_size;
    int failed = 0;
#pragma omp parallel num_threads(sizes->threads)
    for (const Term *t = terms; t < terms + sizes->terms; t++) {
        const int64_t K = t->K, columns = t->P * t->Q, tile = tile_length(t), step = columns * HIDDEN;
        const int64_t x_edge = x_rows[t->x] * BLOCK, out_edge = out_rows[t->out] * BLOCK;
        const int64_t of_block = (2 * HIDDEN + t->Q) * BLOCK;
        float *buffers = scratch(CHUNK * of_block + 2 * tile * columns * BLOCK);
        float *radial = buffers + CHUNK * of_block, *grad_radial = radial + tile * columns * BLOCK;
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t last = buffers ? blocks * (thread + 1) / team : 0;
        const float *matrix = matrices + t->matrix;
        float *grad_matrix = grad_matrices + t->matrix, *own = thread ? spare + (thread - 1) * spare_size : grad_matrix;
        memset(own, 0, K * step * sizeof(float));
        if (!buffers) failed = NO_MEMORY;
        const int in_three = G == 1 && t->P == 2; /* see `gradients_of_factors` */
#pragma omp for schedule(static)
        for (int64_t k = 0; k < (in_three ? K : 0); k++) mix(t, matrix + k * step, mixed + k * step);
        for (int64_t start = blocks * thread / team; start < last; start += CHUNK) {
            const int64_t length = last - start < CHUNK ? last - start : CHUNK;
            Block chunk[CHUNK];
            for (int64_t i = 0; i < length; i++) {
                const int64_t row = (start + i) * BLOCK, edge = (start + i) * G;
                const int64_t hidden_at = row * sizes->hidden_row + t->hidden;
                Block *b = chunk + i;
                b->valid = rows - row < BLOCK ? rows - row : BLOCK;
                b->hidden = hidden + hidden_at, b->grad_hidden = grad_hidden + hidden_at;
                b->x = x[t->x] + edge * x_edge + t->x_offset * BLOCK, b->grad_x = grad_x[t->x] + (b->x - x[t->x]);
                b->grad = grad[t->out] + edge * out_edge + t->out_offset * BLOCK;
                b->h = buffers + i * of_block, b->grad_h = b->h + HIDDEN * BLOCK, b->sum = b->grad_h + HIDDEN * BLOCK;
                load(b->hidden, sizes->hidden_row, b->valid, HIDDEN, b->h);
                memset(b->grad_h, 0, HIDDEN * BLOCK * sizeof(float));
                const float *minus = b->grad + t->out_sign * BLOCK;
                for (int64_t j = 0; j < (in_three ? t->Q * BLOCK : 0); j++) b->sum[j] = b->grad[j] + minus[j];
            }
            for (int64_t k = 0; k < K; k += tile) {
                const int64_t ks = K - k < tile ? K - k : tile;
                const float *part = matrix + k * step, *mixed_part = mixed + k * step;
                for (const Block *b = chunk; b < chunk + length; b++) {
                    const float *xs = b->x + k * BLOCK;
                    float *grad_xs = b->grad_x + k * BLOCK;
                    if (G == 1) {
                        for (int64_t i = 0; i < ks; i++) {
                            const float *a = part + i * step, *c = mixed_part + i * step, *xi = xs + i * BLOCK;
                            float *to = grad_xs + i * BLOCK;
                            if (t->P == 1) gradients_of_factors(1, t, a, c, b->grad, b->grad, xi, b->h, to, b->grad_h);
                            else gradients_of_factors(2, t, a, c, b->grad, b->sum, xi, b->h, to, b->grad_h);
                        }
                        gradient_of_radial(t, ks, xs, b->grad, grad_radial, 0);
                    } else {
                        product(BLOCK, ks * columns, HIDDEN, part, HIDDEN, 1, b->h, BLOCK, radial, 0);
                        for (int64_t g = 0; g < G; g++) {
                            apply_to_gradient(t, ks, radial, b->grad + g * out_edge, grad_xs + g * x_edge);
                            if (g) gradient_of_radial(t, ks, xs + g * x_edge, b->grad + g * out_edge, grad_radial, 1);
                            else gradient_of_radial(t, ks, xs, b->grad, grad_radial, 0);
                        }
                        product(BLOCK, HIDDEN, ks * columns, part, 1, HIDDEN, grad_radial, BLOCK, b->grad_h, 1);
                    }
                    product(HIDDEN, ks * columns, b->valid, grad_radial, BLOCK, 1, b->hidden, sizes->hidden_row,
                            own + k * step, 1);
                }
            }
            for (const Block *b = chunk; b < chunk + length; b++)
                store(b->grad_h, b->grad_hidden, sizes->hidden_row, b->valid, HIDDEN, 1);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < K * step; i++)
            for (int other = 1; other < team; other++) grad_matrix[i] += spare[(other - 1) * spare_size + i];
    }
    return failed;
}
