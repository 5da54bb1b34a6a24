// The distillation loss of one row after the other: statistics, sums that need the normalisers, and the gradient, which
// overwrites the student's logits. A row stays in the cache from the first look to the last.
//
// Plain C++ with a C interface and no header of torch, so that it builds in seconds. vectors.h has vectors, exp and log,
// memory.h how logits are read.
// No -ffast-math: a NaN in the logits must reach the statistics, where the caller finds it.
//
// Precision. Sums run over a block in fp32 and over blocks in fp64: a plain fp32 sum over 100,000 columns costs 1e-4 of
// the gradient. The gradient of a nearly certain student is a difference of nearly equal numbers, so every difference
// log p - log q is kept relative to that of the row's likeliest token (so far), where it is exactly 0.
//
// Exponentials are relative to the largest logit so far, so one look at a row is enough: a block in which a larger one turns
// up is looked at once more, and `total` puts the blocks on one scale. What the columns of `stats` and `sums` mean is in
// layout.py; reference.py has the plain formulas.

#include <cmath>
#include <vector>

#include "memory.h"

namespace {

constexpr float LITTLE = 8.f;  // above the reference, what an exponential bears

}  // namespace

extern "C" {

enum { FORWARD = 0, REVERSE = 1, JSD = 2 };                       // kind
enum { MAKE_STATS = 1, MAKE_SUMS = 2, MAKE_GRADIENT = 4 };        // phases; without the first, `stats` is input
enum { S_MAX, S_SUM, MAX = 0, SUM, GAP_S, GAP_T };                // columns of stats: the student's; from first_teacher or 2 on
enum { FIRST, SECOND, REVERSE_KL, NUM_SUMS };                     // columns of sums

struct Job {
  int64_t rows, width, columns;  // width: real columns; the gradient of the others is 0
  int64_t kind, probs, first_teacher, teacher_columns;  // the columns of stats; 0 where there are none
  int64_t gaps, phases, threads;                        // gaps: whether each teacher's distance from the student is wanted
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
  float max = NOTHING;  // what its exponentials are relative to
  double sum = 0, gap = 0, ref = 0;  // gap: sum of exp * (D - ref), or (ref - D) for the student; D = target - student
  double scale = 0;                  // exp(max - the row's max)
};

// The largest logit so far, and one at least nearly as large, which exponentials are relative to.
struct Peak {
  float top = NOTHING, reference = NOTHING;

  // Whether the exponentials have to be made again: with `above` larger ones than the reference by more than that.
  bool rise(float max, float above) {
    top = max > top ? max : top;
    if (!(max > reference + above)) return false;
    reference = max;
    return true;
  }
};

class Row : Blocks {
 public:
  // Blocks are smaller where several rows are read at once, for which the fastest cache is small.
  explicit Row(const Job& job)
      : Blocks(job.width, job.probs ? MOST : MOST / 2), j(job), q(columns), p(needs_p() ? columns : 0),
        d(needs_d() ? columns : 0), each(job.probs ? job.num_teachers * columns : 0),
        factor(job.probs ? job.num_teachers * blocks : 0), student(blocks), target(blocks) {}

  void run(int64_t number) {
    n = number;
    stats = j.stats + n * j.num_stats;
    given = !(j.phases & MAKE_STATS);
    find_sources();
    if (j.probs) {
      look_at_student();
      look_at_teachers();
    } else {
      needs_p() ? needs_d() ? look_at_both<true, true>() : look_at_both<true, false>() : look_at_both<false, true>();
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
  int64_t n = 0;
  bool given = false;
  double* stats = nullptr;
  Source own{};               // the student's
  std::vector<Source> asked;  // of the teachers with weight
  int64_t likeliest = 0;      // column of the student's largest logit, for averages of probabilities
  // Of the whole row: exponentials of the student, of the target, and log p - log q up to constants. For JSD, log q - log m.
  Values q, p, d;
  // For averages of probabilities, by teacher with weight: exponentials of the row, and what makes a block's its share of p.
  Values each;
  std::vector<float> factor;
  std::vector<Block> student, target;
  double mass_p = 0;  // of the target on this shard, for averages of probabilities
  double log_s = 0, reference = 0, over_reference = 0;
  float over_p = 0;  // what makes p one where log p - log q is the reference and q largest
  alignas(64) float student_buffer[MOST], target_buffer[MOST], scratch[MOST], most[MOST], kept_p[MOST], kept_d[MOST];

  bool compared() const { return j.probs || j.kind == JSD; }
  bool at_once() const { return j.probs && j.kind == FORWARD; }  // a block's gradient needs nothing of later ones
  bool needs_p() const { return !j.probs && j.kind != REVERSE; }
  bool needs_d() const { return j.kind != FORWARD; }
  float weight(int64_t k) const { return j.weights[n * j.num_teachers + k]; }
  double* target_stats() const { return stats + 2; }
  double* teacher_stats(int64_t k) const { return stats + j.first_teacher + j.teacher_columns * k; }

  // Puts the blocks on the scale of `max`, the row's on this shard or on all.
  static void relate(std::vector<Block>& all, double max) {
    for (Block& b : all) b.scale = b.max == max ? 1. : std::exp(b.max - max);
  }

  // Sum of the blocks' sums; with `sign`, of their gaps: +1 for exp * (difference - D), -1 for the opposite.
  static double total(const std::vector<Block>& all, double difference = 0, int sign = 0) {
    double sum = 0;
    for (const Block& b : all) sum += b.scale * (sign ? b.gap + sign * b.sum * (difference - b.ref) : b.sum);
    return sum;
  }

  Source source(const Matrix& m, int64_t teacher, float factor) const {
    const int64_t at = j.index ? j.index[n] : n, size = m.is_bf16 ? 2 : 4;
    const int64_t next = n + 1 >= j.rows ? at : j.index ? j.index[n + 1] : n + 1;
    char* data = (char*)m.data;
    return {data + at * m.stride * size, size, teacher, factor, data + next * m.stride * size, LEAD};
  }

  // In the order in which they are read: averages of probabilities one row after the other, averages of logits at once.
  void find_sources() {
    const float inv_t = (float)j.inv_t;
    own = source(j.student, -1, inv_t);
    asked.clear();
    for (int64_t k = 0; k < j.num_teachers; ++k)
      if (weight(k) != 0.f) asked.push_back(source(j.teachers[k], k, j.probs ? inv_t : weight(k) * inv_t));
    if (!j.probs || asked.empty()) {
      for (Source& s : asked) s.lead /= asked.size() + 1;
      own.lead /= asked.size() + 1;
      return;
    }
    asked.back().then = own.then;
    for (size_t i = 0; i + 1 < asked.size(); ++i) asked[i].then = asked[i + 1].row;
    own.then = asked[0].row;
  }

  One student_logits(int64_t b) { return one(own, b, student_buffer); }
  float logit(const Source& s, int64_t column) const { return s.at(column, 1)[0] * s.factor; }

  // Student and the average of logits: everything that one look gives.
  template <bool P, bool D>
  void look_at_both() {
    Peak of_student, of_target;
    float at_peak = NOTHING;  // the target's logit where the student's is largest
    for (int64_t b = 0; b < blocks; ++b) {
      if (b == 0) find_peaks(of_student, of_target, at_peak);
      while (look_at_both<P, D>(b, of_student, of_target, at_peak)) {
      }
    }
    double* of = target_stats();
    if (!given) stats[S_MAX] = of_student.top, of[MAX] = of_target.top;
    relate(student, stats[S_MAX]), relate(target, of[MAX]);
    if (given) return;
    const double difference = of[MAX] - stats[S_MAX];
    stats[S_SUM] = total(student), of[SUM] = total(target);
    of[GAP_S] = total(student, difference, 1), of[GAP_T] = total(target, difference, -1);
  }

  // The first block's maxima, so that it need not be looked at twice.
  void find_peaks(Peak& of_student, Peak& of_target, float& at_peak) {
    Vec amaxs = all(NOTHING), tmaxs = all(NOTHING), at_amaxs = all(NOTHING);
    const One student = student_logits(0), target = gathered(asked.data(), asked.size(), 0, target_buffer);
    for (int64_t c = 0; c < size(0); c += LANES) {
      const Vec x = student(c), y = target(c);
      at_amaxs = x > amaxs ? y : at_amaxs;
      amaxs = larger(x, amaxs), tmaxs = larger(y, tmaxs);
    }
    of_student.rise(largest(amaxs), 0), of_target.rise(largest(tmaxs), 0);
    at_peak = largest(amaxs == of_student.top ? at_amaxs : all(NOTHING));
  }

  // Whether the block has to be looked at again, with other references.
  template <bool P, bool D>
  bool look_at_both(int64_t b, Peak& of_student, Peak& of_target, float& at_peak) {
    return read(asked, b, target_buffer, [&](auto target_logits) {
      return look_at_both<P, D>(b, of_student, of_target, at_peak, target_logits);
    });
  }

  template <bool P, bool D, typename Target>
  bool look_at_both(int64_t b, Peak& of_student, Peak& of_target, float& at_peak, Target target_logits) {
    const int64_t end = padded(b);
    const One logits = student_logits(b);
    const float amax = of_student.reference, tmax = of_target.reference, ref = at_peak - tmax;
    Vec amaxs = all(NOTHING), tmaxs = all(NOTHING), at_amaxs = all(NOTHING), s1{}, s2{}, g1{}, g2{};
    float *qb = q.at(b * block), *pb = P ? p.at(b * block) : nullptr, *db = D ? d.at(b * block) : nullptr;
    for (int64_t c = 0; c < end; c += LANES) {
      logits.ask(c), target_logits.ask(c);
      const Vec l = logits(c), z = target_logits(c);
      at_amaxs = l > amaxs ? z : at_amaxs;
      amaxs = larger(l, amaxs), tmaxs = larger(z, tmaxs);
      const Vec u = l - amax, v = z - tmax, x = fast_exp(u), y = fast_exp(v), gap = (v - u) - ref;
      store(qb + c, x);
      if (P) store(pb + c, y);
      if (D) store(db + c, gap);
      s1 += x, s2 += y, g1 -= x * gap, g2 += y * gap;
    }
    const bool student_rose = of_student.rise(largest(amaxs), 0), target_rose = of_target.rise(largest(tmaxs), LITTLE);
    if (student_rose) at_peak = largest(amaxs == of_student.top ? at_amaxs : all(NOTHING));
    if (student_rose || target_rose) return true;
    const double difference = (double)tmax - amax + ref;
    student[b] = {amax, sum(s1), sum(g1), difference}, target[b] = {tmax, sum(s2), sum(g2), difference};
    return false;
  }

  // Exponentials of one row, in `out` from `first` on, or in `scratch` if that is null; in `made` what a block's are.
  Peak exponentials(const Source& s, float above, Values* out, int64_t first, std::vector<Block>& made) {
    Peak peak;
    for (int64_t b = 0; b < blocks; ++b) {
      if (b == 0) peak.rise(maximum(s), 0);
      float* to = out ? out->at(first + b * block) : scratch;
      while (exponentials(s, b, above, peak, to, made[b])) {
      }
    }
    return peak;
  }

  // Of the first block.
  float maximum(const Source& s) {
    Vec maxs = all(NOTHING);
    const One logits = one(s, 0, target_buffer);
    for (int64_t c = 0; c < size(0); c += LANES) maxs = larger(logits(c), maxs);
    return largest(maxs);
  }

  bool exponentials(const Source& s, int64_t b, float above, Peak& peak, float* out, Block& made) {
    const One logits = one(s, b, target_buffer);
    const int64_t end = padded(b);
    const float max = peak.reference;
    Vec maxs = all(NOTHING), sums{};
    for (int64_t c = 0; c < end; c += LANES) {
      logits.ask(c);
      const Vec x = logits(c), y = fast_exp(x - max);
      maxs = larger(x, maxs);
      store(out + c, y);
      sums += y;
    }
    if (peak.rise(largest(maxs), above)) return true;
    made = {max, sum(sums)};
    return false;
  }

  void look_at_student() {
    const Peak peak = exponentials(own, 0, &q, 0, student);
    if (!given) stats[S_MAX] = peak.top;
    relate(student, stats[S_MAX]);
    if (!given) stats[S_SUM] = total(student);
    find_likeliest(peak.top);
  }

  // The first block whose exponentials are relative to the row's maximum has it, where the exponential is 1.
  void find_likeliest(float max) {
    int64_t b = 0, c = 0;
    while (b + 1 < blocks && student[b].max != max) ++b;
    while (c + 1 < size(b) && q.at(b * block)[c] != 1.f) ++c;
    likeliest = b * block + c;
  }

  // Every teacher by itself, for averages of probabilities.
  void look_at_teachers() {
    mass_p = 0;
    forget_others();
    for (size_t i = 0; i < asked.size(); ++i) {
      look_at_teacher(asked[i], &each, i * columns);
      const double share = weight(asked[i].teacher) / teacher_stats(asked[i].teacher)[SUM];
      for (int64_t b = 0; b < blocks; ++b) {
        factor[b * j.num_teachers + i] = (float)(share * target[b].scale);
        mass_p += share * target[b].scale * target[b].sum;
      }
    }
  }

  // Statistics of teachers without weight.
  void forget_others() {
    for (int64_t k = 0; k < j.num_teachers && !given; ++k) {
      if (weight(k) != 0.f) continue;
      double* of = teacher_stats(k);
      of[MAX] = NOTHING;
      for (int64_t i = 1; i < j.teacher_columns; ++i) of[i] = 0;
    }
  }

  // One teacher's statistics and its exponentials.
  void look_at_teacher(const Source& s, Values* out, int64_t first) {
    double* of = teacher_stats(s.teacher);
    const Peak peak = exponentials(s, LITTLE, out, first, target);
    if (!given) of[MAX] = peak.top;
    relate(target, of[MAX]);
    if (given) return;
    of[SUM] = total(target);
    if (j.teacher_columns > 2) of[GAP_S] = j.gaps ? gap_to(s, of[MAX]) : 0;
  }

  // Σ exp(u) (u - v) of student u and teacher v, both relative to their maxima.
  double gap_to(const Source& s, double max) {
    const float ref = blocks ? logit(s, likeliest) - logit(own, likeliest) : 0.f;
    for (int64_t b = 0; b < blocks; ++b) {
      const One student_at = student_logits(b), teacher_at = one(s, b, target_buffer);
      const float* qb = q.at(b * block);
      Vec g{};
      for (int64_t c = 0; c < size(b); c += LANES) g -= load(qb + c) * ((teacher_at(c) - student_at(c)) - ref);
      student[b].gap = sum(g), student[b].ref = ref;
    }
    return total(student, max - stats[S_MAX], 1);
  }

  // Statistics of every teacher by itself, beside an average of logits; where only one has weight, it is the target.
  void look_at_each() {
    forget_others();
    if (asked.size() == 1) {
      std::memcpy(teacher_stats(asked[0].teacher), target_stats(), j.teacher_columns * sizeof(double));
      return;
    }
    kept = target, kept_student = student;
    find_likeliest(stats[S_MAX]);
    for (Source s : asked) {
      s.factor = (float)j.inv_t;
      look_at_teacher(s, nullptr, 0);
    }
    target.swap(kept), student.swap(kept_student);
  }

  double at_sampling_temperature() {
    const float ratio = (float)j.sampler_ratio;
    double all_blocks = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const float max = student[b].max;
      const One logits = student_logits(b);
      Vec s{};
      for (int64_t c = 0; c < size(b); c += LANES) s += fast_exp((logits(c) - max) * ratio);
      all_blocks += sum(s) * std::exp((max - stats[S_MAX]) * j.sampler_ratio);
    }
    return all_blocks;
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
    over_p = (float)std::exp(log_s - reference);
    over_reference = -std::log((1 - j.beta) + j.beta * std::exp(reference));
  }

  // log p of the student's likeliest token of this shard.
  double log_average_at_peak() const {
    if (!blocks) return 0;
    double sum = 0;
    for (const Source& s : asked) {
      const double* of = teacher_stats(s.teacher);
      sum += weight(s.teacher) * std::exp(logit(s, likeliest) - of[MAX]) / of[SUM];
    }
    return std::log(sum);
  }

  // Factors that make the block's exponentials probabilities.
  double student_factor(int64_t b) const { return student[b].scale / stats[S_SUM]; }
  double target_factor(int64_t b) const { return j.probs ? 1. : target[b].scale / target_stats()[SUM]; }

  // What d of the block lacks to be log p - log q - reference (averages of logits).
  double shift(int64_t b) const {
    const double* of = target_stats();
    return student[b].ref - (of[MAX] - stats[S_MAX]) + log_s - std::log(of[SUM]) - reference;
  }

  struct Sums {
    double first = 0, second = 0, reverse = 0;
  };

  // The block's p, the average of probabilities, and d = log p - log q - reference; sums of p d and -q d.
  Sums average_probabilities(int64_t b, float* pb, float* db) {
    const bool far = average(b, pb) < 1e-30f;
    const int64_t end = padded(b);
    const One logits = student_logits(b);
    const float* qb = q.at(b * block);
    const float smax = (float)stats[S_MAX], over = over_p;
    Vec first{}, reverse{};
    if (far) log_average(b, reference - log_s);
    for (int64_t c = 0; c < end; c += LANES) {
      const Vec y = load(pb + c), gap = (far ? load(scratch + c) : fast_log(y * over)) - (logits(c) - smax);
      store(db + c, gap);
      first += y * gap, reverse -= load(qb + c) * gap;
    }
    return {sum(first), 0, sum(reverse) * student_factor(b)};
  }

  // The block's p, and the smallest of it.
  float average(int64_t b, float* pb) {
    shares.clear();
    for (size_t i = 0; i < asked.size(); ++i)
      shares.push_back({(char*)each.at(i * columns), 4, asked[i].teacher, factor[b * j.num_teachers + i], nullptr, 0});
    const int64_t whole = size(b) / LANES * LANES;
    float smallest = read(shares, b, target_buffer, [&](auto share) {
      Vec least = all(1.f);
      for (int64_t c = 0; c < whole; c += LANES) {
        const Vec y = share(c);
        store(pb + c, y), least = smaller(y, least);
      }
      return -largest(-least);
    });
    for (int64_t c = whole; c < padded(b); ++c) {
      pb[c] = 0;
      for (const Source& s : shares) pb[c] += ((const float*)s.row)[b * block + c] * s.factor;
      if (c < size(b)) smallest = pb[c] < smallest ? pb[c] : smallest;
    }
    return smallest;
  }

  // scratch = log p - less, of a block in which p leaves the range of fp32.
  void log_average(int64_t b, double less) {
    for (int pass = 0; pass < 2; ++pass)
      for (size_t i = 0; i < asked.size(); ++i) {
        const double* of = teacher_stats(asked[i].teacher);
        const float max = (float)of[MAX], share = (float)(std::log((double)weight(asked[i].teacher)) - std::log(of[SUM]) - less);
        const One logits = one(asked[i], b, target_buffer);
        for (int64_t c = 0; c < padded(b); c += LANES) {
          const Vec x = (logits(c) - max) + share;
          if (pass == 0) store(most + c, larger(x, i ? load(most + c) : all(NOTHING)));
          else store(scratch + c, fast_exp(x - load(most + c)) + (i ? load(scratch + c) : Vec{}));
        }
      }
    for (int64_t c = 0; c < padded(b); c += LANES) store(scratch + c, fast_log(load(scratch + c)) + load(most + c));
  }

  // The block's sums of JSD. Afterwards d is log q - log m - over_reference, and q holds probabilities.
  Sums compare_to_mixture(int64_t b, const float* pb, float* db) {
    const float beta = (float)j.beta, rest = (float)(1 - j.beta), r0 = (float)std::exp(reference);
    const float scale = (float)std::exp(over_reference), kappa = beta * scale;
    const float far = (float)(-std::log(j.beta) - over_reference - reference);  // log p - log m where q is nothing
    const float fq = (float)student_factor(b), fp = (float)target_factor(b), lacks = j.probs ? 0.f : (float)shift(b);
    float* qb = q.at(b * block);
    Vec first{}, second{}, reverse{};
    for (int64_t c = 0; c < padded(b); c += LANES) {
      const Vec x = load(qb + c) * fq, y = load(pb + c) * fp, gap = load(db + c) + lacks, ratio = y / (x + TINY);
      const Vec capped = ratio > 1e30f ? all(1e30f) : ratio;
      const Vec w = (capped * beta + rest) * scale, e = w - 1.f, exact = (capped - r0) * kappa;
      const Vec lost = (exact - e) * (1.f - e + e * e);  // of log1p(exact), where that matters
      const Vec over = -(fast_log(w) + ((exact < 0.5f) & (exact > -0.5f) ? lost : Vec{}));
      store(qb + c, x), store(db + c, over);
      first += x * over, second += y * (capped < 1e9f ? over + gap : all(far)), reverse -= x * gap;
    }
    return {sum(first), sum(second), sum(reverse)};
  }

  // Sums that need the normalisers. Afterwards d is as JSD's or, for averages of probabilities, log p - log q - reference;
  // or, where that is possible at once, the gradient is made.
  void compare() {
    Sums all;
    for (int64_t b = 0; b < blocks; ++b) {
      float* db = at_once() ? kept_d : d.at(b * block);  // there for its value only
      float* pb = j.probs ? kept_p : p.at(b * block);
      Sums here;
      if (j.probs) here = average_probabilities(b, pb, db);
      if (j.kind == JSD) here = compare_to_mixture(b, pb, db);
      if (at_once() && j.phases & MAKE_GRADIENT) gradient(b, pb);
      all.first += here.first, all.second += here.second, all.reverse += here.reverse;
    }
    if (!(j.phases & MAKE_SUMS)) return;
    const double mass_q = total(student) / stats[S_SUM];
    const double mass = j.probs ? mass_p : total(target) / target_stats()[SUM];
    double* out = j.sums + n * NUM_SUMS;
    out[REVERSE_KL] = all.reverse - mass_q * reference;
    out[FIRST] = j.kind == JSD       ? all.first + mass_q * over_reference
                 : j.kind == FORWARD ? all.first + mass * reference
                                     : out[REVERSE_KL];
    out[SECOND] = j.kind == JSD ? all.second + mass * (over_reference + reference) : 0;
  }

  // What makes the gradient of the row sum to 0: the expectation under q of log q - log p, or log q - log m.
  double center() const {
    if (j.center) return j.center[n];
    return compared() ? j.sums[n * NUM_SUMS + FIRST] : -reference;
  }

  void gradient() {
    for (int64_t b = 0; b < blocks && !at_once(); ++b) gradient(b, p.at(b * block));
    if (j.columns > width) std::memset(own.row + width * own.size, 0, (j.columns - width) * own.size);
  }

  void gradient(int64_t b, const float* pb) {
    const int64_t end = padded(b);
    const double scale = j.scale[n] * j.inv_t * (j.kind == JSD ? 1 - j.beta : 1.);
    const float fq = (float)(j.kind == JSD ? scale : scale * student_factor(b));
    const float* qb = q.at(b * block);
    float* out = own.size == 4 && size(b) == end ? (float*)own.row + b * block : scratch;
    if (j.kind == FORWARD) {
      const float fp = (float)(scale * target_factor(b));
      for (int64_t c = 0; c < end; c += LANES) store(out + c, load(qb + c) * fq - load(pb + c) * fp);
    } else {
      const float sign = j.kind == JSD ? 1.f : -1.f;
      const double mean = center() + (j.kind == JSD ? -over_reference : reference);
      const float lacks = (float)(compared() ? mean : mean + shift(b));
      const float* db = d.at(b * block);
      for (int64_t c = 0; c < end; c += LANES) store(out + c, load(qb + c) * fq * (load(db + c) * sign - lacks));
    }
    if (out == scratch) put_back(b);
  }

  // The block's gradient from `scratch` into the student's row.
  void put_back(int64_t b) {
    char* to = own.row + b * block * own.size;
    if (own.size == 4) {
      std::memcpy(to, scratch, size(b) * 4);
      return;
    }
    Halves last;
    const int64_t whole = size(b) / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) store_bf16(to + c * 2, load(scratch + c));
    if (whole < size(b)) store_bf16(&last, load(scratch + whole)), std::memcpy(to + whole * 2, &last, (size(b) - whole) * 2);
  }

  std::vector<Source> shares;
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
