/* A 128-bit digest of topic and payload, to know a message that a broker sends again.
 *
 * Two publishers that may choose every byte must not find two messages of one digest, so the keys are
 * random, of this process, and never leave it; nor does a digest. It is NH as in UMAC and VMAC: the sum
 * mod 2^128 of products of keyed words. Two different messages of up to 976 bytes have equal digests with a
 * probability of at most 2^-64, whoever chose them. What is longer is chained piece by piece
 * through multiply-shift, which brings a sum down with the same bound at each step. One multiplication
 * for 16 bytes, none of which waits for another: about 10 ns for 200 bytes.
 */
#ifndef FASTKIN_DIGEST_H
#define FASTKIN_DIGEST_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/random.h>
#endif

#define FK_DIGEST_PAIRS 64 /* of words, with keys of their own; the first pair is the two lengths */

typedef unsigned __int128 fk_u128;

struct fk_digest_keys {
    uint8_t nh[16 * FK_DIGEST_PAIRS];
    fk_u128 fold[2][4];
};

static struct fk_digest_keys fk_digest_key;

/* 0, or -1 with errno when the system gives no randomness. */
static int fk_digest_init(void) {
    unsigned char *at = (unsigned char *)&fk_digest_key;
    size_t left = sizeof fk_digest_key;
    while (left > 0) {
        size_t part = left < 256 ? left : 256; /* getentropy gives no more at once */
        if (getentropy(at, part) != 0) return -1;
        at += part;
        left -= part;
    }
    return 0;
}

static inline uint64_t fk_digest_load(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* Fewer than 8 bytes; their number is in the digest by itself. */
static inline uint64_t fk_digest_short(const uint8_t *p, size_t n) {
    uint32_t a, b;
    if (n >= 4) { /* both halves, which may overlap */
        memcpy(&a, p, 4);
        memcpy(&b, p + n - 4, 4);
        return (uint64_t)a << 32 | b;
    }
    return (uint64_t)p[0] << 16 | (uint64_t)p[n / 2] << 8 | p[n - 1];
}

/* One pair of words at p + i with its keys at the same offset: seven instructions. */
#define FK_DIGEST_PAIR(i) \
    (sum += (fk_u128)(fk_digest_load(p + (i)) + fk_digest_load(key + (i))) \
            * (fk_digest_load(p + (i) + 8) + fk_digest_load(key + (i) + 8)))

/* Adds n bytes whose first pair has the keys at `key`; where the next pair has its own. Called for a topic of two
 * words as often as for a payload: a call would cost more than the sum. */
static inline __attribute__((always_inline)) const uint8_t *fk_digest_add(const uint8_t *p, size_t n,
                                                                          const uint8_t *key, fk_u128 *total) {
    fk_u128 sum = *total;
    uint64_t k0, k1;
    size_t i = 0;
    const size_t last = n > 16 ? n - 16 : 0; /* up to here pairs are whole, and something is left */
    while (i + 16 < last) {
        FK_DIGEST_PAIR(i);
        FK_DIGEST_PAIR(i + 16);
        i += 32;
    }
    if (i < last) {
        FK_DIGEST_PAIR(i);
        i += 16;
    }
    if (n > i) { /* 1 to 16 bytes, read without going beyond either end */
        k0 = fk_digest_load(key + i);
        k1 = fk_digest_load(key + i + 8);
        if (n - i >= 8)
            sum += (fk_u128)(fk_digest_load(p + i) + k0) * (fk_digest_load(p + n - 8) + k1);
        else
            sum += (fk_u128)(fk_digest_short(p + i, n - i) + k0) * k1;
        i += 16;
    }
    *total = sum;
    return key + i;
}

/* Topic or payload of a long message, in pieces that there are keys for. */
static void fk_digest_chain(const struct fk_digest_keys *keys, const uint8_t *p, size_t n, uint64_t *chain) {
    const size_t most = 16 * (FK_DIGEST_PAIRS - 1);
    while (n > 0) {
        fk_u128 sum = 0;
        size_t part = n < most ? n : most;
        fk_digest_add(p, part, keys->nh + 16, &sum);
        for (int i = 0; i < 2; i++) {
            const fk_u128 *k = keys->fold[i];
            chain[i] = (uint64_t)((k[0] * (uint64_t)sum + k[1] * (uint64_t)(sum >> 64) + k[2] * chain[i] + k[3]) >> 64);
        }
        p += part;
        n -= part;
    }
}

static inline void fk_digest_by(const struct fk_digest_keys *keys, const uint8_t *topic, size_t topic_length,
                                const uint8_t *payload, size_t payload_length, uint64_t *out) {
    const uint8_t *key = keys->nh;
    fk_u128 sum = (fk_u128)(topic_length + fk_digest_load(key)) * (payload_length + fk_digest_load(key + 8));
    if (topic_length + payload_length <= 16 * (FK_DIGEST_PAIRS - 3)) {
        key = fk_digest_add(topic, topic_length, key + 16, &sum);
        fk_digest_add(payload, payload_length, key, &sum);
        out[0] = (uint64_t)sum;
        out[1] = (uint64_t)(sum >> 64);
        return;
    }
    out[0] = (uint64_t)sum;
    out[1] = (uint64_t)(sum >> 64);
    fk_digest_chain(keys, topic, topic_length, out);
    fk_digest_chain(keys, payload, payload_length, out);
}

static inline void fk_digest(const uint8_t *topic, size_t topic_length, const uint8_t *payload,
                             size_t payload_length, uint64_t *out) {
    fk_digest_by(&fk_digest_key, topic, topic_length, payload, payload_length, out);
}

#endif
