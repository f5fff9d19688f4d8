/* The hidden layers of the radial networks of radial.py. */
#include "common.h"

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
    product(BLOCK, HIDDEN, inputs, weights, inputs, 1, input, BLOCK, normed, 0);
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

/* scalars (rows, inputs), parameters (networks, ...); out (rows, networks, HIDDEN) is written. */
int radial_forward(const Radial *r, const float *scalars, const float *parameters, float *out)
{
    const int64_t first = layer_size(r, r->inputs), size = first + layer_size(r, HIDDEN);
    int failed = 0;
#pragma omp parallel num_threads(r->threads)
    {
        float *input = scratch((r->inputs + 3 * HIDDEN + 1) * BLOCK), *normed = input + r->inputs * BLOCK;
        float *hidden = normed + HIDDEN * BLOCK, *last = hidden + HIDDEN * BLOCK, *inverse = last + HIDDEN * BLOCK;
        if (!input) failed = NO_MEMORY;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < r->rows; row += BLOCK) {
            if (!input) continue;
            const int64_t valid = r->rows - row < BLOCK ? r->rows - row : BLOCK;
            load(scalars + row * r->inputs, r->inputs, valid, r->inputs, input);
            for (int64_t n = 0; n < r->networks; n++) {
                layer(r, r->inputs, parameters + n * size, input, normed, inverse, hidden);
                layer(r, HIDDEN, parameters + n * size + first, hidden, normed, inverse, last);
                store(last, out + (row * r->networks + n) * HIDDEN, r->networks * HIDDEN, valid, HIDDEN, 0);
            }
        }
    }
    return failed;
}

/* From the gradient of out those of scalars (if wanted) and of the parameters: grad_parameters (threads,
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
        if (!input) failed = NO_MEMORY;
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
                store(hidden, hidden_rows, HIDDEN, BLOCK, HIDDEN, 0);
                product(HIDDEN, HIDDEN, BLOCK, grad_last, BLOCK, 1, hidden_rows, HIDDEN, grad_last_weights, 1);
                product(BLOCK, HIDDEN, HIDDEN, last_weights, 1, HIDDEN, grad_last, BLOCK, grad_hidden, 0);
                layer_backward(r, I, weights, normed, inverse, hidden, grad_hidden, grad_weights);
                for (int u = 0; u < HIDDEN; u++)
                    for (int64_t column = 0; column < I; column++) {
                        float sum = 0;
                        for (int i = 0; i < BLOCK; i++) sum += grad_hidden[u * BLOCK + i] * input[column * BLOCK + i];
                        grad_weights[u * I + column] += sum;
                    }
                product(BLOCK, I, HIDDEN, weights, 1, I, grad_hidden, BLOCK, grad_input, n > 0);
            }
            if (grad_scalars) store(grad_input, grad_scalars + row * I, I, valid, I, 0);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < all; i++)
            for (int other = 1; other < team; other++) grad_parameters[i] += grad_parameters[other * all + i];
    }
    return failed;
}
