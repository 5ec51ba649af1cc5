// Lookups in stacked tables, and the optimizer's step on the rows that were read. Built and called by native.py.
//
// Memory is waited for as little as can be: rows are asked for before they are needed, each row that occurs is updated
// once, and vectors are written where they are wanted. No function starts threads; each does a part of the work, so
// that callers may run several, and every number comes out the same however many do. The compiler must not fuse
// multiplications and additions (-ffp-contract=off), so that it also comes out the same on every processor.

#include <algorithm>
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

namespace {

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;

constexpr int64_t AHEAD = 16;  // entries between asking for a row and needing it
constexpr int64_t SAMPLES = 16;  // whose gradients are read together
constexpr int LINE = 64;       // bytes that come together
constexpr size_t LARGE_PAGE = 1 << 21;

enum Optimizer { SGD, ADAGRAD, ROWWISE_ADAGRAD };

}  // namespace

// What is read: rows in bags, B bags of each of F features, one feature after the other.
struct Batch {
  const int64_t *rows;     // [N]
  const int64_t *offsets;  // [F * B + 1] where bags begin; null where every row is a bag
  const float *weights;    // [N] factors, or null
  int64_t entries;         // N
  int64_t features;        // F
  int64_t bags;            // B
};

struct Tables {
  float *rows;     // [R, W]
  float *moments;  // nothing, [R, W] or [R], as the optimizer has it
  int64_t count;   // R
  int64_t width;   // W
  int32_t optimizer;
  float lr;
  float eps;
};

// Large pages for memory that will be read at random.
extern "C" void embtab_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const int64_t skipped = static_cast<int64_t>(first - reinterpret_cast<uintptr_t>(memory));
  if (bytes > skipped) madvise(reinterpret_cast<void *>(first), static_cast<size_t>(bytes - skipped), MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

namespace {

// Has memory brought near. (Always inline: a compiler that looks at it alone finds that it does nothing.)
template <bool FOR_WRITING>
__attribute__((always_inline)) inline void ask(const float *numbers, int64_t width) {
  const char *start = reinterpret_cast<const char *>(numbers);
  const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
  for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(start + at, FOR_WRITING);
}

// A width that the compiler knows, which makes loops of known length; W = 0 for one that it does not.
template <int W>
struct Width {
  int64_t given;
  operator int64_t() const { return W ? W : given; }
};

template <class Work>
inline void with_width(int64_t width, Work work) {
  switch (width) {
    case 8: return work(Width<8>{width});
    case 16: return work(Width<16>{width});
    case 32: return work(Width<32>{width});
    case 64: return work(Width<64>{width});
    default: return work(Width<0>{width});
  }
}

// Where in the vectors [B, F, W] that of a bag stands, in vectors of W.
inline int64_t place_of(const Batch batch, int64_t bag) {
  return bag % batch.bags * batch.features + bag / batch.bags;
}

inline int64_t start_of(const Batch batch, int64_t bag) { return batch.offsets ? batch.offsets[bag] : bag; }

// Calls visit(entry, place) for the entries of some bags, one feature after the other: as rows lie in memory.
template <class Visit>
inline void by_feature(const Batch batch, int64_t from, int64_t to, Visit visit) {
  for (int64_t bag = from; bag < to;) {
    const int64_t last = std::min(to, (bag / batch.bags + 1) * batch.bags);
    int64_t place = place_of(batch, bag);
    int64_t entry = start_of(batch, bag);
    for (; bag < last; bag++, place += batch.features)
      for (const int64_t stop = start_of(batch, bag + 1); entry < stop; entry++) visit(entry, place);
  }
}

// The same for all bags, some samples at a time, so that the vectors of these stay in the cache.
template <class Visit>
inline void by_samples(const Batch batch, Visit visit) {
  for (int64_t first = 0; first < batch.bags; first += SAMPLES)
    for (int64_t f = 0; f < batch.features; f++) {
      const int64_t bag = f * batch.bags + first;
      by_feature(batch, bag, std::min(bag + SAMPLES, (f + 1) * batch.bags), visit);
    }
}

// Eight numbers at once, whatever the processor's vectors; `at` need not be aligned.
typedef float Eight __attribute__((vector_size(32)));

inline Eight eight(const float *at) {
  Eight numbers;
  std::memcpy(&numbers, at, sizeof numbers);
  return numbers;
}

inline void put(float *at, Eight numbers) { std::memcpy(at, &numbers, sizeof numbers); }

template <class W>
inline void add(float *sum, const float *row, float weight, W width) {
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) put(sum + x, eight(sum + x) + weight * eight(row + x));
  for (; x < width; x++) sum[x] += weight * row[x];
}

template <class W>
inline void copy(float *out, const float *row, float weight, W width) {
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) put(out + x, weight * eight(row + x));
  for (; x < width; x++) out[x] = weight * row[x];
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
    const float moment = tables.moments[row] += squares(gradient, width) / static_cast<float>(width);
    add(values, gradient, -tables.lr / (std::sqrt(moment) + tables.eps), width);
  } else {
    float *moments = tables.moments + row * width;
    for (int64_t x = 0; x < width; x++) {
      moments[x] += gradient[x] * gradient[x];
      values[x] -= tables.lr * gradient[x] / (std::sqrt(moments[x]) + tables.eps);
    }
  }
}

__attribute__((always_inline)) inline void ask_for_step(const Tables &tables, int64_t row, int64_t width) {
  ask<true>(tables.rows + row * width, width);
  if (tables.optimizer == ADAGRAD) ask<true>(tables.moments + row * width, width);
  if (tables.optimizer == ROWWISE_ADAGRAD) ask<true>(tables.moments + row, 1);
}

// Whether one of `parts` callers has a row. Rows that share a cache line have the same caller.
inline bool is_mine(int64_t row, int64_t part, int64_t parts) { return parts == 1 || (row >> 4) % parts == part; }

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
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / LARGE_PAGE + 1) * LARGE_PAGE;
    memory_ = static_cast<T *>(std::aligned_alloc(LARGE_PAGE, bytes));
    if (!memory_) throw std::bad_alloc();
    count_ = static_cast<int64_t>(bytes / sizeof(T));
    embtab_large_pages(memory_, static_cast<int64_t>(bytes));
    std::memset(static_cast<void *>(memory_), 0, bytes);
    return true;
  }

  T &operator[](int64_t at) { return memory_[at]; }

 private:
  T *memory_ = nullptr;
  int64_t count_ = 0;
};

// The distinct rows of a batch, in the order in which they first occur.
class Distinct {
 public:
  // Forgets all rows and makes room for so many, all below a limit.
  void start(int64_t most, int64_t limit) {
    bits_ = 4;
    while ((int64_t{1} << bits_) < 2 * most) bits_++;
    const int64_t places = int64_t{1} << bits_;
    has_own_place_ = limit <= places;
    last_ = places - 1;
    rows_.room(most + 1);
    before_ += static_cast<uint32_t>(count_);
    count_ = 0;
    if (!places_.room(places) && before_ <= UINT32_MAX - static_cast<uint32_t>(most)) return;
    for (int64_t at = 0; at < places; at++) places_[at] = Place{0, 0};
    before_ = 0;
  }

  __attribute__((always_inline)) void ask(int64_t row) { __builtin_prefetch(&places_[first(row)], 1); }

  // Where a row stands among the distinct ones.
  int64_t slot(int64_t row) {
    const uint32_t key = static_cast<uint32_t>(row);
    int64_t at = first(row);
    while (places_[at].number > before_ && places_[at].row != key) at = (at + 1) & last_;
    // No branch, for nobody can tell whether a row is new.
    const bool is_new = places_[at].number <= before_;
    const uint32_t number = is_new ? before_ + static_cast<uint32_t>(count_) + 1 : places_[at].number;
    places_[at] = Place{key, number};
    rows_[count_] = key;
    count_ += is_new;
    return number - before_ - 1;
  }

  int64_t count() const { return count_; }
  int64_t row(int64_t slot) { return rows_[slot]; }

 private:
  struct Place {
    uint32_t row;
    uint32_t number;  // slots are numbered on and on, so that numbers of former batches need not be wiped out
  };

  int64_t first(int64_t row) const {
    return has_own_place_ ? row : static_cast<int64_t>((static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u) >> (64 - bits_));
  }

  Kept<Place> places_;
  Kept<uint32_t> rows_;
  int bits_ = 4;
  int64_t last_ = 0;
  bool has_own_place_ = false;
  uint32_t before_ = 0;
  int64_t count_ = 0;
};

// Sums up the gradients of every row, in the order of the vectors, and steps once on each.
class Update {
 public:
  void run(const Batch &batch, const Tables &tables, const float *gradient, int64_t part, int64_t parts) {
    find(batch, tables, part, parts);
    with_width(tables.width, [&](auto width) {
      add_up(batch, gradient, width);
      step_all(tables, width);
    });
  }

  void find(const Batch &batch, const Tables &tables, int64_t part, int64_t parts) {
    distinct_.start(std::min(batch.entries, tables.count), tables.count);
    slots_.room(batch.entries);
    for (int64_t i = 0; i < batch.entries; i++) {
      if (i + AHEAD < batch.entries) distinct_.ask(batch.rows[i + AHEAD]);
      slots_[i] = is_mine(batch.rows[i], part, parts) ? static_cast<int32_t>(distinct_.slot(batch.rows[i])) : OTHERS;
    }
  }

  template <class W>
  void add_up(const Batch batch, const float *gradient, W width) {
    sums_.room((distinct_.count() + 1) * width);
    std::memset(&sums_[0], 0, sizeof(float) * distinct_.count() * width);
    const auto visit = [batch, gradient, width, slots = &slots_[0], sums = &sums_[0]](int64_t entry, int64_t place) {
      const int64_t slot = slots[entry];
      if (slot == OTHERS) return;
      const float weight = batch.weights ? batch.weights[entry] : 1.0f;
      add(sums + slot * width, gradient + place * width, weight, width);
    };
    by_samples(batch, visit);
  }

  template <class W>
  void step_all(const Tables tables, W width) {
    for (int64_t slot = 0; slot < distinct_.count(); slot++) {
      if (slot + AHEAD < distinct_.count()) ask_for_step(tables, distinct_.row(slot + AHEAD), width);
      step(tables, distinct_.row(slot), &sums_[slot * width], width);
    }
  }

 private:
  static constexpr int32_t OTHERS = -1;

  Distinct distinct_;
  Kept<int32_t> slots_;
  Kept<float> sums_;
};

// Updates that nobody is running.
std::mutex idle_lock;
std::vector<std::unique_ptr<Update>> idle;

std::unique_ptr<Update> taken() {
  const std::lock_guard<std::mutex> lock(idle_lock);
  if (idle.empty()) return std::make_unique<Update>();
  std::unique_ptr<Update> last = std::move(idle.back());
  idle.pop_back();
  return last;
}

void given_back(std::unique_ptr<Update> update) {
  const std::lock_guard<std::mutex> lock(idle_lock);
  idle.push_back(std::move(update));
}

}  // namespace

extern "C" {

// out [B, F, W]: sums over the bags from .. to of F * B.
void embtab_sum_bags(const Batch *given, const Tables *tables, float *out, int64_t from, int64_t to) {
  with_width(tables->width, [batch = *given, table = tables->rows, out, from, to](auto width) {
    if (batch.offsets)
      for (int64_t bag = from; bag < to; bag++)
        std::memset(out + place_of(batch, bag) * width, 0, sizeof(float) * width);
    by_feature(batch, from, to, [=](int64_t entry, int64_t place) {
      if (entry + AHEAD < batch.entries) ask<false>(table + batch.rows[entry + AHEAD] * width, width);
      const float *row = table + batch.rows[entry] * width;
      const float weight = batch.weights ? batch.weights[entry] : 1.0f;
      if (batch.offsets)
        add(out + place * width, row, weight, width);
      else
        copy(out + place * width, row, weight, width);
    });
  });
}

// out [N]: the gradients of the weights of the bags from .. to.
void embtab_weight_gradients(const Batch *batch, const Tables *tables, const float *gradient, float *out, int64_t from,
                             int64_t to) {
  const int64_t width = tables->width;
  by_feature(*batch, from, to, [=](int64_t entry, int64_t place) {
    const float *row = tables->rows + batch->rows[entry] * width, *above = gradient + place * width;
    float sum = 0;
    for (int64_t x = 0; x < width; x++) sum += row[x] * above[x];
    out[entry] = sum;
  });
}

// The optimizer's step, on the rows of one of `parts` callers; gradient [B, F, W]. 1 where memory did not suffice.
int32_t embtab_update(const Batch *batch, const Tables *tables, const float *gradient, int64_t part, int64_t parts) {
  try {
    std::unique_ptr<Update> update = taken();
    update->run(*batch, *tables, gradient, part, parts);
    given_back(std::move(update));
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

}  // extern "C"
