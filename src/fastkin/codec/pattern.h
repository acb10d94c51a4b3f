/* Is this the same text as one that was read before, but for other bytes within some of its strings?
 *
 * Entries of an answer differ in a sequence number and a shard id; the names, quotes and braces around these are the
 * same from entry to entry. An entry that is found to be so needs no reading: it says what the first one said.
 *
 *     fixed byte (mask 255)   the same as before
 *     open byte (mask 0)      within a string: anything that neither ends it nor begins an escape
 *
 * Sixteen bytes at a time, as vectors of GCC and clang: SSE2, NEON, or what else there is.
 */

#ifndef FASTKIN_PATTERN_H
#define FASTKIN_PATTERN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FK_PATTERN_STEP = 16, FK_PATTERN_ROOM = 512 };

typedef uint8_t fk_bytes16 __attribute__((vector_size(FK_PATTERN_STEP)));

typedef struct {
    size_t length; /* 0: there is none. At least FK_PATTERN_STEP otherwise */
    uint8_t text[FK_PATTERN_ROOM];
    uint8_t mask[FK_PATTERN_ROOM];
} fk_pattern;

/* Take over a text, all of it fixed. 0: it is too short or too long, and there is no pattern. */
static inline int fk_pattern_set(fk_pattern *pattern, const uint8_t *text, size_t length) {
    pattern->length = 0;
    if (length < FK_PATTERN_STEP || length > FK_PATTERN_ROOM)
        return 0;
    memcpy(pattern->text, text, length);
    memset(pattern->mask, 255, length);
    pattern->length = length;
    return 1;
}

static inline void fk_pattern_open(fk_pattern *pattern, size_t from, size_t length) {
    memset(pattern->mask + from, 0, length);
}

/* `left` bytes from `text` on: do they begin with the pattern? */
static inline int fk_pattern_is(const fk_pattern *pattern, const uint8_t *text, size_t left) {
    const size_t length = pattern->length;
    const fk_bytes16 zero = {0}, quote = zero + '"', escape = zero + '\\';
    fk_bytes16 wrong = zero, byte, expected, mask;
    uint64_t halves[2];
    size_t at = 0;
    if (length == 0 || length > left)
        return 0;
    for (;;) {
        memcpy(&byte, text + at, sizeof byte);
        memcpy(&expected, pattern->text + at, sizeof expected);
        memcpy(&mask, pattern->mask + at, sizeof mask);
        wrong |= ((byte ^ expected) & mask) | (((fk_bytes16)(byte == quote) | (fk_bytes16)(byte == escape)) & ~mask);
        if (at + FK_PATTERN_STEP == length)
            break;
        at += FK_PATTERN_STEP;
        if (length - at < FK_PATTERN_STEP)
            at = length - FK_PATTERN_STEP; /* the last ones, some of them again */
    }
    memcpy(halves, &wrong, sizeof halves);
    return (halves[0] | halves[1]) == 0;
}

#endif
