/* The contraction of contraction.py. Radial weights are never in memory, only in registers (contraction_rows.h, for
 * terms whose outputs fill these) or in the cache (contraction_tiles.h, if lower precision was asked for; else here,
 * where the edges of a block are side by side). For every edge e, every |m|:
 *
 *     R[e] = matrix · hidden[e]                                         radial weights (K, P, Q)
 *     out[e, q] = sum_k R[e, k, 0, q] x[e, k]                           m = 0, P = 1
 *     out[e, ±, q] = sum_k R[e, k, 0, q] x[e, ±, k] ∓ R[e, k, 1, q] x[e, ∓, k]      m > 0, P = 2
 *
 * `group` edges that follow each other share a row of `hidden`. The x of one block of rows after the other, and of each
 * the edges that are first in their group, then those that are second, are (rows of x, BLOCK); so is what comes out.
 */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-associative-math") /* sums in the order of the source, which takes fewer operations */
#endif
#include "contraction_rows.h"

/* What comes out of one term is added to out; each thread of a team has some blocks. */
static int forward_of_term(const Inputs *in, const Term *t, float *const *out)
{
    const int64_t G = in->sizes->group, blocks = num_blocks(in->sizes), columns = t->P * t->Q, span = span_length(t);
    const int64_t x_edge = in->x_rows[t->x] * BLOCK, out_edge = in->out_rows[t->out] * BLOCK;
    const Share own = share(blocks);
    float *h = scratch((HIDDEN + span * columns) * BLOCK), *radial = h + HIDDEN * BLOCK;
    if (!h) return NO_MEMORY;
    for (int64_t block = own.first; block < own.end; block++) {
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

/* Gradients of one term, of the k from `first` to `end`. */
static int backward_of_term(const Inputs *in, const Gradients *to, const Term *t, int64_t first, int64_t end)
{
    const int64_t G = in->sizes->group, blocks = num_blocks(in->sizes), columns = t->P * t->Q, step = columns * HIDDEN;
    const int64_t x_edge = in->x_rows[t->x] * BLOCK, out_edge = in->out_rows[t->out] * BLOCK, span = span_length(t);
    enum { OF_BLOCK = 2 * HIDDEN * BLOCK };
    float *buffers = scratch(CHUNK * OF_BLOCK + 2 * span * columns * BLOCK);
    float *radial = buffers + CHUNK * OF_BLOCK, *grad_radial = radial + span * columns * BLOCK;
    if (!buffers) return NO_MEMORY;
    memset(to->grad_matrices + t->matrix + first * step, 0, (end - first) * step * sizeof(float));
    for (int64_t start = 0; start < blocks; start += CHUNK) {
        const int64_t length = blocks - start < CHUNK ? blocks - start : CHUNK;
        Block chunk[CHUNK];
        for (int64_t i = 0; i < length; i++) chunk[i] = begin_block(in, to, t, start + i, buffers + i * OF_BLOCK);
        for (int64_t k = first; k < end; k += span) {
            const int64_t ks = end - k < span ? end - k : span;
            const float *part = in->matrices + t->matrix + k * step;
            for (const Block *b = chunk; b < chunk + length; b++) {
                const float *xs = b->x + k * BLOCK;
                product(BLOCK, ks * columns, HIDDEN, part, HIDDEN, 1, b->h, BLOCK, radial, 0);
                for (int64_t g = 0; g < G; g++) {
                    const float *grad = b->grad + g * out_edge;
                    apply_to_gradient(t, ks, radial, grad, b->grad_x + k * BLOCK + g * x_edge);
                    if (g) gradient_of_radial(t, ks, xs + g * x_edge, grad, grad_radial, 1);
                    else gradient_of_radial(t, ks, xs, grad, grad_radial, 0);
                }
                product(BLOCK, HIDDEN, ks * columns, part, 1, HIDDEN, grad_radial, BLOCK, b->grad_h, 1);
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
            if (in_tiles(sizes, t)) fault |= forward_in_tiles(&in, t, out, spare);
            else if (!in_rows(sizes, t)) fault |= forward_of_term(&in, t, out);
        fault |= forward_in_rows(&in, terms, out);
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
    if (!sizes->rows) {
        for (const Term *t = terms; t < terms + sizes->terms; t++)
            memset(grad_matrices + t->matrix, 0, t->K * t->P * t->Q * HIDDEN * sizeof(float));
        return 0;
    }
#pragma omp parallel num_threads(sizes->threads)
    {
        const Tiles before = begin_tiles(sizes);
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Gradients to = {grad, grad_x, thread ? spare + (thread - 1) * of_hidden : grad_hidden, grad_matrices};
        int fault = 0;
        if (thread) memset(to.grad_hidden, 0, of_hidden * sizeof(float));
        for (const Term *t = terms; t < terms + sizes->terms; t++) {
            const Share k = share(t->K);
            if (k.first == k.end) continue;
            if (in_tiles(sizes, t)) fault |= backward_in_tiles(&in, &to, t, k.first, k.end);
            else if (!in_rows(sizes, t)) fault |= backward_of_term(&in, &to, t, k.first, k.end);
        }
        fault |= backward_in_rows(&in, &to, terms);
        if (fault) failed = fault;
        end_tiles(sizes, before);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < of_hidden; i++)
            for (int other = 1; other < team; other++) grad_hidden[i] += spare[(other - 1) * of_hidden + i];
    }
    return failed;
}
