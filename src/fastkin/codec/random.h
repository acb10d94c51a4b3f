/* Partition keys need uniqueness and spread, not secrecy: Kinesis hashes them with MD5. So they come
 * from xoshiro256++ (Blackman and Vigna, public domain), seeded by the system, and cost some 10 ns
 * against 2.6 us for str(uuid.uuid4()). One generator per process, used with the GIL held. It is seeded
 * anew now and then; a child process draws a seed of its own before its first key, or parent and child
 * would share their keys, as would two copies of a snapshot of a virtual machine for good.
 */
#ifndef FASTKIN_RANDOM_H
#define FASTKIN_RANDOM_H

#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/random.h>
#endif

#define FK_UUID_LENGTH 36
#define FK_RESEED 65536 /* records put or frames */

static uint64_t fk_state[4];
static int fk_seeded = 0;
static uint32_t fk_left = 0; /* until the next seed */
static char fk_hex[256][2];

static inline uint64_t fk_rotate(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

static inline uint64_t fk_random(void) {
    uint64_t *s = fk_state;
    const uint64_t result = fk_rotate(s[0] + s[3], 23) + s[0];
    const uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = fk_rotate(s[3], 45);
    return result;
}

static void fk_random_forget(void) {
    memset(fk_state, 0, sizeof fk_state);
    fk_seeded = 0;
    fk_left = 0;
}

static int fk_random_seed(void) {
    uint64_t fresh[4];
    fk_left = FK_RESEED;
    if (getentropy(fresh, sizeof fresh) != 0) {
        if (fk_seeded) return 0; /* the seed there is goes on */
        fk_left = 0;
        return -1;
    }
    memcpy(fk_state, fresh, sizeof fresh);
    fk_state[0] |= 1; /* all zero is the one state it never leaves */
    fk_seeded = 1;
    return 0;
}

/* splitmix64, Vigna, public domain */
static inline uint64_t fk_splitmix(uint64_t *seed) {
    uint64_t z = (*seed += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* For tests alone: the same keys for the same seed, until fk_random_forget(). */
static inline void fk_random_fix(uint64_t seed) {
    for (unsigned i = 0; i < 4; i++) fk_state[i] = fk_splitmix(&seed);
    fk_state[0] |= 1;
    fk_seeded = 1;
    fk_left = UINT32_MAX; /* no seed from the system in between */
}

/* Call it before drawing: 0, or -1 with errno when the system gives no randomness. */
static inline int fk_random_ready(void) {
    if (fk_left == 0) return fk_random_seed();
    fk_left--;
    return 0;
}

static int fk_random_init(void) {
    static const char digits[] = "0123456789abcdef";
    for (unsigned i = 0; i < 256; i++) {
        fk_hex[i][0] = digits[i >> 4];
        fk_hex[i][1] = digits[i & 15];
    }
    return pthread_atfork(NULL, NULL, fk_random_forget);
}

/* 32 hexadecimal digits and four dashes */
static inline void fk_uuid_text(uint64_t a, uint64_t b, char *out) {
#define FK_PUT(at, word, shift) memcpy(out + (at), fk_hex[((word) >> (shift)) & 255], 2)
    FK_PUT(0, a, 56);
    FK_PUT(2, a, 48);
    FK_PUT(4, a, 40);
    FK_PUT(6, a, 32);
    out[8] = '-';
    FK_PUT(9, a, 24);
    FK_PUT(11, a, 16);
    out[13] = '-';
    FK_PUT(14, a, 8);
    FK_PUT(16, a, 0);
    out[18] = '-';
    FK_PUT(19, b, 56);
    FK_PUT(21, b, 48);
    out[23] = '-';
    FK_PUT(24, b, 40);
    FK_PUT(26, b, 32);
    FK_PUT(28, b, 24);
    FK_PUT(30, b, 16);
    FK_PUT(32, b, 8);
    FK_PUT(34, b, 0);
#undef FK_PUT
}

/* RFC 9562 section 5.4: 122 random bits, version 4, variant 10 */
static inline void fk_uuid4(char *out) {
    uint64_t a = (fk_random() & ~UINT64_C(0xf000)) | UINT64_C(0x4000);
    uint64_t b = (fk_random() >> 2) | UINT64_C(0x8000000000000000);
    fk_uuid_text(a, b, out);
}

#endif
