/* Whether a topic is one of the many that need no closer look. */
#ifndef FASTKIN_TEXT_H
#define FASTKIN_TEXT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* GCC's and clang's own vectors: SSE2, NEON or plain code. */
typedef int8_t fk_text_bytes __attribute__((vector_size(16)));
typedef uint64_t fk_text_words __attribute__((vector_size(16)));

static inline uint64_t fk_text_load(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* The eight bytes at each place; in registers, for what is put together in memory is waited for. */
static inline fk_text_words fk_text_odd(const uint8_t *p, const uint8_t *q) {
    const fk_text_words words = {fk_text_load(p), fk_text_load(q)};
    const fk_text_bytes b = (fk_text_bytes)words;
    /* 0 and what has the high bit set are below 1 as signed bytes */
    return (fk_text_words)((b < 1) | (b == '#') | (b == '+'));
}

/* 1: at least 8 bytes of ASCII, with neither NUL nor wildcard. 0: not so, or not known. */
static inline int fk_text_plain(const uint8_t *p, size_t n) {
    fk_text_words odd;
    if (n < 8) return 0;
    odd = fk_text_odd(n < 16 ? p : p + n - 16, p + n - 8); /* some of it is looked at twice */
    for (; n > 16; n -= 16, p += 16) odd |= fk_text_odd(p, p + 8);
    return (odd[0] | odd[1]) == 0;
}

#endif
