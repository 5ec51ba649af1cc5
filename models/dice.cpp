// Dice, forward and backward, in one pass over the numbers each. Built and called by dice.py.
//
// With z = (s - mean) * scale and p = sigmoid(z), out = s (alpha + (1 - alpha) p). A pass for each step of that, which
// is what tensor operations are, takes longer than the matrix products around it.

#include <algorithm>
#include <new>
#include <vector>

#include "lanes.hpp"

// What a column has.
struct Columns {
  const float *alpha, *mean, *scale;  // [H]
  int64_t width;                      // H
};

namespace {

inline float sigmoid(float z) {
  const float e = exponential<float, uint32_t>(z < 0 ? z : -z), share = 1.0f / (1.0f + e);
  return z < 0 ? e * share : share;
}

// Rows whose sums are single numbers before they are added to double ones.
constexpr int64_t FEW = 64;

}  // namespace

extern "C" {

// out [N, H] of s [N, H], for the rows from .. to.
void embtab_dice(const Columns *columns, const float *s, float *out, int64_t from, int64_t to) {
  const Columns c = *columns;
  for (int64_t i = from; i < to; i++) {
    const float *row = s + i * c.width;
    float *made = out + i * c.width;
#pragma GCC ivdep
    for (int64_t j = 0; j < c.width; j++) {
      const float p = sigmoid((row[j] - c.mean[j]) * c.scale[j]);
      made[j] = row[j] * (c.alpha[j] + (1.0f - c.alpha[j]) * p);
    }
  }
}

// of_s [N, H]: the gradient of s with mean and scale as they are. sums [3, H], added to: the gradient of alpha, the sum
// of the gradient of z, and that of its product with z. 1 where memory did not suffice.
int32_t embtab_dice_backward(const Columns *columns, const float *s, const float *gradient, float *of_s, double *sums,
                             int64_t from, int64_t to) {
  const Columns c = *columns;
  try {
    std::vector<float> few(3 * c.width);
    float *of_alpha = few.data(), *of_z = of_alpha + c.width, *of_z_by_z = of_z + c.width;
    for (int64_t start = from; start < to; start += FEW) {
      std::fill(few.begin(), few.end(), 0.0f);
      for (int64_t i = start; i < std::min(start + FEW, to); i++) {
        const float *row = s + i * c.width, *above = gradient + i * c.width;
        float *below = of_s + i * c.width;
#pragma GCC ivdep
        for (int64_t j = 0; j < c.width; j++) {
          const float z = (row[j] - c.mean[j]) * c.scale[j], p = sigmoid(z), rest = 1.0f - p;
          const float product = above[j] * row[j], reaches = product * (1.0f - c.alpha[j]) * p * rest;
          of_alpha[j] += product * rest;
          of_z[j] += reaches;
          of_z_by_z[j] += reaches * z;
          below[j] = above[j] * (c.alpha[j] + (1.0f - c.alpha[j]) * p) + reaches * c.scale[j];
        }
      }
      for (size_t j = 0; j < few.size(); j++) sums[j] += few[j];
    }
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

// What reaches s by way of mean and scale, which are of the batch: taken from of_s. of_mean, of_deviation [H]: the means
// of the gradient of z and of its product with z, times scale.
void embtab_dice_of_batch(const Columns *columns, const float *s, const float *of_mean, const float *of_deviation,
                          float *of_s, int64_t from, int64_t to) {
  const Columns c = *columns;
  for (int64_t i = from; i < to; i++) {
    const float *row = s + i * c.width;
    float *below = of_s + i * c.width;
#pragma GCC ivdep
    for (int64_t j = 0; j < c.width; j++)
      below[j] -= of_mean[j] + (row[j] - c.mean[j]) * c.scale[j] * of_deviation[j];
  }
}

}  // extern "C"
