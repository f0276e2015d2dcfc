// What both drivers share: a seeded generator, exactly sized arrays, and how a run ends.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct Random {
  std::mt19937 generator;

  // Uniform in low..high, both included.
  int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
  bool chance(int percent) { return draw(1, 100) <= percent; }
};

[[noreturn]] inline void mismatch(const std::string& what) {
  throw std::runtime_error("mismatch: " + what);
}

template <class T>
void expect_equal(const char* name, const std::vector<T>& got, const std::vector<T>& want) {
  for (size_t i = 0; i < want.size(); ++i)
    if (got[i] != want[i])
      mismatch(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) +
               ", expected " + std::to_string(want[i]));
}

// Usage: DRIVER VARIANT SEED CASES. `run` takes one variant, a generator and the case's number, and
// returns how much of the case mattered (accepted nodes, moved rows).
template <class Variants, class Run>
int drive(int argc, char** argv, const Variants& variants, Run run) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s VARIANT SEED CASES\n", argv[0]);
    return 2;
  }
  const int cases = std::atoi(argv[3]);
  Random random{std::mt19937(unsigned(std::atoi(argv[2])))};
  long weight = 0;
  int number = 0;
  try {
    const auto& variant = variants.at(argv[1]);
    for (; number < cases; ++number) weight += run(variant, random, number);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "case %d: %s\n", number, error.what());
    return 3;
  }
  std::printf("{\"cases\": %d, \"weight\": %ld}\n", cases, weight);
  return 0;
}
