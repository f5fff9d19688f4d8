/* The parts of a convolution that take most time on a CPU, in single precision; called by native.py.
 *
 * contraction_*: the contraction of contraction.py, with the radial weights of a block of edges in the cache and never
 * in memory. For every edge e, every |m|:
 *
 *     R[e] = matrix · hidden[e]                                         radial weights (K, P, Q)
 *     out[e, q] = sum_k R[e, k, 0, q] x[e, k]                           m = 0, P = 1
 *     out[e, ±, q] = sum_k R[e, k, 0, q] x[e, ±, k] ∓ R[e, k, 1, q] x[e, ∓, k]      m > 0, P = 2
 *
 * `group` edges that follow each other share a row of `hidden`.
 *
 * radial_*: the hidden layers of the radial networks of radial.py.
 *
 * Threads take blocks of BLOCK rows (edges, or groups of them). Within a block the row is the last axis of everything,
 * so that a vector register holds one number of several rows, whatever the other sizes are. What the backward functions
 * need of the forward pass they compute again.
 */

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

enum { BLOCK = 32, HIDDEN = 32, TILE = 512 }; /* rows at a time; hidden units; radial weights of a row at a time */

#if defined(__AVX512F__)
enum { VECTOR = 64, ROWS = 8, WIDTH = 32 }; /* bytes of a register; accumulators of `product`: ROWS x WIDTH numbers */
#elif defined(__AVX__)
enum { VECTOR = 32, ROWS = 4, WIDTH = 16 };
#else
enum { VECTOR = 16, ROWS = 4, WIDTH = 16 };
#endif
enum { LANES = VECTOR / 4, PARTS = WIDTH / LANES };
typedef float vector __attribute__((vector_size(VECTOR), aligned(4), may_alias));

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

/* c (count x WIDTH) (+)= a (count x n) b (n x WIDTH), count a constant; distances between rows and columns. */
static inline __attribute__((always_inline)) void panel(
    const int count, int64_t n, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
    float *c, int64_t c_row, int add)
{
    vector sum[ROWS][PARTS];
    for (int r = 0; r < count; r++)
        for (int p = 0; p < PARTS; p++) sum[r][p] = (vector){0};
    for (int64_t i = 0; i < n; i++, a += a_column, b += b_row) {
        vector right[PARTS];
        for (int p = 0; p < PARTS; p++) right[p] = *(vector *)(b + p * LANES);
        for (int r = 0; r < count; r++)
            for (int p = 0; p < PARTS; p++) sum[r][p] += a[r * a_row] * right[p];
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
    const int width, int64_t m, int64_t n, const float *a, int64_t a_row, int64_t a_column, const float *b, float *c,
    int add)
{
    int64_t r = 0;
    for (; r + ROWS <= m; r += ROWS)
        for (int i = 0; i < width; i += WIDTH)
            panel(ROWS, n, a + r * a_row, a_row, a_column, b + i, width, c + r * width + i, width, add);
    for (; r < m; r++)
        for (int i = 0; i < width; i += WIDTH)
            panel(1, n, a + r * a_row, a_row, a_column, b + i, width, c + r * width + i, width, add);
}

/* to (columns, BLOCK) = from (valid, columns) transposed, then zeros */
static void load(const float *from, int64_t row, int64_t valid, int64_t columns, float *to)
{
    if (valid < BLOCK) memset(to, 0, columns * BLOCK * sizeof(float));
    for (int64_t r = 0; r < valid; r++)
        for (int64_t c = 0; c < columns; c++) to[c * BLOCK + r] = from[r * row + c];
}

/* to (valid, columns) += from (columns, BLOCK) transposed */
static void store(const float *from, float *to, int64_t row, int64_t valid, int64_t columns)
{
    for (int64_t r = 0; r < valid; r++)
        for (int64_t c = 0; c < columns; c++) to[r * row + c] += from[c * BLOCK + r];
}

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

/* Memory of the calling thread, kept for its next call; 0 if there is none. */
static float *scratch(int64_t numbers)
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
        if (!h) failed = 1;
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
        if (!h) failed = 1;
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

/* ------------------------------------------------------------------------------------------------- radial networks */

/* Networks of the same scalars: linear, [layer norm], ReLU, linear, [layer norm], ReLU, each of HIDDEN units. The
 * parameters of each: weight (HIDDEN, inputs), bias, [scale, shift], weight (HIDDEN, HIDDEN), bias, [scale, shift]. */
typedef struct {
    int64_t rows, inputs, networks, norm, threads;
} Radial;

static const float EPSILON = 1e-5f; /* of torch.nn.LayerNorm */

static int64_t layer_size(const Radial *r, int64_t inputs) { return HIDDEN * (inputs + (r->norm ? 3 : 1)); }

/* One layer, from its input (inputs, BLOCK): `normed` (HIDDEN, BLOCK) before scale and shift, the inverse standard
 * deviations (BLOCK) it was divided by, and the output (HIDDEN, BLOCK). */
static void layer(
    const Radial *r, int64_t inputs, const float *weights, const float *input, float *normed, float *inverse,
    float *output)
{
    const float *bias = weights + HIDDEN * inputs, *scale = bias + HIDDEN, *shift = scale + HIDDEN;
    float mean[BLOCK] = {0}, square[BLOCK] = {0};
    product(BLOCK, HIDDEN, inputs, weights, inputs, 1, input, normed, 0);
    for (int u = 0; u < HIDDEN; u++)
        for (int i = 0; i < BLOCK; i++) mean[i] += normed[u * BLOCK + i] += bias[u];
    if (r->norm) {
        for (int i = 0; i < BLOCK; i++) mean[i] /= HIDDEN;
        for (int u = 0; u < HIDDEN; u++)
            for (int i = 0; i < BLOCK; i++) {
                const float difference = normed[u * BLOCK + i] -= mean[i];
                square[i] += difference * difference;
            }
        for (int i = 0; i < BLOCK; i++) inverse[i] = 1 / sqrtf(square[i] / HIDDEN + EPSILON);
    }
    for (int u = 0; u < HIDDEN; u++)
        for (int i = 0; i < BLOCK; i++) {
            float value = normed[u * BLOCK + i];
            if (r->norm) {
                value = normed[u * BLOCK + i] = value * inverse[i];
                value = value * scale[u] + shift[u];
            }
            output[u * BLOCK + i] = value < 0 ? 0 : value; /* keeps NaN */
        }
}

/* grad (HIDDEN, BLOCK), of the output of a layer, becomes that of its linear map; those of bias, scale and shift are
 * added to. */
static void layer_backward(
    const Radial *r, int64_t inputs, const float *weights, const float *normed, const float *inverse,
    const float *output, float *grad, float *grad_weights)
{
    const float *scale = weights + HIDDEN * inputs + HIDDEN;
    float *grad_bias = grad_weights + HIDDEN * inputs;
    float *grad_scale = grad_bias + HIDDEN, *grad_shift = grad_scale + HIDDEN;
    float mean[BLOCK] = {0}, along[BLOCK] = {0};
    for (int u = 0; u < HIDDEN; u++) {
        float *g = grad + u * BLOCK, sum = 0, sum_normed = 0;
        const float *n = normed + u * BLOCK, *y = output + u * BLOCK;
        for (int i = 0; i < BLOCK; i++) g[i] = y[i] > 0 ? g[i] : 0;
        if (!r->norm) continue;
        for (int i = 0; i < BLOCK; i++) sum += g[i], sum_normed += g[i] * n[i];
        grad_shift[u] += sum, grad_scale[u] += sum_normed;
        for (int i = 0; i < BLOCK; i++) {
            g[i] *= scale[u];
            mean[i] += g[i], along[i] += g[i] * n[i];
        }
    }
    for (int u = 0; u < HIDDEN; u++) {
        float *g = grad + u * BLOCK, sum = 0;
        const float *n = normed + u * BLOCK;
        if (r->norm)
            for (int i = 0; i < BLOCK; i++) g[i] = inverse[i] * (g[i] - (mean[i] + n[i] * along[i]) / HIDDEN);
        for (int i = 0; i < BLOCK; i++) sum += g[i];
        grad_bias[u] += sum;
    }
}

/* scalars (rows, inputs), parameters (networks, ...); out (rows, networks, HIDDEN) is added to. */
int radial_forward(const Radial *r, const float *scalars, const float *parameters, float *out)
{
    const int64_t first = layer_size(r, r->inputs), size = first + layer_size(r, HIDDEN);
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    {
        float *input = scratch((r->inputs + 3 * HIDDEN + 1) * BLOCK), *normed = input + r->inputs * BLOCK;
        float *hidden = normed + HIDDEN * BLOCK, *last = hidden + HIDDEN * BLOCK, *inverse = last + HIDDEN * BLOCK;
        if (!input) failed = 1;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < r->rows; row += BLOCK) {
            if (!input) continue;
            const int64_t valid = r->rows - row < BLOCK ? r->rows - row : BLOCK;
            load(scalars + row * r->inputs, r->inputs, valid, r->inputs, input);
            for (int64_t n = 0; n < r->networks; n++) {
                layer(r, r->inputs, parameters + n * size, input, normed, inverse, hidden);
                layer(r, HIDDEN, parameters + n * size + first, hidden, normed, inverse, last);
                store(last, out + (row * r->networks + n) * HIDDEN, r->networks * HIDDEN, valid, HIDDEN);
            }
        }
    }
    return failed;
}

/* From the gradient of out those of scalars (if wanted, added to) and of the parameters: grad_parameters (threads,
 * networks, ...), of which the first is the gradient in the end. */
int radial_backward(
    const Radial *r, const float *scalars, const float *parameters, const float *grad, float *grad_scalars,
    float *grad_parameters)
{
    const int64_t first = layer_size(r, r->inputs), size = first + layer_size(r, HIDDEN);
    const int64_t I = r->inputs, all = r->networks * size;
    int failed = 0, team = 1;
#pragma omp parallel num_threads(r->threads)
    {
        float *input = scratch((2 * I + 9 * HIDDEN + 2) * BLOCK), *grad_input = input + I * BLOCK;
        float *normed = grad_input + I * BLOCK, *hidden = normed + HIDDEN * BLOCK;
        float *hidden_rows = hidden + HIDDEN * BLOCK;
        float *last_normed = hidden_rows + HIDDEN * BLOCK, *last = last_normed + HIDDEN * BLOCK;
        float *grad_last = last + HIDDEN * BLOCK, *grad_hidden = grad_last + HIDDEN * BLOCK;
        float *inverse = grad_hidden + HIDDEN * BLOCK, *last_inverse = inverse + BLOCK;
        float *own = grad_parameters + omp_get_thread_num() * all;
        memset(own, 0, all * sizeof(float));
        if (!input) failed = 1;
#pragma omp single
        team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < r->rows; row += BLOCK) {
            if (!input) continue;
            const int64_t valid = r->rows - row < BLOCK ? r->rows - row : BLOCK;
            load(scalars + row * I, I, valid, I, input);
            for (int64_t n = 0; n < r->networks; n++) {
                const float *weights = parameters + n * size, *last_weights = weights + first;
                float *grad_weights = own + n * size, *grad_last_weights = grad_weights + first;
                layer(r, I, weights, input, normed, inverse, hidden);
                layer(r, HIDDEN, last_weights, hidden, last_normed, last_inverse, last);
                load(grad + (row * r->networks + n) * HIDDEN, r->networks * HIDDEN, valid, HIDDEN, grad_last);
                layer_backward(r, HIDDEN, last_weights, last_normed, last_inverse, last, grad_last, grad_last_weights);
                memset(hidden_rows, 0, HIDDEN * BLOCK * sizeof(float));
                store(hidden, hidden_rows, HIDDEN, BLOCK, HIDDEN);
                product(HIDDEN, HIDDEN, BLOCK, grad_last, BLOCK, 1, hidden_rows, grad_last_weights, 1);
                product(BLOCK, HIDDEN, HIDDEN, last_weights, 1, HIDDEN, grad_last, grad_hidden, 0);
                layer_backward(r, I, weights, normed, inverse, hidden, grad_hidden, grad_weights);
                for (int u = 0; u < HIDDEN; u++)
                    for (int64_t column = 0; column < I; column++) {
                        float sum = 0;
                        for (int i = 0; i < BLOCK; i++) sum += grad_hidden[u * BLOCK + i] * input[column * BLOCK + i];
                        grad_weights[u * I + column] += sum;
                    }
                product(BLOCK, I, HIDDEN, weights, 1, I, grad_hidden, grad_input, n > 0);
            }
            if (grad_scalars) store(grad_input, grad_scalars + row * I, I, valid, I);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < all; i++)
            for (int other = 1; other < team; other++) grad_parameters[i] += grad_parameters[other * all + i];
    }
    return failed;
}
