// Rows of logits in memory: where they are, how a block of them is read, and how it is asked for in time.
//
// Memory is as slow as the arithmetic. A loop that reads logits therefore asks for later ones with every vector (`ask`);
// asked for in bursts, they would keep the processor from everything else.

#pragma once

#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 512;     // columns; buffers for more would drive each other from the fastest cache
constexpr int64_t LEAD = 2560;     // logits asked for and not yet looked at; the same
constexpr float PADDING = -2e30f;  // as a logit: its exponential is 0 even beside a maximum of NOTHING

struct Matrix {  // rows of logits, `stride` values apart
  void* data;
  int64_t stride;
  int64_t is_bf16;
};

struct alignas(64) Line {
  float values[16];
};

// Zeros to begin with.
class Values {
 public:
  explicit Values(int64_t size) : lines(size / 16) {}
  float* at(int64_t column) { return (float*)lines.data() + column; }
  const float* at(int64_t column) const { return (const float*)lines.data() + column; }

 private:
  std::vector<Line> lines;
};

// A row of one matrix, and what is read after it.
struct Source {
  char* row;
  int64_t size;  // bytes of a value
  int64_t teacher;
  float factor;  // weight / temperature, or 1 / temperature
  const char* then;
  int64_t lead;  // columns from what is read to what is asked for

  Vec at(int64_t column) const {
    const char* from = row + column * size;
    return size == 2 ? load_bf16(from) : load((const float*)from);
  }

  // The same of `count` columns, where there are no more; then zeros.
  Vec at(int64_t column, int64_t count) const {
    char last[LANES * 4] = {};
    std::memcpy(last, row + column * size, count * size);
    return size == 2 ? load_bf16(last) : load((const float*)last);
  }

  // What is to be asked for when `column` of `columns` is read.
  const char* ahead(int64_t column, int64_t columns) const {
    column += lead;
    return column < columns ? row + column * size : then + (column - columns) * size;
  }
};

// A block of one row, and what is asked for meanwhile.
struct One {
  const float *from, *later;

  Vec operator()(int64_t column) const { return load(from + column); }
  void ask(int64_t column) const { __builtin_prefetch(later + column); }
};

// A block of the sum of N rows, each times its factor. It asks straight on, beyond the end of a row for what lies there,
// which mostly is the next one: N addresses more would not fit into registers.
template <int N>
struct Sum {
  const float* from[N];
  float factor[N];
  int64_t lead;

  Vec operator()(int64_t column) const {
    Vec x = load(from[0] + column) * factor[0];
    for (int i = 1; i < N; ++i) x += load(from[i] + column) * factor[i];
    return x;
  }
  void ask(int64_t column) const {
    for (int i = 0; i < N; ++i) __builtin_prefetch(from[i] + column + lead);
  }
};

// A row's columns, some at a time.
class Blocks {
 protected:
  explicit Blocks(int64_t width) : width(width), blocks((width + BLOCK - 1) / BLOCK), columns(blocks * BLOCK) {}

  const int64_t width, blocks, columns;  // columns: of whole blocks

  int64_t size(int64_t b) const { return b + 1 < blocks ? BLOCK : width - b * BLOCK; }
  int64_t padded(int64_t b) const { return (size(b) + LANES - 1) / LANES * LANES; }

  // The block of one row times its factor. The product goes through memory: rounded once, it is 0 where its maximum is
  // subtracted, which a multiplication joined with the subtraction is not.
  One one(const Source& s, int64_t b, float* buffer) const {
    if (s.factor != 1.f || !are_direct(&s, 1, b)) return gathered(&s, 1, b, buffer);
    return direct(s, b);
  }

  // Calls `work` with what makes a reader of a block of the sum of several, and with the block up to which it can.
  template <typename Work>
  auto read(const std::vector<Source>& from, int64_t b, float* buffer, Work work) const {
    const int64_t count = are_direct(from.data(), from.size(), b) ? from.size() : 0;
    const int64_t last = size(blocks - 1) % LANES ? blocks - 1 : blocks;
    if (count == 1 && from[0].factor == 1.f) return work([&](int64_t at) { return direct(from[0], at); }, last);
    if (count == 2) return work([&](int64_t at) { return direct<2>(from.data(), at); }, last);
    if (count == 3) return work([&](int64_t at) { return direct<3>(from.data(), at); }, last);
    if (count == 4) return work([&](int64_t at) { return direct<4>(from.data(), at); }, last);
    return work([&](int64_t at) { return gathered(from.data(), from.size(), at, buffer); }, blocks);
  }

  // The block of the sum, with PADDING behind the last column.
  __attribute__((noinline)) One gathered(const Source* from, int64_t count, int64_t b, float* to) const {
    const int64_t whole = size(b) / LANES * LANES, left = size(b) - whole;
    Vec last{};
    for (int64_t i = 0; i < count; ++i) {
      const Source s = from[i];
      const char* later = s.ahead(b * BLOCK, columns);
      for (int64_t c = 0; c < whole; c += LANES) {
        __builtin_prefetch(later + c * s.size);
        const Vec x = s.at(b * BLOCK + c) * s.factor;
        store(to + c, i ? load(to + c) + x : x);
      }
      if (left) last += s.at(b * BLOCK + whole, left) * s.factor;
    }
    if (left) store(to + whole, last);
    for (int64_t c = size(b); c < padded(b); ++c) to[c] = PADDING;
    return {to, to};
  }

 private:
  // Whether the block can be read where it is, in whole vectors of fp32.
  bool are_direct(const Source* from, int64_t count, int64_t b) const {
    bool all = size(b) % LANES == 0;
    for (int64_t i = 0; i < count; ++i) all = all && from[i].size == 4;
    return all;
  }

  One direct(const Source& s, int64_t b) const {
    return {(const float*)s.row + b * BLOCK, (const float*)s.ahead(b * BLOCK, columns)};
  }

  template <int N>
  Sum<N> direct(const Source* from, int64_t b) const {
    Sum<N> sum;
    sum.lead = from[0].lead;
    for (int i = 0; i < N; ++i) {
      sum.from[i] = (const float*)from[i].row + b * BLOCK, sum.factor[i] = from[i].factor;
    }
    return sum;
  }
};

}  // namespace
