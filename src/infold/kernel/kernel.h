/* A block of one tensor, and what is done to it: see kernel.c, and residual.c for the coding of what
 * its rounding destroyed. `library.py` holds the same structs. */
#ifndef INFOLD_KERNEL_H
#define INFOLD_KERNEL_H

#include <stdint.h>

/* GCC prefers half of AVX-512's width; clang does not know the words, and has the whole of it. */
#ifdef __clang__
#define WIDE
#else
#define WIDE ",prefer-vector-width=512"
#endif

#define INLINE static inline __attribute__((always_inline))
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE)))

enum { BF16, F16, F32 };                               /* how elements are stored */
enum { SCALE_ROWS, SCALE_COLUMNS, ADD, SUBTRACT };     /* operations */

/* Rows and columns that are computed at a time: the registers' and the first cache's. */
enum { GROUP = 4, WIDTH = 16 };

typedef struct {
    int64_t kind;
    const double *vector;      /* SCALE_*: a factor for each row or column of the block */
    int64_t rank, slices;      /* ADD, SUBTRACT: left (rows, rank) @ right (rank, columns) */
    const double *left[2];     /* one for each slice of the factors, with the same strides */
    const double *right[2];
    int64_t left_row, left_rank, right_rank, right_column; /* strides in elements */
    int64_t same;              /* number of an earlier operation with this product, or -1 */
} operation;

typedef struct {
    int64_t dtype, rows, columns;
    const void *raw;           /* (rows, columns) of each, a row's elements one after the other */
    void *out;                 /* NULL: `near` is made of `raw` itself */
    void *near;                /* NULL where no way back is asked for */
    int64_t raw_row, out_row, near_row; /* strides in elements */
    int64_t forward, backward; /* numbers of operations, the way back's behind the others */
    const operation *operations;
    int64_t panel;             /* columns that are computed at a time, a multiple of WIDTH */
    double *scratch;           /* see infold_scratch */
} job;

typedef struct {
    int64_t size, count;       /* bytes of an element, and how many elements */
    void *block;               /* the elements, one after the other; see infold_decode */
    const void *guess;         /* as many */
    uint8_t *coded;            /* a byte for four elements, and at most their own bytes */
    int64_t length;            /* bytes of `coded` that may be read */
    void *scratch;             /* as large as `coded` can be, aligned for eight bytes */
} residual;

/* delta (GROUP, columns) = the product of packed factors; see product.c. */
typedef void product_of(double *delta, int64_t columns, const double *left, const double *right,
                        int64_t rank, int64_t slices);
product_of infold_product_plain;
#ifdef __x86_64__
product_of infold_product_avx2, infold_product_avx512;
#endif

#endif
