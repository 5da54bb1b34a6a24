// Rows of logits in memory: where they are, how a block of them is read, and how it is asked for in time.
//
// Memory is as slow as the arithmetic. A loop that reads logits therefore asks for later ones with every vector (`ask`);
// asked for in bursts, they would keep the processor from everything else.

#pragma once

#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t MOST = 1024;     // columns of a block
constexpr int64_t LEAD = 2560;     // logits asked for and not yet looked at; more would drive each other from the fastest cache
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

// A block of the sum of N rows, each times its factor.
template <int N>
struct Sum {
  const float *from[N], *later[N];
  float factor[N];

  Vec operator()(int64_t column) const {
    Vec x = load(from[0] + column) * factor[0];
    for (int i = 1; i < N; ++i) x += load(from[i] + column) * factor[i];
    return x;
  }
  void ask(int64_t column) const {
    for (int i = 0; i < N; ++i) __builtin_prefetch(later[i] + column);
  }
};

// A row's columns, some at a time.
class Blocks {
 protected:
  Blocks(int64_t width, int64_t block)
      : width(width), block(block), blocks((width + block - 1) / block), columns(blocks * block) {}

  const int64_t width, block, blocks, columns;  // columns: of whole blocks

  int64_t size(int64_t b) const { return b + 1 < blocks ? block : width - b * block; }
  int64_t padded(int64_t b) const { return (size(b) + LANES - 1) / LANES * LANES; }

  // The block of one row times its factor. The product goes through memory: rounded once, it is 0 where its maximum is
  // subtracted, which a multiplication joined with the subtraction is not.
  One one(const Source& s, int64_t b, float* buffer) const {
    if (s.factor != 1.f || !are_direct(&s, 1, b)) return gathered(&s, 1, b, buffer);
    return {(const float*)s.row + b * block, (const float*)s.ahead(b * block, columns)};
  }

  // Calls `work` with what reads the block of the sum of several.
  template <typename Work>
  auto read(const std::vector<Source>& from, int64_t b, float* buffer, Work work) const {
    const int64_t count = are_direct(from.data(), from.size(), b) ? from.size() : 0;
    if (count == 1) return work(one(from[0], b, buffer));
    if (count == 2) return work(direct<2>(from.data(), b));
    if (count == 3) return work(direct<3>(from.data(), b));
    if (count == 4) return work(direct<4>(from.data(), b));
    return work(gathered(from.data(), from.size(), b, buffer));
  }

  // The block of the sum, with PADDING behind the last column.
  One gathered(const Source* from, int64_t count, int64_t b, float* to) const {
    const int64_t whole = size(b) / LANES * LANES, left = size(b) - whole;
    Vec last{};
    for (int64_t i = 0; i < count; ++i) {
      const Source s = from[i];
      const char* later = s.ahead(b * block, columns);
      for (int64_t c = 0; c < whole; c += LANES) {
        __builtin_prefetch(later + c * s.size);
        const Vec x = s.at(b * block + c) * s.factor;
        store(to + c, i ? load(to + c) + x : x);
      }
      if (left) last += s.at(b * block + whole, left) * s.factor;
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

  template <int N>
  Sum<N> direct(const Source* from, int64_t b) const {
    Sum<N> sum;
    for (int i = 0; i < N; ++i) {
      sum.from[i] = (const float*)from[i].row + b * block, sum.factor[i] = from[i].factor;
      sum.later[i] = (const float*)from[i].ahead(b * block, columns);
    }
    return sum;
  }
};

}  // namespace
