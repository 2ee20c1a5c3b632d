// Weights that were mapped from a file, moved into huge pages while they are in use already.
#pragma once
#include <memory>

#include "weights.h"

namespace moescope {

// Have `weights` moved once `settle` is called, if they are still there then.
void settle_later(const std::shared_ptr<Weights>& weights);
// Begin, in a thread of its own.
void settle();
// Bytes that are still to be moved, whatever is being moved included.
int64_t unsettled();

}  // namespace moescope
