/* The coding of a block whose elements have BITS bits. Included by residual.c, once for each. */

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define WORD JOIN(uint, BITS, _t)
#define SIGNED JOIN(int, BITS, _t)

INLINE int64_t JOIN(code, BITS, )(const residual *job) {
    const WORD *restrict of = job->block, *restrict from = job->guess;
    uint8_t *coded = job->coded;
    const int64_t n = job->count, quarter = quarter_of(n);
    memset(coded, 0, (size_t)quarter);
    for (int q = 0; q < 4; q++) {
        const int64_t first = q * quarter, here = within(n - first, quarter);
        uint8_t *restrict codes = coded;
        for (int64_t i = 0; i < here; i++) {
            SIGNED r = (SIGNED)(WORD)(of[first + i] - from[first + i]);
            r = r < -2 ? -2 : r;
            r = r > 2 ? 2 : r;
            codes[i] |= (uint8_t)((r & 3) << 2 * q);
        }
    }
    uint32_t *lanes = job->scratch;
    WORD *rest = (WORD *)((char *)job->scratch + quarter);
    int64_t found, others = 0;
    find_others(coded, quarter, lanes, &found);
    for (int q = 0; q < 4; q++)
        for (int64_t i = 0; i < found; i++)
            for (uint64_t marks = marked(coded, lanes[i], q); marks; marks &= marks - 1) {
                const int64_t at = q * quarter + element_of(lanes[i], marks);
                const WORD r = (WORD)(of[at] - from[at]), sign = (WORD)(0 - (r >> (BITS - 1)));
                rest[others++] = (WORD)((WORD)(((WORD)(r << 1)) ^ sign) - 3);
            }
    uint8_t *restrict planes = coded + quarter;
    for (int byte = 0; byte < BITS / 8; byte++)
        for (int64_t k = 0; k < others; k++)
            *planes++ = (uint8_t)(rest[k] >> 8 * byte);
    return quarter + others * (BITS / 8);
}

/* found, others: of find_others; the codes are known to suit the block. */
INLINE void JOIN(add, BITS, )(const residual *job, int64_t found, int64_t others) {
    WORD *restrict to = job->block;
    const uint8_t *coded = job->coded;
    const int64_t n = job->count, quarter = quarter_of(n);
    for (int q = 0; q < 4; q++) {
        const int64_t first = q * quarter, here = within(n - first, quarter);
        const uint8_t *restrict codes = coded;
        for (int64_t i = 0; i < here; i++) {
            const int code = codes[i] >> 2 * q & 3;
            to[first + i] = (WORD)(to[first + i] + (code ^ 2) - 2);
        }
    }
    const uint8_t *planes = coded + quarter;
    const uint32_t *lanes = job->scratch;
    for (int q = 0; q < 4; q++)
        for (int64_t i = 0; i < found; i++)
            for (uint64_t marks = marked(coded, lanes[i], q); marks; marks &= marks - 1, planes++) {
                WORD told = 0;
                for (int byte = 0; byte < BITS / 8; byte++)
                    told |= (WORD)((WORD)planes[byte * others] << 8 * byte);
                told += 3;
                const WORD r = (WORD)((told >> 1) ^ (WORD)(0 - (told & 1)));
                const int64_t at = q * quarter + element_of(lanes[i], marks);
                to[at] = (WORD)(to[at] + r + 2); /* the code has taken 2 away */
            }
}

#undef JOIN_
#undef JOIN
#undef WORD
#undef SIGNED
#undef BITS
