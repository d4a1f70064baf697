// The smallest singular triplets, by block Krylov subspaces of the inverse.
#pragma once

#include "krylov.h"

namespace lora {

// The r smallest triplets of one weight, ascending.
Triplets trailing_triplets(Engine& engine, int64_t r, uint64_t seed);

}  // namespace lora
