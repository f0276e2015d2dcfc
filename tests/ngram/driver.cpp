// The n-gram memory under sanitizers: random answers, eviction, and readers beside a writer.
// Prints a sum over all that was proposed, so that two builds can be compared.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "cpu/ngram_request.h"

using namespace xspec::ngram;

namespace {

const CopySettings kCopy{{0.3, 0.45, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9}, 16.0, 0.5, 6};

std::vector<Token> random_answer(std::mt19937& rng, int vocab, int longest) {
  std::vector<Token> answer(1 + rng() % longest);
  for (Token& token : answer) token = Token(rng() % vocab);
  return answer;
}

void check(const Tree& tree, int rows) {
  bool sound = tree.tokens.size() <= size_t(rows) && tree.parents[0] == -1;
  for (size_t i = 1; i < tree.tokens.size(); ++i)
    sound &= tree.parents[i] >= 0 && tree.parents[i] < int(i) &&
             tree.scores[i] <= tree.scores[tree.parents[i]];
  if (sound) return;
  std::puts("malformed tree");
  std::exit(1);
}

double walk(NgramRequest& request, const std::vector<Token>& answer, std::mt19937& rng) {
  double sum = 0.0;
  request.begin(random_answer(rng, 6, 30));
  for (const Token token : answer) {
    const int rows = 1 + int(rng() % 64);
    const Tree tree = request.propose({token}, rows);
    check(tree, rows);
    for (const double score : tree.scores) sum += score;
  }
  return sum;
}

double alone(unsigned seed) {
  std::mt19937 rng(seed);
  const int vocabularies[] = {1, 2, 6, 60, 3000}, bounds[] = {5, 300, 20000};
  double sum = 0.0;
  for (const int vocab : vocabularies)
    for (const int bound : bounds) {
      const int longest = std::min(bound, 60);
      auto counts = std::make_shared<NgramCounts>(
          Settings{1 + int(rng() % 20), bound, int(rng() % 5), 0.25, 0.65, 1.0});
      for (const bool chain : {false, true}) {
        NgramRequest request(counts, chain, rng() % 2, kCopy, 12, 1e-5);
        for (int i = 0; i < 25; ++i) {
          counts->extend({random_answer(rng, vocab, longest), random_answer(rng, vocab, longest)});
          sum += walk(request, random_answer(rng, vocab, 20), rng);
        }
      }
      const auto known = counts->statistics();
      sum += double(known[1] + known[3] + counts->predict({0}).size() + counts->counts({0}).size());
    }
  return sum;
}

void together(unsigned seed) {
  auto counts = std::make_shared<NgramCounts>(Settings{14, 2000, 3, 0.25, 0.65, 1.0});
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (unsigned i = 0; i < 3; ++i)
    readers.emplace_back([&, i] {
      std::mt19937 rng(seed + i);
      NgramRequest request(counts, false, true, kCopy, 12, 1e-5);
      while (!done) walk(request, random_answer(rng, 6, 40), rng);
    });
  std::mt19937 rng(seed + 9);
  for (int i = 0; i < 300; ++i) counts->extend({random_answer(rng, 6, 40)});
  done = true;
  for (std::thread& reader : readers) reader.join();
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? unsigned(std::strtoul(argv[1], nullptr, 10)) : 1;
  std::printf("%.17g\n", alone(seed));
  together(seed);
}
