// The n-gram memory in Python: NgramCounts and NgramRequest. The GIL is released in every call
// that waits for a memory's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <vector>

#include "cpu/ngram_request.h"

namespace py = pybind11;

namespace xspec {

void bind_ngram(py::module_& m) {
  using namespace ngram;
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  py::class_<NgramCounts, std::shared_ptr<NgramCounts>>(m, "NgramCounts")
      .def(py::init([](int order, int64_t max_tokens, int recency, double share, double low_share,
                       double discount) {
        const bool valid = 1 <= order && order <= kMaxOrder && 0 <= recency && recency <= 8;
        if (!valid || max_tokens < 1 || max_tokens > kMostTokens)
          throw py::value_error("NgramCounts: order, max_tokens or recency out of range");
        return std::make_shared<NgramCounts>(
            Settings{order, max_tokens, recency, share, low_share, discount});
      }))
      .def("extend", &NgramCounts::extend, Unlocked())
      .def("version", &NgramCounts::version, Unlocked())
      .def("statistics", &NgramCounts::statistics, Unlocked())
      .def("answers", &NgramCounts::answers, Unlocked())
      .def("counts", &NgramCounts::counts, Unlocked())
      .def("predict", &NgramCounts::predict, Unlocked())
      .def("opening", &NgramCounts::opening, Unlocked())
      .def("usual_end", &NgramCounts::usual_end, Unlocked());

  py::class_<NgramRequest>(m, "NgramRequest")
      .def(py::init([](std::shared_ptr<NgramCounts> counts, bool chain, bool copy,
                       const std::vector<double>& trust, double prior, double second, int first,
                       int siblings, double negligible) {
        if (trust.size() != size_t(kTail) || siblings < 1)
          throw py::value_error("NgramRequest: trust needs 8 entries, siblings at least 1");
        return std::make_unique<NgramRequest>(std::move(counts), chain, copy,
                                              CopySettings{trust, prior, second, first}, siblings,
                                              negligible);
      }))
      .def("begin", &NgramRequest::begin, Unlocked())
      .def(
          "propose",
          [](NgramRequest& request, const std::vector<Token>& fresh, int rows) {
            Tree tree = request.propose(fresh, rows);
            return std::make_tuple(std::move(tree.tokens), std::move(tree.parents),
                                   std::move(tree.scores));
          },
          Unlocked());
}

}  // namespace xspec
