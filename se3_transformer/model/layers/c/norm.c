/* NormSE3 of norm.py with ReLU: with the lengths |x[c]| of the C channels of a degree of a node, at least CLAMP and
 * softened,
 *
 *     out[c] = x[c] · relu(weight[c] (|x[c]| - mean) / deviation + bias[c]) / |x[c]|,      mean, deviation over c. */
#include "common.h"

typedef struct {
    int64_t nodes, degrees, threads;
    int64_t channels, largest; /* channels of all degrees; the largest M */
    float softening;
} Norm;

/* Features (nodes, C, M) of a degree; distances from node to node, channel to channel, and order to order. */
typedef struct {
    int64_t C, M, first; /* its first channel among those of all degrees */
    int64_t node, channel, order;
    int64_t grad_node, grad_channel, grad_order;
} Degree;

static const float CLAMP = 0x1p-24f, EPSILON = 1e-5f; /* NormSE3.NORM_CLAMP; of torch's norms */

/* to (M, C) = from (C, M), with distances from channel to channel and order to order */
static void collect(const Degree *d, const float *from, int64_t channel, int64_t order, float *to)
{
    for (int64_t m = 0; m < d->M; m++, from += order, to += d->C)
        for (int64_t c = 0; c < d->C; c++) to[c] = from[c * channel];
}

/* Lengths (C) of x (M, C), their inverse standard deviation, and them normalised (C). */
static float normed_lengths(const Degree *d, float softening, const float *x, float *lengths, float *normed)
{
    float mean = 0, square = 0;
    for (int64_t c = 0; c < d->C; c++) lengths[c] = 0;
    for (int64_t m = 0; m < d->M; m++, x += d->C)
        for (int64_t c = 0; c < d->C; c++) lengths[c] += x[c] * x[c];
    for (int64_t c = 0; c < d->C; c++) {
        lengths[c] = sqrtf((lengths[c] < CLAMP * CLAMP ? CLAMP * CLAMP : lengths[c]) + softening * softening);
        mean += lengths[c];
    }
    mean /= d->C;
    for (int64_t c = 0; c < d->C; c++) {
        normed[c] = lengths[c] - mean;
        square += normed[c] * normed[c];
    }
    const float inverse = 1 / sqrtf(square / d->C + EPSILON);
    for (int64_t c = 0; c < d->C; c++) normed[c] *= inverse;
    return inverse;
}

/* out[i] (nodes, C, M) of every degree are written */
int norm_forward(
    const Norm *n, const Degree *degrees, const float *const *x, const float *weight, const float *bias,
    float *const *out)
{
    int failed = 0;
#pragma omp parallel num_threads(n->threads)
    {
        float *lengths = scratch((3 + n->largest) * n->channels), *normed = lengths + n->channels;
        float *factors = normed + n->channels, *x_rows = factors + n->channels;
        if (!lengths) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t node = 0; node < n->nodes; node++)
            for (int64_t i = 0; lengths && i < n->degrees; i++) {
                const Degree *d = degrees + i;
                const float *from = x[i] + node * d->node, *w = weight + d->first, *b = bias + d->first;
                float *to = out[i] + node * d->C * d->M;
                collect(d, from, d->channel, d->order, x_rows);
                normed_lengths(d, n->softening, x_rows, lengths, normed);
                for (int64_t c = 0; c < d->C; c++) {
                    const float value = w[c] * normed[c] + b[c];
                    factors[c] = (value < 0 ? 0 : value) / lengths[c];
                }
                for (int64_t m = 0; m < d->M; m++)
                    for (int64_t c = 0; c < d->C; c++) to[c * d->M + m] = factors[c] * x_rows[m * d->C + c];
            }
    }
    return failed;
}

/* grad_x[i] (nodes, C, M) are written; those of weight and bias are in the first row of grad_parameters (threads, 2,
 * channels) in the end. */
int norm_backward(
    const Norm *n, const Degree *degrees, const float *const *x, const float *weight, const float *bias,
    const float *const *grad, float *const *grad_x, float *grad_parameters)
{
    const int64_t all = 2 * n->channels;
    int failed = 0, team = 1;
#pragma omp parallel num_threads(n->threads)
    {
        float *lengths = scratch((6 + 2 * n->largest) * n->channels), *normed = lengths + n->channels;
        float *grads = normed + n->channels, *sums = grads + n->channels, *factors = sums + n->channels;
        float *along_x = factors + n->channels, *x_rows = along_x + n->channels;
        float *g_rows = x_rows + n->largest * n->channels;
        float *own = grad_parameters + omp_get_thread_num() * all;
        memset(own, 0, all * sizeof(float));
        if (!lengths) failed = NO_MEMORY;
#pragma omp single
        team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t node = 0; node < n->nodes; node++)
            for (int64_t i = 0; lengths && i < n->degrees; i++) {
                const Degree *d = degrees + i;
                const float *from = x[i] + node * d->node, *g = grad[i] + node * d->grad_node;
                const float *w = weight + d->first, *b = bias + d->first;
                float *to = grad_x[i] + node * d->C * d->M, *grad_w = own + d->first, *grad_b = grad_w + n->channels;
                collect(d, from, d->channel, d->order, x_rows);
                collect(d, g, d->grad_channel, d->grad_order, g_rows);
                const float inverse = normed_lengths(d, n->softening, x_rows, lengths, normed);
                float mean = 0, along = 0;
                for (int64_t c = 0; c < d->C; c++) sums[c] = 0; /* gradients of the factors */
                for (int64_t m = 0; m < d->M; m++)
                    for (int64_t c = 0; c < d->C; c++) sums[c] += g_rows[m * d->C + c] * x_rows[m * d->C + c];
                for (int64_t c = 0; c < d->C; c++) {
                    const float value = w[c] * normed[c] + b[c], grad_value = value > 0 ? sums[c] / lengths[c] : 0;
                    factors[c] = (value < 0 ? 0 : value) / lengths[c];
                    grad_w[c] += grad_value * normed[c];
                    grad_b[c] += grad_value;
                    grads[c] = grad_value * w[c];
                    mean += grads[c], along += grads[c] * normed[c];
                }
                mean /= d->C, along /= d->C;
                for (int64_t c = 0; c < d->C; c++) {
                    const float of_length = inverse * (grads[c] - mean - normed[c] * along);
                    along_x[c] = lengths[c] > CLAMP ? (of_length - sums[c] * factors[c] / lengths[c]) / lengths[c] : 0;
                }
                for (int64_t m = 0; m < d->M; m++)
                    for (int64_t c = 0; c < d->C; c++)
                        to[c * d->M + m] = factors[c] * g_rows[m * d->C + c] + along_x[c] * x_rows[m * d->C + c];
            }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < all; i++)
            for (int other = 1; other < team; other++) grad_parameters[i] += grad_parameters[other * all + i];
    }
    return failed;
}
