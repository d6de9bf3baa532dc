/* The product of LoRA's factors, which `adapters/exact.py` has put on grids: every partial sum is
 * exact (above 2^-1022), so neither the order of the terms nor a fused multiply-add changes a bit. This file may
 * therefore be compiled with -ffp-contract=fast; kernel.c must not be.
 *
 *   delta (GROUP, columns);  left (slices, rank, GROUP);  right (slices, columns / WIDTH, rank, WIDTH)
 *
 * Two slices of each factor make B1 A1 + (B1 A2 + B2 A1): each of the two sums exact, one rounding. */
#include "kernel.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

/* The sums of a group of rows stay in registers: 8 of 16. */
#define NAME infold_product_plain
#define TARGET
#define BYTES 16
#define VECTORS 2
#include "product.h"

#ifdef __x86_64__
#define NAME infold_product_avx2
#define TARGET AVX2
#define BYTES 32
#define VECTORS 2
#include "product.h"

#define NAME infold_product_avx512
#define TARGET AVX512
#define BYTES 64
#define VECTORS 2
#include "product.h"
#endif
