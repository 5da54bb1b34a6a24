// The distillation loss of one row after the other: statistics, sums that need the normalisers, and the gradient, which
// overwrites the student's logits. A row stays in the cache from the first look to the last.
//
// Plain C++ with a C interface and no header of torch, so that it builds in seconds. vectors.h has vectors, exp and log,
// memory.h how logits are read.
// No -ffast-math: a NaN in the logits must reach the statistics, where the caller finds it.
//
// Precision. Sums run over a block in fp32 and over blocks in fp64: a plain fp32 sum over 100,000 columns costs 1e-4 of
// the gradient. The gradient of a nearly certain student is a difference of nearly equal numbers, so every difference
// log p - log q is kept relative to that of the row's likeliest token (or nearly), where it is exactly 0.
//
// Exponentials are relative to a large logit met before, so one look at a row is enough: a block in which a much larger one
// turns up is looked at once more, and `total` puts the blocks on one scale. The student's reference is at most NEARLY below
// its largest logit: a token that is likelier than by that may be nearly certain, and has to be the reference itself.
//
// The gradient of a row whose logits were averaged is made while the next row is read: it waits for the second cache, the
// reading for memory, and q, p and d are in the fastest cache already when the next row's are written to their place.
//
// What the columns of `stats` and `sums` mean is in layout.py; reference.py has the plain formulas.

#include <cmath>
#include <vector>

#include "memory.h"

namespace {

constexpr float LITTLE = 8.f;  // above the reference, what an exponential bears
constexpr float NEARLY = 1.f;  // the same where the reference is to be a likely token

}  // namespace

extern "C" {

enum { FORWARD = 0, REVERSE = 1, JSD = 2 };                       // kind
enum { MAKE_STATS = 1, MAKE_SUMS = 2, MAKE_GRADIENT = 4 };        // phases; without the first, `stats` is input
enum { S_MAX, S_SUM, MAX = 0, SUM, GAP_S, GAP_T };  // columns of stats: the student's; from first_teacher or 2 on
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

struct Factors {
  float of_q, shift;
};

// Makes a block's gradient, q * of_q * (d - shift), or q * of_q - p * shift; nothing where `to` is null.
template <bool D>
struct Owed {
  float* to;
  Factors by;

  void operator()(int64_t c, const float* q, const float* p_or_d) const {
    if (!to) return;
    const Vec x = load(q + c) * by.of_q, y = load(p_or_d + c);
    store(to + c, D ? x * (y - by.shift) : x - y * by.shift);
  }
};

// Adds a block's exponentials of the teacher before to p, or makes p of those of the first; nothing where `p` is null.
struct Share {
  float* p;
  const float* exps;
  float factor;
  bool is_first;

  void operator()(int64_t c) const {
    if (!p) return;
    const Vec x = load(exps + c) * factor;
    store(p + c, is_first ? x : load(p + c) + x);
  }
};

// What exponentials are relative to, and the largest logits so far.
struct Peaks {
  float student = NOTHING, target = NOTHING, top_student = NOTHING, top_target = NOTHING;
  float at_student = NOTHING;  // the target's logit where the student's is the reference
  bool rose = false;           // whether the next block has been looked at, with references that were too small for it
};

class Row : Blocks {
 public:
  explicit Row(const Job& job)
      : Blocks(job.width), j(job), q(columns), p(needs_p() ? columns : 0), d(needs_d() ? columns : 0),
        latest(job.probs ? columns : 0), share(blocks), student(blocks), target(blocks), owed(blocks) {}

  void run(int64_t number) {
    n = number;
    stats = j.stats + n * j.num_stats;
    given = !(j.phases & MAKE_STATS);
    find_sources();
    if (j.probs) {
      look_at_student();
      look_at_teachers();
    } else {
      if (j.kind == FORWARD) look_at_both<true, false>();
      if (j.kind == REVERSE) look_at_both<false, true>();
      if (j.kind == JSD) look_at_both<true, true>();
      if (j.first_teacher && !given) look_at_each();
    }
    if (!given && j.sampler_ratio > 0) stats[j.num_stats - 1] = at_sampling_temperature();
    if (!(j.phases & (MAKE_SUMS | MAKE_GRADIENT))) return;
    find_reference();
    if (compared()) compare();
    if (!(j.phases & MAKE_GRADIENT)) return;
    if (!at_once()) owe();
    if (j.probs) settle();
    if (j.columns > width) std::memset(own.row + width * own.size, 0, (j.columns - width) * own.size);
  }

  // The gradient that the last row is owed.
  void settle() {
    for (int64_t b = 0; b < blocks && debtor; ++b) needs_d() ? settle<true>(b) : settle<false>(b);
    debtor = nullptr;
  }

 private:
  const Job& j;
  int64_t n = 0;
  bool given = false;
  double* stats = nullptr;
  Source own{};                    // the student's
  const char* next_own = nullptr;  // the student's next row, for averages of probabilities
  std::vector<Source> asked;       // of the teachers with weight
  int64_t likeliest = 0;           // column of the student's last reference, for averages of probabilities
  // Of the whole row: exponentials of the student, of the target, and log p - log q up to constants. For JSD, log q - log m.
  Values q, p, d;
  // For averages of probabilities: exponentials of the teacher looked at last, and what makes a block's its share of p. The
  // shares of those before it are in p.
  Values latest;
  std::vector<float> share;
  std::vector<Block> student, target;
  double mass_p = 0;  // of the target on this shard, for averages of probabilities
  double log_s = 0, reference = 0, over_reference = 0;
  float over_p = 0;  // what makes p one where log p - log q is the reference and q largest
  // The row whose gradient is still to be made, or null, and what makes it, by block.
  char* debtor = nullptr;
  std::vector<Factors> owed;
  std::vector<Block> kept, kept_student;
  alignas(64) float student_buffer[BLOCK], target_buffer[BLOCK], scratch[BLOCK], most[BLOCK], kept_d[BLOCK];

  bool compared() const { return j.probs || j.kind == JSD; }
  bool at_once() const { return j.probs && j.kind == FORWARD; }  // a block's gradient needs nothing of later ones
  bool needs_p() const { return j.probs || j.kind != REVERSE; }
  bool needs_d() const { return j.kind != FORWARD; }
  float weight(int64_t k) const { return j.weights[n * j.num_teachers + k]; }
  double* target_stats() const { return stats + 2; }
  double* teacher_stats(int64_t k) const { return stats + j.first_teacher + j.teacher_columns * k; }

  // Puts the blocks on the scale of `max`, the row's on this shard or on all.
  static void relate(std::vector<Block>& all, double max) {
    float known = NOTHING;
    double scale = 0;
    for (Block& b : all) {
      if (b.max != known) known = b.max, scale = std::exp(known - max);
      b.scale = scale;
    }
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
    next_own = own.then;
    asked.back().then = own.then;
    for (size_t i = 0; i + 1 < asked.size(); ++i) asked[i].then = asked[i + 1].row;
    own.then = asked[0].row;
  }

  One student_logits(int64_t b) { return one(own, b, student_buffer); }
  float logit(const Source& s, int64_t column) const { return s.at(column, 1)[0] * s.factor; }

  // Student and the average of logits: everything that one look gives.
  template <bool P, bool D>
  void look_at_both() {
    Peaks peaks;
    if (blocks) find_peaks(0, peaks);
    for (int64_t b = 0; b < blocks;) {
      b = read(asked, b, target_buffer, [&](auto target, int64_t end) { return look_at_both<P, D>(b, end, peaks, target); });
      if (peaks.rose) find_peaks(b, peaks);
    }
    debtor = nullptr;
    double* of = target_stats();
    if (!given) stats[S_MAX] = peaks.top_student, of[MAX] = peaks.top_target;
    relate(student, stats[S_MAX]), relate(target, of[MAX]);
    if (given) return;
    const double difference = of[MAX] - stats[S_MAX];
    stats[S_SUM] = total(student), of[SUM] = total(target);
    of[GAP_S] = total(student, difference, 1), of[GAP_T] = total(target, difference, -1);
  }

  // The block's largest logits: of the first one, which need not be looked at twice then, and of one where they rose.
  void find_peaks(int64_t b, Peaks& peaks) {
    Vec amaxs = all(NOTHING), tmaxs = all(NOTHING), at_amaxs = all(NOTHING);
    const One student_at = student_logits(b);
    read(asked, b, target_buffer, [&](auto target_block, int64_t) {
      const auto target_at = target_block(b);
      for (int64_t c = 0, end = padded(b); c < end; c += LANES) {
        const Vec x = student_at(c), y = target_at(c);
        at_amaxs = x > amaxs ? y : at_amaxs;
        amaxs = larger(x, amaxs), tmaxs = larger(y, tmaxs);
      }
      return b;
    });
    const float amax = largest(amaxs), tmax = largest(tmaxs);
    if (tmax > peaks.target + LITTLE) peaks.target = tmax;
    if (!(amax > peaks.student + NEARLY)) return;
    peaks.student = amax;
    peaks.at_student = largest(amaxs == amax ? at_amaxs : all(NOTHING));
  }

  // Looks at blocks until one is to be looked at again, because its logits are too large for the references; gives the next.
  // The blocks' sums are those of the last one: all have the same references.
  template <bool P, bool D, typename Target>
  int64_t look_at_both(int64_t first, int64_t end, Peaks& peaks, Target target_block) {
    const float amax = peaks.student, tmax = peaks.target, ref = peaks.at_student - tmax;
    const double difference = (double)tmax - amax + ref;
    bool is_second = peaks.rose;
    peaks.rose = false;
    Vec amaxs = all(NOTHING), tmaxs = all(NOTHING);
    Wide s1{}, s2{}, g1{}, g2{};
    int64_t b = first;
    for (; b < end; ++b) {
      const One logits = student_logits(b);
      const auto target_logits = target_block(b);
      const Owed<D> owed = is_second ? Owed<D>{} : owed_of<D>(b);
      float *qb = q.at(b * BLOCK), *pb = P ? p.at(b * BLOCK) : nullptr, *db = D ? d.at(b * BLOCK) : nullptr;
      Vec bamaxs = all(NOTHING), btmaxs = all(NOTHING), bs1{}, bs2{}, bg1{}, bg2{};  // of this block
      for (int64_t c = 0, count = padded(b); c < count; c += LANES) {
        logits.ask(c), target_logits.ask(c);
        owed(c, qb, D ? db : pb);
        const Vec l = logits(c), z = target_logits(c);
        bamaxs = larger(l, bamaxs), btmaxs = larger(z, btmaxs);
        const Vec u = l - amax, v = z - tmax, x = fast_exp(u), y = fast_exp(v), gap = (v - u) - ref;
        store(qb + c, x);
        if (P) store(pb + c, y);
        if (D) store(db + c, gap);
        bs1 += x, bs2 += y, bg1 -= x * gap, bg2 += y * gap;
      }
      if (owed.to == scratch) put_back(b);
      amaxs = larger(bamaxs, amaxs), tmaxs = larger(btmaxs, tmaxs);
      peaks.rose = any((bamaxs > amax + NEARLY) | (btmaxs > tmax + LITTLE)) && !is_second;
      if (peaks.rose) break;
      is_second = false;
      s1 += wide(bs1), s2 += wide(bs2), g1 += wide(bg1), g2 += wide(bg2);
      student[b] = {amax, 0, 0, difference}, target[b] = {tmax, 0, 0, difference};
    }
    peaks.top_student = std::fmax(peaks.top_student, largest(amaxs));
    peaks.top_target = std::fmax(peaks.top_target, largest(tmaxs));
    if (b > first) {
      student[b - 1].sum = sum(s1), student[b - 1].gap = sum(g1);
      target[b - 1].sum = sum(s2), target[b - 1].gap = sum(g2);
    }
    return b;
  }

  // Exponentials of one row, in `out`, or in `scratch` if that is null; in `made` what the blocks' are, as above. Logits may
  // exceed their reference by `above`. While the `number`th of several teachers (from 0 on) is looked at, p gets its share
  // of the one before. Gives the largest logit.
  float exponentials(const Source& s, float above, Values* out, std::vector<Block>& made, size_t number = 0) {
    float max = blocks ? maximum(s) : NOTHING;
    for (int64_t b = 0; b < blocks;) b = exponentials(s, above, out, made, number, b, max);
    return max;
  }

  // Of the first block.
  float maximum(const Source& s) {
    Vec maxs = all(NOTHING);
    const One logits = one(s, 0, target_buffer);
    for (int64_t c = 0; c < size(0); c += LANES) maxs = larger(logits(c), maxs);
    return largest(maxs);
  }

  // Those of the blocks from `first` on that bear `max`, the largest logit before, as their reference; gives the next block.
  int64_t exponentials(const Source& s, float above, Values* out, std::vector<Block>& made, size_t number, int64_t first,
                       float& max) {
    const float reference = max;
    bool is_second = first > 0;  // it has been looked at, with a reference that was too small for it
    Vec maxs = all(NOTHING);
    Wide sums{};
    int64_t b = first;
    for (; b < blocks; ++b, is_second = false) {
      const One logits = one(s, b, target_buffer);
      const Share share_before = number && !is_second ? share_of(b, number - 1) : Share{};
      float* to = out ? out->at(b * BLOCK) : scratch;
      Vec bmaxs = all(NOTHING), bsums{};  // of this block
      for (int64_t c = 0, end = padded(b); c < end; c += LANES) {
        logits.ask(c);
        share_before(c);
        const Vec x = logits(c), y = fast_exp(x - reference);
        bmaxs = larger(x, bmaxs);
        store(to + c, y);
        bsums += y;
      }
      maxs = larger(bmaxs, maxs);
      if (any(bmaxs > reference + above)) break;
      sums += wide(bsums);
      made[b] = {reference};
    }
    max = std::fmax(max, largest(maxs));
    if (b > first) made[b - 1].sum = sum(sums);
    return b;
  }

  Share share_of(int64_t b, size_t number) {
    return {p.at(b * BLOCK), latest.at(b * BLOCK), share[b], number == 0};
  }

  void look_at_student() {
    const float max = exponentials(own, NEARLY, &q, student);
    if (!given) stats[S_MAX] = max;
    relate(student, stats[S_MAX]);
    if (!given) stats[S_SUM] = total(student);
    find_likeliest();
  }

  // The student's last reference: its likeliest token, or nearly. The first block relative to it has it.
  void find_likeliest() {
    int64_t b = 0, c = 0;
    while (b + 1 < blocks && student[b].max != student.back().max) ++b;
    while (c + 1 < size(b) && q.at(b * BLOCK)[c] != 1.f) ++c;
    likeliest = b * BLOCK + c;
  }

  // Every teacher by itself, for averages of probabilities.
  void look_at_teachers() {
    mass_p = 0;
    forget_others();
    for (size_t i = 0; i < asked.size(); ++i) {
      look_at_teacher(asked[i], &latest, i);
      const double part = weight(asked[i].teacher) / teacher_stats(asked[i].teacher)[SUM];
      for (int64_t b = 0; b < blocks; ++b) {
        share[b] = (float)(part * target[b].scale);
        mass_p += part * target[b].scale * target[b].sum;
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
  void look_at_teacher(const Source& s, Values* out, size_t number = 0) {
    double* of = teacher_stats(s.teacher);
    const float max = exponentials(s, LITTLE, out, target, number);
    if (!given) of[MAX] = max;
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
      const float* qb = q.at(b * BLOCK);
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
    find_likeliest();
    for (Source s : asked) {
      s.factor = (float)j.inv_t;
      look_at_teacher(s, nullptr);
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
    const Share last_share = share_of(b, asked.size() - 1);
    const float over = over_p;
    const int64_t whole = size(b) / LANES * LANES;
    Vec least = all(1.f);
    const Sums found = gaps(b, pb, db, [&](int64_t c) {
      last_share(c);
      const Vec y = load(pb + c);
      if (c < whole) least = smaller(y, least);
      return fast_log(y * over);
    });
    float smallest = -largest(-least);
    for (int64_t c = whole; c < size(b); ++c) smallest = pb[c] < smallest ? pb[c] : smallest;
    if (smallest >= 1e-30f) return found;
    log_average(b, reference - log_s);
    return gaps(b, pb, db, [&](int64_t c) { return load(scratch + c); });
  }

  // Memory would be idle meanwhile, so the student's next row is fetched into the second cache.
  template <typename Log>
  Sums gaps(int64_t b, const float* pb, float* db, Log log_p) {
    const One logits = student_logits(b);
    const char* later = next_own + b * BLOCK * own.size;
    const float* qb = q.at(b * BLOCK);
    const float smax = (float)stats[S_MAX];
    Vec first{}, reverse{};
    for (int64_t c = 0, end = padded(b); c < end; c += LANES) {
      __builtin_prefetch(later + c * own.size, 0, 2);
      const Vec gap = log_p(c) - (logits(c) - smax);
      store(db + c, gap);
      first += load(pb + c) * gap, reverse -= load(qb + c) * gap;
    }
    return {sum(first), 0, sum(reverse) * student_factor(b)};
  }

  // scratch = log p - less, of a block in which p leaves the range of fp32.
  void log_average(int64_t b, double less) {
    for (int pass = 0; pass < 2; ++pass)
      for (size_t i = 0; i < asked.size(); ++i) {
        const double* of = teacher_stats(asked[i].teacher);
        const float max = (float)of[MAX];
        const float share = (float)(std::log((double)weight(asked[i].teacher)) - std::log(of[SUM]) - less);
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
    float* qb = q.at(b * BLOCK);
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
    if (at_once() && j.phases & MAKE_GRADIENT) owe();
    for (int64_t b = 0; b < blocks; ++b) {
      float* db = at_once() ? kept_d : d.at(b * BLOCK);  // there for its value only
      float* pb = p.at(b * BLOCK);
      Sums here;
      if (j.probs) here = average_probabilities(b, pb, db);
      if (j.kind == JSD) here = compare_to_mixture(b, pb, db);
      if (at_once() && debtor) settle<false>(b);
      all.first += here.first, all.second += here.second, all.reverse += here.reverse;
    }
    if (at_once()) debtor = nullptr;
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

  // What each block's gradient is made with, once the row's sums are known.
  void owe() {
    const double scale = j.scale[n] * j.inv_t * (j.kind == JSD ? 1 - j.beta : 1.), sign = j.kind == REVERSE ? -1 : 1;
    const double mean = j.kind == FORWARD ? 0 : center() + (j.kind == JSD ? -over_reference : reference);
    const double of_q = j.kind == JSD ? sign * scale : sign * scale / stats[S_SUM];
    const double of_p = j.kind == FORWARD ? scale / (j.probs ? 1 : target_stats()[SUM]) : 0;
    for (int64_t b = 0; b < blocks; ++b) {
      owed[b].of_q = (float)(j.kind == JSD ? of_q : of_q * student[b].scale);
      if (j.kind == FORWARD) owed[b].shift = (float)(j.probs ? of_p : of_p * target[b].scale);
      else owed[b].shift = (float)(sign * (compared() ? mean : mean + shift(b)));
    }
    debtor = own.row;
  }

  template <bool D>
  Owed<D> owed_of(int64_t b) {
    if (!debtor) return {};
    float* to = own.size == 4 && size(b) == padded(b) ? (float*)debtor + b * BLOCK : scratch;
    return {to, owed[b]};
  }

  template <bool D>
  void settle(int64_t b) {
    const Owed<D> gradient = owed_of<D>(b);
    const float *qb = q.at(b * BLOCK), *other = D ? d.at(b * BLOCK) : p.at(b * BLOCK);
    for (int64_t c = 0, end = padded(b); c < end; c += LANES) gradient(c, qb, other);
    if (gradient.to == scratch) put_back(b);
  }

  // The block's gradient from `scratch` into its row.
  void put_back(int64_t b) {
    char* to = debtor + b * BLOCK * own.size;
    if (own.size == 4) {
      std::memcpy(to, scratch, size(b) * 4);
      return;
    }
    Halves last;
    const int64_t whole = size(b) / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) store_bf16(to + c * 2, load(scratch + c));
    if (whole < size(b)) store_bf16(&last, load(scratch + whole)), std::memcpy(to + whole * 2, &last, (size(b) - whole) * 2);
  }
};

}  // namespace

extern "C" void megatron_opd_rows(const Job* job) {
#pragma omp parallel num_threads(job->threads)
  {
    Row row(*job);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < job->rows; ++n) row.run(n);
    row.settle();
  }
}
