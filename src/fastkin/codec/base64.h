/* Base64 (RFC 4648, with padding) of one record into the open request body.
 *
 * Three kernels, the best one the CPU has is chosen at import: table-driven C (3 GB/s of input on a
 * Zen 4 core), AVX2 (15), AVX-512 VBMI (21 at 200 B, 66 at 10 KB). None reads a byte outside
 * src[0..n); each writes exactly fk_b64_length(n) bytes plus at most FK_B64_SLACK bytes behind them.
 *
 * Every vector kernel ends in vzeroupper. Without it the upper halves stay dirty and OpenSSL's
 * SHA-NI code, which hashes the body next, runs a third slower until somebody else cleans up; gcc
 * inserts none by itself behind the 512-bit code.
 */
#ifndef FASTKIN_BASE64_H
#define FASTKIN_BASE64_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define FK_X86 1
#include <immintrin.h>
#else
#define FK_X86 0
#endif

#define FK_B64_SLACK 64

enum { FK_SCALAR = 0, FK_AVX2 = 1, FK_VBMI = 2 };

typedef void (*fk_b64_kernel)(const uint8_t *src, size_t n, char *dst);

static const char fk_b64_alphabet[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* 12 bits -> 2 characters, filled at import */
static char fk_b64_pairs[4096][2];

static inline size_t fk_b64_length(size_t n) { return (n + 2) / 3 * 4; }

static __attribute__((noinline)) void fk_b64_scalar(const uint8_t *src, size_t n, char *dst) {
    while (n >= 3) {
        uint32_t v = (uint32_t)src[0] << 16 | (uint32_t)src[1] << 8 | src[2];
        memcpy(dst, fk_b64_pairs[v >> 12], 2);
        memcpy(dst + 2, fk_b64_pairs[v & 0xfff], 2);
        src += 3;
        dst += 4;
        n -= 3;
    }
    if (n == 2) {
        uint32_t v = (uint32_t)src[0] << 8 | src[1];
        memcpy(dst, fk_b64_pairs[v >> 4], 2);
        dst[2] = fk_b64_alphabet[(v & 15) << 2];
        dst[3] = '=';
    } else if (n == 1) {
        memcpy(dst, fk_b64_pairs[(uint32_t)src[0] << 4], 2);
        dst[2] = '=';
        dst[3] = '=';
    }
}

#if FK_X86
/* Mula and Lemire, "Faster Base64 Encoding and Decoding using AVX2 Instructions" (2018). */
static __attribute__((target("avx2"), noinline)) void fk_b64_avx2(const uint8_t *src, size_t n,
                                                                   char *dst) {
    const __m256i spread = _mm256_setr_epi8(1, 0, 2, 1, 4, 3, 5, 4, 7, 6, 8, 7, 10, 9, 11, 10, 1, 0,
                                            2, 1, 4, 3, 5, 4, 7, 6, 8, 7, 10, 9, 11, 10);
    const __m256i offsets =
        _mm256_setr_epi8(71, -4, -4, -4, -4, -4, -4, -4, -4, -4, -4, -19, -16, 65, 0, 0, 71, -4, -4,
                         -4, -4, -4, -4, -4, -4, -4, -4, -19, -16, 65, 0, 0);
    /* 24 bytes go in per step, the two 16-byte loads touch 28 */
    while (n >= 28) {
        __m256i v = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)src)),
            _mm_loadu_si128((const __m128i *)(src + 12)), 1);
        v = _mm256_shuffle_epi8(v, spread);
        __m256i hi = _mm256_mulhi_epu16(_mm256_and_si256(v, _mm256_set1_epi32(0x0fc0fc00)),
                                        _mm256_set1_epi32(0x04000040));
        __m256i lo = _mm256_mullo_epi16(_mm256_and_si256(v, _mm256_set1_epi32(0x003f03f0)),
                                        _mm256_set1_epi32(0x01000010));
        __m256i index = _mm256_or_si256(hi, lo);
        __m256i row = _mm256_subs_epu8(index, _mm256_set1_epi8(51));
        __m256i upper = _mm256_cmpgt_epi8(_mm256_set1_epi8(26), index);
        row = _mm256_or_si256(row, _mm256_and_si256(upper, _mm256_set1_epi8(13)));
        __m256i out = _mm256_add_epi8(_mm256_shuffle_epi8(offsets, row), index);
        _mm256_storeu_si256((__m256i *)dst, out);
        src += 24;
        dst += 32;
        n -= 24;
    }
    _mm256_zeroupper();
    fk_b64_scalar(src, n, dst);
}

/* 48 bytes to 64 characters in three instructions; masks take the tail, so nothing is read past it. */
static __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi"), noinline)) void fk_b64_vbmi(
    const uint8_t *src, size_t n, char *dst) {
    const __m512i spread = _mm512_set_epi8(
        46, 47, 45, 46, 43, 44, 42, 43, 40, 41, 39, 40, 37, 38, 36, 37, 34, 35, 33, 34, 31, 32, 30,
        31, 28, 29, 27, 28, 25, 26, 24, 25, 22, 23, 21, 22, 19, 20, 18, 19, 16, 17, 15, 16, 13, 14,
        12, 13, 10, 11, 9, 10, 7, 8, 6, 7, 4, 5, 3, 4, 1, 2, 0, 1);
    const __m512i shifts = _mm512_set1_epi64(0x3036242a1016040aLL);
    const __m512i alphabet = _mm512_loadu_si512((const void *)fk_b64_alphabet);
    const __mmask64 take = 0xffffffffffffULL;
    while (n >= 48) {
        __m512i v = _mm512_maskz_loadu_epi8(take, src);
        v = _mm512_permutexvar_epi8(spread, v);
        v = _mm512_multishift_epi64_epi8(shifts, v);
        _mm512_storeu_si512((void *)dst, _mm512_permutexvar_epi8(v, alphabet));
        src += 48;
        dst += 64;
        n -= 48;
    }
    if (n > 0) {
        size_t chars = n / 3 * 4 + (n % 3 ? n % 3 + 1 : 0);
        __m512i v = _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, src);
        v = _mm512_permutexvar_epi8(spread, v);
        v = _mm512_multishift_epi64_epi8(shifts, v);
        v = _mm512_permutexvar_epi8(v, alphabet);
        /* what is not data becomes padding; chars <= 63 as n <= 47, and 64 bytes are written */
        v = _mm512_mask_blend_epi8(((__mmask64)1 << chars) - 1, _mm512_set1_epi8('='), v);
        _mm512_storeu_si512((void *)dst, v);
    }
    _mm256_zeroupper();
}
#endif

static fk_b64_kernel fk_b64_kernels[3] = {fk_b64_scalar, NULL, NULL};
static fk_b64_kernel fk_b64_encode = fk_b64_scalar;

/* Fills the table and picks the kernel; returns which one. */
static int fk_b64_init(void) {
    int best = FK_SCALAR;
    for (unsigned i = 0; i < 4096; i++) {
        fk_b64_pairs[i][0] = fk_b64_alphabet[i >> 6];
        fk_b64_pairs[i][1] = fk_b64_alphabet[i & 63];
    }
#if FK_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        fk_b64_kernels[FK_AVX2] = fk_b64_avx2;
        best = FK_AVX2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi")) {
        fk_b64_kernels[FK_VBMI] = fk_b64_vbmi;
        best = FK_VBMI;
    }
#endif
    fk_b64_encode = fk_b64_kernels[best];
    return best;
}

/* 1 when the CPU has the kernel; then it is the one in use from now on */
static int fk_b64_use(int kernel) {
    if (kernel < FK_SCALAR || kernel > FK_VBMI || fk_b64_kernels[kernel] == NULL) return 0;
    fk_b64_encode = fk_b64_kernels[kernel];
    return 1;
}

#endif
