/* The residuals of a block, as `edit/residual.py` codes them: two bits for each element, then what
 * two bits do not tell. What is read here may be forged, so its length is compared first. */
#include <string.h>

#include "kernel.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the lowest byte of a lane is taken for its first"
#endif

enum { LANE = 8 };                        /* bytes of codes that are looked at together */
enum { TOO_SHORT = 1, OUTSIDE, TOO_LONG }; /* what may be wrong; library.py has the same */

/* Elements of a quarter: whole lanes. */
INLINE int64_t quarter_of(int64_t n) { return (n + 4 * LANE - 1) / (4 * LANE) * LANE; }

INLINE int64_t within(int64_t n, int64_t most) { return n < 0 ? 0 : n < most ? n : most; }

INLINE uint64_t lane_of(const uint8_t *codes, int64_t lane) {
    uint64_t bytes;
    memcpy(&bytes, codes + lane * LANE, LANE);
    return bytes;
}

/* The lowest bit of each byte of a lane whose code in the quarter q is 2. */
INLINE uint64_t marked(const uint8_t *codes, int64_t lane, int q) {
    const uint64_t bytes = lane_of(codes, lane) >> 2 * q;
    return bytes >> 1 & ~bytes & 0x0101010101010101u;
}

/* Numbers of the lanes in which a code is 2, mostly few, and how many. Returns how many codes. */
INLINE int64_t find_others(const uint8_t *codes, int64_t quarter, uint32_t *lanes, int64_t *found) {
    int64_t others = 0, count = 0;
    for (int64_t lane = 0; lane < quarter / LANE; lane++) {
        const uint64_t bytes = lane_of(codes, lane), marks = bytes >> 1 & ~bytes & 0x5555555555555555u;
        lanes[count] = (uint32_t)lane;
        if (marks) {
            count++;
            others += __builtin_popcountll(marks);
        }
    }
    *found = count;
    return others;
}

/* The first that is marked, counted within the quarter. */
INLINE int64_t element_of(int64_t lane, uint64_t marks) {
    return lane * LANE + __builtin_ctzll(marks) / 8;
}

#define BITS 8
#include "residual.h"
#define BITS 16
#include "residual.h"
#define BITS 32
#include "residual.h"
#define BITS 64
#include "residual.h"

/* Whether a code is 2 that has no element. */
INLINE int outside(const uint8_t *codes, int64_t n) {
    const int64_t quarter = quarter_of(n);
    for (int64_t at = n; at < 4 * quarter; at++)
        if ((codes[at % quarter] >> at / quarter * 2 & 3) == 2)
            return 1;
    return 0;
}

INLINE int64_t code(const residual *job) {
    switch (job->size) {
    case 1:
        return code8(job);
    case 2:
        return code16(job);
    case 4:
        return code32(job);
    default:
        return code64(job);
    }
}

INLINE int64_t add(const residual *job) {
    const int64_t quarter = quarter_of(job->count);
    if (job->length < quarter)
        return TOO_SHORT;
    int64_t found;
    const int64_t others = find_others(job->coded, quarter, job->scratch, &found);
    const int64_t length = quarter + others * job->size;
    if (job->length != length)
        return job->length < length ? TOO_SHORT : TOO_LONG;
    if (outside(job->coded, job->count))
        return OUTSIDE;
    switch (job->size) {
    case 1:
        add8(job, found, others);
        break;
    case 2:
        add16(job, found, others);
        break;
    case 4:
        add32(job, found, others);
        break;
    default:
        add64(job, found, others);
    }
    return 0;
}

static int64_t code_plain(const residual *job) { return code(job); }
static int64_t add_plain(const residual *job) { return add(job); }
#ifdef __x86_64__
AVX2 static int64_t code_avx2(const residual *job) { return code(job); }
AVX2 static int64_t add_avx2(const residual *job) { return add(job); }
AVX512 static int64_t code_avx512(const residual *job) { return code(job); }
AVX512 static int64_t add_avx512(const residual *job) { return add(job); }
#endif

/* Fills `coded`, and returns how many bytes of it. */
int64_t infold_code(const residual *job, int64_t level) {
#ifdef __x86_64__
    if (level >= 1)
        return level == 1 ? code_avx2(job) : code_avx512(job);
#endif
    (void)level;
    return code_plain(job);
}

/* Turns `block`, which holds the guess. Returns 0, or what is wrong with `coded`; then the block is
 * as it was. */
int64_t infold_decode(const residual *job, int64_t level) {
#ifdef __x86_64__
    if (level >= 1)
        return level == 1 ? add_avx2(job) : add_avx512(job);
#endif
    (void)level;
    return add_plain(job);
}
