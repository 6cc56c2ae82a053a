/* Products of one packed block, for one set of instructions. _native.c includes this once for each, with
 *
 *   VARIANT  the suffix of its names
 *   TARGET   what the compiler may use
 *   LANES    floats in a vector
 *   TALL     rows that are made together, with 4 columns: TALL * 4 sums and TALL + 1 operands have to fit into registers
 */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define Vector JOIN(Vector, VARIANT)

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

/* The sums of the lanes of four vectors. */
__attribute__((target(TARGET), always_inline)) static inline __m128 JOIN(lane_sums, VARIANT)(const Vector *v) {
#if LANES == 16
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]),
                                    _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]),
                                    _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
#else
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]),
                                    _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]),
                                    _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]));
    const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
#endif
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* TALL x 4 inner products of the rows at a and at b, `width` floats long, added to `sums`. */
__attribute__((target(TARGET), noinline)) static void JOIN(add_tile, VARIANT)(const float *a, const float *b,
                                                                              ptrdiff_t width, double *sums,
                                                                              ptrdiff_t rows) {
    Vector products[TALL][4] = {{{0}}};
    for (ptrdiff_t k = 0; k < width; k += LANES) {
        Vector left[TALL];
        _Pragma("GCC unroll 8") for (int i = 0; i < TALL; i++) left[i] = *(const Vector *)(a + i * STRIDE + k);
        _Pragma("GCC unroll 8") for (int j = 0; j < 4; j++) {
            const Vector right = *(const Vector *)(b + j * STRIDE + k);
            _Pragma("GCC unroll 8") for (int i = 0; i < TALL; i++) products[i][j] += left[i] * right;
        }
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < TALL; i++) {
        double *to = sums + i * rows;
        const __m256d found = _mm256_cvtps_pd(JOIN(lane_sums, VARIANT)(products[i]));
        _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), found));
    }
}

/* Pack one block and add its products, tiles on and below the diagonal; the squared norm of what was taken off. */
__attribute__((target(TARGET))) static double JOIN(add_block, VARIANT)(const Features *x, const float *group,
                                                                       ptrdiff_t start, ptrdiff_t width,
                                                                       ptrdiff_t rows, const Buffers *own) {
    const double norm = pack(x, group, start, width, own);
    for (ptrdiff_t i = 0; i < rows; i += TALL)
        for (ptrdiff_t j = 0; j < i + TALL; j += 4)
            JOIN(add_tile, VARIANT)(own->panel + i * STRIDE, own->panel + j * STRIDE, padded(width),
                                    own->sums + i * rows + j, rows);
    return norm;
}

#undef Vector
#undef JOIN
#undef JOIN_
#undef VARIANT
#undef TARGET
#undef LANES
#undef TALL
