#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "expert_memory.h"
#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr float kSwigluOai = 1.702f;

// One expert's part of the work: the tokens that visit it, one row each.
struct Visit {
  const Experts* experts;
  int64_t matrix;
  int64_t first_row;  // in the intermediate activations
  int64_t rows;
};

struct Scratch {
  QuantizedRows inputs, routed, shared;
  std::vector<int32_t> token_of_row;
  std::vector<float> weight_of_row;
  std::vector<int64_t> edges;
  std::vector<Visit> visits;
};

// Experts that were brought into memory, let go at the end.
struct Lease {
  const ExpertParts& parts;
  const std::vector<int64_t>& experts;
  size_t first, last;
  ~Lease() { expert_memory().let_go(parts, experts, first, last); }
};

void check(const Experts& experts, int64_t hidden) {
  const Weights &gate = *experts.gate, &up = *experts.up, &down = *experts.down;
  if (gate.columns() != hidden || up.columns() != hidden || up.outputs() != gate.outputs() ||
      down.columns() != gate.outputs() || down.outputs() != gate.columns() ||
      up.matrices() != gate.matrices() || down.matrices() != gate.matrices())
    throw std::invalid_argument("gate, up and down projections do not fit together");
}

// Rows of a tile += outputs [start, start + width) of a matrix's bias.
void add_bias(const std::vector<float>& bias, int64_t first, int64_t width, int count,
              float* tile) {
  if (bias.empty()) return;
  for (int r = 0; r < count; ++r)
    for (int64_t n = 0; n < width; ++n) tile[r * kTile + n] += bias[first + n];
}

}  // namespace

void Activation::apply(float* gate, float* up, int64_t n) const {
  if (std::isfinite(limit))
    for (int64_t i = 0; i < n; ++i) {
      gate[i] = std::min(gate[i], limit);
      up[i] = std::max(std::min(up[i], limit), -limit);
    }
  if (swigluoai)  // as silu(1.702 * gate) * ((up + 1) / 1.702)
    for (int64_t i = 0; i < n; ++i) {
      gate[i] *= kSwigluOai;
      up[i] = (up[i] + 1) / kSwigluOai;
    }
  kernels().swiglu(gate, up, n);
}

FeedForward::FeedForward(Experts routed, Experts shared)
    : routed_(std::move(routed)), shared_(std::move(shared)) {
  if (!routed_.gate && !shared_.gate) throw std::invalid_argument("there are no experts");
  if (routed_.gate) check(routed_, any().columns());
  if (shared_.gate) check(shared_, any().columns());
}

void FeedForward::forward(const float* x, int64_t tokens, const int64_t* topk_ids,
                          const float* topk_weights, int64_t slots, float* out,
                          float factor) const {
  if (!routed_.gate || !routed_.gate->stored().is_streamed()) {
    forward_held(x, tokens, topk_ids, topk_weights, slots, out, factor, true);
    return;
  }
  // As many experts at a time, in their order, as fit into memory: sums are the same as together.
  const ExpertParts parts{routed_.gate.get(), routed_.up.get(), routed_.down.get()};
  std::vector<int64_t> visited(topk_ids, topk_ids + tokens * slots);
  std::sort(visited.begin(), visited.end());
  visited.erase(std::unique(visited.begin(), visited.end()), visited.end());
  if (!visited.empty() && visited.back() >= routed_experts())
    throw std::invalid_argument("there is no such expert");
  visited.erase(visited.begin(), std::lower_bound(visited.begin(), visited.end(), 0));
  std::vector<int64_t> ids(tokens * slots);
  size_t first = 0;
  do {
    const size_t last = first < visited.size() ? expert_memory().hold(parts, visited, first) : 0;
    const int64_t from = last ? visited[first] : 0, to = last ? visited[last - 1] : -1;
    std::transform(topk_ids, topk_ids + tokens * slots, ids.begin(),
                   [&](int64_t id) { return from <= id && id <= to ? id : -1; });
    const Lease lease{parts, visited, first, last};
    forward_held(x, tokens, ids.data(), topk_weights, slots, out, factor, first == 0);
    first = last;
  } while (first < visited.size());
}

void FeedForward::forward_held(const float* x, int64_t tokens, const int64_t* topk_ids,
                               const float* topk_weights, int64_t slots, float* out, float factor,
                               bool with_shared) const {
  static thread_local Scratch caller_scratch;
  Scratch& scratch = caller_scratch;  // the caller's, seen by all threads
  const int64_t hidden = any().columns(), experts = routed_experts();

  // Dispatch: sort the slots by expert; the shared experts' rows, one a token, come behind.
  std::vector<int64_t>& edges = scratch.edges;
  edges.assign(experts + 1, 0);
  for (int64_t slot = 0; slot < tokens * slots; ++slot) {
    if (topk_ids[slot] >= experts) throw std::invalid_argument("there is no such expert");
    if (topk_ids[slot] >= 0) ++edges[topk_ids[slot] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) edges[e + 1] += edges[e];
  const int64_t routed_rows = edges[experts];
  const int64_t shared_rows = shared_.gate && with_shared ? tokens : 0;
  scratch.token_of_row.resize(routed_rows + shared_rows);
  scratch.weight_of_row.resize(routed_rows + shared_rows);
  scratch.visits.clear();
  if (shared_rows) scratch.visits.push_back({&shared_, 0, routed_rows, tokens});
  int64_t bytes = 0;
  for (int64_t e = 0; e < experts; ++e)
    if (edges[e] < edges[e + 1])
      scratch.visits.push_back({&routed_, e, edges[e], edges[e + 1] - edges[e]});
  for (int64_t slot = 0; slot < tokens * slots; ++slot) {
    if (topk_ids[slot] < 0) continue;
    const int64_t row = edges[topk_ids[slot]]++;
    scratch.token_of_row[row] = static_cast<int32_t>(slot / slots);
    scratch.weight_of_row[row] = topk_weights[slot] * factor;
  }
  for (int64_t token = 0; token < shared_rows; ++token) {
    scratch.token_of_row[routed_rows + token] = static_cast<int32_t>(token);
    scratch.weight_of_row[routed_rows + token] = factor;
  }

  // Round the inputs once for all experts, in each way that one of their formats wants.
  const Experts& one = routed_.gate ? routed_ : shared_;
  const Experts& other = shared_.gate ? shared_ : routed_;
  scratch.inputs.resize({one.gate.get(), one.up.get(), other.gate.get(), other.up.get()}, tokens);
  parallel_rows(tokens, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      scratch.inputs.set_row(token, x + token * hidden);
  });
  const QuantizedRows& inputs = scratch.inputs;

  // silu(gate) * up, tile by tile of every visit, rounded where it stands.
  if (routed_.gate) scratch.routed.resize(*routed_.down, routed_rows);
  if (shared_.gate) scratch.shared.resize(*shared_.down, shared_rows);
  std::vector<int64_t> first_task(scratch.visits.size() + 1, 0);
  for (size_t v = 0; v < scratch.visits.size(); ++v) {
    const Experts& of = *scratch.visits[v].experts;
    first_task[v + 1] = first_task[v] + of.gate->tiles();
    bytes += of.gate->matrix_bytes() + of.up->matrix_bytes() + of.down->matrix_bytes();
  }
  const auto visit_of = [&](int64_t task) -> size_t {
    return std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
  };
  // A thread mostly goes on with the task behind.
  const auto next_after = [&](int64_t task) -> const uint8_t* {
    ++task;
    if (task >= first_task.back()) return scratch.visits[0].experts->down->start(0, 0);
    const size_t v = visit_of(task);
    return scratch.visits[v].experts->gate->start(scratch.visits[v].matrix, task - first_task[v]);
  };
  parallel(first_task.back(), [&](int64_t task) {
    const size_t v = visit_of(task);
    const Visit& visit = scratch.visits[v];
    const Experts& of = *visit.experts;
    const int64_t tile = task - first_task[v], start = tile * kTile;
    const int64_t width = std::min<int64_t>(kTile, of.gate->outputs() - start);
    const int64_t padded = std::min<int64_t>(kTile, of.down->padded_columns() - start);
    const uint8_t *up_start = of.up->start(visit.matrix, tile), *next = next_after(task);
    const bool is_shared = visit.experts == &shared_;
    QuantizedRows& activated = is_shared ? scratch.shared : scratch.routed;
    alignas(64) float gate[kRowBlock * kTile], up[kRowBlock * kTile];
    for (int64_t first = 0; first < visit.rows; first += kRowBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kRowBlock, visit.rows - first));
      const int32_t* rows = scratch.token_of_row.data() + visit.first_row + first;
      of.gate->multiply(visit.matrix, tile, inputs, rows, count, gate, up_start);
      of.up->multiply(visit.matrix, tile, inputs, rows, count, up, next);
      const int64_t bias_at = visit.matrix * of.gate->outputs() + start;
      add_bias(of.gate_bias, bias_at, width, count, gate);
      add_bias(of.up_bias, bias_at, width, count, up);
      for (int r = 0; r < count; ++r) {
        of.activation.apply(gate + r * kTile, up + r * kTile, width);
        const int64_t row = (is_shared ? 0 : visit.first_row) + first + r;
        activated.set(row, start, gate + r * kTile, width, padded);
      }
    }
  });

  // Down projections and the weighted sum: a task owns some outputs of all tokens.
  const QuantizedRows &routed = scratch.routed, &shared = scratch.shared;
  const int64_t out_tiles = (hidden + kTile - 1) / kTile;
  parallel(out_tiles, [&](int64_t tile) {
    const int64_t start = tile * kTile, width = std::min<int64_t>(kTile, hidden - start);
    alignas(64) float product[kRowBlock * kTile];
    for (size_t v = 0; v < scratch.visits.size(); ++v) {
      const Visit& visit = scratch.visits[v];
      const bool is_shared = visit.experts == &shared_, is_last = v + 1 == scratch.visits.size();
      const Visit& next = scratch.visits[is_last ? 0 : v + 1];
      const int64_t next_tile = std::min(is_last ? tile + 1 : tile, out_tiles - 1);
      for (int64_t first = 0; first < visit.rows; first += kRowBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kRowBlock, visit.rows - first));
        const int64_t base = visit.first_row + first;
        int32_t rows[kRowBlock];
        for (int r = 0; r < count; ++r)
          rows[r] = static_cast<int32_t>((is_shared ? first : base) + r);
        visit.experts->down->multiply(visit.matrix, tile, is_shared ? shared : routed, rows, count,
                                      product, next.experts->down->start(next.matrix, next_tile));
        add_bias(visit.experts->down_bias, visit.matrix * hidden + start, width, count, product);
        for (int r = 0; r < count; ++r)
          kernels().axpy(scratch.weight_of_row[base + r], product + r * kTile,
                         out + scratch.token_of_row[base + r] * hidden + start, width);
      }
    }
  });
  count_weight_bytes(bytes);
}

}  // namespace moescope
