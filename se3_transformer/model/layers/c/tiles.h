/* Products of matrices of bf16 numbers with sums in single precision, by the tile registers (AMX) of some processors.
 *
 * A number of single precision is the sum of three in bf16, each of which rounds what those before it leave (Henry,
 * Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations").
 * With `parts` of them a product of matrices is one, three or six: those whose parts i, j have i + j < parts. One is
 * as exact as bf16, six are as exact as single precision. */
#include "term.h"

/* AMX_BF16 has other names in gcc and in clang 14 */
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

/* A panel is 32 x 32 numbers, for each part two tiles: of 16 rows each on the left of a product; on the right of 16
 * columns each, in which the numbers of two rows alternate. */
enum { SIDE = 32, HALF = 16 * SIDE, PANEL = 2 * HALF };
enum { ROW = 2 * SIDE, SUM_ROW = 4 * SIDE }; /* bytes of a row of a tile, and of a row of sums */

/* What the instructions want to know of the eight tiles. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Tiles;

/* Ask the system, once in a process, for leave to use tiles; whether they can be had. */
int has_tiles(void)
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* Set up the tiles of this thread; for others who use them, returns how they were. */
static inline Tiles begin_tiles(const Sizes *sizes)
{
    Tiles before = {0}, own = {.palette = 1};
    if (!sizes->parts) return before;
    for (int i = 0; i < 8; i++) own.row_bytes[i] = ROW, own.rows[i] = 16;
    /* not _tile_storeconfig and _tile_loadconfig, as compilers think that these access fewer bytes */
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    __asm__ volatile("ldtilecfg %0" ::"m"(own));
    return before;
}

static inline void end_tiles(const Sizes *sizes, Tiles before)
{
    if (sizes->parts) __asm__ volatile("ldtilecfg %0" ::"m"(before));
}

/* sum (32 x 32) (+)= the sum over depth of panels left · right */
static inline void multiply(int64_t parts, int64_t depth, const bf16 *left, const bf16 *right, float *sum, int add)
{
    __asm__ volatile("" ::: "memory"); /* what has been stored is stored; compilers do not know that tiles read it */
    if (add) {
        _tile_loadd(0, sum, SUM_ROW);
        _tile_loadd(1, sum + 16, SUM_ROW);
        _tile_loadd(2, sum + 16 * SIDE, SUM_ROW);
        _tile_loadd(3, sum + 16 * SIDE + 16, SUM_ROW);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (; depth; depth--, left += parts * PANEL, right += parts * PANEL)
        for (int64_t i = 0; i < parts; i++) {
            _tile_loadd(4, left + i * PANEL, ROW);
            _tile_loadd(5, left + i * PANEL + HALF, ROW);
            for (int64_t j = 0; i + j < parts; j++) {
                _tile_loadd(6, right + j * PANEL, ROW);
                _tile_loadd(7, right + j * PANEL + HALF, ROW);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    _tile_stored(0, sum, SUM_ROW);
    _tile_stored(1, sum + 16, SUM_ROW);
    _tile_stored(2, sum + 16 * SIDE, SUM_ROW);
    _tile_stored(3, sum + 16 * SIDE + 16, SUM_ROW);
}

/* Sixteen numbers of bf16 in single precision. */
static inline __m512 widened(__m256i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* to (parts, with a distance) = the parts of low (16) and high (16), one after the other or in turns */
static inline __attribute__((always_inline)) void split(
    int64_t parts, __m512 low, __m512 high, bf16 *to, int64_t distance, const int in_turns)
{
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < parts; i++) {
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(to + i * distance, in_turns ? _mm512_permutexvar_epi16(turns, rounded) : rounded);
        if (i + 1 == parts) break;
        low -= widened(_mm512_castsi512_si256(rounded));
        high -= widened(_mm512_extracti64x4_epi64(rounded, 1));
    }
}

/* A panel for the left, from its 32 rows (32). */
static inline void left_panel(int64_t parts, const float *from, int64_t row, bf16 *to)
{
    for (int64_t r = 0; r < SIDE; r++, from += row, to += SIDE)
        split(parts, _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), to, PANEL, 0);
}

/* A panel for the right, from its 32 rows (32), those from `valid` on zero. */
static inline void right_panel(int64_t parts, const float *from, int64_t row, int64_t valid, bf16 *to)
{
    for (int64_t r = 0; r < SIDE; r += 2, from += 2 * row, to += SIDE)
        for (int64_t half = 0; half < 2; half++) {
            const __m512 even = r < valid ? _mm512_loadu_ps(from + 16 * half) : _mm512_setzero_ps();
            const __m512 odd = r + 1 < valid ? _mm512_loadu_ps(from + row + 16 * half) : _mm512_setzero_ps();
            split(parts, even, odd, to + half * HALF, PANEL, 1);
        }
}

/* A panel for the right from one for the left. */
static inline void turn_panel(int64_t parts, const bf16 *from, bf16 *to)
{
    const __m512i turns = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i later = _mm512_add_epi16(turns, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < parts; i++, from += PANEL, to += PANEL)
        for (int64_t r = 0; r < SIDE; r += 2) {
            const __m512i even = _mm512_loadu_si512(from + r * SIDE), odd = _mm512_loadu_si512(from + (r + 1) * SIDE);
            _mm512_storeu_si512(to + r / 2 * SIDE, _mm512_permutex2var_epi16(even, turns, odd));
            _mm512_storeu_si512(to + HALF + r / 2 * SIDE, _mm512_permutex2var_epi16(even, later, odd));
        }
}
#else
#define HAS_TILES 0
typedef uint16_t bf16;
typedef int Tiles;
int has_tiles(void) { return 0; }
static inline Tiles begin_tiles(const Sizes *sizes) { return 0; }
static inline void end_tiles(const Sizes *sizes, Tiles before) {}
#endif
