/* One product for one kind of processor: NAME, with vectors of BYTES, VECTORS of them side by side.
 * Included by product.c, once for each. */

typedef double JOIN(NAME, _vector) __attribute__((vector_size(BYTES), aligned(8)));
#define VECTOR JOIN(NAME, _vector)
enum { JOIN(NAME, _lanes) = BYTES / 8 };
#define LANES JOIN(NAME, _lanes)

/* sum += the product of one slice of each factor */
TARGET static inline __attribute__((always_inline)) void JOIN(NAME, _add)(
    VECTOR sum[GROUP][VECTORS], const double *left, const double *right, int64_t rank) {
    for (int64_t k = 0; k < rank; k++) {
        const VECTOR *row = (const VECTOR *)(right + k * WIDTH);
        for (int m = 0; m < GROUP; m++)
            for (int v = 0; v < VECTORS; v++)
                sum[m][v] += left[k * GROUP + m] * row[v];
    }
}

TARGET void NAME(double *delta, int64_t columns, const double *left, const double *right,
                 int64_t rank, int64_t slices) {
    const double *second_left = left + rank * GROUP;
    for (int64_t j = 0; j < columns; j += VECTORS * LANES) {
        const double *first = right + j / WIDTH * rank * WIDTH + j % WIDTH;
        VECTOR sum[GROUP][VECTORS] = {{{0}}};
        JOIN(NAME, _add)(sum, left, first, rank);
        if (slices == 2) {
            VECTOR cross[GROUP][VECTORS] = {{{0}}};
            JOIN(NAME, _add)(cross, left, first + columns * rank, rank);
            JOIN(NAME, _add)(cross, second_left, first, rank);
            for (int m = 0; m < GROUP; m++)
                for (int v = 0; v < VECTORS; v++)
                    sum[m][v] += cross[m][v];
        }
        for (int m = 0; m < GROUP; m++)
            for (int v = 0; v < VECTORS; v++)
                *(VECTOR *)(delta + m * columns + j + v * LANES) = sum[m][v];
    }
}

#undef VECTOR
#undef LANES
#undef NAME
#undef TARGET
#undef BYTES
#undef VECTORS
