// Lookups in stacked tables, and the optimizer's step on the rows that were read. Built and called by native.py.
//
// Memory is waited for as little as can be: rows are asked for before they are needed, each row that occurs is updated
// once, vectors are made of their parts on the way and written where they are wanted. Threads share the bags out, or the
// rows, and every number comes out the same however many there are. The compiler must not fuse multiplications and
// additions (-ffp-contract=off), so that it does on every processor, too.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;

// What is read: K rows for every id; ids in bags, B of them for each of F features, one feature after the other.
struct Batch {
  const int64_t *rows;     // [K, N]
  const int64_t *offsets;  // [F * B + 1] where bags begin; null where every id is a bag
  const float *weights;    // [N] factors of the ids' vectors, or null
  int64_t ids;             // N
  int64_t features;        // F
  int64_t bags;            // B
  int64_t parts;           // K
  int64_t op;              // how rows become a vector
  const int64_t *columns;  // [F] where a feature's vectors stand among those of a sample
  int64_t across;          // vectors of a sample, C
  int64_t first;           // number at which the vectors [B, C, V] begin; V = K * W where rows stand side by side, else W
  const float *saved;      // [K, N, W] the rows as they were read, where the tables have changed since; or null
  const float *gradient;   // in an update: that of the vectors of all batches that were read together
};

struct Tables {
  float *rows;     // [R, W]
  float *moments;  // nothing, [R, W] or [R], as the optimizer has it
  int64_t count;   // R
  int64_t width;   // W
  int64_t optimizer;
  float lr;
  float eps;
  float weight_decay;
  float max_gradient;  // infinite for no clamp
};

namespace {

enum Op { CONCAT, SUM, PRODUCT };
enum Arithmetic { ID, HASH, QUOTIENT, DIGIT };
enum Optimizer { SGD, ADAGRAD, ROWWISE_ADAGRAD };

constexpr int64_t AHEAD = 16;        // rows between asking for one and needing it
constexpr int64_t LINE = 64;         // bytes that come together
#ifdef __SANITIZE_ADDRESS__
constexpr size_t LARGE_PAGE = 8;  // so that nothing is past the end unseen
#else
constexpr size_t LARGE_PAGE = 1 << 21;
#endif
constexpr int64_t TOGETHER = 1 << 9;   // bags whose rows are looked at before any is read
constexpr int64_t MANY = 1 << 20;    // bytes of vectors from which on they are not kept in the caches
constexpr int64_t MOST_KEPT = 1 << 28;  // bytes that updates leave to the next ones, all together
constexpr int64_t SAMPLES = 1 << 10;    // rows that say how many are read where
constexpr int64_t MOST_SUMS = 1 << 24;  // numbers of a table each of whose rows may have a sum of its own

// Has memory brought near. (Always inline: a compiler that looks at it alone finds that it does nothing.)
template <bool FOR_WRITING>
__attribute__((always_inline)) inline void ask(const float *numbers, int64_t width) {
  const char *start = reinterpret_cast<const char *>(numbers);
  const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
  for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(start + at, FOR_WRITING);
}

// Calls work(part) for each part, in as many threads as the pool gives: OpenMP's, which torch's kernels use, so that no
// thread of theirs is in the way of ours. Without OpenMP one after the other.
template <class Work>
void in_threads(int64_t parts, Work work) {
  if (parts == 1) return work(0);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(parts))
  for (int64_t part = 0; part < parts; part++) work(part);
}

// A number that the compiler knows, which makes loops of known length; W = 0 for one that it does not.
template <int W>
struct Known {
  static constexpr int number = W;  // or 0
  int64_t given;
  operator int64_t() const { return W ? W : given; }
};

template <class Work>
inline void with_width(int64_t width, Work work) {
  switch (width) {
    case 8: return work(Known<8>{width});
    case 16: return work(Known<16>{width});
    case 32: return work(Known<32>{width});
    case 64: return work(Known<64>{width});
    default: return work(Known<0>{width});
  }
}

// The same for the number of parts.
template <class Work>
inline void with_parts(int64_t parts, Work work) {
  switch (parts) {
    case 1: return work(Known<1>{parts});
    case 2: return work(Known<2>{parts});
    default: return work(Known<0>{parts});
  }
}

// Rows of the tables that a vector has side by side.
inline int64_t rows_beside(const Batch &batch) { return batch.op == CONCAT ? batch.parts : 1; }

inline int64_t start_of(const Batch &batch, int64_t bag) { return batch.offsets ? batch.offsets[bag] : bag; }

// Calls visit(id, stop, vector) for some bags, which hold the ids from .. stop, one feature after the other: as rows lie
// in memory.
template <class Visit>
INLINE inline void each_bag(const Batch batch, int64_t from, int64_t to, Visit visit) {
  for (int64_t bag = from; bag < to;) {
    const int64_t feature = bag / batch.bags, last = std::min(to, (feature + 1) * batch.bags);
    int64_t vector = (bag - feature * batch.bags) * batch.across + batch.columns[feature];
    for (int64_t id = start_of(batch, bag); bag < last; bag++, vector += batch.across) {
      const int64_t stop = start_of(batch, bag + 1);
      visit(id, stop, vector);
      id = stop;
    }
  }
}

// Calls visit(id, vector) for the ids of some bags.
template <class Visit>
INLINE inline void by_feature(const Batch batch, int64_t from, int64_t to, Visit visit) {
  each_bag(batch, from, to, [=](int64_t id, int64_t stop, int64_t vector) INLINE {
    for (; id < stop; id++) visit(id, vector);
  });
}

// Eight numbers at once, whatever the processor's vectors; they need not be aligned.
typedef float Eight __attribute__((vector_size(32)));

inline Eight eight(const float *at) {
  Eight numbers;
  std::memcpy(&numbers, at, sizeof numbers);
  return numbers;
}

inline void put(float *at, Eight numbers) { std::memcpy(at, &numbers, sizeof numbers); }

inline void add_to(float *sum, Eight numbers) { put(sum, eight(sum) + numbers); }
inline void add_to(float *sum, float number) { *sum += number; }

template <class W>
INLINE inline void add(float *sum, const float *row, float weight, W width) {
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) add_to(sum + x, weight * eight(row + x));
  for (; x < width; x++) sum[x] += weight * row[x];
}

// At most so far from zero; what is no number stays so.
inline float clamped(float number, float most) {
  number = number > most ? most : number;
  return number < -most ? -most : number;
}

inline Eight clamped(Eight numbers, float most) {
  const Eight high = Eight{} + most;
  numbers = numbers > high ? high : numbers;
  return numbers < -high ? -high : numbers;
}

template <class W>
INLINE inline void add_clamped(float *sum, const float *row, float most, float weight, W width) {
  if (most == INFINITY) return add(sum, row, weight, width);
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) add_to(sum + x, weight * clamped(eight(row + x), most));
  for (; x < width; x++) sum[x] += weight * clamped(row[x], most);
}

// Writes to whole cache lines that nobody has read, and so nobody has to read first. (Elsewhere than on x86: as ever.)
inline void put_past_the_caches(float *at, Eight numbers) {
#if defined(__AVX__)
  _mm256_stream_ps(at, reinterpret_cast<__m256>(numbers));
#elif defined(__SSE2__)
  for (int half = 0; half < 8; half += 4)
    _mm_stream_ps(at + half, _mm_set_ps(numbers[half + 3], numbers[half + 2], numbers[half + 1], numbers[half]));
#else
  put(at, numbers);
#endif
}

template <bool PAST_THE_CACHES>
inline void write(float *at, Eight numbers) {
  if (PAST_THE_CACHES)
    put_past_the_caches(at, numbers);
  else
    put(at, numbers);
}

template <bool PAST_THE_CACHES>
inline void write(float *at, float number) {
  *at = number;
}

template <bool PAST_THE_CACHES, class W>
inline void copy(float *out, const float *row, float weight, W width) {
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) write<PAST_THE_CACHES>(out + x, weight * eight(row + x));
  for (; x < width; x++) out[x] = weight * row[x];
}

// The row that is read at a place [K, N], as it was then: it still is in the table, or was saved.
template <bool SAVED, class W>
inline const float *row_read(const Batch &batch, const float *table, int64_t at, W width) {
  return SAVED ? batch.saved + at * width : table + batch.rows[at] * width;
}

// Gives use(x, product) the products of numbers (or of ones), a weight and the rows of an id, but for one part's:
// `without`, or -1.
template <bool SAVED, class Parts, class W, class Use>
inline void multiply(const float *numbers, float weight, const Batch &batch, const float *table, int64_t id,
                     int64_t without, Parts parts, W width, Use use) {
  const auto row_of = [&](int64_t k) { return row_read<SAVED>(batch, table, k * batch.ids + id, width); };
  const Eight ones = {1, 1, 1, 1, 1, 1, 1, 1};
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) {
    Eight product = weight * (numbers ? eight(numbers + x) : ones);
    for (int64_t k = 0; k < parts; k++)
      if (k != without) product *= eight(row_of(k) + x);
    use(x, product);
  }
  for (; x < width; x++) {
    float product = weight * (numbers ? numbers[x] : 1.0f);
    for (int64_t k = 0; k < parts; k++)
      if (k != without) product *= row_of(k)[x];
    use(x, product);
  }
}

// The sum of squares; always in the same order.
template <class W>
inline float squares(const float *row, W width) {
  Eight lanes = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) lanes += eight(row + x) * eight(row + x);
  for (int lane = 0; x + lane < width; lane++) lanes[lane] += row[x + lane] * row[x + lane];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// One step on a row, by the sum of its gradients.
template <class W>
inline void step(const Tables tables, int64_t row, const float *gradient, W width) {
  float *values = tables.rows + row * width;
  if (tables.optimizer == SGD) {
    add(values, gradient, -tables.lr, width);
  } else if (tables.optimizer == ROWWISE_ADAGRAD) {
    const float moment = tables.moments[row] += squares(gradient, width) / static_cast<float>(int64_t{width});
    add(values, gradient, -tables.lr / (std::sqrt(moment) + tables.eps), width);
  } else {
    float *moments = tables.moments + row * width;
    for (int64_t x = 0; x < width; x++) {
      moments[x] += gradient[x] * gradient[x];
      values[x] -= tables.lr * gradient[x] / (std::sqrt(moments[x]) + tables.eps);
    }
  }
}

__attribute__((always_inline)) inline void ask_for_step(const Tables tables, int64_t row, int64_t width) {
  ask<true>(tables.rows + row * width, width);
  if (tables.optimizer == ADAGRAD) ask<true>(tables.moments + row * width, width);
  if (tables.optimizer == ROWWISE_ADAGRAD) ask<true>(tables.moments + row, 1);
}

// The hash of embtab/hashing.py.
inline int64_t hashed(int64_t id, int64_t seed, int64_t num_rows) {
  uint64_t x = static_cast<uint64_t>(id) + static_cast<uint64_t>(seed);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<int64_t>((x >> 33) * static_cast<uint64_t>(num_rows) >> 31);
}

#ifdef __SIZEOF_INT128__
__extension__ typedef unsigned __int128 Wide;
#else
typedef uint64_t Wide;
#endif

// Quotients of numbers below 2^32 by one below 2^32: the high half of a product with its reciprocal, which is exact
// (Lemire, Kaser and Kurz, Faster remainder by direct computation, 2019) and several times as fast as a division.
class Quotient {
 public:
  explicit Quotient(int64_t by)
      : reciprocal_(by == 1 ? 0 : ~uint64_t{0} / static_cast<uint64_t>(by) + 1), by_one_(by == 1 ? -1 : 0) {}

  int64_t operator()(int64_t id) const {
    return static_cast<int64_t>(Wide{reciprocal_} * static_cast<uint64_t>(id) >> 32 >> 32) + (id & by_one_);
  }

 private:
  uint64_t reciprocal_;  // of 1 it would not fit
  int64_t by_one_;
};

inline bool below_2_to_the_32(const int64_t *ids, int64_t count, int64_t divisor) {
  uint64_t bits = static_cast<uint64_t>(divisor);
  for (int64_t i = 0; i < count; i++) bits |= static_cast<uint64_t>(ids[i]);
  return sizeof(Wide) == 16 && bits >> 32 == 0;
}

// Ids to rows, by what a method does with them; c: its constants.
template <class Row>
inline void each_row(const int64_t *ids, int64_t count, int64_t base, int64_t *rows, Row row_of) {
  for (int64_t i = 0; i < count; i++) rows[i] = base + row_of(ids[i]);
}

template <class Divide>
inline void rows_by(Divide by_c0, Divide by_c1, int64_t arithmetic, const int64_t *ids, int64_t count, int64_t base,
                    const int64_t *c, int64_t *rows) {
  const int64_t c1 = c[1], c2 = c[2];
  if (arithmetic == QUOTIENT)
    each_row(ids, count, base, rows, [=](int64_t id) { return by_c0(id) * c1 + id * c2; });
  else
    each_row(ids, count, base, rows, [=](int64_t id) {
      const int64_t quotient = by_c0(id);
      return quotient - by_c1(quotient) * c1;
    });
}

inline void rows_of(int64_t arithmetic, const int64_t *ids, int64_t count, int64_t base, const int64_t *c,
                    int64_t *rows) {
  const int64_t c0 = c[0], c1 = c[1];
  if (arithmetic == ID) return each_row(ids, count, base, rows, [](int64_t id) { return id; });
  if (arithmetic == HASH) return each_row(ids, count, base, rows, [=](int64_t id) { return hashed(id, c0, c1); });
  const int64_t by = arithmetic == QUOTIENT ? 1 : c1;
  if (below_2_to_the_32(ids, count, c0 | by))
    return rows_by(Quotient(c0), Quotient(by), arithmetic, ids, count, base, c, rows);
  const auto divided_by = [](int64_t divisor) { return [=](int64_t id) { return id / divisor; }; };
  rows_by(divided_by(c0), divided_by(by), arithmetic, ids, count, base, c, rows);
}

// Whether ids may be divided by a method's constants.
inline bool divides(int64_t arithmetic, const int64_t *c) {
  return (arithmetic != QUOTIENT && arithmetic != DIGIT) || (c[0] > 0 && (arithmetic == QUOTIENT || c[1] > 0));
}

// Large pages for memory that will be read at random.
inline void in_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const int64_t skipped = static_cast<int64_t>(first - reinterpret_cast<uintptr_t>(memory));
  if (bytes > skipped) madvise(reinterpret_cast<void *>(first), static_cast<size_t>(bytes - skipped), MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Memory that grows and is kept: fresh pages cost more than the work that is done in them.
template <class T>
class Kept {
 public:
  Kept() = default;
  Kept(const Kept &) = delete;
  ~Kept() { std::free(memory_); }

  // Room for so many; true where it is new, and holds zeros.
  bool room(int64_t count) {
    if (count <= count_) return false;
    std::free(memory_);
    memory_ = nullptr, count_ = 0;
    const size_t bytes = ((static_cast<size_t>(count) * sizeof(T) - 1) / LARGE_PAGE + 1) * LARGE_PAGE;
    memory_ = static_cast<T *>(std::aligned_alloc(LARGE_PAGE, bytes));
    if (!memory_) throw std::bad_alloc();
    count_ = static_cast<int64_t>(bytes / sizeof(T));
    in_large_pages(memory_, static_cast<int64_t>(bytes));
    clear();
    return true;
  }

  void clear() { std::memset(static_cast<void *>(memory_), 0, static_cast<size_t>(count_) * sizeof(T)); }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  T *at(int64_t place) { return memory_ + place; }
  T &operator[](int64_t place) { return memory_[place]; }

 private:
  T *memory_ = nullptr;
  int64_t count_ = 0;
};

inline uint64_t mixed(int64_t row) { return static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u; }

// Distinct rows, in the order in which they first occur.
class Distinct {
 public:
  // Forgets all rows and makes room for so many.
  void start(int64_t most) {
    bits_ = 4;
    while ((int64_t{1} << bits_) < 2 * most) bits_++;
    rows_.room(most + 1);
    before_ += static_cast<uint32_t>(count_);
    count_ = 0;
    if (!places_.room(int64_t{1} << bits_) && before_ <= UINT32_MAX - static_cast<uint32_t>(most)) return;
    places_.clear();
    before_ = 0;
  }

  // Calls put(i, slot) with where each of the rows row_of(i) stands among the distinct ones.
  template <class RowOf, class Put>
  void find(int64_t count, RowOf row_of, Put put) {
    Place *places = places_.at(0);
    uint32_t *distinct = rows_.at(0), found = static_cast<uint32_t>(count_);
    const uint32_t before = before_;
    const uint64_t last = (uint64_t{1} << bits_) - 1;
    const int shift = 64 - bits_;
    for (int64_t i = 0; i < count; i++) {
      if (i + AHEAD < count) __builtin_prefetch(places + (mixed(row_of(i + AHEAD)) >> shift), true);
      const uint32_t row = static_cast<uint32_t>(row_of(i));
      uint64_t at = mixed(row) >> shift;
      while (places[at].number > before && places[at].row != row) at = (at + 1) & last;
      // No branch, for nobody can tell whether a row is new.
      const bool is_new = places[at].number <= before;
      const uint32_t number = is_new ? before + found + 1 : places[at].number;
      places[at] = Place{row, number};
      distinct[found] = row;
      found += is_new;
      put(i, number - before - 1);
    }
    count_ = found;
  }

  int64_t bytes() const { return places_.bytes() + rows_.bytes(); }
  int64_t count() const { return count_; }
  const uint32_t *rows() { return rows_.at(0); }

 private:
  struct Place {
    uint32_t row;
    uint32_t number;  // slots are numbered on and on, so that numbers of former batches need not be wiped out
  };

  Kept<Place> places_;
  Kept<uint32_t> rows_;
  int bits_ = 4;
  uint32_t before_ = 0;
  int64_t count_ = 0;
};

// Whether the tables have all rows of the ids from .. to.
bool all_known(const Batch &batch, int64_t from, int64_t to, int64_t count) {
  uint64_t wrong = 0;  // its highest bit: of a row below zero, or of one that is count or more
  for (int64_t k = 0; k < batch.parts; k++) {
    const int64_t *rows = batch.rows + k * batch.ids;
    for (int64_t id = from; id < to; id++)
      wrong |= static_cast<uint64_t>(rows[id]) | (static_cast<uint64_t>(count - 1) - static_cast<uint64_t>(rows[id]));
  }
  return wrong >> 63 == 0;
}

// Whether vectors are so many that those who read them will not find them in a cache anyway, and fill whole lines.
inline bool past_the_caches(const Batch &batch, const float *vectors, int64_t width) {
  const int64_t bytes = rows_beside(batch) * width * static_cast<int64_t>(sizeof(float));
  const bool whole = bytes % LINE == 0 && width % 8 == 0 && reinterpret_cast<uintptr_t>(vectors) % LINE == 0;
  return whole && batch.bags * batch.across * bytes >= MANY;
}

// Vectors of one id each, whose rows are written as they stand.
template <bool PAST_THE_CACHES, class Parts, class W>
void write_rows(const Batch batch, const float *table, float *vectors, int64_t from, int64_t to, Parts parts, W width) {
  each_bag(batch, from, to, [=](int64_t id, int64_t, int64_t vector) {
    const float weight = batch.weights ? batch.weights[id] : 1.0f;
    for (int64_t k = 0; k < parts; k++) {
      const int64_t *rows = batch.rows + k * batch.ids;
      if (id + AHEAD < batch.ids) ask<false>(table + rows[id + AHEAD] * width, width);
      copy<PAST_THE_CACHES>(vectors + (vector * parts + k) * width, table + rows[id] * width, weight, width);
    }
  });
}

// Vectors of one id each, whose rows are multiplied.
template <bool PAST_THE_CACHES, class Parts, class W>
void write_products(const Batch batch, const float *table, float *vectors, int64_t from, int64_t to, Parts parts,
                    W width) {
  each_bag(batch, from, to, [=](int64_t id, int64_t, int64_t vector) {
    for (int64_t k = 0; k < parts && id + AHEAD < batch.ids; k++)
      ask<false>(table + batch.rows[k * batch.ids + id + AHEAD] * width, width);
    multiply<false>(nullptr, batch.weights ? batch.weights[id] : 1.0f, batch, table, id, -1, parts, width,
             [=](int64_t x, auto product) { write<PAST_THE_CACHES>(vectors + vector * width + x, product); });
  });
}

// Sums of the vectors of bags.
template <bool PAST_THE_CACHES, class Parts, class W>
void write_sums(const Batch batch, const float *table, float *vectors, int64_t from, int64_t to, Parts parts, W width) {
  const int64_t beside = rows_beside(batch), size = beside * width;
  const bool multiplied = batch.op == PRODUCT && parts > 1;
  std::vector<float> many(static_cast<size_t>(size));
  each_bag(batch, from, to, [=, many = many.data()](int64_t id, int64_t stop, int64_t vector) {
    constexpr int known = static_cast<int>(Parts::number) * static_cast<int>(W::number);
    float few[known ? known : 1];  // so few that registers may hold them
    float *sum = known ? few : many;
    std::fill_n(sum, known ? int64_t{known} : size, 0.0f);
    for (; id < stop; id++) {
      const float weight = batch.weights ? batch.weights[id] : 1.0f;
      for (int64_t k = 0; k < parts; k++) {
        const int64_t *rows = batch.rows + k * batch.ids;
        if (id + AHEAD < batch.ids) ask<false>(table + rows[id + AHEAD] * width, width);
        if (!multiplied) add(sum + (beside > 1 ? k * width : 0), table + rows[id] * width, weight, width);
      }
      if (multiplied)
        multiply<false>(nullptr, weight, batch, table, id, -1, parts, width,
                 [=](int64_t x, auto product) { add_to(sum + x, product); });
    }
    for (int64_t k = 0; k < beside; k++)
      copy<PAST_THE_CACHES>(vectors + vector * size + k * width, sum + k * width, 1.0f, width);
  });
}

template <bool PAST_THE_CACHES, class W>
void write_vectors(const Batch batch, const float *table, float *vectors, int64_t from, int64_t to, W width) {
  with_parts(batch.parts, [=](auto parts) {
    if (batch.offsets || (batch.op == SUM && parts > 1))
      write_sums<PAST_THE_CACHES>(batch, table, vectors, from, to, parts, width);
    else if (batch.op == PRODUCT && parts > 1)
      write_products<PAST_THE_CACHES>(batch, table, vectors, from, to, parts, width);
    else
      write_rows<PAST_THE_CACHES>(batch, table, vectors, from, to, parts, width);
  });
#ifdef __SSE2__
  if (PAST_THE_CACHES) _mm_sfence();
#endif
}

inline bool is_product(const Batch &batch) { return batch.op == PRODUCT && batch.parts > 1; }

// Where a row is read. The row is counted from its range's first; above: the piece of the gradient, as wide as a row, that
// reaches it.
struct Place {
  uint32_t row, above;
};

// The id and the part whose row it is, for weights and products.
struct Source {
  uint32_t id, part;
};

// Bags from .. to of a batch, and their ids: all of their rows are the caller's; or, with places, these are.
struct Piece {
  const Batch *batch;
  int64_t from, to, id, stop;
  Place *places;
  const Source *sources;
  int64_t count;
};

// Sums up the gradients of every row of a range, in the order of the ids, feature after feature, and steps once on each.
//
// Sums lie one after the other in the order in which rows occur, found by a hash. Where the table has hardly more rows
// than are read each row has a sum of its own, and nothing is looked for.
class Update {
 public:
  // Room for what others note: the places of so many rows.
  void make_room(int64_t places, bool with_sources) {
    places_.room(places + 1);
    if (with_sources) sources_.room(places + 1);
  }
  Place *places() { return places_.at(0); }
  Source *sources() { return sources_.at(0); }

  // Reads the batches and, for products, the tables; all callers have to be through before one goes on.
  void sum_up(const std::vector<Piece> &pieces, const Tables &tables, int64_t first, int64_t last, bool each_has_a_sum) {
    each_has_a_sum_ = each_has_a_sum;
    first_ = first, last_ = last;
    if (each_has_a_sum_) {
      marked_.room(last - first + 1);
      rows_.room(last - first + 1);
      sums_.room((last - first) * tables.width + 1);
    } else {
      find_slots(pieces, tables.width);
    }
    const uint32_t *slots = rows_.at(0);
    for (const Piece &piece : pieces)
      if (piece.places)
        add_places(piece, tables);
      else
        slots += add_all(piece, tables, slots);
  }

  void run(const Tables &tables) {
    const int64_t count = each_has_a_sum_ ? list_marked() : distinct_.count();
    const uint32_t *rows = each_has_a_sum_ ? rows_.at(0) : distinct_.rows();
    with_width(tables.width, [=, sums = sums_.at(0), first = first_, by_row = each_has_a_sum_](auto width) {
      for (int64_t slot = 0; slot < count; slot++) {
        if (slot + AHEAD < count) ask_for_step(tables, first + rows[slot + AHEAD], width);
        const int64_t row = first + rows[slot];
        float *sum = sums + (by_row ? rows[slot] : slot) * int64_t{width};
        if (tables.weight_decay != 0) add(sum, tables.rows + row * width, tables.weight_decay, width);
        step(tables, row, sum, width);
        std::fill_n(sum, int64_t{width}, 0.0f);  // for the next batch
      }
    });
  }

  int64_t bytes() const {
    return distinct_.bytes() + rows_.bytes() + marked_.bytes() + places_.bytes() + sources_.bytes() + sums_.bytes();
  }

 private:
  // Finds the places of the sums: rows_ holds those of pieces that are whole, [K, ids] each; places name their own.
  void find_slots(const std::vector<Piece> &pieces, int64_t width) {
    int64_t most = 0, whole = 0;
    for (const Piece &piece : pieces) {
      const int64_t read = piece.places ? piece.count : (piece.stop - piece.id) * piece.batch->parts;
      most += read, whole += piece.places ? 0 : read;
    }
    distinct_.start(std::min(most, last_ - first_));
    rows_.room(whole + 1);
    uint32_t *slots = rows_.at(0);
    for (const Piece &piece : pieces) {
      Place *places = piece.places;
      if (places) {
        distinct_.find(
            piece.count, [=](int64_t at) { return int64_t{places[at].row}; },
            [=](int64_t at, uint32_t slot) { places[at].row = slot; });
        continue;
      }
      for (int64_t k = 0; k < piece.batch->parts; k++, slots += piece.stop - piece.id) {
        const int64_t *rows = piece.batch->rows + k * piece.batch->ids + piece.id;
        distinct_.find(
            piece.stop - piece.id, [=, first = first_](int64_t at) { return rows[at] - first; },
            [=](int64_t at, uint32_t slot) { slots[at] = slot; });
      }
    }
    sums_.room(distinct_.count() * width + 1);
  }

  // Adds what reaches the rows of a piece to their sums; how many slots were used.
  int64_t add_all(const Piece &piece, const Tables &tables, const uint32_t *slots) {
    const int64_t ids = piece.stop - piece.id;
    if (each_has_a_sum_)
      add_up(piece, tables, [rows = piece.batch->rows, all = piece.batch->ids, first = first_, marked = marked_.at(0)](
                                int64_t k, int64_t id) INLINE {
        const int64_t row = rows[k * all + id] - first;
        marked[row] = 1;
        return row;
      });
    else
      add_up(piece, tables, [ids, before = slots - piece.id](int64_t k, int64_t id) INLINE {
        return int64_t{before[k * ids + id]};
      });
    return ids * piece.batch->parts;
  }

  template <class Slot>
  void add_up(const Piece &piece, const Tables &tables, Slot slot_of) {
    with_width(tables.width, [&](auto width) {
      with_parts(piece.batch->parts, [&](auto parts) {
        if (piece.batch->saved)
          add_up<true>(piece, tables, slot_of, parts, width);
        else
          add_up<false>(piece, tables, slot_of, parts, width);
      });
    });
  }

  template <bool SAVED, class Slot, class Parts, class W>
  void add_up(const Piece &piece, const Tables &tables, Slot slot_of, Parts parts, W width) {
    const float *table = tables.rows;
    const float most = tables.max_gradient;
    const Batch batch = *piece.batch;
    const bool multiplied = batch.op == PRODUCT && parts > 1;
    const int64_t beside = rows_beside(batch), next = (batch.offsets ? 1 : AHEAD) * batch.across;
    const float *gradient = batch.gradient + batch.first;
    float *sums = sums_.at(0);
    const int64_t stop = piece.stop;
    by_feature(batch, piece.from, piece.to, [=](int64_t id, int64_t vector) INLINE {
      const float weight = batch.weights ? batch.weights[id] : 1.0f;
      const float *above = gradient + vector * beside * width;
      ask<false>(above + next * beside * width, beside * width);
      for (int64_t k = 0; k < parts; k++) {
        if (id + AHEAD < stop) {
          ask<true>(sums + slot_of(k, id + AHEAD) * width, width);
          if (multiplied) ask<false>(row_read<SAVED>(batch, table, k * batch.ids + id + AHEAD, width), width);
        }
        float *sum = sums + slot_of(k, id) * width;
        if (multiplied)
          multiply<SAVED>(above, weight, batch, table, id, k, parts, width,
                          [=](int64_t x, auto product) { add_to(sum + x, clamped(product, most)); });
        else
          add_clamped(sum, above + (beside > 1 ? k * width : 0), most, weight, width);
      }
    });
  }

  // The same for places.
  void add_places(const Piece &piece, const Tables &tables) {
    with_width(tables.width, [&](auto width) {
      if (piece.batch->saved)
        add_places<true>(piece, tables, width);
      else
        add_places<false>(piece, tables, width);
    });
  }

  template <bool SAVED, class W>
  void add_places(const Piece &piece, const Tables &tables, W width) {
    const Batch batch = *piece.batch;
    const bool multiplied = is_product(batch);
    const float *table = tables.rows, *gradient = batch.gradient + batch.first;
    const float most = tables.max_gradient;
    const Place *places = piece.places;
    const Source *sources = piece.sources;
    const int64_t count = piece.count;
    float *sums = sums_.at(0);
    uint8_t *marked = each_has_a_sum_ ? marked_.at(0) : nullptr;
    if (marked)
      for (int64_t i = 0; i < count; i++) marked[places[i].row] = 1;
    for (int64_t i = 0; i < count; i++) {
      const Place later = places[std::min(i + AHEAD, count - 1)], place = places[i];
      ask<true>(sums + later.row * int64_t{width}, width);
      ask<false>(gradient + later.above * int64_t{width}, width);
      const float *above = gradient + place.above * int64_t{width};
      const float weight = batch.weights ? batch.weights[sources[i].id] : 1.0f;
      float *sum = sums + place.row * int64_t{width};
      if (multiplied)
        multiply<SAVED>(above, weight, batch, table, sources[i].id, sources[i].part, batch.parts, width,
                        [=](int64_t x, auto product) { add_to(sum + x, clamped(product, most)); });
      else
        add_clamped(sum, above, most, weight, width);
    }
  }

  // The rows that are marked, and no longer are, as the first of rows_.
  int64_t list_marked() {
    uint32_t *rows = rows_.at(0), found = 0;
    uint8_t *marked = marked_.at(0);
    for (int64_t row = 0; row < last_ - first_; row++) {
      rows[found] = static_cast<uint32_t>(row);
      found += marked[row];
      marked[row] = 0;
    }
    return found;
  }

  bool each_has_a_sum_ = false;
  int64_t first_ = 0, last_ = 0;  // the caller's rows
  Distinct distinct_;
  Kept<uint32_t> rows_;    // slots of the rows of whole pieces, or the rows that are marked
  Kept<uint8_t> marked_;   // rows that occur; none between updates
  Kept<Place> places_;
  Kept<Source> sources_;
  Kept<float> sums_;       // zeros between updates
};

// Updates that nobody is running, for their memory.
std::mutex idle_lock;
std::vector<std::unique_ptr<Update>> idle;

std::unique_ptr<Update> taken() {
  const std::lock_guard<std::mutex> lock(idle_lock);
  if (idle.empty()) return std::make_unique<Update>();
  std::unique_ptr<Update> last = std::move(idle.back());
  idle.pop_back();
  return last;
}

void put_back(std::unique_ptr<Update> update) {
  try {
    const std::lock_guard<std::mutex> lock(idle_lock);
    int64_t bytes = update->bytes();
    for (const std::unique_ptr<Update> &each : idle) bytes += each->bytes();
    if (bytes <= MOST_KEPT) idle.push_back(std::move(update));
  } catch (const std::bad_alloc &) {  // the next one takes memory anew
  }
}

// The first of the bags that one of several callers has: about as many ids for each.
int64_t first_bag(const Batch &batch, int64_t part, int64_t parts) {
  const int64_t bags = batch.features * batch.bags;
  if (part == 0 || part == parts || !batch.offsets) return bags * part / parts;
  return std::lower_bound(batch.offsets, batch.offsets + bags, batch.ids * part / parts) - batch.offsets;
}

// The rows of an update, shared out by range, a range for each thread.
//
// A thread looks at its share of the ids alone. Where it finds that all rows of a feature are of one range, it leaves them
// to that range's thread as they stand; of others it notes the places, range by range, in the order of the ids.
class Shares {
 public:
  Shares(const Batch *batches, int64_t count, int64_t rows, int64_t threads) : threads_(threads) {
    for (const Batch *batch = batches; batch < batches + count; batch++) {
      read_ += batch->ids * batch->parts;
      with_sources_ = with_sources_ || batch->weights || is_product(*batch);
      for (int64_t thread = 0; thread < threads; thread++)
        cut(*batch, thread, first_bag(*batch, thread, threads), first_bag(*batch, thread + 1, threads));
    }
    find_ranges(batches, count, rows);
    counts_.resize(segments_.size() * static_cast<size_t>(threads));
    next_.resize(counts_.size());
    noted_.resize(static_cast<size_t>(threads));
  }

  int64_t read() const { return read_; }
  bool any_noted() const { return any_noted_; }
  int64_t first(int64_t range) const { return starts_[static_cast<size_t>(range)]; }

  // Counts the rows of a thread's share by range.
  void count(int64_t thread) {
    for (size_t s = 0; s < segments_.size(); s++)
      if (segments_[s].thread == thread) count(segments_[s], &counts_[place_of(s, 0)]);
  }

  // Makes room for all places: in the updates, which have one range each.
  void lay_out(const std::vector<std::unique_ptr<Update>> &updates) {
    for (const Segment &segment : segments_) any_noted_ = any_noted_ || segment.owner == SEVERAL;
    for (int64_t range = 0; range < threads_; range++) {
      int64_t noted = 0;
      for (size_t s = 0; s < segments_.size(); s++)
        if (segments_[s].owner == SEVERAL) noted += counts_[place_of(s, range)];
      Update &update = *updates[static_cast<size_t>(range)];
      update.make_room(noted, with_sources_);
      noted_[static_cast<size_t>(range)] = {update.places(), update.sources()};
      Place *next = update.places();
      for (size_t s = 0; s < segments_.size(); s++) {
        next_[place_of(s, range)] = next;
        if (segments_[s].owner == SEVERAL) next += counts_[place_of(s, range)];
      }
    }
  }

  // Notes the places of a thread's share.
  void note(int64_t thread) {
    for (size_t s = 0; s < segments_.size(); s++) {
      const Segment &segment = segments_[s];
      if (segment.thread == thread && segment.owner == SEVERAL)
        with_parts(segment.batch->parts, [&](auto parts) {
          with_parts(threads_, [&](auto ranges) { note(segment, &next_[place_of(s, 0)], parts, ranges); });
        });
    }
  }

  // What is a range's, in the order of the ids.
  std::vector<Piece> pieces(int64_t range) const {
    std::vector<Piece> made;
    const Noted &noted = noted_[static_cast<size_t>(range)];
    for (size_t s = 0; s < segments_.size(); s++) {
      const Segment &segment = segments_[s];
      const int64_t count = counts_[place_of(s, range)];
      if (segment.owner == SEVERAL && count) {
        Place *const places = next_[place_of(s, range)] - count;
        const Source *const sources = with_sources_ ? noted.sources + (places - noted.places) : nullptr;
        made.push_back({segment.batch, 0, 0, 0, 0, places, sources, count});
      }
      if (segment.owner != range) continue;
      if (!made.empty() && !made.back().places && made.back().batch == segment.batch && made.back().to == segment.from)
        made.back().to = segment.to, made.back().stop = segment.stop;
      else
        made.push_back({segment.batch, segment.from, segment.to, segment.id, segment.stop, nullptr, nullptr, 0});
    }
    return made;
  }

 private:
  static constexpr int64_t SEVERAL = -1;

  // Bags of one feature, which a thread looks at, and the range that has all of their rows.
  struct Segment {
    const Batch *batch;
    int64_t thread, from, to, id, stop, owner;
  };

  struct Noted {
    Place *places;
    Source *sources;
  };

  void cut(const Batch &batch, int64_t thread, int64_t from, int64_t to) {
    while (from < to) {
      const int64_t stop = std::min(to, (from / batch.bags + 1) * batch.bags);
      if (start_of(batch, from) < start_of(batch, stop))
        segments_.push_back({&batch, thread, from, stop, start_of(batch, from), start_of(batch, stop), 0});
      from = stop;
    }
  }

  // Rows at which ranges begin, so that of a sample of the rows that are read each has as many.
  void find_ranges(const Batch *batches, int64_t count, int64_t rows) {
    starts_.assign(static_cast<size_t>(threads_ + 1), rows);
    starts_[0] = 0;
    if (threads_ == 1) return;
    std::vector<int64_t> samples;
    const int64_t step = std::max(read_ / SAMPLES, int64_t{1});
    for (int64_t i = 0; i < count; i++)
      for (int64_t at = 0; at < batches[i].ids * batches[i].parts; at += step) samples.push_back(batches[i].rows[at]);
    std::sort(samples.begin(), samples.end());
    const int64_t found = static_cast<int64_t>(samples.size());
    for (int64_t range = 1; range < threads_ && found; range++)
      starts_[static_cast<size_t>(range)] = samples[static_cast<size_t>(found * range / threads_)];
  }

  void count(Segment &segment, int64_t *counts) {
    const int64_t all = (segment.stop - segment.id) * segment.batch->parts;
    segment.owner = SEVERAL;
    int64_t behind = 0;
    for (int64_t range = threads_ - 1; range >= 0; range--) {
      const int64_t from_here = range ? rows_from(segment, first(range)) : all;
      counts[range] = from_here - behind;
      behind = from_here;
      if (counts[range] == all) segment.owner = range;
    }
  }

  static int64_t rows_from(const Segment &segment, int64_t first) {
    int64_t found = 0;
    for (int64_t k = 0; k < segment.batch->parts; k++) {
      const int64_t *rows = segment.batch->rows + k * segment.batch->ids;
      for (int64_t id = segment.id; id < segment.stop; id++) found += rows[id] >= first;
    }
    return found;
  }

  template <class Parts, class Ranges>
  void note(const Segment &segment, Place **next, Parts parts, Ranges ranges) const {
    const Batch batch = *segment.batch;
    const int64_t beside = rows_beside(batch), *const starts = starts_.data();
    const Noted *const noted = noted_.data();
    by_feature(batch, segment.from, segment.to,
               [=, sources = with_sources_](int64_t id, int64_t vector) INLINE {
      for (int64_t k = 0; k < parts; k++) {
        const int64_t row = batch.rows[k * batch.ids + id];
        int64_t range = 0;
        for (int64_t i = 1; i < ranges; i++) range += row >= starts[i];
        Place *const place = next[range]++;
        place->row = static_cast<uint32_t>(row - starts[range]);
        place->above = static_cast<uint32_t>(vector * beside + (beside > 1 ? k : 0));
        if (sources)
          noted[range].sources[place - noted[range].places] = {static_cast<uint32_t>(id), static_cast<uint32_t>(k)};
      }
    });
  }

  size_t place_of(size_t segment, int64_t range) const {
    return segment * static_cast<size_t>(threads_) + static_cast<size_t>(range);
  }

  int64_t threads_, read_ = 0;
  bool with_sources_ = false, any_noted_ = false;
  std::vector<Segment> segments_;  // in the order of the ids
  std::vector<int64_t> starts_;    // [ranges + 1]
  std::vector<int64_t> counts_;    // [segments, ranges] of rows
  std::vector<Place *> next_;      // [segments, ranges] where the next place goes
  std::vector<Noted> noted_;       // [ranges]
};

// Vectors of the bags from .. to; false where a row is none of the tables'.
bool sum_bags(const Batch &batch, const Tables &tables, float *vectors, int64_t from, int64_t to) {
  // Some bags at a time, whose rows stay in the cache from the look at them until they are read.
  for (int64_t start = from; start < to; start += TOGETHER) {
    const int64_t stop = std::min(to, start + TOGETHER);
    if (!all_known(batch, start_of(batch, start), start_of(batch, stop), tables.count)) return false;
    with_width(tables.width, [=, table = tables.rows](auto width) {
      if (past_the_caches(batch, vectors, width))
        write_vectors<true>(batch, table, vectors, start, stop, width);
      else
        write_vectors<false>(batch, table, vectors, start, stop, width);
    });
  }
  return true;
}

// Gradients of the weights of the bags from .. to.
void weight_gradients(const Batch &batch, const Tables &tables, const float *gradient, float *out, int64_t from,
                      int64_t to) {
  const int64_t width = tables.width, beside = rows_beside(batch);
  by_feature(batch, from, to, [=](int64_t id, int64_t vector) {
    const float *above = gradient + batch.first + vector * beside * width;
    float sum = 0;
    for (int64_t x = 0; x < width; x++) {
      float product = 1;
      for (int64_t k = 0; k < batch.parts; k++) {
        const int64_t at = k * batch.ids + id;
        const float value = batch.saved ? batch.saved[at * width + x] : tables.rows[batch.rows[at] * width + x];
        if (batch.op == PRODUCT)
          product *= value;
        else
          sum += value * above[x + (batch.op == CONCAT ? k * width : 0)];
      }
      if (batch.op == PRODUCT) sum += product * above[x];
    }
    out[id] = sum;
  });
}

}  // namespace

extern "C" {

// rows [K, N] of ids [N], of which features have sizes [F], one feature after the other. constants [F, K, 3]; bases
// [F, K]: what a table's rows begin with. 1 where ids were to be divided by what is not above zero.
int32_t embtab_place_rows(int64_t arithmetic, const int64_t *ids, const int64_t *sizes, int64_t features, int64_t parts,
                          const int64_t *bases, const int64_t *constants, int64_t *rows, int64_t threads) {
  int64_t count = 0;
  for (int64_t f = 0; f < features; f++) count += sizes[f];
  for (int64_t part = 0; part < features * parts; part++)
    if (!divides(arithmetic, constants + 3 * part)) return 1;
  in_threads(threads, [=](int64_t thread) {
    const int64_t from = count * thread / threads, to = count * (thread + 1) / threads;
    for (int64_t f = 0, start = 0; f < features; start += sizes[f], f++) {
      const int64_t first = std::max(from, start), last = std::min(to, start + sizes[f]);
      for (int64_t k = 0; k < parts && first < last; k++) {
        const int64_t part = f * parts + k;
        rows_of(arithmetic, ids + first, last - first, bases[part], constants + 3 * part, rows + k * count + first);
      }
    }
  });
  return 0;
}

// Offsets [count + 1] of bags of some lengths. 1 where a length is below zero, or they do not add up to `ids`.
int32_t embtab_offsets(const int64_t *lengths, int64_t count, int64_t ids, int64_t *offsets) {
  offsets[0] = 0;
  for (int64_t bag = 0; bag < count; bag++) {
    if (lengths[bag] < 0 || lengths[bag] > ids - offsets[bag]) return 1;
    offsets[bag + 1] = offsets[bag] + lengths[bag];
  }
  return offsets[count] != ids;
}

// Vectors [B, C, V] in out: the sums over the bags. 1 where a row is none of the tables'.
int32_t embtab_sum_bags(const Batch *batch, const Tables *tables, float *out, int64_t threads) {
  std::atomic<bool> known{true};
  in_threads(threads, [=, &known](int64_t part) {
    const int64_t from = first_bag(*batch, part, threads), to = first_bag(*batch, part + 1, threads);
    if (!sum_bags(*batch, *tables, out + batch->first, from, to)) known = false;
  });
  return !known;
}

// out [N]: the gradients of the weights; gradient: that of the vectors.
void embtab_weight_gradients(const Batch *batch, const Tables *tables, const float *gradient, float *out,
                             int64_t threads) {
  in_threads(threads, [=](int64_t part) {
    const int64_t from = first_bag(*batch, part, threads), to = first_bag(*batch, part + 1, threads);
    weight_gradients(*batch, *tables, gradient, out, from, to);
  });
}

// The optimizer's step. 1 where memory does not suffice; then nothing has changed.
int32_t embtab_update(const Batch *batches, int64_t count, const Tables *tables, int64_t threads) {
  try {
    Shares shares(batches, count, tables->count, threads);
    const bool each_has_a_sum = tables->count <= 2 * shares.read() && tables->count * tables->width <= MOST_SUMS;
    std::vector<std::unique_ptr<Update>> updates;
    for (int64_t part = 0; part < threads; part++) updates.push_back(taken());
    if (threads > 1) {
      in_threads(threads, [&](int64_t part) { shares.count(part); });
      shares.lay_out(updates);
      if (shares.any_noted()) in_threads(threads, [&](int64_t part) { shares.note(part); });
    }
    std::atomic<bool> failed{false};
    in_threads(threads, [&](int64_t part) {
      try {
        const int64_t first = shares.first(part), last = shares.first(part + 1);
        updates[static_cast<size_t>(part)]->sum_up(shares.pieces(part), *tables, first, last, each_has_a_sum);
      } catch (const std::bad_alloc &) {
        failed = true;
      }
    });
    if (failed) return 1;
    in_threads(threads, [&](int64_t part) { updates[static_cast<size_t>(part)]->run(*tables); });
    for (std::unique_ptr<Update> &update : updates) put_back(std::move(update));
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

}  // extern "C"
