/* What contraction.c does, one row of `hidden` after the other, for those terms whose outputs fill registers. Hidden
 * units that the ReLU made zero, about half of them, are left out, and with them half of the operations, and what is
 * not finite in their weights. The gradient of such a unit, which does not go through the ReLU, stays zero.
 *
 * A row's radial weights are never all there at once: for some columns of the matrix, in the first level of the cache,
 * those of one row after the other are made in registers and used. */
#include "contraction_tiles.h"

/* Registers of radial weights, and the columns of the matrix that they hold; rows that take turns with some columns. */
enum { VECTORS = VECTOR == 32 ? 4 : 8, COLUMNS = VECTORS * LANES, MOST_ROWS = 640 };

_Static_assert(HIDDEN == 32, "hidden units are the bits of a number");

/* Some rows of `hidden`, and what their edges have to do with one term. */
typedef struct {
    int64_t start, length, group;             /* first row, rows, edges of each */
    int64_t K, Q;                             /* numbers of x and out, K rounded up to a multiple of VECTORS */
    float *x, *out, *grad_x;                  /* (length, group, P, K or Q); backward, out is its gradient */
    int64_t hidden_row;                       /* from row to row of hidden */
    const float *hidden;                      /* the first row */
    uint32_t units[MOST_ROWS];                /* of each row, a bit for every unit that is not zero */
    vector *of_units;                         /* the gradient of each of these: the sum over the lanes */
    float *columns;                           /* (HIDDEN, COLUMNS); backward (HIDDEN, 2, COLUMNS), with gradients */
    const float *next[COLUMNS];               /* where the columns that come next are */
    float *gradient[COLUMNS];                 /* where the gradients of the columns belong: */
    float nowhere[HIDDEN];                    /* those of columns that the matrix does not have, here */
} Rows;

/* Whether a term is contracted here. */
static inline int in_rows(const Sizes *sizes, const Term *t) { return t->Q % LANES == 0 && !in_tiles(sizes, t); }

/* The columns are (some k, P, some q): registers of q, numbers of q, and k. */
static inline int parts_of(const Term *t) { return t->Q % WIDTH ? 1 : PARTS; }
static inline int width_of(const Term *t) { return parts_of(t) * LANES; }
static inline __attribute__((always_inline)) int ks_for(const int P, const int parts) { return VECTORS / (P * parts); }
static inline int ks_of(const Term *t) { return ks_for(t->P, parts_of(t)); }

/* A column into the cache. */
static inline __attribute__((always_inline)) void fetch(const float *column, const int to_write)
{
    for (int i = 0; i < HIDDEN; i += 16) {
        if (to_write) __builtin_prefetch(column + i, 1); /* clang wants constants */
        else __builtin_prefetch(column + i, 0);
    }
}

#define EVERY for (int i = 0; i < VECTORS; i++)
#define LOCALS \
    const int ks = ks_for(P, parts); \
    const int64_t G = alone ? 1 : rows->group, x_edge = P * rows->K, out_edge = P * rows->Q; \
    const int64_t minus_x = rows->K, minus_out = rows->Q; \
    const float *hidden = rows->hidden

/* What the columns give is added to out, from x: both begin at the first k and q of the columns. P, parts (see above)
 * and whether there is one edge to a row are constants. */
static inline __attribute__((always_inline)) void forward_of_columns(
    const int P, const int parts, const int alone, const Rows *rows, const float *x, float *out)
{
    LOCALS;
    for (int64_t r = 0; r < rows->length; r++, hidden += rows->hidden_row) {
        vector radial[VECTORS];
        EVERY radial[i] = (vector){0};
        if (r < COLUMNS) fetch(rows->next[r], 0); /* with each row one of them */
        for (uint32_t units = rows->units[r]; units; units &= units - 1) {
            const uint64_t unit = (uint32_t)__builtin_ctz(units);
            const vector *weights = (vector *)(rows->columns + unit * COLUMNS);
            __asm__("" : "+r"(weights)); /* so that this address is not computed again for each of them */
            EVERY radial[i] += hidden[unit] * weights[i];
        }
        for (int64_t g = 0; g < G; g++, x += x_edge, out += out_edge)
            for (int p = 0; p < parts; p++) {
                vector *to = (vector *)out + p, *to_minus = (vector *)(out + minus_out) + p;
                vector plus = *to, minus = P == 2 ? *to_minus : plus;
                for (int k = 0; k < ks; k++) {
                    const vector a = radial[k * P * parts + p], b = radial[(k * P + P - 1) * parts + p];
                    plus += a * x[k];
                    if (P == 1) continue;
                    plus -= b * x[minus_x + k];
                    minus += a * x[minus_x + k];
                    minus += b * x[k];
                }
                *to = plus;
                if (P == 2) *to_minus = minus;
            }
    }
}

#if defined(__AVX512F__)
#define PICK(a, b, w, x, y, z) \
    SHUFFLE(a, b, w, x, y, z, w + 4, x + 4, y + 4, z + 4, w + 8, x + 8, y + 8, z + 8, w + 12, x + 12, y + 12, z + 12)
#elif defined(__AVX__)
#define PICK(a, b, w, x, y, z) SHUFFLE(a, b, w, x, y, z, w + 4, x + 4, y + 4, z + 4)
#else
#define PICK SHUFFLE
#endif

/* The sums over the lanes of four vectors. */
static inline __attribute__((always_inline)) four totals(const vector *of)
{
    enum { L = LANES }; /* lanes of the second vector begin there */
    const vector ab = PICK(of[0], of[1], 0, L, 1, L + 1) + PICK(of[0], of[1], 2, L + 2, 3, L + 3);
    const vector cd = PICK(of[2], of[3], 0, L, 1, L + 1) + PICK(of[2], of[3], 2, L + 2, 3, L + 3);
    const vector fours = PICK(ab, cd, 0, 1, L, L + 1) + PICK(ab, cd, 2, 3, L + 2, L + 3);
    four sums = ((four *)&fours)[0];
    for (int i = 1; i < LANES / 4; i++) sums += ((four *)&fours)[i];
    return sums;
}

/* From grad, the gradient of out, those of x, of the hidden units and of the columns, which are added to. */
static inline __attribute__((always_inline)) void backward_of_columns(
    const int P, const int parts, const int alone, const Rows *rows, const float *x, const float *grad, float *grad_x)
{
    LOCALS;
    vector *of_unit = rows->of_units;
    for (int64_t r = 0; r < rows->length; r++, hidden += rows->hidden_row) {
        vector radial[VECTORS], of_radial[VECTORS];
        EVERY radial[i] = of_radial[i] = (vector){0};
        if (r < COLUMNS) fetch(rows->next[r], 0), fetch(rows->gradient[r], 1);
        for (int64_t g = 0; g < G; g++)
            for (int p = 0; p < parts; p++) {
                const float *xs = x + g * x_edge, *of_out = grad + g * out_edge;
                const vector plus = ((vector *)of_out)[p], minus = P == 2 ? ((vector *)(of_out + minus_out))[p] : plus;
                for (int k = 0; k < ks; k++) {
                    vector *a = of_radial + k * P * parts + p, *b = a + parts;
                    *a += xs[k] * plus;
                    if (P == 1) continue;
                    *a += xs[minus_x + k] * minus;
                    *b += xs[k] * minus;
                    *b -= xs[minus_x + k] * plus;
                }
            }
        for (uint32_t units = rows->units[r]; units; units &= units - 1, of_unit++) {
            const uint64_t unit = (uint32_t)__builtin_ctz(units);
            const float value = hidden[unit];
            vector *weights = (vector *)(rows->columns + unit * 2 * COLUMNS), *of_weights = weights + VECTORS;
            vector sums[2] = {*of_unit}; /* which take turns, so that none waits for itself */
            EVERY {
                radial[i] += value * weights[i];
                sums[i % 2] += weights[i] * of_radial[i];
                of_weights[i] += value * of_radial[i];
            }
            *of_unit = sums[0] + sums[1];
        }
        for (int64_t g = 0; g < G; g++, x += x_edge, grad += out_edge, grad_x += x_edge) {
            vector of_x[VECTORS] = {0}; /* of +m, then of -m */
            for (int k = 0; k < ks; k++)
                for (int p = 0; p < parts; p++) {
                    const vector a = radial[k * P * parts + p], b = radial[(k * P + P - 1) * parts + p];
                    const vector plus = ((vector *)grad)[p], minus = P == 2 ? ((vector *)(grad + minus_out))[p] : plus;
                    of_x[k] += a * plus;
                    if (P == 1) continue;
                    of_x[k] += b * minus;
                    of_x[ks + k] += a * minus;
                    of_x[ks + k] -= b * plus;
                }
            for (int i = 0; i < P * ks; i += 4) {
                const four sums = totals(of_x + i);
                for (int j = i; j < i + 4 && j < P * ks; j++) grad_x[j / ks * minus_x + j % ks] += sums[j - i];
            }
        }
    }
}

/* One of these two with its constants; not inlined where it is called, which leaves all registers to it. */
#define OF_TERM(function, ...) \
    do { \
        if (t->P == 1 && parts_of(t) == 1) OF_EDGES(function, 1, 1, __VA_ARGS__); \
        else if (t->P == 1) OF_EDGES(function, 1, PARTS, __VA_ARGS__); \
        else if (parts_of(t) == 1) OF_EDGES(function, 2, 1, __VA_ARGS__); \
        else OF_EDGES(function, 2, PARTS, __VA_ARGS__); \
    } while (0)
#define OF_EDGES(function, P, parts, ...) \
    do { \
        if (rows->group == 1) function(P, parts, 1, rows, __VA_ARGS__); \
        else function(P, parts, 0, rows, __VA_ARGS__); \
    } while (0)

static __attribute__((noinline)) void forward_of(const Term *t, const Rows *rows, const float *x, float *out)
{
    OF_TERM(forward_of_columns, x, out);
}

static __attribute__((noinline)) void backward_of(
    const Term *t, const Rows *rows, const float *x, const float *grad, float *grad_x)
{
    OF_TERM(backward_of_columns, x, grad, grad_x);
}

/* Numbers of +m and -m in the edge frames: frames (blocks, group, numbers of an edge, BLOCK), and where they are. */
typedef struct {
    float *frames;
    int64_t edge, offset, sign, P, size;
} Part;

static inline Part part_of_x(const Inputs *in, const Term *t, const float *x, Share k)
{
    return (Part){(float *)x, in->x_rows[t->x], t->x_offset + k.first, t->x_sign, t->P, k.end - k.first};
}

static inline Part part_of_out(const Inputs *in, const Term *t, const float *out)
{
    return (Part){(float *)out, in->out_rows[t->out], t->out_offset, t->out_sign, t->P, t->Q};
}

/* From the frames to (length, group, P, distance), or back. */
static inline __attribute__((always_inline)) void turn(
    const Part part, const Rows *rows, float *numbers, int64_t distance, const int back)
{
    for (int64_t r = 0; r < rows->length; r += BLOCK)
        for (int64_t g = 0; g < rows->group; g++)
            for (int64_t p = 0; p < part.P; p++) {
                const int64_t valid = rows->length - r < BLOCK ? rows->length - r : BLOCK;
                const int64_t edge = (rows->start + r) / BLOCK * rows->group + g;
                float *frame = part.frames + (edge * part.edge + part.offset + p * part.sign) * BLOCK, *edges[BLOCK];
                for (int64_t i = 0; i < valid; i++)
                    edges[i] = numbers + (((r + i) * rows->group + g) * part.P + p) * distance;
                if (back) load_rows((const float *const *)edges, valid, part.size, frame);
                else store_rows(frame, BLOCK, edges, valid, part.size, 0);
            }
}

static void from_frames(const Part part, const Rows *rows, float *numbers, int64_t distance)
{
    turn(part, rows, numbers, distance, 0);
}

static void to_frames(const Part part, const Rows *rows, const float *numbers, int64_t distance)
{
    turn(part, rows, (float *)numbers, distance, 1);
}

/* Buffers for so many of `count` rows at a time, as are returned, for any of the terms; 0 if there is no memory. */
static int64_t begin_rows(const Inputs *in, const Term *terms, int64_t count, Rows *rows)
{
    const int64_t times = (count + MOST_ROWS - 1) / MOST_ROWS, blocks = (count + BLOCK - 1) / BLOCK;
    const int64_t length = (blocks + times - 1) / times * BLOCK, units = length * HIDDEN + 3; /* `totals` reads on */
    int64_t of_x = 0, of_out = 0;
    for (const Term *t = terms; t < terms + in->sizes->terms; t++) {
        if (!in_rows(in->sizes, t)) continue;
        const int64_t x = t->P * (t->K + VECTORS), out = t->P * t->Q;
        of_x = x > of_x ? x : of_x, of_out = out > of_out ? out : of_out;
    }
    rows->group = in->sizes->group, rows->hidden_row = in->sizes->hidden_row;
    of_x *= length * rows->group, of_out *= length * rows->group;
    rows->columns = scratch(2 * HIDDEN * COLUMNS + units * LANES + of_out + 2 * of_x);
    if (!rows->columns) return 0;
    rows->of_units = (vector *)(rows->columns + 2 * HIDDEN * COLUMNS);
    rows->out = (float *)(rows->of_units + units);
    rows->x = rows->out + of_out, rows->grad_x = rows->x + of_x;
    return length;
}

/* The first `length` of the rows from `start` to `end`, and for terms with so many k. */
static void set_rows(int64_t start, int64_t length, int64_t end, int64_t k, Rows *rows)
{
    rows->start = start, rows->length = end - start < length ? end - start : length;
    rows->K = (k + VECTORS - 1) / VECTORS * VECTORS;
}

/* A term of them. Returns how many units are not zero. */
static int64_t set_term(const Inputs *in, const Term *t, Rows *rows)
{
    int64_t not_zero = 0;
    rows->Q = t->Q, rows->hidden = in->hidden + rows->start * rows->hidden_row + t->hidden;
    for (int64_t r = 0; r < rows->length; r++) {
        uint32_t units = 0;
        for (int i = 0; i < HIDDEN; i++) units |= (uint32_t)(rows->hidden[r * rows->hidden_row + i] != 0) << i;
        rows->units[r] = units, not_zero += __builtin_popcount(units);
    }
    return not_zero;
}

/* x of some k. */
static void load_x(const Inputs *in, const Term *t, Share k, const Rows *rows)
{
    if (rows->K > k.end - k.first) memset(rows->x, 0, rows->length * rows->group * t->P * rows->K * sizeof(float));
    from_frames(part_of_x(in, t, in->x[t->x], k), rows, rows->x, rows->K);
}

/* The end of the terms from t on that read the same x; they have as many k, and stand together, see `Plan`. */
static const Term *end_of_run(const Term *t, const Term *last)
{
    const Term *next = t + 1;
    while (next < last && next->x == t->x && next->x_offset == t->x_offset) next++;
    return next;
}

/* Whether some of these terms are contracted here. */
static int any_in_rows(const Sizes *sizes, const Term *t, const Term *last)
{
    while (t < last && !in_rows(sizes, t)) t++;
    return t < last;
}

/* Where the columns from k and q on are in a matrix (K, P, Q, HIDDEN); `none` for those from k = end on. */
static void find_columns(
    const Term *t, const float *matrix, int64_t k, int64_t end, int64_t q, const float *none, const float **columns)
{
    const int width = width_of(t);
    for (const float **last = columns + COLUMNS; columns < last; k++)
        for (int64_t p = 0; p < t->P; p++)
            for (int i = 0; i < width; i++)
                *columns++ = k < end ? matrix + ((k * t->P + p) * t->Q + q + i) * HIDDEN : none;
}

/* The columns from k and q on, `distance` from unit to unit. */
static void load_columns(
    const Term *t, const float *matrix, int64_t k, int64_t end, int64_t q, const int distance, Rows *rows)
{
    static const float none[HIDDEN];
    const float *columns[COLUMNS];
    const int64_t next = q + width_of(t);
    find_columns(t, matrix, k, end, q, none, columns);
    for (int i = 0; i < COLUMNS; i += BLOCK) turn_rows(columns + i, BLOCK, HIDDEN, rows->columns + i, distance);
    find_columns(t, matrix, next < t->Q ? k : k + ks_of(t), end, next % t->Q, none, rows->next);
}

/* The gradients of the columns, zero, and where they belong. */
static void begin_gradients(const Term *t, float *grad_matrix, int64_t k, int64_t end, int64_t q, Rows *rows)
{
    for (int i = 0; i < HIDDEN; i++) memset(rows->columns + (2 * i + 1) * COLUMNS, 0, COLUMNS * sizeof(float));
    find_columns(t, grad_matrix, k, end, q, rows->nowhere, (const float **)rows->gradient);
}

/* They are written if they are those of the first rows, else added. */
static void end_gradients(const Rows *rows)
{
    for (int i = 0; i < COLUMNS; i += BLOCK) {
        const float *from = rows->columns + COLUMNS + i;
        if (rows->start) store_rows(from, 2 * COLUMNS, rows->gradient + i, BLOCK, HIDDEN, 1);
        else store_rows(from, 2 * COLUMNS, rows->gradient + i, BLOCK, HIDDEN, 0);
    }
}

/* As forward_of_term of contraction.c, for all terms that are contracted here. */
static int forward_in_rows(const Inputs *in, const Term *terms, float *const *out)
{
    const Share blocks = share(num_blocks(in->sizes));
    const int64_t first = blocks.first * BLOCK, last = blocks.end * BLOCK;
    const int64_t end = last < in->sizes->rows ? last : in->sizes->rows;
    if (first >= end || !any_in_rows(in->sizes, terms, terms + in->sizes->terms)) return 0;
    Rows rows;
    const int64_t length = begin_rows(in, terms, end - first, &rows);
    if (!length) return NO_MEMORY;
    for (int64_t start = first; start < end; start += length)
        for (const Term *run = terms, *next; run < terms + in->sizes->terms; run = next) {
            next = end_of_run(run, terms + in->sizes->terms);
            if (!any_in_rows(in->sizes, run, next)) continue;
            set_rows(start, length, end, run->K, &rows);
            load_x(in, run, (Share){0, run->K}, &rows);
            for (const Term *t = run; t < next; t++) {
                if (!in_rows(in->sizes, t)) continue;
                const Part part = part_of_out(in, t, out[t->out]);
                set_term(in, t, &rows);
                from_frames(part, &rows, rows.out, t->Q);
                for (int64_t k = 0; k < t->K; k += ks_of(t))
                    for (int64_t q = 0; q < t->Q; q += width_of(t)) {
                        load_columns(t, in->matrices + t->matrix, k, t->K, q, COLUMNS, &rows);
                        forward_of(t, &rows, rows.x + k, rows.out + q);
                    }
                to_frames(part, &rows, rows.out, t->Q);
            }
        }
    return 0;
}

/* The gradients of hidden units, whose lanes are added up. */
static void end_units(const Gradients *to, const Term *t, const Rows *rows)
{
    const vector *of_unit = rows->of_units;
    float *grad_hidden = to->grad_hidden + rows->start * rows->hidden_row + t->hidden;
    for (int64_t r = 0; r < rows->length; r++, grad_hidden += rows->hidden_row)
        for (uint32_t units = rows->units[r]; units;) {
            const four sums = totals(of_unit);
            for (int i = 0; i < 4 && units; i++, units &= units - 1, of_unit++)
                grad_hidden[__builtin_ctz(units)] += sums[i];
        }
}

/* As backward_of_term, for all terms that are contracted here. */
static int backward_in_rows(const Inputs *in, const Gradients *to, const Term *terms)
{
    if (!any_in_rows(in->sizes, terms, terms + in->sizes->terms)) return 0;
    Rows rows;
    const int64_t length = begin_rows(in, terms, in->sizes->rows, &rows);
    if (!length) return NO_MEMORY;
    for (int64_t start = 0; start < in->sizes->rows; start += length)
        for (const Term *run = terms, *next; run < terms + in->sizes->terms; run = next) {
            const Share own = share(run->K);
            next = end_of_run(run, terms + in->sizes->terms);
            if (own.first == own.end || !any_in_rows(in->sizes, run, next)) continue;
            const Part part = part_of_x(in, run, to->grad_x[run->x], own);
            set_rows(start, length, in->sizes->rows, own.end - own.first, &rows);
            load_x(in, run, own, &rows);
            from_frames(part, &rows, rows.grad_x, rows.K);
            for (const Term *t = run; t < next; t++) {
                if (!in_rows(in->sizes, t)) continue;
                float *grad_matrix = to->grad_matrices + t->matrix;
                memset(rows.of_units, 0, set_term(in, t, &rows) * sizeof(vector));
                from_frames(part_of_out(in, t, to->grad[t->out]), &rows, rows.out, t->Q);
                for (int64_t k = own.first; k < own.end; k += ks_of(t))
                    for (int64_t q = 0; q < t->Q; q += width_of(t)) {
                        const int64_t x = k - own.first;
                        load_columns(t, in->matrices + t->matrix, k, own.end, q, 2 * COLUMNS, &rows);
                        begin_gradients(t, grad_matrix, k, own.end, q, &rows);
                        backward_of(t, &rows, rows.x + x, rows.out + q, rows.grad_x + x);
                        end_gradients(&rows);
                    }
                end_units(to, t, &rows);
            }
            to_frames(part, &rows, rows.grad_x, rows.K);
        }
    return 0;
}
