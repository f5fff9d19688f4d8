/* Attention of every node over its incoming edges, for `heads` parts of the features each: with edges e of node n,
 *
 *     w[e, h] = softmax over e of scale · <key[e, h], query[n, h]>,      out[n, h] = sum_e w[e, h] value[e, h]
 *
 * The edges of node n are order[starts[n]] … order[starts[n + 1] - 1]. */
#include "common.h"

typedef struct {
    int64_t nodes, heads, threads;
    int64_t of_key, of_value;       /* numbers of a head */
    int64_t key_row, value_row;     /* from edge to edge; queries and what comes out are contiguous */
} Attention;

static float dot(int64_t n, const float *a, const float *b)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* weights (E, heads), out (nodes, heads · of_value) are written */
int attention_forward(
    const Attention *a, float scale, const int64_t *starts, const int64_t *order, const float *value, const float *key,
    const float *query, float *weights, float *out)
{
    const int64_t H = a->heads, K = a->of_key, V = a->of_value;
#pragma omp parallel for schedule(static) num_threads(a->threads)
    for (int64_t n = 0; n < a->nodes; n++) {
        const int64_t first = starts[n], end = starts[n + 1];
        memset(out + n * H * V, 0, H * V * sizeof(float));
        for (int64_t h = 0; h < H; h++) {
            const float *q = query + (n * H + h) * K;
            float highest = -INFINITY, sum = 0, *to = out + (n * H + h) * V;
            for (int64_t i = first; i < end; i++) {
                const float logit = scale * dot(K, key + order[i] * a->key_row + h * K, q);
                weights[order[i] * H + h] = logit;
                if (logit > highest) highest = logit;
            }
            for (int64_t i = first; i < end; i++)
                sum += weights[order[i] * H + h] = expf(weights[order[i] * H + h] - highest);
            for (int64_t i = first; i < end; i++) {
                const float w = weights[order[i] * H + h] /= sum, *v = value + order[i] * a->value_row + h * V;
                for (int64_t j = 0; j < V; j++) to[j] += w * v[j];
            }
        }
    }
    return 0;
}

/* grad_value and grad_key, with the rows of value and key, and grad_query are written; grad is that of out */
int attention_backward(
    const Attention *a, float scale, const int64_t *starts, const int64_t *order, const float *value, const float *key,
    const float *query, const float *weights, const float *grad, float *grad_value, float *grad_key, float *grad_query)
{
    const int64_t H = a->heads, K = a->of_key, V = a->of_value;
#pragma omp parallel for schedule(static) num_threads(a->threads)
    for (int64_t n = 0; n < a->nodes; n++) {
        const int64_t first = starts[n], end = starts[n + 1];
        memset(grad_query + n * H * K, 0, H * K * sizeof(float));
        for (int64_t h = 0; h < H; h++) {
            const float *q = query + (n * H + h) * K, *g = grad + (n * H + h) * V;
            float along = 0, *grad_q = grad_query + (n * H + h) * K;
            for (int64_t i = first; i < end; i++) /* the part that all edges share */
                along += weights[order[i] * H + h] * dot(V, g, value + order[i] * a->value_row + h * V);
            for (int64_t i = first; i < end; i++) {
                const int64_t e = order[i];
                const float w = weights[e * H + h], *v = value + e * a->value_row + h * V;
                const float *k = key + e * a->key_row + h * K;
                float *grad_v = grad_value + e * a->value_row + h * V, *grad_k = grad_key + e * a->key_row + h * K;
                const float grad_logit = scale * w * (dot(V, g, v) - along);
                for (int64_t j = 0; j < V; j++) grad_v[j] = w * g[j];
                for (int64_t j = 0; j < K; j++) {
                    grad_k[j] = grad_logit * q[j];
                    grad_q[j] += grad_logit * k[j];
                }
            }
        }
    }
    return 0;
}
