/* What the compiled parts of the model have in common. Everything is in single precision; see native.py, which calls it.
 *
 * Products go through blocks of BLOCK rows (edges, or groups of them), shared out between threads. Within a block the
 * row is the last axis of everything, so that a vector register holds one number of several rows, whatever the other
 * sizes are. What the backward functions need of the forward pass they compute again. Functions that Python calls
 * return 0, or one of the faults below. */

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

enum { NO_MEMORY = 1, NO_ITEM = 2 }; /* faults: no memory for buffers; an index that is out of range */
enum { BLOCK = 32, HIDDEN = 32 }; /* rows at a time; hidden units of the radial networks */

#if defined(__AVX512F__)
enum { VECTOR = 64, ROWS = 8, WIDTH = 32 }; /* bytes of a register; accumulators of `product`: ROWS x WIDTH numbers */
#elif defined(__AVX__)
enum { VECTOR = 32, ROWS = 4, WIDTH = 16 };
#else
enum { VECTOR = 16, ROWS = 4, WIDTH = 16 };
#endif
enum { LANES = VECTOR / 4, PARTS = WIDTH / LANES };
typedef float vector __attribute__((vector_size(VECTOR), aligned(4), may_alias));

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
