// Arithmetic that the loops of models share.

#pragma once

#include <cstdint>
#include <cstring>

using std::int32_t;
using std::int64_t;
using std::uint32_t;

template <class To, class From>
__attribute__((always_inline)) inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// e^x of x <= 0 to a few units of the last place: 2^n e^r with |r| <= ln(2) / 2 (Cephes' polynomial). Real: float or a
// vector of them; Whole: the integers of its size, without a sign.
template <class Real, class Whole>
__attribute__((always_inline)) inline Real exponential(Real x) {
  const Real low = Real{} - 87.0f;
  x = x < low ? low : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const Real shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  const Real r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Real p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Whole power = (bits<Whole>(shifted) << 23) + (127u << 23);
  return p * bits<Real>(power);
}
