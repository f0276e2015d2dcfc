// The law of sample_tokens on the CPU: what a row's logits become, in integers.
#pragma once

#include <cstdint>
#include <vector>

#include "../api.h"

namespace xspec {

// 2^40, the weight of a row's likeliest token and the unit of probabilities.
constexpr double kOne = double(int64_t(1) << 40);

class RowLaw {
 public:
  RowLaw(const SamplingLaw& law, int32_t vocab);

  // Weigh a row of logits; false where it has no law.
  bool read(const float* logits);

  const std::vector<int64_t>& weights() const { return weights_; }
  int64_t total() const { return total_; }

 private:
  float threshold(float best, float floor, int64_t need, bool count) const;
  void keep(float least);

  const SamplingLaw law_;
  int64_t total_ = 0;
  std::vector<float> scores_;
  std::vector<int64_t> weights_;
};

// The first index at which the running sum exceeds floor(uniform * total).
int32_t draw(const std::vector<int64_t>& weights, int64_t total, double uniform);

}  // namespace xspec
