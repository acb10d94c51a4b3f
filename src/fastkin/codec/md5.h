/* MD5 (RFC 1321): Kinesis chooses a record's shard by it, and KPL aggregates end in it. Nothing here
 * is about security. One call, no state kept. */
#ifndef FASTKIN_MD5_H
#define FASTKIN_MD5_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static const uint32_t fk_md5_k[64] = {
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391};

static inline uint32_t fk_md5_load(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint32_t fk_md5_turn(uint32_t x, int k) { return (x << k) | (x >> (32 - k)); }

static void fk_md5_block(uint32_t h[4], const uint8_t *p) {
    static const uint8_t turns[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
    uint32_t a = h[0], b = h[1], c = h[2], d = h[3], w[16];
    for (int i = 0; i < 16; i++) w[i] = fk_md5_load(p + 4 * i);
#define FK_STEP(i, f, g)                                                 \
    do {                                                                 \
        uint32_t t = a + (f) + fk_md5_k[i] + w[(g) & 15];                \
        a = d;                                                           \
        d = c;                                                           \
        c = b;                                                           \
        b += fk_md5_turn(t, turns[(i) >> 4][(i) & 3]);                   \
    } while (0)
    for (int i = 0; i < 16; i++) FK_STEP(i, d ^ (b & (c ^ d)), i);
    for (int i = 16; i < 32; i++) FK_STEP(i, c ^ (d & (b ^ c)), 5 * i + 1);
    for (int i = 32; i < 48; i++) FK_STEP(i, b ^ c ^ d, 3 * i + 5);
    for (int i = 48; i < 64; i++) FK_STEP(i, c ^ (b | ~d), 7 * i);
#undef FK_STEP
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
}

static void fk_md5(const uint8_t *data, size_t n, uint8_t out[16]) {
    uint32_t h[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    uint8_t tail[128];
    uint64_t bits = (uint64_t)n * 8;
    size_t left = n, padded;
    while (left >= 64) {
        fk_md5_block(h, data);
        data += 64;
        left -= 64;
    }
    memset(tail, 0, sizeof tail);
    if (left) memcpy(tail, data, left);
    tail[left] = 0x80;
    padded = left < 56 ? 64 : 128;
    for (int i = 0; i < 8; i++) tail[padded - 8 + (size_t)i] = (uint8_t)(bits >> (8 * i));
    fk_md5_block(h, tail);
    if (padded == 128) fk_md5_block(h, tail + 64);
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)(h[i / 4] >> (8 * (i % 4)));
}

#endif
