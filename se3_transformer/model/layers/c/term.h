/* What the three ways to contract have in common, see contraction.c. */
#include "common.h"

/* In blocks: radial weights of a row at a time; blocks that go through a part of a matrix while it is in the cache. */
enum { SPAN = 512, CHUNK = 20 };

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
    int64_t parts;                            /* of each number in products of tiles, see tiles.h; 0: no tiles */
} Sizes;

/* What goes into a contraction; see contraction_forward. */
typedef struct {
    const Sizes *sizes;
    const float *const *x;
    const int64_t *x_rows, *out_rows;
    const float *hidden, *matrices;
} Inputs;

/* What comes out of the backward pass, and from what; grad_hidden is the share of one thread. */
typedef struct {
    const float *const *grad;
    float *const *grad_x, *grad_hidden, *grad_matrices;
} Gradients;

/* A block of rows in the backward pass of a term. */
typedef struct {
    int64_t valid;                            /* rows that there are */
    const float *x, *grad, *hidden;
    float *grad_x, *grad_hidden;
    float *h, *grad_h;                        /* hidden, its gradient (HIDDEN, BLOCK) */
} Block;

/* The calling thread's share of n blocks (forward) or k (backward). All ways to contract share out alike, so that no
 * two threads write to the same rows of out or grad_x. */
typedef struct {
    int64_t first, end;
} Share;

static inline Share share(int64_t n)
{
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    return (Share){n * thread / team, n * (thread + 1) / team};
}

static inline int64_t num_blocks(const Sizes *sizes) { return (sizes->rows + BLOCK - 1) / BLOCK; }

/* Rows that there are in a block. */
static inline int64_t valid_rows(const Sizes *sizes, int64_t block)
{
    return sizes->rows - block * BLOCK < BLOCK ? sizes->rows - block * BLOCK : BLOCK;
}

/* h (HIDDEN, BLOCK) of a block */
static inline void load_hidden(const Inputs *in, const Term *t, int64_t block, float *h)
{
    const int64_t row = in->sizes->hidden_row;
    load(in->hidden + block * BLOCK * row + t->hidden, row, valid_rows(in->sizes, block), HIDDEN, h);
}

/* A block with h and grad_h, which is zero, in a buffer (2, HIDDEN, BLOCK). */
static inline Block begin_block(const Inputs *in, const Gradients *to, const Term *t, int64_t block, float *buffer)
{
    const int64_t edge = block * in->sizes->group, hidden = block * BLOCK * in->sizes->hidden_row + t->hidden;
    const int64_t x = (edge * in->x_rows[t->x] + t->x_offset) * BLOCK;
    load_hidden(in, t, block, buffer);
    memset(buffer + HIDDEN * BLOCK, 0, HIDDEN * BLOCK * sizeof(float));
    return (Block){
        .valid = valid_rows(in->sizes, block),
        .x = in->x[t->x] + x,
        .grad = to->grad[t->out] + (edge * in->out_rows[t->out] + t->out_offset) * BLOCK,
        .hidden = in->hidden + hidden,
        .grad_x = to->grad_x[t->x] + x,
        .grad_hidden = to->grad_hidden + hidden,
        .h = buffer,
        .grad_h = buffer + HIDDEN * BLOCK,
    };
}

static inline void end_block(const Inputs *in, const Block *b)
{
    store(b->grad_h, b->grad_hidden, in->sizes->hidden_row, b->valid, HIDDEN, 1);
}

#define AT(pointer) (*(vector *)((pointer) + lane))
#define EACH for (int p = 0, lane = start; p < PARTS; p++, lane += LANES)

/* out (P, Q, BLOCK) += radial (ks, P, Q, BLOCK) x (P, ks, BLOCK) */
static inline void apply(const Term *s, int64_t ks, const float *radial, const float *x, float *out)
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
static inline void apply_to_gradient(const Term *s, int64_t ks, const float *radial, const float *grad, float *grad_x)
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

/* How many k of radial weights are made at a time: SPAN of them, or the weights of one k. */
static inline int64_t span_length(const Term *s)
{
    int64_t length = SPAN / (s->P * s->Q);
    return length < 1 ? 1 : length < s->K ? length : s->K;
}
