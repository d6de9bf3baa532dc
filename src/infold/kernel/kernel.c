/* The steps of one edit on a block, as `edit/steps.py` does them with PyTorch, to the bit: decode,
 * float64, each operation in order, one rounding. Here an element passes through all of them while
 * it is in the first cache, and no interpreter is asked between.
 *
 * Compile with -ffp-contract=off: a fused multiply-add would leave out a rounding. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

#ifdef __FAST_MATH__
#error "these roundings are what this file is for"
#endif

INLINE uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Stored elements as float64. Returns nonzero where one may not be finite; what the arithmetic
 * makes infinite or NaN, `round_to` finds. */
INLINE uint32_t decode(int dtype, const void *raw, double *restrict x, int64_t n) {
    uint32_t odd = 0;
    if (dtype == BF16) {
        const uint16_t *restrict from = raw;
        for (int64_t j = 0; j < n; j++)
            x[j] = float_of((uint32_t)from[j] << 16);
    } else if (dtype == F16) {
        /* the exponent's bias is 15 instead of 127; the multiplication is exact */
        const uint16_t *restrict from = raw;
        for (int64_t j = 0; j < n; j++) {
            uint32_t h = from[j];
            odd |= (h & 0x7c00u) == 0x7c00u;
            x[j] = float_of((h & 0x8000u) << 16 | (h & 0x7fffu) << 13) * 0x1p112f;
        }
    } else {
        const float *restrict from = raw;
        for (int64_t j = 0; j < n; j++)
            x[j] = from[j];
    }
    return odd;
}

INLINE float largest_of(int dtype) {
    return dtype == BF16 ? 0x1.fep127f : dtype == F16 ? 65504.0f : 0x1.fffffep127f;
}

/* x rounded once to what the dtype can store, ties to even; beyond its range maybe infinite or NaN.
 *
 * Adding 1.5 * 2^52 units of the last place, and taking them away, rounds to a multiple of that
 * unit, subnormals too. The sign is put back for results of 0. */
INLINE double round_to(int dtype, double x) {
    if (dtype == F32)
        return (float)x;
    const double smallest = dtype == BF16 ? 0x1p-126 : 0x1p-14;
    const double units = dtype == BF16 ? 0x1.8p45 : 0x1.8p42;
    double power = double_of(bits_of(x) & 0x7ff0000000000000u);
    power = power > smallest ? power : smallest;
    double big = power * units;
    double rounded = (x + big) - big;
    return double_of(bits_of(rounded) | (bits_of(x) & 0x8000000000000000u));
}

/* What `round_to` gave, as it is stored. */
INLINE uint16_t half_word(int dtype, float rounded) {
    if (dtype == BF16)
        return (uint16_t)(bits_of_float(rounded) >> 16);
    uint32_t bits = bits_of_float(rounded * 0x1p-112f); /* exact, as in `decode` */
    return (uint16_t)((bits >> 16 & 0x8000u) | (bits >> 13 & 0x7fffu));
}

/* A float's bits rounded to a BF16's, which are their upper half; ties to even. */
INLINE uint16_t upper_half(uint32_t bits) {
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

INLINE uint32_t is_tie(uint32_t bits) { return (bits & 0xffffu) == 0x8000u; }

INLINE int fits_bf16(uint32_t bits) { return (bits & 0x7fffffffu) < 0x7f7f8000u; }

/* As `store`, through float32. That is one rounding, unless the first rounds to a tie of the second:
 * then it returns zero, and `out` holds nothing of use. */
INLINE int store_bf16(const double *restrict x, const uint16_t *restrict before,
                      uint16_t *restrict out, int64_t n, int64_t *changed, uint32_t *wrong) {
    uint32_t ties = 0, beyond = 0;
    uint16_t differ = 0; /* as in `store` */
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits = bits_of_float((float)x[j]);
        uint16_t word = upper_half(bits);
        ties |= is_tie(bits);
        beyond |= !fits_bf16(bits);
        differ += word != before[j];
        out[j] = word;
    }
    if (ties) { /* most are exact, such as those of weights times an IA³ vector in BF16 */
        uint32_t inexact = 0;
        for (int64_t j = 0; j < n; j++) {
            float rounded = (float)x[j];
            inexact |= is_tie(bits_of_float(rounded)) & (rounded != x[j]);
        }
        if (inexact)
            return 0;
    }
    *changed += differ;
    *wrong |= beyond;
    return 1;
}

/* float64 values rounded once into stored elements, at most 2^15 of them. Adds to `changed` how many
 * differ from `raw`. Returns nonzero where a value is not finite or too large. */
INLINE uint32_t store(int dtype, const double *restrict x, float *restrict staged, const void *raw,
                      void *out, int64_t n, int64_t *changed) {
    const float largest = largest_of(dtype);
    uint32_t wrong = 0;
    if (dtype == BF16 && store_bf16(x, raw, out, n, changed, &wrong))
        return wrong;
    for (int64_t j = 0; j < n; j++)
        staged[j] = (float)round_to(dtype, x[j]);
    for (int64_t j = 0; j < n; j++)
        wrong |= fabsf(staged[j]) <= largest ? 0 : 1;
    if (dtype == F32) {
        const float *restrict before = raw;
        float *restrict to = out;
        uint32_t differ = 0;
        for (int64_t j = 0; j < n; j++) {
            differ += staged[j] != before[j];
            to[j] = staged[j];
        }
        *changed += differ;
    } else {
        const uint16_t *restrict before = raw;
        uint16_t *restrict to = out;
        uint16_t differ = 0; /* as wide as what is compared, which is quicker */
        for (int64_t j = 0; j < n; j++) {
            uint16_t word = half_word(dtype, staged[j]);
            differ += word != before[j];
            to[j] = word;
        }
        *changed += differ;
    }
    return wrong;
}

/* As `_store_nearly` of steps.py: through float32, and 0 for what is not finite. */
INLINE void store_nearly(int dtype, const double *restrict x, float *restrict staged, void *near,
                         int64_t n) {
    if (dtype == BF16) {
        uint16_t *restrict to = near;
        for (int64_t j = 0; j < n; j++) {
            uint32_t bits = bits_of_float((float)x[j]);
            to[j] = fits_bf16(bits) ? upper_half(bits) : 0;
        }
        return;
    }
    const float largest = largest_of(dtype);
    for (int64_t j = 0; j < n; j++) {
        float rounded = (float)round_to(dtype, (float)x[j]);
        staged[j] = fabsf(rounded) <= largest ? rounded : 0.0f;
    }
    if (dtype == F32) {
        memcpy(near, staged, (size_t)n * sizeof *staged);
        return;
    }
    uint16_t *restrict to = near;
    for (int64_t j = 0; j < n; j++)
        to[j] = half_word(dtype, staged[j]);
}

/* The m-th row of a group. delta: of a product, the whole group's. */
INLINE void operate(const operation *op, double *restrict x, const double *restrict delta,
                    int64_t m, int64_t width, int64_t row, int64_t column, int64_t n) {
    const double *restrict vector = op->vector;
    switch (op->kind) {
    case SCALE_ROWS: {
        double factor = vector[row + m];
        for (int64_t j = 0; j < n; j++)
            x[j] *= factor;
        break;
    }
    case SCALE_COLUMNS:
        vector += column;
        for (int64_t j = 0; j < n; j++)
            x[j] *= vector[j];
        break;
    case ADD:
        delta += m * width;
        for (int64_t j = 0; j < n; j++)
            x[j] += delta[j];
        break;
    default:
        delta += m * width;
        for (int64_t j = 0; j < n; j++)
            x[j] -= delta[j];
    }
}

static int is_product(const operation *op) { return op->kind == ADD || op->kind == SUBTRACT; }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* A panel of right factors, zeros beyond the block. */
static void pack_right(const operation *op, double *to, int64_t column, int64_t n, int64_t width) {
    for (int64_t slice = 0; slice < op->slices; slice++)
        for (int64_t j = 0; j < width; j += WIDTH)
            for (int64_t k = 0; k < op->rank; k++)
                for (int64_t w = 0; w < WIDTH; w++, to++)
                    *to = j + w < n ? op->right[slice][k * op->right_rank +
                                                       (column + j + w) * op->right_column]
                                    : 0.0;
}

static void pack_left(const operation *op, double *to, int64_t row, int64_t rows) {
    for (int64_t slice = 0; slice < op->slices; slice++)
        for (int64_t k = 0; k < op->rank; k++)
            for (int64_t m = 0; m < GROUP; m++, to++)
                *to = m < rows ? op->left[slice][(row + m) * op->left_row + k * op->left_rank]
                               : 0.0;
}

INLINE int64_t edit(const job *job, int dtype, product_of *multiply) {
    const int64_t count = job->forward + job->backward, panel = job->panel;
    const operation *ops = job->operations;
    const int64_t size = dtype == F32 ? 4 : 2;
    double *x = job->scratch, *next = x + panel;
    float *staged = (float *)next;
    next += panel / 2;
    double **right = malloc(3 * (size_t)(count ? count : 1) * sizeof *right);
    if (!right)
        return -1;
    double **left = right + count, **delta = left + count;
    for (int64_t i = 0; i < count; i++) {
        delta[i] = NULL;
        if (!is_product(&ops[i]))
            continue;
        if (ops[i].same >= 0) {
            delta[i] = delta[ops[i].same];
            continue;
        }
        int64_t terms = ops[i].slices * ops[i].rank;
        right[i] = next, next += terms * panel;
        left[i] = next, next += terms * GROUP;
        delta[i] = next, next += GROUP * panel;
    }

    int64_t changed = 0;
    uint32_t wrong = 0;
    for (int64_t column = 0; column < job->columns; column += panel) {
        const int64_t n = smaller(panel, job->columns - column);
        const int64_t width = (n + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t i = 0; i < count; i++)
            if (is_product(&ops[i]) && ops[i].same < 0)
                pack_right(&ops[i], right[i], column, n, width);
        for (int64_t row = 0; row < job->rows; row += GROUP) {
            const int64_t rows = smaller(GROUP, job->rows - row);
            for (int64_t i = 0; i < count; i++)
                if (is_product(&ops[i]) && ops[i].same < 0) {
                    pack_left(&ops[i], left[i], row, rows);
                    multiply(delta[i], width, left[i], right[i], ops[i].rank, ops[i].slices);
                }
            for (int64_t m = 0; m < rows; m++) {
                const char *raw = (const char *)job->raw + ((row + m) * job->raw_row + column) * size;
                wrong |= decode(dtype, raw, x, n);
                if (job->out) {
                    char *out = (char *)job->out + ((row + m) * job->out_row + column) * size;
                    for (int64_t i = 0; i < job->forward; i++)
                        operate(&ops[i], x, delta[i], m, width, row, column, n);
                    wrong |= store(dtype, x, staged, raw, out, n, &changed);
                    if (!job->near)
                        continue;
                    decode(dtype, out, x, n);
                }
                for (int64_t i = job->forward; i < count; i++)
                    operate(&ops[i], x, delta[i], m, width, row, column, n);
                store_nearly(dtype, x, staged,
                             (char *)job->near + ((row + m) * job->near_row + column) * size, n);
            }
        }
        if (wrong)
            break;
    }
    free(right);
    return wrong ? -1 : changed;
}

#define EVERY_DTYPE(multiply)                                                                   \
    {                                                                                           \
        switch (job->dtype) {                                                                   \
        case BF16:                                                                              \
            return edit(job, BF16, multiply);                                                   \
        case F16:                                                                               \
            return edit(job, F16, multiply);                                                    \
        default:                                                                                \
            return edit(job, F32, multiply);                                                    \
        }                                                                                       \
    }

static int64_t edit_plain(const job *job) EVERY_DTYPE(infold_product_plain)

#ifdef __x86_64__
AVX2 static int64_t edit_avx2(const job *job) EVERY_DTYPE(infold_product_avx2)
AVX512 static int64_t edit_avx512(const job *job) EVERY_DTYPE(infold_product_avx512)
#endif

/* SHA-256 of sources and flags, by which library.py knows them. */
const char *infold_sources(void) { return INFOLD_SOURCES; }

/* What the processor has: 0 nothing that is used here, 1 AVX2, 2 AVX-512. */
int64_t infold_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

/* Doubles that `scratch` must have. */
int64_t infold_scratch(const job *job) {
    int64_t doubles = job->panel + job->panel / 2;
    for (int64_t i = 0; i < job->forward + job->backward; i++) {
        const operation *op = &job->operations[i];
        if (is_product(op) && op->same < 0)
            doubles += op->slices * op->rank * (job->panel + GROUP) + GROUP * job->panel;
    }
    return doubles;
}

/* Edits a block. Returns how many elements of `out` differ from `raw`, or -1 where a value is not
 * finite or memory lacks: then `out` and `near` hold nothing of use. level: at most infold_level(). */
int64_t infold_edit(const job *job, int64_t level) {
#ifdef __x86_64__
    if (level >= 2)
        return edit_avx512(job);
    if (level == 1)
        return edit_avx2(job);
#endif
    (void)level;
    return edit_plain(job);
}
