// The law of sample_tokens on the CPU. Every float operation rounds by itself, as in the reference:
// this file is compiled without contraction.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

namespace xspec {
namespace {

constexpr float kCutoff = 30.0f;
constexpr int32_t kInfinity = 0x7f800000;

// Comparisons are of bits, and conversions to 32-bit integers, since the simplest vector units have
// no other; all of it is exact.
inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Bits of a float, made to be ordered as floats are; its own inverse.
inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// floor(2^40 e^-distance), its high and its low 20 bits one after the other.
inline int64_t weight_of(float distance) {
  distance = float_of(std::min(bits_of(distance), bits_of(kCutoff)));
  const int32_t halvings = int32_t(distance * 1.4426950408889634f + 0.5f);
  const float whole = float(halvings);
  const float x = (whole * 0.693359375f - distance) + whole * -2.121944400546905827e-4f;
  float power = float(1.0 / 5040) * x + float(1.0 / 720);
  power = power * x + float(1.0 / 120);
  power = power * x + float(1.0 / 24);
  power = power * x + float(1.0 / 6);
  power = power * x + 0.5f;
  power = power * x + 1.0f;
  power = power * x + 1.0f;
  const float value = power * float_of((127 + 40 - halvings) << 23);
  const int32_t high = int32_t(value * 0x1p-20f);
  const int32_t low = int32_t(value - float(high) * 0x1p20f);
  return int64_t(uint64_t(uint32_t(high)) << 20 | uint32_t(low));
}

// The largest score; false where one is NaN or the largest is infinite.
bool maximum(const float* score, size_t count, float& best) {
  int32_t top = ordered(bits_of(-std::numeric_limits<float>::infinity())), widest = 0;
  for (size_t i = 0; i < count; ++i) {
    const int32_t bits = bits_of(score[i]);
    top = std::max(top, ordered(bits));
    widest = std::max(widest, bits & 0x7fffffff);
  }
  best = float_of(ordered(top));
  return widest <= kInfinity && std::isfinite(best);
}

}  // namespace

RowLaw::RowLaw(const SamplingLaw& law, int32_t vocab)
    : law_(law), scores_(vocab), weights_(vocab) {}

bool RowLaw::read(const float* logits) {
  const size_t vocab = scores_.size();
  float* const score = scores_.data();
  int64_t* const weight = weights_.data();
  for (size_t i = 0; i < vocab; ++i) score[i] = logits[i] * law_.inverse;
  float best = 0;
  if (!maximum(score, vocab, best)) return false;
  for (size_t i = 0; i < vocab; ++i) weight[i] = weight_of(best - score[i]);
  float least = best - kCutoff;
  if (law_.top_k) {
    least = threshold(best, least, law_.top_k, true);
    keep(least);
  }
  total_ = std::accumulate(weights_.begin(), weights_.end(), int64_t(0));
  if (law_.top_p < 1) {
    const auto need = int64_t(std::ceil(double(total_) * law_.top_p));
    keep(threshold(best, least, std::max(need, int64_t(1)), false));
    total_ = std::accumulate(weights_.begin(), weights_.end(), int64_t(0));
  }
  return true;
}

// Drops all others.
void RowLaw::keep(float least) {
  for (size_t i = 0; i < weights_.size(); ++i) weights_[i] &= -int64_t(scores_[i] >= least);
}

// The largest score v from `floor` up such that scores >= v weigh (count: number) at least `need`,
// or `floor` where there are none. Scores fall into buckets by their distance to the best one; only
// those of the bucket in which `need` is reached are sorted.
float RowLaw::threshold(float best, float floor, int64_t need, bool count) const {
  constexpr int kBuckets = 256;
  const auto bucket_of = [best](float score) {
    return std::min(int((best - score) * (kBuckets / kCutoff)), kBuckets - 1);
  };
  int64_t mass[kBuckets] = {};
  for (size_t i = 0; i < scores_.size(); ++i)
    if (scores_[i] >= floor) mass[bucket_of(scores_[i])] += count ? 1 : weights_[i];
  int bucket = 0;
  while (bucket < kBuckets && mass[bucket] < need) need -= mass[bucket++];

  std::vector<std::pair<float, int64_t>> inside;
  for (size_t i = 0; i < scores_.size(); ++i)
    if (scores_[i] >= floor && bucket_of(scores_[i]) == bucket)
      inside.emplace_back(scores_[i], count ? 1 : weights_[i]);
  std::sort(inside.begin(), inside.end(), std::greater<>());
  for (const auto& [score, weight] : inside)
    if ((need -= weight) <= 0) return score;
  return floor;
}

int32_t draw(const std::vector<int64_t>& weights, int64_t total, double uniform) {
  const int64_t target =
      std::min(std::max(int64_t(uniform * double(total)), int64_t(0)), total - 1);
  int64_t running = 0;
  int32_t i = 0;
  while ((running += weights[i]) <= target) ++i;
  return i;
}

void sample_tokens_cpu(const SampleTokensArgs& a) {
  RowLaw law(a.law, a.vocab);
  for (int64_t row = 0; row < a.rows; ++row) {
    const bool valid = law.read(a.logits + row * a.vocab);
    a.ids[row] = valid ? draw(law.weights(), law.total(), a.uniforms[row]) : -1;
  }
}

}  // namespace xspec
