// Layers of self-attention over the fields of a row, forward and backward. Built and called by attention.py.
//
// The matrices of one row are so small (39 x 39 and 39 x 16 on Criteo) that kernels made for large ones spend their time
// around the products. Here every number is a register of numbers, one for each of as many rows as it holds: all rows
// of a group are multiplied at once, nothing is padded or transposed on the way, and what a group needs stays in the
// cache from the first layer to the last. No function starts threads; each does some groups.

#include <algorithm>
#include <new>
#include <vector>

#include "lanes.hpp"

// A layer: q, k, v and the residual, one after the other, are x times the rows of the weight.
struct Layer {
  const float *weight;  // [4 * A, I]
  float *gradient;      // [4 * A, I], added to; for backward
  int64_t in;           // I
  int64_t out;          // A, of all heads
  int64_t heads;
};

namespace {

// HIGH x WIDE sums, what is multiplied for them and no more have to find room in the registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, HIGH = 6, WIDE = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, HIGH = 3, WIDE = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, HIGH = 6, WIDE = 4;
#else
constexpr int LANES = 4, HIGH = 3, WIDE = 4;
#endif

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t Whole __attribute__((vector_size(LANES * 4)));

// A matrix of whatever steps its elements lie at.
template <class T>
struct Matrix {
  T *start;
  int64_t down, across;
  T &operator()(int64_t i, int64_t j) const { return start[i * down + j * across]; }
  Matrix from(int64_t i, int64_t j) const { return {start + i * down + j * across, down, across}; }
  Matrix turned() const { return {start, across, down}; }
};

template <class T>
Matrix<T> rows_of(T *start, int64_t width) {
  return {start, width, 1};
}

// Some elements of a product.
template <int M, int N, bool ADDED, class A, class B>
__attribute__((always_inline)) inline void tile(int64_t depth, Matrix<A> a, Matrix<B> b, Matrix<Lanes> c) {
  Lanes sums[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) sums[i][j] = ADDED ? c(i, j) : Lanes{};
  for (int64_t x = 0; x < depth; x++)
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) sums[i][j] += a(i, x) * b(x, j);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) c(i, j) = sums[i][j];
}

template <int M, bool ADDED, class A, class B>
void strip(int64_t columns, int64_t depth, Matrix<A> a, Matrix<B> b, Matrix<Lanes> c) {
  int64_t j = 0;
  for (; j + WIDE <= columns; j += WIDE) tile<M, WIDE, ADDED>(depth, a, b.from(0, j), c.from(0, j));
  for (; j < columns; j++) tile<M, 1, ADDED>(depth, a, b.from(0, j), c.from(0, j));
}

// c [rows, columns] = a [rows, depth] b [depth, columns], or added to what c holds.
template <bool ADDED, class A, class B>
void product(int64_t rows, int64_t columns, int64_t depth, Matrix<A> a, Matrix<B> b, Matrix<Lanes> c) {
  int64_t i = 0;
  for (; i + HIGH <= rows; i += HIGH) strip<HIGH, ADDED>(columns, depth, a.from(i, 0), b, c.from(i, 0));
  for (; i + 3 <= rows; i += 3) strip<3, ADDED>(columns, depth, a.from(i, 0), b, c.from(i, 0));
  for (; i < rows; i++) strip<1, ADDED>(columns, depth, a.from(i, 0), b, c.from(i, 0));
}

void softmax(Lanes *scores, int64_t count) {
  Lanes most = scores[0], sum{};
  for (int64_t j = 1; j < count; j++) most = scores[j] > most ? scores[j] : most;
  for (int64_t j = 0; j < count; j++) sum += scores[j] = exponential<Lanes, Whole>(scores[j] - most);
  const Lanes share = 1.0f / sum;
  for (int64_t j = 0; j < count; j++) scores[j] *= share;
}

// Calls move(row, i, place) for the numbers i < count of a group's rows, a few lines at a time, so that they stay near.
template <class Move>
void each_number(int64_t count, int64_t group, int64_t all, Move move) {
  constexpr int64_t FEW = 64;
  const int64_t first = group * LANES, many = std::min<int64_t>(LANES, all - first);
  for (int64_t i = 0; i < count; i += FEW)
    for (int64_t lane = 0; lane < many; lane++)
      for (int64_t j = i; j < std::min(i + FEW, count); j++) move((first + lane) * count + j, j * LANES + lane);
}

// numbers [count] in lanes, of rows [all, count]; lanes beyond the last row are zero.
void gather(const float *rows, int64_t count, int64_t group, int64_t all, Lanes *numbers) {
  if ((group + 1) * LANES > all) std::fill_n(numbers, count, Lanes{});
  float *lanes = reinterpret_cast<float *>(numbers);
  each_number(count, group, all, [=](int64_t number, int64_t place) { lanes[place] = rows[number]; });
}

void scatter(const Lanes *numbers, int64_t count, int64_t group, int64_t all, float *rows) {
  const float *lanes = reinterpret_cast<const float *>(numbers);
  each_number(count, group, all, [=](int64_t number, int64_t place) { rows[number] = lanes[place]; });
}

// A layer for the rows of one group.
class Group {
 public:
  Group(const Layer *layers, int64_t count, int64_t fields)
      : fields_(fields), scores_(fields * fields), of_scores_(fields * fields) {
    int64_t widest = 0;
    for (int64_t l = 0; l < count; l++) widest = std::max({widest, layers[l].in, layers[l].out});
    parts_.resize(fields * widest * 4);
    of_parts_.resize(fields * widest * 4);
  }

  void forward(const Layer &layer, Lanes *x, Lanes *out) {
    const int64_t across = 4 * layer.out, width = layer.out / layer.heads;
    project(layer, x, across);
    const Matrix<Lanes> parts = rows_of(parts_.data(), across), scores = rows_of(scores_.data(), fields_);
    for (int64_t h = 0; h < layer.heads; h++) {
      attend(layer, h);
      product<true>(fields_, width, fields_, scores, parts.from(0, 2 * layer.out + h * width),
                    parts.from(0, 3 * layer.out + h * width));
    }
    for (int64_t i = 0; i < fields_; i++)
      for (int64_t j = 0; j < layer.out; j++) {
        const Lanes sum = parts(i, 3 * layer.out + j);
        out[i * layer.out + j] = sum < 0 ? Lanes{} : sum;  // what is no number stays none
      }
  }

  // of_out, of_x: the gradients of out and x; of_x may be null. weights [4 * A, I]: sums for their gradients.
  void backward(const Layer &layer, Lanes *x, const Lanes *out, const Lanes *of_out, Lanes *of_x, Lanes *weights) {
    const int64_t across = 4 * layer.out, width = layer.out / layer.heads;
    project(layer, x, 3 * layer.out);
    const Matrix<Lanes> parts = rows_of(parts_.data(), across), of_parts = rows_of(of_parts_.data(), across);
    const Matrix<Lanes> scores = rows_of(scores_.data(), fields_), of_scores = rows_of(of_scores_.data(), fields_);
    for (int64_t i = 0; i < fields_; i++)
      for (int64_t j = 0; j < layer.out; j++) {
        const int64_t at = i * layer.out + j;
        of_parts(i, 3 * layer.out + j) = out[at] <= 0 ? Lanes{} : of_out[at];
      }
    for (int64_t h = 0; h < layer.heads; h++) {
      attend(layer, h);
      const int64_t q = h * width, k = layer.out + q, v = k + layer.out, r = v + layer.out;
      product<false>(fields_, width, fields_, scores.turned(), of_parts.from(0, r), of_parts.from(0, v));
      product<false>(fields_, fields_, width, of_parts.from(0, r), parts.from(0, v).turned(), of_scores);
      for (int64_t i = 0; i < fields_; i++) {
        Lanes *of = &of_scores(i, 0), *share = &scores(i, 0), sum{};
        for (int64_t j = 0; j < fields_; j++) sum += of[j] * share[j];
        for (int64_t j = 0; j < fields_; j++) of[j] = (of[j] - sum) * share[j];
      }
      product<false>(fields_, width, fields_, of_scores, parts.from(0, k), of_parts.from(0, q));
      product<false>(fields_, width, fields_, of_scores.turned(), parts.from(0, q), of_parts.from(0, k));
    }
    if (of_x)
      product<false>(fields_, layer.in, across, of_parts, rows_of(layer.weight, layer.in), rows_of(of_x, layer.in));
    product<true>(across, layer.in, fields_, of_parts.turned(), rows_of(x, layer.in), rows_of(weights, layer.in));
  }

 private:
  // The first columns of q, k, v and the residual.
  void project(const Layer &layer, Lanes *x, int64_t columns) {
    product<false>(fields_, columns, layer.in, rows_of(x, layer.in), rows_of(layer.weight, layer.in).turned(),
                   rows_of(parts_.data(), 4 * layer.out));
  }

  // The shares of a head, in scores_.
  void attend(const Layer &layer, int64_t head) {
    const int64_t width = layer.out / layer.heads;
    const Matrix<Lanes> parts = rows_of(parts_.data(), 4 * layer.out), scores = rows_of(scores_.data(), fields_);
    product<false>(fields_, fields_, width, parts.from(0, head * width),
                   parts.from(0, layer.out + head * width).turned(), scores);
    for (int64_t i = 0; i < fields_; i++) softmax(&scores(i, 0), fields_);
  }

  int64_t fields_;
  std::vector<Lanes> parts_, of_parts_, scores_, of_scores_;  // [F, 4 * A], the same, [F, F], the same
};

// Lanes of all inputs and outputs of the layers, one after the other.
int64_t kept_of(const Layer *layers, int64_t count, int64_t fields) {
  int64_t sum = count ? layers[0].in : 0;
  for (int64_t l = 0; l < count; l++) sum += layers[l].out;
  return sum * fields;
}

}  // namespace

extern "C" {

// Rows of a group.
int64_t embtab_lanes() { return LANES; }

// x [all, F, I] -> out [all, F, A] for the groups from .. to. kept: room for all layers' inputs and outputs, in lanes,
// of every group; or null. 1 where memory did not suffice.
int32_t embtab_attend(const Layer *layers, int64_t count, int64_t fields, int64_t all, const float *x, float *out,
                      float *kept, int64_t from, int64_t to) {
  try {
    Group group(layers, count, fields);
    const int64_t size = kept_of(layers, count, fields);
    std::vector<Lanes> own(kept ? 0 : size);
    for (int64_t g = from; g < to; g++) {
      Lanes *at = kept ? reinterpret_cast<Lanes *>(kept) + g * size : own.data();
      gather(x, fields * layers[0].in, g, all, at);
      for (int64_t l = 0; l < count; l++) {
        group.forward(layers[l], at, at + fields * layers[l].in);
        at += fields * layers[l].in;
      }
      scatter(at, fields * layers[count - 1].out, g, all, out);
    }
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

// The gradients of x (or null) and of the layers' weights, of the groups from .. to.
int32_t embtab_attend_backward(const Layer *layers, int64_t count, int64_t fields, int64_t all, float *kept,
                               const float *of_out, float *of_x, int64_t from, int64_t to) {
  try {
    Group group(layers, count, fields);
    const int64_t size = kept_of(layers, count, fields);
    int64_t widest = 0;
    std::vector<std::vector<Lanes>> weights;
    for (int64_t l = 0; l < count; l++) {
      widest = std::max({widest, layers[l].in, layers[l].out});
      weights.emplace_back(4 * layers[l].out * layers[l].in);
    }
    std::vector<Lanes> above(fields * widest), below(fields * widest);
    for (int64_t g = from; g < to; g++) {
      Lanes *at = reinterpret_cast<Lanes *>(kept) + (g + 1) * size - fields * layers[count - 1].out;
      gather(of_out, fields * layers[count - 1].out, g, all, above.data());
      for (int64_t l = count - 1; l >= 0; l--) {
        Lanes *x = at - fields * layers[l].in, *of = l || of_x ? below.data() : nullptr;
        group.backward(layers[l], x, at, above.data(), of, weights[l].data());
        at = x;
        above.swap(below);
      }
      if (of_x) scatter(above.data(), fields * layers[0].in, g, all, of_x);
    }
    for (int64_t l = 0; l < count; l++)
      for (size_t i = 0; i < weights[l].size(); i++)
        for (int lane = 0; lane < LANES; lane++) layers[l].gradient[i] += weights[l][i][lane];
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

}  // extern "C"
