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
#include "contraction_tiles.h"

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

/* What comes out of one term is added to out; each thread of a team has some blocks. */
static int forward_of_term(const Inputs *in, const Term *t, float *const *out)
{
    const int64_t G = in->sizes->group, blocks = num_blocks(in->sizes), columns = t->P * t->Q, span = span_length(t);
    const int64_t x_edge = in->x_rows[t->x] * BLOCK, out_edge = in->out_rows[t->out] * BLOCK;
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    float *h = scratch((HIDDEN + span * columns) * BLOCK), *radial = h + HIDDEN * BLOCK;
    if (!h) return NO_MEMORY;
    for (int64_t block = blocks * thread / team; block < blocks * (thread + 1) / team; block++) {
        const float *xs = in->x[t->x] + block * G * x_edge + t->x_offset * BLOCK;
        float *sums = out[t->out] + block * G * out_edge + t->out_offset * BLOCK;
        load_hidden(in, t, block, h);
        for (int64_t k = 0; k < t->K; k += span) {
            const int64_t ks = t->K - k < span ? t->K - k : span;
            const float *part = in->matrices + t->matrix + k * columns * HIDDEN;
            product(BLOCK, ks * columns, HIDDEN, part, HIDDEN, 1, h, BLOCK, radial, 0);
            for (int64_t g = 0; g < G; g++) apply(t, ks, radial, xs + g * x_edge + k * BLOCK, sums + g * out_edge);
        }
    }
    return 0;
}

/* Gradients of one term, of the k from `first` to `end`. Edges that share radial weights make them again, for all of
 * them; an edge that has its own takes fewer products by the gradient of the outer product of x and hidden. */
static int backward_of_term(const Inputs *in, const Gradients *to, const Term *t, int64_t first, int64_t end)
{
    const int64_t G = in->sizes->group, blocks = num_blocks(in->sizes), columns = t->P * t->Q, step = columns * HIDDEN;
    const int64_t x_edge = in->x_rows[t->x] * BLOCK, out_edge = in->out_rows[t->out] * BLOCK;
    const int64_t span = span_length(t), of_block = (2 * HIDDEN + t->Q) * BLOCK;
    const int in_three = G == 1 && t->P == 2; /* see `gradients_of_factors` */
    float *buffers = scratch(CHUNK * of_block + span * columns * (2 * BLOCK + HIDDEN));
    float *radial = buffers + CHUNK * of_block, *grad_radial = radial + span * columns * BLOCK;
    float *mixed = grad_radial + span * columns * BLOCK;
    if (!buffers) return NO_MEMORY;
    memset(to->grad_matrices + t->matrix + first * step, 0, (end - first) * step * sizeof(float));
    for (int64_t start = 0; start < blocks; start += CHUNK) {
        const int64_t length = blocks - start < CHUNK ? blocks - start : CHUNK;
        Block chunk[CHUNK];
        const float *shared[CHUNK]; /* grad, or grad[+] + grad[-] (Q, BLOCK) */
        for (int64_t i = 0; i < length; i++) {
            float *buffer = buffers + i * of_block, *sum = buffer + 2 * HIDDEN * BLOCK;
            const Block b = chunk[i] = begin_block(in, to, t, start + i, buffer);
            const float *minus = b.grad + t->out_sign * BLOCK;
            for (int64_t j = 0; j < (in_three ? t->Q * BLOCK : 0); j++) sum[j] = b.grad[j] + minus[j];
            shared[i] = in_three ? sum : b.grad;
        }
        for (int64_t k = first; k < end; k += span) {
            const int64_t ks = end - k < span ? end - k : span;
            const float *part = in->matrices + t->matrix + k * step;
            for (int64_t j = 0; in_three && j < ks; j++) mix(t, part + j * step, mixed + j * step);
            for (int64_t i = 0; i < length; i++) {
                const Block *b = chunk + i;
                const float *xs = b->x + k * BLOCK;
                float *grad_xs = b->grad_x + k * BLOCK;
                if (G == 1) {
                    for (int64_t j = 0; j < ks; j++) {
                        const float *a = part + j * step, *c = mixed + j * step, *x = xs + j * BLOCK;
                        float *grad_x = grad_xs + j * BLOCK;
                        if (t->P == 1) gradients_of_factors(1, t, a, c, b->grad, shared[i], x, b->h, grad_x, b->grad_h);
                        else gradients_of_factors(2, t, a, c, b->grad, shared[i], x, b->h, grad_x, b->grad_h);
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
                product(HIDDEN, ks * columns, b->valid, grad_radial, BLOCK, 1, b->hidden, in->sizes->hidden_row,
                        to->grad_matrices + t->matrix + k * step, 1);
            }
        }
        for (const Block *b = chunk; b < chunk + length; b++) end_block(in, b);
    }
    return 0;
}

/* x[i] (blocks, group, x_rows[i], BLOCK), hidden (rows, hidden_row), matrices; out[i] (blocks, group, out_rows[i],
 * BLOCK) is added to. In spare is room for the panels of the largest matrix, if there are tiles. Returns 0 unless there
 * is no memory. */
int contraction_forward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_rows, const float *hidden,
    const float *matrices, float *const *out, const int64_t *out_rows, bf16 *spare)
{
    const Inputs in = {sizes, x, x_rows, out_rows, hidden, matrices};
    int failed = 0;
#pragma omp parallel num_threads(sizes->threads)
    {
        const Tiles before = begin_tiles(sizes);
        int fault = 0;
        for (const Term *t = terms; t < terms + sizes->terms; t++)
            fault |= in_tiles(sizes, t) ? forward_in_tiles(&in, t, out, spare) : forward_of_term(&in, t, out);
        if (fault) failed = fault;
        end_tiles(sizes, before);
    }
    return failed;
}

/* From the gradient of out those of x and hidden, which are added to, and of the matrices, which are written. A thread
 * has some k of each term to itself, so that their part of a matrix and of its gradient stays in its cache; terms that
 * share rows of x have the same K. In spare (threads - 1, rows, hidden_row) threads other than the first add up their
 * share of grad_hidden. */
int contraction_backward(
    const Sizes *sizes, const Term *terms, const float *const *x, const int64_t *x_rows, const float *hidden,
    const float *matrices, const float *const *grad, const int64_t *out_rows, float *const *grad_x, float *grad_hidden,
    float *grad_matrices, float *spare)
{
    const Inputs in = {sizes, x, x_rows, out_rows, hidden, matrices};
    const int64_t of_hidden = sizes->rows * sizes->hidden_row;
    int failed = 0;
#pragma omp parallel num_threads(sizes->threads)
    {
        const Tiles before = begin_tiles(sizes);
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Gradients to = {grad, grad_x, thread ? spare + (thread - 1) * of_hidden : grad_hidden, grad_matrices};
        int fault = 0;
        if (thread) memset(to.grad_hidden, 0, of_hidden * sizeof(float));
        for (const Term *t = terms; t < terms + sizes->terms; t++) {
            const int64_t first = t->K * thread / team, end = t->K * (thread + 1) / team;
            if (first == end) continue;
            fault |= (in_tiles(sizes, t) ? backward_in_tiles : backward_of_term)(&in, &to, t, first, end);
        }
        if (fault) failed = fault;
        end_tiles(sizes, before);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < of_hidden; i++)
            for (int other = 1; other < team; other++) grad_hidden[i] += spare[(other - 1) * of_hidden + i];
    }
    return failed;
}
