// Pieces of the network from several threads at once, while the number of threads changes: every
// answer must be the one that a single thread gave, and that one near a plain loop's. Made for
// ThreadSanitizer and for processors that are not at hand (sanitize.py).
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "file.h"
#include "ops.h"
#include "pool.h"
#include "settling.h"

namespace {

using namespace moescope;

constexpr int64_t kExperts = 19, kHidden = 96, kWidth = 40, kTokens = 23, kSlots = 2, kVocab = 700;
constexpr int64_t kLikeliest = 9;
constexpr int kCallers = 4, kRounds = 25;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s (%s)\n", what, kernels().name);
  std::exit(1);
}

std::vector<float> chance(size_t size, uint32_t seed) {
  std::vector<float> numbers(size);
  for (float& number : numbers) {
    seed = seed * 1664525u + 1013904223u;
    number = static_cast<float>(seed >> 8) / (1 << 23) - 1;
  }
  return numbers;
}

std::shared_ptr<Weights> packed(int format, int64_t matrices, int64_t outputs, int64_t columns,
                                uint32_t seed) {
  const std::vector<float> values = chance(matrices * outputs * columns, seed);
  const Source source{values.data(), false, outputs * columns, columns};
  return std::make_shared<Weights>(format, matrices, outputs, columns, source);
}

std::shared_ptr<const float> weight_of_router() {
  const auto numbers = std::make_shared<std::vector<float>>(chance(kExperts * kHidden, 7));
  return {numbers, numbers->data()};
}

struct Model {
  std::shared_ptr<Weights> gate, up, down;
  FeedForward mixture;
  Router router;
  std::vector<float> x = chance(kTokens * kHidden, 4), topk_weights = chance(kTokens * kSlots, 5);
  std::vector<float> logits = chance(kTokens * kVocab, 6);
  std::vector<int64_t> topk_ids;

  explicit Model(int format)
      : gate(packed(format, kExperts, kWidth, kHidden, 1)),
        up(packed(format, kExperts, kWidth, kHidden, 2)),
        down(packed(format, kExperts, kHidden, kWidth, 3)),
        mixture({gate, up, down}, {}),
        router{weight_of_router(), {},    {},  {}, {}, {}, kExperts, kHidden, kSlots, 1, 1, 1,
               Scoring::softmax,   false, 1.0f} {
    for (int64_t slot = 0; slot < kTokens * kSlots; ++slot)
      topk_ids.push_back(slot % 7 == 6 ? -1 : slot % kExperts);
  }
};

std::vector<float> unpacked(const Weights& weights) {
  std::vector<float> out(weights.matrices() * weights.outputs() * weights.columns());
  weights.unpack(out.data());
  return out;
}

// out = matrix (outputs, columns) times x
void plain_product(const float* matrix, int64_t outputs, int64_t columns, const float* x,
                   float* out) {
  for (int64_t n = 0; n < outputs; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < columns; ++k)
      sum += static_cast<double>(matrix[n * columns + k]) * x[k];
    out[n] = static_cast<float>(sum);
  }
}

void require_near(const std::vector<float>& ours, const std::vector<float>& exact,
                  const char* what) {
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(static_cast<double>(ours[i]) - exact[i], 2);
    size += std::pow(static_cast<double>(exact[i]), 2);
  }
  require(std::sqrt(error) <= 0.02 * std::sqrt(size), what);
}

std::vector<float> linear_of(const Model& model) {
  std::vector<float> out(kTokens * kExperts * kWidth);
  linear(*model.gate, model.x.data(), kTokens, nullptr, out.data());
  return out;
}

std::vector<float> mixture_of(const Model& model) {
  std::vector<float> out(kTokens * kHidden, 0.0f);
  model.mixture.forward(model.x.data(), kTokens, model.topk_ids.data(), model.topk_weights.data(),
                        kSlots, out.data());
  return out;
}

void check_against_plain_loops(const Model& model) {
  const std::vector<float> gate = unpacked(*model.gate), up = unpacked(*model.up);
  const std::vector<float> down = unpacked(*model.down);
  std::vector<float> product(kTokens * kExperts * kWidth), mixed(kTokens * kHidden, 0.0f);
  std::vector<float> a(kWidth), b(kWidth), part(kHidden);
  for (int64_t token = 0; token < kTokens; ++token) {
    const float* x = model.x.data() + token * kHidden;
    plain_product(gate.data(), kExperts * kWidth, kHidden, x,
                  product.data() + token * kExperts * kWidth);
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      const int64_t expert = model.topk_ids[token * kSlots + slot];
      if (expert < 0) continue;
      plain_product(gate.data() + expert * kWidth * kHidden, kWidth, kHidden, x, a.data());
      plain_product(up.data() + expert * kWidth * kHidden, kWidth, kHidden, x, b.data());
      for (int64_t i = 0; i < kWidth; ++i) a[i] = a[i] / (1 + std::exp(-a[i])) * b[i];
      plain_product(down.data() + expert * kWidth * kHidden, kHidden, kWidth, a.data(),
                    part.data());
      for (int64_t i = 0; i < kHidden; ++i)
        mixed[token * kHidden + i] += model.topk_weights[token * kSlots + slot] * part[i];
    }
  }
  require_near(linear_of(model), product, "a linear map");
  require_near(mixture_of(model), mixed, "a mixture");
}

struct Answers {
  std::vector<float> linear, mixture, likeliest, topk_weights, scores;
  std::vector<int64_t> ids, topk_ids;
  uint64_t sum;

  explicit Answers(const Model& model)
      : linear(linear_of(model)),
        mixture(mixture_of(model)),
        likeliest(kTokens * kLikeliest),
        topk_weights(kTokens * kSlots),
        scores(kTokens * kSlots),
        ids(kTokens * kLikeliest),
        topk_ids(kTokens * kSlots) {
    const std::vector<const Router*> routers(kTokens, &model.router);
    route(routers.data(), model.x.data(), ids.data(), kTokens,
          {kSlots, topk_ids.data(), topk_weights.data(), scores.data()});
    moescope::likeliest(model.logits.data(), kTokens, kVocab, kLikeliest, ids.data(),
                        likeliest.data());
    const Buffer& stored = model.gate->stored();
    sum = checksum(stored.data(), stored.size());
  }

  bool operator==(const Answers& other) const {
    return linear == other.linear && mixture == other.mixture && likeliest == other.likeliest &&
           topk_weights == other.topk_weights && scores == other.scores && ids == other.ids &&
           topk_ids == other.topk_ids && sum == other.sum;
  }
};

void each_task_once(int64_t count) {
  std::vector<int> calls(count, 0);  // not atomic: the pool must hand each to one thread
  parallel(count, [&](int64_t i) { ++calls[i]; });
  for (int seen : calls) require(seen == 1, "a task that is done once");
}

void ask_from_many_threads(const Model& model, const Answers& alone) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < kRounds; ++round) {
        require(Answers(model) == alone, "an answer beside others");
        each_task_once(1 + (caller * kRounds + round) % 40);
        if (caller == 0) set_threads(1 + round % 4);
        if (round % 8 == 7)  // so long that the pool falls asleep
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    });
  for (std::thread& caller : callers) caller.join();
}

// Weights that are mapped from a file and moved into memory while products read them.
void move_under_the_readers() {
  constexpr int64_t kOutputs = 3000, kColumns = 4096;  // two pieces, the second not whole
  std::vector<float> numbers(kOutputs * kColumns), x(kColumns), alone(kOutputs), beside(kOutputs);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i % 251) - 125;
  for (int64_t i = 0; i < kColumns; ++i) x[i] = static_cast<float>(i % 13) - 6;
  const Weights made(format_of("int8"), 1, kOutputs, kColumns,
                     {numbers.data(), false, 0, kColumns});
  linear(made, x.data(), 1, nullptr, alone.data());
  std::FILE* file = std::tmpfile();
  require(file != nullptr &&
              std::fwrite(made.stored().data(), 1, made.stored().size(), file) ==
                  made.stored().size() &&
              std::fflush(file) == 0,
          "a file of weights");
  const auto mapped = std::make_shared<Weights>(format_of("int8"), 1, kOutputs, kColumns);
  mapped->stored().fill(fileno(file), 0);
  settle_later(mapped);
  settle();
  int reads = 0;
  do {
    linear(*mapped, x.data(), 1, nullptr, beside.data());
    require(beside == alone, "a product while weights are moved");
  } while (unsettled() > 0 || ++reads < 3);
  std::fclose(file);
}

}  // namespace

int main() {
  move_under_the_readers();
  for (const Kernels* set : available_kernels()) {
    use_kernels(set->name);
    for (const char* name : {"int8", "int4"}) {
      set_threads(1);
      const Model model(format_of(name));
      check_against_plain_loops(model);
      const Answers alone(model);
      ask_from_many_threads(model, alone);
    }
    std::printf("%s: all as it should be\n", set->name);
  }
  return 0;
}
