/* What contraction.c does, in products of tiles, for those terms that consist of panels. */
#include "tiles.h"

#if HAS_TILES
/* Whether a term is multiplied in tiles. */
static inline int in_tiles(const Sizes *sizes, const Term *t) { return sizes->parts && t->Q % SIDE == 0; }

/* For one k, panels (P · Q / SIDE, with a distance) of the gradient of the radial weights of a block: the sum over its
 * `group` edges of the products of x (P) and grad (P, Q, BLOCK). */
static inline __attribute__((always_inline)) void radial_panels(
    const int P, const Term *t, int64_t parts, int64_t group, const float *x, int64_t x_edge, const float *grad,
    int64_t out_edge, bf16 *to, int64_t distance)
{
    const int64_t minus_x = t->x_sign * BLOCK, minus_grad = t->out_sign * BLOCK, start = 0;
    for (int64_t q = 0; q < t->Q; q++, grad += BLOCK) {
        vector of_a[PARTS], of_b[PARTS];
        EACH of_a[p] = of_b[p] = (vector){0};
        for (int64_t g = 0; g < group; g++) {
            const float *xs = x + g * x_edge, *gs = grad + g * out_edge;
            EACH {
                of_a[p] += AT(xs) * AT(gs);
                if (P == 1) continue;
                of_a[p] += AT(xs + minus_x) * AT(gs + minus_grad);
                of_b[p] += AT(xs) * AT(gs + minus_grad) - AT(xs + minus_x) * AT(gs);
            }
        }
        bf16 *row = to + q / SIDE * distance + q % SIDE * SIDE;
        split(parts, (__m512)of_a[0], (__m512)of_a[1], row, PANEL, 0);
        if (P == 2) split(parts, (__m512)of_b[0], (__m512)of_b[1], row + t->Q / SIDE * distance, PANEL, 0);
    }
}

/* As forward_of_term; in spare the threads make panels of the matrix together. */
static int forward_in_tiles(const Inputs *in, const Term *t, float *const *out, bf16 *spare)
{
    const int64_t G = in->sizes->group, blocks = num_blocks(in->sizes), columns = t->P * t->Q, span = span_length(t);
    const int64_t x_edge = in->x_rows[t->x] * BLOCK, out_edge = in->out_rows[t->out] * BLOCK;
    const int64_t parts = in->sizes->parts, of_panel = parts * PANEL, strips = columns / SIDE;
    const Share own = share(blocks);
    float *radial = scratch((span * columns + HIDDEN) * BLOCK + CHUNK * of_panel / 2);
    float *h = radial + span * columns * BLOCK;
    bf16 *hidden_panels = (bf16 *)(h + HIDDEN * BLOCK);
    const int64_t last = radial ? own.end : 0;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < t->K * strips; i++)
        left_panel(parts, in->matrices + t->matrix + i * SIDE * HIDDEN, HIDDEN, spare + i * of_panel);
    for (int64_t start = own.first; start < last; start += CHUNK) {
        const int64_t length = last - start < CHUNK ? last - start : CHUNK;
        for (int64_t i = 0; i < length; i++) {
            load_hidden(in, t, start + i, h);
            right_panel(parts, h, BLOCK, SIDE, hidden_panels + i * of_panel);
        }
        for (int64_t k = 0; k < t->K; k += span) {
            const int64_t ks = t->K - k < span ? t->K - k : span;
            for (int64_t i = 0; i < length; i++) {
                const float *xs = in->x[t->x] + (start + i) * G * x_edge + (t->x_offset + k) * BLOCK;
                float *sums = out[t->out] + (start + i) * G * out_edge + t->out_offset * BLOCK;
                for (int64_t j = 0; j < ks * strips; j++)
                    multiply(parts, 1, spare + (k * strips + j) * of_panel, hidden_panels + i * of_panel,
                             radial + j * SIDE * BLOCK, 0);
                for (int64_t g = 0; g < G; g++) apply(t, ks, radial, xs + g * x_edge, sums + g * out_edge);
            }
        }
    }
#pragma omp barrier
    return radial ? 0 : NO_MEMORY;
}

/* Where each edge has radial weights of its own, its gradients of x and of the hidden layer come from that of their
 * outer product, which with the transposed matrices A (and B) is A grad; or if m > 0
 *
 *     outer[+] = A grad[+] + B grad[-] = A (grad[+] + grad[-]) + (B - A) grad[-]
 *     outer[-] = A grad[-] - B grad[+] = A (grad[+] + grad[-]) - (A + B) grad[+],
 *
 * three products: the one that both signs have, then that of + alone, then that of - alone. */
static int64_t products(const Term *t) { return t->P == 1 ? 1 : 3; }

/* to (products, Q / SIDE) panels of what is multiplied by grad, from the matrix of one k */
static void left_of_products(const Term *t, int64_t parts, const float *matrix, bf16 *to)
{
    const int64_t of_product = t->Q / SIDE * parts * PANEL;
    float a[SIDE * SIDE], b[SIDE * SIDE], mixed[SIDE * SIDE];
    for (int64_t q = 0; q < t->Q; q += SIDE, to += parts * PANEL) {
        load(matrix + q * HIDDEN, HIDDEN, SIDE, HIDDEN, a);
        left_panel(parts, a, SIDE, to);
        if (t->P == 1) continue;
        load(matrix + (t->Q + q) * HIDDEN, HIDDEN, SIDE, HIDDEN, b);
        for (int i = 0; i < SIDE * SIDE; i++) mixed[i] = b[i] - a[i];
        left_panel(parts, mixed, SIDE, to + of_product);
        for (int i = 0; i < SIDE * SIDE; i++) mixed[i] = -a[i] - b[i];
        left_panel(parts, mixed, SIDE, to + 2 * of_product);
    }
}

/* to (products, Q / SIDE) panels of what they multiply, from an edge's gradient (P, Q, BLOCK) */
static void right_of_products(const Term *t, int64_t parts, const float *grad, bf16 *to)
{
    const int64_t of_product = t->Q / SIDE * parts * PANEL, size = SIDE * BLOCK;
    const float *minus = grad + t->out_sign * BLOCK;
    float sum[SIDE * BLOCK];
    for (int64_t q = 0; q < t->Q; q += SIDE, grad += size, minus += size, to += parts * PANEL) {
        if (t->P == 1) {
            right_panel(parts, grad, BLOCK, SIDE, to);
            continue;
        }
        for (int j = 0; j < size; j++) sum[j] = grad[j] + minus[j];
        right_panel(parts, sum, BLOCK, SIDE, to);
        right_panel(parts, minus, BLOCK, SIDE, to + of_product);
        right_panel(parts, grad, BLOCK, SIDE, to + 2 * of_product);
    }
}

/* From outer (products, HIDDEN, BLOCK), see `products`, for one k the gradients of x (P, BLOCK) and h (HIDDEN, BLOCK),
 * which are added to. */
static inline __attribute__((always_inline)) void factors_of_outer(
    const int P, const Term *t, const float *outer, const float *x, const float *h, float *grad_x, float *grad_h)
{
    enum { SIZE = HIDDEN * BLOCK };
    const int64_t minus_x = t->x_sign * BLOCK;
    for (int start = 0; start < BLOCK; start += WIDTH) {
        vector x_plus[PARTS], x_minus[PARTS], of_plus[PARTS], of_minus[PARTS];
        EACH of_plus[p] = of_minus[p] = (vector){0};
        EACH x_plus[p] = AT(x);
        if (P == 2) EACH x_minus[p] = AT(x + minus_x);
        for (int i = 0; i < SIZE; i += BLOCK)
            EACH {
                vector plus = AT(outer + i), minus = plus;
                if (P == 1) {
                    of_plus[p] += plus * AT(h + i);
                    AT(grad_h + i) += plus * x_plus[p];
                    continue;
                }
                plus += AT(outer + SIZE + i), minus += AT(outer + 2 * SIZE + i);
                of_plus[p] += plus * AT(h + i), of_minus[p] += minus * AT(h + i);
                AT(grad_h + i) += plus * x_plus[p] + minus * x_minus[p];
            }
        EACH AT(grad_x) += of_plus[p];
        if (P == 2) EACH AT(grad_x + minus_x) += of_minus[p];
    }
}

/* From left_of_products of some k and right_of_products: the gradients of x and h of a block, which are added to. */
static void through_outer(
    const Term *t, int64_t parts, int64_t k, int64_t ks, const bf16 *left, const bf16 *right, float *outer,
    const Block *b)
{
    const int64_t of_product = t->Q / SIDE * parts * PANEL;
    for (const int64_t end = k + ks; k < end; k++) {
        const float *x = b->x + k * BLOCK;
        float *grad_x = b->grad_x + k * BLOCK;
        for (int64_t i = 0; i < products(t); i++, left += of_product)
            multiply(parts, t->Q / SIDE, left, right + i * of_product, outer + i * HIDDEN * BLOCK, 0);
        if (t->P == 1) factors_of_outer(1, t, outer, x, b->h, grad_x, b->grad_h);
        else factors_of_outer(2, t, outer, x, b->h, grad_x, b->grad_h);
    }
}

/* Where edges share radial weights these are made again, for all of them: to panels (strips) of the matrix of some k,
 * and of the same transposed. */
static void left_of_radial(int64_t parts, int64_t strips, const float *matrix, bf16 *to, bf16 *transposed)
{
    float strip[SIDE * SIDE];
    for (int64_t i = 0; i < strips; i++, matrix += SIDE * HIDDEN, to += parts * PANEL, transposed += parts * PANEL) {
        load(matrix, HIDDEN, SIDE, HIDDEN, strip);
        left_panel(parts, matrix, HIDDEN, to);
        left_panel(parts, strip, SIDE, transposed);
    }
}

/* From them and the panel of h, and panels (strips, with a distance) of the gradient of radial weights: the gradients
 * of x and h of a block, which are added to. */
static void through_radial(
    const Inputs *in, const Term *t, int64_t k, int64_t ks, const bf16 *left, const bf16 *transposed, const bf16 *right,
    const bf16 *of_radial, int64_t distance, bf16 *turned, float *radial, const Block *b)
{
    const int64_t parts = in->sizes->parts, of_panel = parts * PANEL, strips = ks * t->P * t->Q / SIDE;
    for (int64_t i = 0; i < strips; i++) {
        multiply(parts, 1, left + i * of_panel, right, radial + i * SIDE * BLOCK, 0);
        turn_panel(parts, of_radial + i * distance, turned + i * of_panel);
    }
    for (int64_t g = 0; g < in->sizes->group; g++)
        apply_to_gradient(t, ks, radial, b->grad + g * in->out_rows[t->out] * BLOCK,
                          b->grad_x + (g * in->x_rows[t->x] + k) * BLOCK);
    multiply(parts, strips, transposed, turned, b->grad_h, 1);
}

/* As backward_of_term. */
static int backward_in_tiles(const Inputs *in, const Gradients *to, const Term *t, int64_t first, int64_t end)
{
    const int64_t G = in->sizes->group, blocks = num_blocks(in->sizes), columns = t->P * t->Q, step = columns * HIDDEN;
    const int64_t x_edge = in->x_rows[t->x] * BLOCK, out_edge = in->out_rows[t->out] * BLOCK;
    const int64_t parts = in->sizes->parts, of_panel = parts * PANEL, strips = columns / SIDE, span = span_length(t);
    const int64_t of_products = products(t) * t->Q / SIDE * of_panel;
    const int64_t of_k = G == 1 ? of_products : 2 * strips * of_panel, of_edges = G == 1 ? of_products : of_panel;
    const int64_t panels = span * of_k + CHUNK * of_edges + (CHUNK + span * strips * (CHUNK + 1)) * of_panel;
    float *buffers = scratch((CHUNK * 2 * HIDDEN + 3 * HIDDEN + span * columns) * BLOCK + panels / 2);
    float *outer = buffers + CHUNK * 2 * HIDDEN * BLOCK, *radial = outer + 3 * HIDDEN * BLOCK;
    bf16 *left = (bf16 *)(radial + span * columns * BLOCK), *right = left + span * of_k;
    bf16 *hidden_panels = right + CHUNK * of_edges, *turned = hidden_panels + CHUNK * of_panel;
    bf16 *of_radial = turned + span * strips * of_panel; /* (span, strips, blocks of a chunk) */
    if (!buffers) return NO_MEMORY;
    for (int64_t start = 0; start < blocks; start += CHUNK) {
        const int64_t length = blocks - start < CHUNK ? blocks - start : CHUNK;
        Block chunk[CHUNK];
        for (int64_t i = 0; i < length; i++) {
            const Block b = chunk[i] = begin_block(in, to, t, start + i, buffers + i * 2 * HIDDEN * BLOCK);
            if (G == 1) right_of_products(t, parts, b.grad, right + i * of_edges);
            else right_panel(parts, b.h, BLOCK, SIDE, right + i * of_edges);
            right_panel(parts, b.hidden, in->sizes->hidden_row, b.valid, hidden_panels + i * of_panel);
        }
        for (int64_t k = first; k < end; k += span) {
            const int64_t ks = end - k < span ? end - k : span;
            const float *matrix = in->matrices + t->matrix + k * step;
            float *grad_matrix = to->grad_matrices + t->matrix + k * step;
            bf16 *transposed = left + ks * strips * of_panel;
            if (G > 1) left_of_radial(parts, ks * strips, matrix, left, transposed);
            else for (int64_t i = 0; i < ks; i++) left_of_products(t, parts, matrix + i * step, left + i * of_k);
            for (int64_t i = 0; i < length; i++) {
                const Block *b = chunk + i;
                const bf16 *of_block = right + i * of_edges;
                const int64_t distance = length * of_panel;
                bf16 *own = of_radial + i * of_panel;
                for (int64_t j = 0; j < ks; j++) {
                    const float *x = b->x + (k + j) * BLOCK;
                    bf16 *place = own + j * strips * distance;
                    if (t->P == 1) radial_panels(1, t, parts, G, x, x_edge, b->grad, out_edge, place, distance);
                    else radial_panels(2, t, parts, G, x, x_edge, b->grad, out_edge, place, distance);
                }
                if (G == 1) through_outer(t, parts, k, ks, left, of_block, outer, b);
                else through_radial(in, t, k, ks, left, transposed, of_block, own, distance, turned, radial, b);
            }
            for (int64_t i = 0; i < ks * strips; i++)
                multiply(parts, length, of_radial + i * length * of_panel, hidden_panels,
                         grad_matrix + i * SIDE * HIDDEN, start > 0);
        }
        for (const Block *b = chunk; b < chunk + length; b++) end_block(in, b);
    }
    return 0;
}
#else
static inline int in_tiles(const Sizes *sizes, const Term *t) { return 0; }
static int forward_in_tiles(const Inputs *in, const Term *t, float *const *out, bf16 *spare) { return 0; }
static int backward_in_tiles(const Inputs *in, const Gradients *to, const Term *t, int64_t first, int64_t end)
{
    return 0;
}
#endif
