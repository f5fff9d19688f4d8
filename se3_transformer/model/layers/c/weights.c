/* The matrices of contraction.c from the last layers of the radial networks: for every pair of channels
 *
 *     row[h] = sum_j coefficient[j] weight[c_out, c_in, start + j, h]
 *
 * see `frame_mixture` in convolution.py. */
#include "common.h"

typedef struct {
    int64_t start, length;     /* the j */
    int64_t coefficient;       /* where the coefficients begin */
    int64_t row, step;         /* where in the matrices its first row is, and from one c_in to the next */
} Row;

typedef struct {
    int64_t C_out, C_in, F;    /* of its weight (C_out, C_in, F, HIDDEN) */
    int64_t first, end;        /* its rows */
} Network;

typedef struct {
    int64_t networks, threads;
} Mixing;

enum { REGISTERS = HIDDEN / LANES };

int weights_forward(
    const Mixing *m, const Network *networks, const Row *rows, const float *coefficients, const float *const *weights,
    float *matrices)
{
#pragma omp parallel num_threads(m->threads)
    for (int64_t i = 0; i < m->networks; i++) {
        const Network n = networks[i];
#pragma omp for schedule(static) nowait
        for (int64_t pair = 0; pair < n.C_out * n.C_in; pair++) {
            const int64_t c_in = pair / n.C_out, c_out = pair % n.C_out;
            const float *weight = weights[i] + (c_out * n.C_in + c_in) * n.F * HIDDEN;
            for (const Row *row = rows + n.first; row < rows + n.end; row++) {
                float *to = matrices + row->row + c_in * row->step + c_out * HIDDEN;
                const float *from = weight + row->start * HIDDEN, *factor = coefficients + row->coefficient;
                vector sum[REGISTERS] = {0};
                for (int64_t j = 0; j < row->length; j++, from += HIDDEN)
                    for (int p = 0; p < REGISTERS; p++) sum[p] += factor[j] * *(vector *)(from + p * LANES);
                for (int p = 0; p < REGISTERS; p++) *(vector *)(to + p * LANES) = sum[p];
            }
        }
    }
    return 0;
}

/* grad_weights are written */
int weights_backward(
    const Mixing *m, const Network *networks, const Row *rows, const float *coefficients,
    const float *grad_matrices, float *const *grad_weights)
{
#pragma omp parallel num_threads(m->threads)
    for (int64_t i = 0; i < m->networks; i++) {
        const Network n = networks[i];
#pragma omp for schedule(static) nowait
        for (int64_t pair = 0; pair < n.C_out * n.C_in; pair++) {
            const int64_t c_in = pair / n.C_out, c_out = pair % n.C_out;
            float *weight = grad_weights[i] + (c_out * n.C_in + c_in) * n.F * HIDDEN;
            memset(weight, 0, n.F * HIDDEN * sizeof(float));
            for (const Row *row = rows + n.first; row < rows + n.end; row++) {
                const float *from = grad_matrices + row->row + c_in * row->step + c_out * HIDDEN;
                const float *factor = coefficients + row->coefficient;
                float *to = weight + row->start * HIDDEN;
                for (int64_t j = 0; j < row->length; j++, to += HIDDEN)
                    for (int p = 0; p < REGISTERS; p++)
                        *(vector *)(to + p * LANES) += factor[j] * *(const vector *)(from + p * LANES);
            }
        }
    }
    return 0;
}
