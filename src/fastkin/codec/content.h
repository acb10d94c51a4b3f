/* Partition keys made from what a message holds, so that one that the broker sends again to another process gets the
 * key that it had: a UUID of version 8 (RFC 9562, section 5.8: the bits are the maker's own).
 *
 * The digest is that of mqtt/digest.h with keys that never change. So anybody can make two messages of one key: they go
 * to the same shard, as they would with one topic for a key, and nothing else comes of it. Who tells repetitions from new
 * records compares the data, too. What changes here changes the keys of all that is sent again after an update.
 */
#ifndef FASTKIN_CONTENT_H
#define FASTKIN_CONTENT_H

#include "mqtt/digest.h"
#include "codec/random.h"

static struct fk_digest_keys fk_content_key;

/* splitmix64 from 0, low byte first: numbers with no sense in them */
static void fk_content_init(void) {
    uint8_t *at = (uint8_t *)&fk_content_key;
    uint64_t seed = 0;
    for (size_t i = 0; i < sizeof fk_content_key; i += 8) {
        uint64_t z = fk_splitmix(&seed);
        memcpy(at + i, &z, 8);
    }
}

/* The end of MurmurHash3 (Appleby, public domain): each bit of it depends on each bit of x, and no two x are alike. */
static inline uint64_t fk_content_mix(uint64_t x) {
    x = (x ^ (x >> 33)) * UINT64_C(0xff51afd7ed558ccd);
    x = (x ^ (x >> 33)) * UINT64_C(0xc4ceb9fe1a85ec53);
    return x ^ (x >> 33);
}

static inline void fk_content(const uint8_t *topic, size_t topic_length, const uint8_t *payload, size_t payload_length,
                              uint64_t *out) {
    fk_digest_by(&fk_content_key, topic, topic_length, payload, payload_length, out);
}

/* The key of record `index` of a message with this digest. */
static inline void fk_uuid8(const uint64_t *digest, uint64_t index, char *out) {
    const uint64_t a = fk_content_mix(digest[0] + index * UINT64_C(0x9e3779b97f4a7c15));
    const uint64_t b = fk_content_mix(digest[1] + a);
    fk_uuid_text((a & ~UINT64_C(0xf000)) | UINT64_C(0x8000), (b >> 2) | UINT64_C(0x8000000000000000), out);
}

#endif
