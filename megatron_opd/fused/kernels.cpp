// The distillation loss of one row after the other: statistics, sums that need the normalisers, and the gradient, which
// overwrites the student's logits. A row stays in the cache from the first look to the last.
//
// Plain C++ with a C interface and no header of torch, so that it builds in seconds. The loops are written so that any
// compiler vectorises them: blocks of BLOCK columns, branch-free bodies, an exp and a log of our own. No -ffast-math: a
// NaN in the logits must reach the statistics, where the caller finds it.
//
// Precision. Sums run over a block in fp32 and over blocks in fp64: a plain fp32 sum over 100,000 columns costs 1e-4 of
// the gradient. The gradient of a nearly certain student is a difference of nearly equal numbers, so every difference
// log p - log q is kept relative to that of the row's (first of the block's) likeliest token, where it is exactly 0.
//
// Exponentials of a block are relative to the block's own maximum, so one look at a row is enough; `total` puts the
// blocks on one scale. What the columns of `stats` and `sums` mean is in layout.py; reference.py has the plain formulas.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 512;
constexpr float NOTHING = -1e30f;  // maximum of no columns; finite, so that differences are
constexpr float TINY = 1.17549435e-38f;

struct Matrix {  // rows of logits, `stride` values apart
  void* data;
  int64_t stride;
  int64_t is_bf16;
};

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// exp for x <= 0 or a little above, 1 ulp; 0 below -87; NaN stays NaN.
inline float fast_exp(float x) {
  const float shifted = x * 1.44269504f + 12582912.f;  // rounds to the nearest integer in the low bits
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  const float y = (p * r * r + r + 1.f) * scale;
  return x < -87.f ? 0.f : y;
}

// log, 1 ulp; that of the smallest normal number for anything below it.
inline float fast_log(float x) {
  x = x < TINY ? TINY : x;
  const uint32_t bits = float_to_bits(x) - 0x3f3504f3u;  // mantissas from sqrt(1/2) to sqrt(2)
  const float e = (float)((int32_t)bits >> 23);
  const float m = bits_to_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float m2 = m * m;
  return (m + (p * m * m2 - 2.12194440e-4f * e - 0.5f * m2)) + 0.693359375f * e;
}

inline float from_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Fetches what is worked on later into the cache.
inline void fetch_ahead(const char* next, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
#endif
}

// out = or += scale * in
template <bool ADD>
void put(const float* __restrict in, int64_t n, float scale, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = ADD ? out[i] + scale * in[i] : scale * in[i];
}

// out = or += scale * row[start : start + n]
template <bool ADD>
void load(const Matrix& m, int64_t row, int64_t start, int64_t n, float scale, float* __restrict out) {
  if (m.is_bf16) {
    const uint16_t* __restrict in = (const uint16_t*)m.data + row * m.stride + start;
    fetch_ahead((const char*)(in + n), n * 2);
    for (int64_t i = 0; i < n; ++i) out[i] = ADD ? out[i] + scale * from_bf16(in[i]) : scale * from_bf16(in[i]);
  } else {
    const float* in = (const float*)m.data + row * m.stride + start;
    fetch_ahead((const char*)(in + n), n * 4);
    put<ADD>(in, n, scale, out);
  }
}

// scale * row[start : start + n]: where it is, if it can be read there, else in `buffer`. Fetches a block `ahead` columns
// from here: the fewer matrices are read in turn, the sooner it is wanted.
const float* values(const Matrix& m, int64_t row, int64_t start, int64_t n, float scale, float* buffer, int64_t ahead) {
  if (m.is_bf16 || scale != 1.f) {
    load<false>(m, row, start, n, scale, buffer);
    return buffer;
  }
  const float* in = (const float*)m.data + row * m.stride + start;
  fetch_ahead((const char*)(in + ahead), n * 4);
  return in;
}

void store(const Matrix& m, int64_t row, int64_t start, int64_t n, const float* __restrict in) {
  if (m.is_bf16) {
    uint16_t* __restrict out = (uint16_t*)m.data + row * m.stride + start;
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
  } else {
    std::memcpy((float*)m.data + row * m.stride + start, in, n * sizeof(float));
  }
}

// A NaN is passed over: it reaches the sum of exponentials.
float maximum(const float* __restrict x, int64_t n) {
  float most = NOTHING;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

float minimum(const float* __restrict x, int64_t n) {
  float least = -NOTHING;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < n; ++i) least = x[i] < least ? x[i] : least;
  return least;
}

// y where x is `max`: the largest, if there are several.
float value_at(float max, const float* __restrict x, const float* __restrict y, int64_t n) {
  float most = NOTHING;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const float here = x[i] == max ? y[i] : NOTHING;
    most = here > most ? here : most;
  }
  return most;
}

}  // namespace

extern "C" {

enum { FORWARD = 0, REVERSE = 1, JSD = 2 };                       // kind
enum { MAKE_STATS = 1, MAKE_SUMS = 2, MAKE_GRADIENT = 4 };        // phases; without the first, `stats` is input
enum { S_MAX, S_SUM, MAX = 0, SUM, GAP_S, GAP_T };                // columns of stats: the student's; from first_teacher or 2 on
enum { FIRST, SECOND, REVERSE_KL, NUM_SUMS };                     // columns of sums

struct Job {
  int64_t rows, width, columns;  // width: real columns; the gradient of the others is 0
  int64_t kind, probs, first_teacher, teacher_columns, phases, threads;  // of stats; 0 where there are none
  int64_t num_teachers, num_stats;
  double beta, inv_t, sampler_ratio;  // sampler_ratio: loss temperature / sampling temperature, or 0
  Matrix student;
  const Matrix* teachers;
  const int64_t* index;  // rows of the matrices, or null: all
  const float* weights;  // [rows, num_teachers]
  double* stats;         // [rows, num_stats]
  double* sums;          // [rows, NUM_SUMS]
  const double* center;  // [rows], or null: what follows from stats and sums
  const double* scale;   // [rows]
};
}

namespace {

struct Block {
  float max = NOTHING;
  double sum = 0, gap = 0, ref = 0;  // gap: sum of exp * (D - ref), or (ref - D) for the student; D = target - student
};

class Row {
 public:
  explicit Row(const Job& job)
      : j(job), blocks((job.width + BLOCK - 1) / BLOCK), q(job.width), p(needs_p() ? job.width : 0),
        d(needs_d() ? job.width : 0), each(job.probs ? job.num_teachers * job.width : 0),
        factor(job.probs ? job.num_teachers * blocks : 0), student(blocks), target(blocks) {}

  void run(int64_t number) {
    n = number;
    at = j.index ? j.index[n] : n;
    stats = j.stats + n * j.num_stats;
    given = !(j.phases & MAKE_STATS);
    asked = 0;
    for (int64_t k = 0; k < j.num_teachers; ++k) asked += weight(k) != 0.f;
    if (j.probs) {
      look_at_student();
      mass_p = 0;
      for (int64_t k = 0; k < j.num_teachers; ++k) look_at_teacher(k, true);
    } else {
      look_at_both();
      if (j.first_teacher && !given) look_at_each();
    }
    if (!given && j.sampler_ratio > 0) stats[j.num_stats - 1] = at_sampling_temperature();
    if (!(j.phases & (MAKE_SUMS | MAKE_GRADIENT))) return;
    find_reference();
    if (compared()) compare();
    if (j.phases & MAKE_GRADIENT) gradient();
  }

 private:
  const Job& j;
  int64_t n = 0, at = 0, asked = 0;  // asked: teachers with weight
  bool given = false;
  double* stats = nullptr;
  int64_t blocks;
  // Of the whole row: exponentials of the student, of the target, and log p - log q up to constants. For JSD, log q - log m.
  std::vector<float> q, p, d;
  // For averages of probabilities, by teacher: exponentials of the row, and what makes a block's its share of p.
  std::vector<float> each, factor;
  std::vector<Block> student, target;
  double mass_p = 0;  // of the target on this shard, for averages of probabilities
  double log_s = 0, reference = 0, over_reference = 0;
  float a[BLOCK], t[BLOCK], scratch[BLOCK], scratch2[BLOCK], kept_p[BLOCK], kept_d[BLOCK];

  bool compared() const { return j.probs || j.kind == JSD; }
  bool needs_p() const { return j.probs ? j.kind == FORWARD : j.kind != REVERSE; }
  bool needs_d() const { return j.kind != FORWARD; }
  int64_t size(int64_t b) const { return b + 1 < blocks ? BLOCK : j.width - b * BLOCK; }
  float weight(int64_t k) const { return j.weights[n * j.num_teachers + k]; }
  double* target_stats() const { return stats + 2; }
  double* teacher_stats(int64_t k) const { return stats + j.first_teacher + j.teacher_columns * k; }
  bool wants_gaps() const { return j.teacher_columns > 2; }

  static double maximum_of(const std::vector<Block>& all) {
    float max = NOTHING;
    for (const Block& b : all) max = b.max > max ? b.max : max;
    return max;
  }

  // Sum of the blocks' sums relative to `max`; with `sign`, of their gaps: +1 for exp * (difference - D), -1 for the opposite.
  static double total(const std::vector<Block>& all, double max, double difference = 0, int sign = 0) {
    double sum = 0;
    for (const Block& b : all)
      sum += std::exp(b.max - max) * (sign ? b.gap + sign * b.sum * (difference - b.ref) : b.sum);
    return sum;
  }

  const float* student_values(int64_t b, int64_t ahead = 3 * BLOCK) {
    return values(j.student, at, b * BLOCK, size(b), (float)j.inv_t, a, ahead);
  }

  const float* teacher_values(int64_t k, int64_t b, float scale) {
    return values(j.teachers[k], at, b * BLOCK, size(b), scale, t, 3 * BLOCK);
  }

  // The average of logits.
  const float* target_values(int64_t b) {
    bool first = true;
    for (int64_t k = 0; k < j.num_teachers; ++k) {
      const float w = weight(k) * (float)j.inv_t;
      if (weight(k) == 0.f) continue;
      if (asked == 1) return teacher_values(k, b, w);
      first ? load<false>(j.teachers[k], at, b * BLOCK, size(b), w, t)
            : load<true>(j.teachers[k], at, b * BLOCK, size(b), w, t);
      first = false;
    }
    return t;
  }

  // Student and the average of logits: everything that one look gives.
  void look_at_both() {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * BLOCK, m = size(b);
      const float* __restrict l = student_values(b, asked == 1 ? 3 * BLOCK : 2 * BLOCK);
      const float* __restrict z = target_values(b);
      const float amax = maximum(l, m), tmax = maximum(z, m), at_amax = value_at(amax, l, z, m), ref = at_amax - tmax;
      float s1 = 0, s2 = 0, g1 = 0, g2 = 0;
      float* __restrict qb = q.data() + start;
      float* __restrict pb = needs_p() ? p.data() + start : scratch;
      float* __restrict db = needs_d() ? d.data() + start : scratch2;
#pragma omp simd reduction(+ : s1, s2, g1, g2)
      for (int64_t i = 0; i < m; ++i) {
        const float u = l[i] - amax, v = z[i] - tmax, x = fast_exp(u), y = fast_exp(v), gap = (v - u) - ref;
        qb[i] = x, pb[i] = y, db[i] = gap;
        s1 += x, s2 += y, g1 -= x * gap, g2 += y * gap;
      }
      const double difference = (double)tmax - amax + ref;
      student[b] = {amax, s1, g1, difference}, target[b] = {tmax, s2, g2, difference};
    }
    if (given) return;
    double* own = target_stats();
    stats[S_MAX] = maximum_of(student), own[MAX] = maximum_of(target);
    const double difference = own[MAX] - stats[S_MAX];
    stats[S_SUM] = total(student, stats[S_MAX]), own[SUM] = total(target, own[MAX]);
    own[GAP_S] = total(student, stats[S_MAX], difference, 1), own[GAP_T] = total(target, own[MAX], difference, -1);
  }

  void look_at_student() {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * BLOCK, m = size(b);
      const float* __restrict l = student_values(b);
      const float amax = maximum(l, m);
      float s = 0;
      float* __restrict qb = q.data() + start;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < m; ++i) qb[i] = fast_exp(l[i] - amax), s += qb[i];
      student[b] = {amax, s, 0, 0};
    }
    if (given) return;
    stats[S_MAX] = maximum_of(student), stats[S_SUM] = total(student, stats[S_MAX]);
  }

  // One teacher's statistics; with `add`, what its share of the average of probabilities takes.
  void look_at_teacher(int64_t k, bool add) {
    double* own = teacher_stats(k);
    if (weight(k) == 0.f) {
      if (given) return;
      own[MAX] = NOTHING;
      for (int64_t i = 1; i < j.teacher_columns; ++i) own[i] = 0;
      return;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * BLOCK, m = size(b);
      const float* __restrict z = teacher_values(k, b, (float)j.inv_t);
      const float tmax = maximum(z, m);
      float s = 0;
      float* __restrict eb = add ? each.data() + k * j.width + start : scratch;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < m; ++i) eb[i] = fast_exp(z[i] - tmax), s += eb[i];
      target[b] = {tmax, s, 0, 0};
      if (wants_gaps() && !given) find_gap(b, tmax, z);
    }
    if (!given) {
      own[MAX] = maximum_of(target), own[SUM] = total(target, own[MAX]);
      if (wants_gaps()) own[GAP_S] = total(student, stats[S_MAX], own[MAX] - stats[S_MAX], 1);
    }
    if (!add) return;
    double mass = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double f = weight(k) / own[SUM] * std::exp(target[b].max - own[MAX]);
      factor[k * blocks + b] = (float)f;
      mass += f * target[b].sum;
    }
    mass_p += mass;
  }

  // The block's sum of q times student - teacher, whose logits are z.
  void find_gap(int64_t b, float tmax, const float* __restrict z) {
    const int64_t m = size(b);
    const float* __restrict l = student_values(b);
    const float amax = student[b].max, ref = value_at(amax, l, z, m) - tmax;
    const float* __restrict qb = q.data() + b * BLOCK;
    float g = 0;
#pragma omp simd reduction(+ : g)
    for (int64_t i = 0; i < m; ++i) g -= qb[i] * (((z[i] - tmax) - (l[i] - amax)) - ref);
    student[b].gap = g, student[b].ref = (double)tmax - amax + ref;
  }

  // Statistics of every teacher by itself; where only one has weight, it is the target.
  void look_at_each() {
    if (asked > 1) kept = target, kept_student = student;
    for (int64_t k = 0; k < j.num_teachers; ++k) {
      if (asked == 1 && weight(k) != 0.f)
        std::memcpy(teacher_stats(k), target_stats(), j.teacher_columns * sizeof(double));
      else
        look_at_teacher(k, false);
    }
    if (asked > 1) target.swap(kept), student.swap(kept_student);
  }

  double at_sampling_temperature() {
    const float ratio = (float)j.sampler_ratio;
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m = size(b);
      const float* __restrict l = student_values(b);
      const float amax = student[b].max;
      float s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < m; ++i) s += fast_exp((l[i] - amax) * ratio);
      sum += s * std::exp((amax - stats[S_MAX]) * j.sampler_ratio);
    }
    return sum;
  }

  // log p - log q where q is largest, more or less: what differences are kept relative to. Any number would do.
  void find_reference() {
    log_s = std::log(stats[S_SUM]);
    if (j.probs) {
      const double least = std::log(2. * TINY) + log_s;  // so that p / p_reference is a number
      reference = std::fmax(log_average_at_peak() + log_s, least);
    } else {
      const double* of = target_stats();
      reference = -of[GAP_S] / stats[S_SUM] - std::log(of[SUM]) + log_s;  // their mean under q
    }
    over_reference = -std::log((1 - j.beta) + j.beta * std::exp(reference));
  }

  // log p of the student's likeliest token of this shard.
  double log_average_at_peak() const {
    int64_t peak = 0;
    for (int64_t b = 1; b < blocks; ++b) peak = student[b].max > student[peak].max ? b : peak;
    if (!blocks) return 0;
    int64_t i = peak * BLOCK;
    for (int64_t k = i, end = i + size(peak); k < end; ++k) i = q[k] > q[i] ? k : i;
    double sum = 0;
    for (int64_t k = 0; k < j.num_teachers; ++k) {
      float z = 0;
      if (weight(k) == 0.f) continue;
      load<false>(j.teachers[k], at, i, 1, (float)j.inv_t, &z);
      sum += weight(k) * std::exp(z - teacher_stats(k)[MAX]) / teacher_stats(k)[SUM];
    }
    return std::log(sum);
  }

  // Factors that make the block's exponentials probabilities.
  double student_factor(int64_t b) const { return std::exp(student[b].max - stats[S_MAX]) / stats[S_SUM]; }
  double target_factor(int64_t b) const {
    return j.probs ? 1. : std::exp(target[b].max - target_stats()[MAX]) / target_stats()[SUM];
  }

  // What d of the block lacks to be log p - log q - reference (averages of logits).
  double shift(int64_t b) const {
    const double* of = target_stats();
    return student[b].ref - (of[MAX] - stats[S_MAX]) + log_s - std::log(of[SUM]) - reference;
  }

  // The block's average of probabilities.
  void average(int64_t b, float* __restrict pb) {
    bool first = true;
    for (int64_t k = 0; k < j.num_teachers; ++k) {
      if (weight(k) == 0.f) continue;
      const float* eb = each.data() + k * j.width + b * BLOCK;
      first ? put<false>(eb, size(b), factor[k * blocks + b], pb) : put<true>(eb, size(b), factor[k * blocks + b], pb);
      first = false;
    }
  }

  // d = log p - log q - reference of the block, for averages of probabilities; p is their average, and made here.
  void difference_to_average(int64_t b, float* __restrict pb, float* __restrict db) {
    const int64_t m = size(b);
    average(b, pb);
    const float* __restrict l = student_values(b);
    const double log_p_reference = reference - log_s;
    const float over = (float)std::exp(-log_p_reference), smax = (float)stats[S_MAX];
    if (minimum(pb, m) > 1e-30f) {
      for (int64_t i = 0; i < m; ++i) db[i] = fast_log(pb[i] * over) - (l[i] - smax);
    } else {
      log_average(b, log_p_reference);
      for (int64_t i = 0; i < m; ++i) db[i] = scratch2[i] - (l[i] - smax);
    }
  }

  // scratch2 = log p - c of a block in which p leaves the range of fp32.
  void log_average(int64_t b, double c) {
    const int64_t m = size(b);
    for (int64_t i = 0; i < m; ++i) scratch[i] = NOTHING, scratch2[i] = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t k = 0; k < j.num_teachers; ++k) {
        if (weight(k) == 0.f) continue;
        const double* of = teacher_stats(k);
        const float own = (float)(std::log((double)weight(k)) - std::log(of[SUM]) - c), max = (float)of[MAX];
        const float* __restrict z = teacher_values(k, b, (float)j.inv_t);
        for (int64_t i = 0; i < m; ++i) {
          const float x = (z[i] - max) + own;
          scratch2[i] += pass ? fast_exp(x - scratch[i]) : 0.f;
          scratch[i] = x > scratch[i] ? x : scratch[i];
        }
      }
    for (int64_t i = 0; i < m; ++i) scratch2[i] = fast_log(scratch2[i]) + scratch[i];
  }

  // Sums that need the normalisers. Afterwards d is log p - log q - reference (averages of probabilities), or with JSD
  // log q - log m - over_reference, and q holds probabilities.
  void compare() {
    double first = 0, second = 0, reverse = 0;
    const float beta = (float)j.beta, rest = (float)(1 - j.beta), r0 = (float)std::exp(reference);
    const float scale = (float)std::exp(over_reference), kappa = beta * scale;
    const float far = (float)(-std::log(j.beta) - over_reference - reference);  // log p - log m where q is nothing
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m = size(b);
      float* __restrict db = j.probs && j.kind == FORWARD ? kept_d : d.data() + b * BLOCK;  // forward KL: for its value only
      float* __restrict pb = j.probs && j.kind != FORWARD ? kept_p : p.data() + b * BLOCK;
      if (j.probs) difference_to_average(b, pb, db);
      const float fq = (float)student_factor(b), fp = (float)target_factor(b), c = j.probs ? 0.f : (float)shift(b);
      float* __restrict qb = q.data() + b * BLOCK;
      float s1 = 0, s2 = 0, s3 = 0;
      if (j.kind == JSD) {
#pragma omp simd reduction(+ : s1, s2, s3)
        for (int64_t i = 0; i < m; ++i) {
          const float x = qb[i] * fq, y = pb[i] * fp, gap = db[i] + c, ratio = y / (x + TINY);
          const float capped = ratio > 1e30f ? 1e30f : ratio;
          const float w = (rest + beta * capped) * scale, e = w - 1.f, exact = kappa * (capped - r0);
          const float lost = (exact - e) * (1.f - e + e * e);  // of log1p(exact), where that matters
          const float over = -(fast_log(w) + ((exact < 0.5f && exact > -0.5f) ? lost : 0.f));
          qb[i] = x, db[i] = over;
          s1 += x * over, s2 += y * (capped < 1e9f ? over + gap : far), s3 -= x * gap;
        }
      } else {
#pragma omp simd reduction(+ : s1, s3)
        for (int64_t i = 0; i < m; ++i) s1 += pb[i] * db[i], s3 -= qb[i] * db[i];
        s3 *= fq;
      }
      first += s1, second += s2, reverse += s3;
    }
    if (!(j.phases & MAKE_SUMS)) return;
    const double mass_q = total(student, stats[S_MAX]) / stats[S_SUM];
    const double mass = j.probs ? mass_p : total(target, target_stats()[MAX]) / target_stats()[SUM];
    double* out = j.sums + n * NUM_SUMS;
    out[REVERSE_KL] = reverse - mass_q * reference;
    out[FIRST] = j.kind == JSD       ? first + mass_q * over_reference
                 : j.kind == FORWARD ? first + mass * reference
                                     : out[REVERSE_KL];
    out[SECOND] = j.kind == JSD ? second + mass * (over_reference + reference) : 0;
  }

  // What makes the gradient of the row sum to 0: the expectation under q of log q - log p, or log q - log m.
  double center() const {
    if (j.center) return j.center[n];
    return compared() ? j.sums[n * NUM_SUMS + FIRST] : -reference;
  }

  void gradient() {
    const double scale = j.scale[n] * j.inv_t * (j.kind == JSD ? 1 - j.beta : 1.);
    const float sign = j.kind == JSD ? 1.f : -1.f;
    const double mean = j.kind == FORWARD ? 0. : center() + (j.kind == JSD ? -over_reference : reference);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * BLOCK, m = size(b);
      const float fq = (float)(j.kind == JSD ? scale : scale * student_factor(b));
      const float* __restrict qb = q.data() + start;
      if (j.kind == FORWARD) {
        const float fp = (float)(scale * target_factor(b));
        const float* __restrict pb = p.data() + start;
        for (int64_t i = 0; i < m; ++i) a[i] = qb[i] * fq - pb[i] * fp;
      } else {
        const float c = (float)(compared() ? mean : mean + shift(b));
        const float* __restrict db = d.data() + start;
        for (int64_t i = 0; i < m; ++i) a[i] = qb[i] * fq * (sign * db[i] - c);
      }
      store(j.student, at, start, m, a);
    }
    const int64_t bytes = j.student.is_bf16 ? 2 : 4;
    char* row = (char*)j.student.data + at * j.student.stride * bytes;
    std::memset(row + j.width * bytes, 0, (j.columns - j.width) * bytes);
  }

  std::vector<Block> kept, kept_student;
};

}  // namespace

extern "C" void megatron_opd_rows(const Job* job) {
#pragma omp parallel num_threads(job->threads)
  {
    Row row(*job);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < job->rows; ++n) row.run(n);
  }
}
