#include <algorithm>

#include "ngram_request.h"

namespace xspec::ngram {
namespace {

constexpr int kPlaces = 16;  // latest places looked at in either index

}  // namespace

void Tail::push(Token token) {
  if (count == kTail) {
    std::copy(tokens.begin() + 1, tokens.end(), tokens.begin());
    --count;
  }
  tokens[count++] = token;
}

size_t RequestText::TripleHash::operator()(const Triple& t) const {
  constexpr uint64_t mix = 0x9e3779b97f4a7c15u;
  return size_t(((uint64_t(t.a) * mix + uint64_t(t.b)) * mix + uint64_t(t.c)) * mix >> 16);
}

RequestText::RequestText(const CopySettings& settings) {
  for (int i = 0; i < 2; ++i)
    for (int agreed = 0; agreed < kTail; ++agreed) {
      const double part = i ? settings.second : 1.0;
      tally_[i][agreed] = {settings.prior * settings.trust[agreed] * part, settings.prior};
    }
}

void RequestText::append(Token token) {
  tokens_.push_back(token);
  const int32_t place = int32_t(tokens_.size());
  before_token_.push_back(std::exchange(by_token_[token], place));
  int32_t before = 0;
  if (place >= 3)
    before = std::exchange(by_triple_[{tokens_[place - 3], tokens_[place - 2], token}], place);
  before_triple_.push_back(before);
}

void RequestText::learn(Token token) {
  std::array<Copy, kCopies> found;
  const int count = candidates(tail(), found);
  for (int i = 0; i < count; ++i) {
    Tally& tally = tally_[i > 0][found[i].agreed - 1];
    tally.right += found[i].token == token;
    tally.tried += 1;
  }
  append(token);
}

Tail RequestText::tail() const {
  Tail tail;
  const size_t count = std::min(tokens_.size(), size_t(kTail));
  std::copy(tokens_.end() - count, tokens_.end(), tail.tokens.begin());
  tail.count = int(count);
  return tail;
}

int RequestText::copies(const Tail& tail, std::array<Copy, kCopies>& found) const {
  const int count = candidates(tail, found);
  for (int i = 0; i < count; ++i) {
    const Tally& tally = tally_[i > 0][found[i].agreed - 1];
    found[i].trust = tally.right / tally.tried;
  }
  std::sort(found.begin(), found.begin() + count, [](const Copy& a, const Copy& b) {
    return a.trust != b.trust ? a.trust > b.trust : a.token < b.token;
  });
  return count;
}

// Different tokens that followed places like `tail` and how many tokens agree there, the longest
// agreement first; of equals the one found first, which is the latest.
int RequestText::candidates(const Tail& tail, std::array<Copy, kCopies>& found) const {
  if (!tail.count) return 0;
  std::array<Copy, 2 * kPlaces> all;
  int count = 0;
  const auto look = [&](int32_t place, const std::vector<int32_t>& before) {
    for (int i = 0; i < kPlaces && place; ++i, place = before[place - 1]) {
      if (place == int32_t(tokens_.size())) continue;
      const int most = std::min(tail.count, place);
      int agreed = 1;
      while (agreed < most && tokens_[place - 1 - agreed] == tail.back(agreed)) ++agreed;
      const Token token = tokens_[place];
      int k = 0;
      while (k < count && all[k].token != token) ++k;
      if (k == count) all[count++] = {token, 0.0, 0};
      all[k].agreed = std::max(all[k].agreed, agreed);
    }
  };
  if (tail.count >= 3) {
    const auto known = by_triple_.find({tail.back(2), tail.back(1), tail.back(0)});
    if (known != by_triple_.end()) look(known->second, before_triple_);
  }
  const auto known = by_token_.find(tail.back(0));
  if (known != by_token_.end()) look(known->second, before_token_);
  const auto longer = [](const Copy& a, const Copy& b) { return a.agreed > b.agreed; };
  std::stable_sort(all.begin(), all.begin() + count, longer);
  count = std::min(count, kCopies);
  std::copy(all.begin(), all.begin() + count, found.begin());
  return count;
}

}  // namespace xspec::ngram
