/* NormSE3 of norm.py with ReLU: with the lengths |x[c]| of the C channels of a degree of a node, at least CLAMP and
 * softened,
 *
 *     out[c] = x[c] · relu(weight[c] (|x[c]| - mean) / deviation + bias[c]) / |x[c]|,      mean, deviation over c. */
#include "common.h"

typedef struct {
    int64_t nodes, degrees, threads;
    int64_t channels;          /* of all degrees */
    int64_t rows, most;        /* the most rows, C·M, of a degree; the most channels */
    float softening;
} Norm;

typedef struct {
    int64_t M, first;          /* its first channel among those of all degrees */
    Piece x, grad;             /* features, and the gradient of what comes out */
} Degree;

static const float CLAMP = 0x1p-24f, EPSILON = 1e-5f; /* NormSE3.NORM_CLAMP; of torch's norms */

#define EACH for (int i = 0; i < BLOCK; i++) /* node of a block, in which features are (C, M, BLOCK) */

/* Lengths (C, BLOCK) of x, their inverse standard deviations (BLOCK), and them normalised (C, BLOCK). */
static void normed_lengths(
    int64_t C, int64_t M, float softening, const float *x, float *lengths, float *inverse, float *normed)
{
    float mean[BLOCK] = {0}, square[BLOCK] = {0};
    for (int64_t c = 0; c < C; c++) {
        float sum[BLOCK] = {0}, *length = lengths + c * BLOCK;
        for (int64_t m = 0; m < M; m++, x += BLOCK) EACH sum[i] += x[i] * x[i];
        EACH {
            length[i] = sqrtf((sum[i] < CLAMP * CLAMP ? CLAMP * CLAMP : sum[i]) + softening * softening);
            mean[i] += length[i];
        }
    }
    EACH mean[i] /= C;
    for (int64_t c = 0; c < C; c++)
        EACH {
            const float difference = normed[c * BLOCK + i] = lengths[c * BLOCK + i] - mean[i];
            square[i] += difference * difference;
        }
    EACH inverse[i] = 1 / sqrtf(square[i] / C + EPSILON);
    for (int64_t c = 0; c < C; c++) EACH normed[c * BLOCK + i] *= inverse[i];
}

/* out[i] (nodes, C, M) of every degree are written */
int norm_forward(
    const Norm *n, const Degree *degrees, const float *const *x, const float *weight, const float *bias,
    float *const *out)
{
    int failed = 0;
#pragma omp parallel num_threads(n->threads)
    {
        float *rows = scratch((n->rows + 2 * n->most + 1) * BLOCK), *lengths = rows + n->rows * BLOCK;
        float *normed = lengths + n->most * BLOCK, *inverse = normed + n->most * BLOCK;
        if (!rows) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t node = 0; node < n->nodes; node += BLOCK) {
            const int64_t valid = n->nodes - node < BLOCK ? n->nodes - node : BLOCK;
            for (int64_t j = 0; rows && j < n->degrees; j++) {
                const Degree *d = degrees + j;
                const int64_t C = d->x.C, M = d->M;
                load_piece(&d->x, M, x[j], node, valid, rows);
                normed_lengths(C, M, n->softening, rows, lengths, inverse, normed);
                float *row = rows;
                for (int64_t c = 0; c < C; c++) {
                    const float w = weight[d->first + c], b = bias[d->first + c];
                    float factor[BLOCK];
                    EACH {
                        const float value = w * normed[c * BLOCK + i] + b;
                        factor[i] = (value < 0 ? 0 : value) / lengths[c * BLOCK + i];
                    }
                    for (int64_t m = 0; m < M; m++, row += BLOCK) EACH row[i] *= factor[i];
                }
                store(rows, out[j] + node * C * M, C * M, valid, C * M, 0);
            }
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
        float *rows = scratch((2 * n->rows + 5 * n->most + 1) * BLOCK), *g_rows = rows + n->rows * BLOCK;
        float *lengths = g_rows + n->rows * BLOCK, *normed = lengths + n->most * BLOCK;
        float *sums = normed + n->most * BLOCK, *grads = sums + n->most * BLOCK;
        float *factors = grads + n->most * BLOCK, *inverse = factors + n->most * BLOCK;
        float *own = grad_parameters + omp_get_thread_num() * all;
        memset(own, 0, all * sizeof(float));
        if (!rows) failed = NO_MEMORY;
#pragma omp single
        team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t node = 0; node < n->nodes; node += BLOCK) {
            const int64_t valid = n->nodes - node < BLOCK ? n->nodes - node : BLOCK;
            for (int64_t j = 0; rows && j < n->degrees; j++) {
                const Degree *d = degrees + j;
                const int64_t C = d->x.C, M = d->M;
                float mean[BLOCK] = {0}, along[BLOCK] = {0};
                load_piece(&d->x, M, x[j], node, valid, rows);
                load_piece(&d->grad, M, grad[j], node, valid, g_rows);
                normed_lengths(C, M, n->softening, rows, lengths, inverse, normed);
                for (int64_t c = 0; c < C; c++) {
                    const float w = weight[d->first + c], b = bias[d->first + c], *N = normed + c * BLOCK;
                    const float *xs = rows + c * M * BLOCK, *gs = g_rows + c * M * BLOCK, *L = lengths + c * BLOCK;
                    float *sum = sums + c * BLOCK, grad_w = 0, grad_b = 0; /* sum: gradients of the factors */
                    EACH sum[i] = 0;
                    for (int64_t m = 0; m < M; m++) EACH sum[i] += gs[m * BLOCK + i] * xs[m * BLOCK + i];
                    EACH {
                        const float value = w * N[i] + b, grad_value = value > 0 ? sum[i] / L[i] : 0;
                        factors[c * BLOCK + i] = (value < 0 ? 0 : value) / L[i];
                        grad_w += grad_value * N[i];
                        grad_b += grad_value;
                        grads[c * BLOCK + i] = grad_value * w;
                        mean[i] += grad_value * w;
                        along[i] += grad_value * w * N[i];
                    }
                    own[d->first + c] += grad_w;
                    own[n->channels + d->first + c] += grad_b;
                }
                for (int64_t c = 0; c < C; c++) {
                    const float *xs = rows + c * M * BLOCK, *L = lengths + c * BLOCK, *factor = factors + c * BLOCK;
                    float *gs = g_rows + c * M * BLOCK, along_x[BLOCK];
                    EACH {
                        const int64_t at = c * BLOCK + i;
                        const float of_length = inverse[i] * (grads[at] - (mean[i] + normed[at] * along[i]) / C);
                        along_x[i] = L[i] > CLAMP ? (of_length - sums[at] * factor[i] / L[i]) / L[i] : 0;
                    }
                    for (int64_t m = 0; m < M * BLOCK; m += BLOCK)
                        EACH gs[m + i] = factor[i] * gs[m + i] + along_x[i] * xs[m + i];
                }
                store(g_rows, grad_x[j] + node * C * M, C * M, valid, C * M, 0);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < all; i++)
            for (int other = 1; other < team; other++) grad_parameters[i] += grad_parameters[other * all + i];
    }
    return failed;
}
