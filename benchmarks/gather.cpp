// The plainest loop that reads rows of a table: what a lookup is measured against by beside_gather.py.

#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

// out [N, W]: the rows of a table [R, W], W a multiple of 8; each asked for so many rows ahead, or not at all where
// that is 0; written past the caches if wanted.
extern "C" void gather(float *out, const float *table, const int64_t *rows, int64_t count, int64_t width, int64_t ahead,
                       int64_t past_the_caches) {
  for (int64_t i = 0; i < count; i++, out += width) {
    if (ahead && i + ahead < count) {
      const char *next = reinterpret_cast<const char *>(table + rows[i + ahead] * width);
      for (int64_t at = 0; at < width * 4; at += 64) __builtin_prefetch(next + at);
    }
    const float *row = table + rows[i] * width;
#ifdef __AVX__
    for (int64_t x = 0; x < width; x += 8) {
      const __m256 numbers = _mm256_loadu_ps(row + x);
      if (past_the_caches)
        _mm256_stream_ps(out + x, numbers);
      else
        _mm256_storeu_ps(out + x, numbers);
    }
#else
    std::memcpy(out, row, static_cast<size_t>(width) * 4);
#endif
  }
}
