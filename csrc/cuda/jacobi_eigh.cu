#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "launch.h"

// One-sided Jacobi on a pivoted Cholesky factor (Veselic and Hari 1989; Drmac and Veselic 2008):
//   1. factor:  A = L L^T, with the largest remaining diagonal entry as pivot.
//   2. sweep:   rotate the columns of L until they are orthogonal, L V = U S. Then A = U S^2 U^T,
//               and U is the columns divided by their lengths: V is not needed.
//   3. finish:  squared lengths, sorted; vectors.
// A two-sided Jacobi would move A and V, three times the bytes, and one-sided Jacobi on A itself
// needs more sweeps: with pivoting, L's columns are graded and nearly orthogonal. Numbers of sweeps
// in the tests' emulation: 7 to 11 at l = 64 to 256, 3 for D H D with a well-conditioned H and any
// diagonal D, and up to 17 where half of the spectrum is zero or one cluster 1e-5 below the other
// half.
//
// A column is never split. Two blocks of columns are loaded into the shared memory of one CTA and
// rotated against each other; all blocks of a matrix are paired at the same time, in rounds by the
// circle method. Each round is a launch, which orders the rounds without a grid-wide barrier. When
// a sweep had nothing to rotate, the later launches find this on the device and return at once. Up
// to 64 columns are handled by one CTA and one launch.
//
// Lower bound on the time. A sweep is l - 1 inner rounds with one barrier each. In one round, a CTA
// reads and writes its two blocks of w columns of length l: 32 w l bytes of shared memory at 128
// bytes per clock, compared with 7 w l fused multiply-adds on 64 lanes, so memory is the limit.
// H200, 132 SMs, 1.9 GHz, 32 matrices:
//   l = 256: 8 blocks of 32, 4 x 32 CTAs, one per SM. 2048 clocks per inner round and about 600 of
//            latency, 255 rounds: 0.36 ms per sweep. 7 launches per sweep, each 131 KB from and to
//            L2 and a start: 0.05 ms. 9 sweeps 3.7 ms, factor 0.4 ms, launches that find nothing to
//            do 0.25 ms: predicted 4.4 ms.
//   l = 96:  4 blocks of 24, 2 x 32 CTAs. 576 + 500 clocks, 95 rounds, and 3 launches of 5 us: 0.07
//            ms per sweep. 8 sweeps 0.55 ms, factor 0.07 ms, idle launches 0.1 ms: predicted 0.7
//            ms.

namespace lora {
namespace cuda {
namespace {

constexpr int kLanes = 16;         // per pair of columns: 16 doubles are one access of 128 bytes
constexpr int kBlockColumns = 32;  // two blocks are 32 pairs, the half-warps of kMaxThreads
constexpr int kMaxThreads = 512;
constexpr int kMaxSweeps = 32;

constexpr double kEpsilon = 2.220446049250313e-16;  // 2^-52
// The matrix is scaled by a power of two so that its largest diagonal entry is in [1, 2). Pivots
// that are below kSmallest, or smaller than rounding errors, are replaced by kFill^2: so far below
// all others that they change nothing, but their columns get a direction. An eigenvalue below kZero
// belongs to such a pivot. The square of a product of two is still far from underflow.
constexpr double kSmallest = 0x1p-200;
constexpr double kFill = 0x1p-120;
constexpr double kZero = 0x1p-220;
// A pivot below this fraction of its diagonal entry is treated as rounding noise: twice the error
// of 256 sums, which grows like the square root of their number.
constexpr double kHidden = 8 * kEpsilon;
// The squared Frobenius norm equals the sum of the squared eigenvalues, unless the factor omitted a
// part of the matrix because it is not semi-definite.
constexpr double kIndefinite = 1e-6;

struct Workspace {
  double* columns;  // [batch, size, stride], zero beyond `size`
  double* norms;    // [batch], squared Frobenius norms of the scaled matrices
  int* exponents;   // [batch], exponents of the scales
  int* rotated;     // [batch, kMaxSweeps]: whether that sweep rotated anything
};

int column_stride(int size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// The first shuffle is with the nearest lane, so that every lane of the group gets the same bits.
template <int kGroup>
__device__ double group_sum(double value) {
#pragma unroll
  for (int distance = 1; distance < kGroup; distance *= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// The sum over the block, in every thread, after a barrier. `scratch` has one double per warp and
// must not be used for anything else.
__device__ double block_sum(double value, double* scratch) {
  value = group_sum<kWarp>(value);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double total = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    total += scratch[warp];
  }
  return total;
}

// The largest of values[0, size) and the first index at which it occurs.
struct Largest {
  double value;
  int at;
};

__device__ Largest largest(const double* values, int size) {  // each warp computes it separately
  Largest best{-1.0, 0};
  for (int i = threadIdx.x % kWarp; i < size; i += kWarp) {
    if (values[i] > best.value) {
      best = {values[i], i};
    }
  }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double value = __shfl_xor_sync(kWholeWarp, best.value, distance);
    const int at = __shfl_xor_sync(kWholeWarp, best.at, distance);
    if (value > best.value || (value == best.value && at < best.at)) {
      best = {value, at};
    }
  }
  return best;
}

size_t factor_bytes(int size, int threads) {
  const int parts = std::max(1, threads / size);
  return sizeof(double) * (static_cast<size_t>(2 + parts) * size + threads / kWarp) +
         sizeof(int) * size;
}

// Left-looking: step k reads the k columns before it, k l doubles from L2, and writes one. Rows
// stay in place; only the columns are in the order of the pivots. The remaining diagonal also marks
// the state of each row: positive while it may become a pivot, then kDone, or kHiddenRow if it is
// smaller than rounding errors.
__global__ void __launch_bounds__(kMaxThreads, 1)
    factor(const double* __restrict__ matrices, Workspace work, int size, int stride) {
  LORA_DYNAMIC_SHARED(double, shared);
  constexpr double kDone = -2.0, kHiddenRow = -1.0;
  const int thread = threadIdx.x, threads = blockDim.x;
  const int parts = threads > size ? threads / size : 1;
  double* const left = shared;                                           // [size]
  double* const hidden = left + size;                                    // [size]
  double* const partial = hidden + size;                                 // [parts, size]
  double* const scratch = partial + static_cast<int64_t>(parts) * size;  // [warps]
  int* const fill = reinterpret_cast<int*>(scratch + threads / kWarp);   // [size]
  const int64_t matrix = blockIdx.x;
  const double* const a = matrices + matrix * size * size;
  double* const columns = work.columns + matrix * size * stride;

  bool finite = true;
  for (int i = thread; i < size; i += threads) {
    left[i] = a[static_cast<int64_t>(i) * size + i];
  }
  for (int i = thread / kWarp; i < size; i += threads / kWarp) {
    for (int j = thread % kWarp; j <= i; j += kWarp) {
      finite &= isfinite(a[static_cast<int64_t>(i) * size + j]) != 0;
    }
  }
  finite = !__syncthreads_or(!finite);
  const double top = largest(left, size).value;
  const int exponent = finite && top > 0.0 ? ilogb(top) : 0;
  double squares = 0.0;
  for (int i = thread / kWarp; i < size; i += threads / kWarp) {
    for (int j = thread % kWarp; j <= i; j += kWarp) {
      const double value = ldexp(a[static_cast<int64_t>(i) * size + j], -exponent);
      squares += (i == j ? 1.0 : 2.0) * value * value;
    }
  }
  squares = block_sum(squares, scratch);
  for (int i = thread; i < size; i += threads) {
    const double value = ldexp(left[i], -exponent);
    hidden[i] = fmax(kHidden * value, kSmallest);
    left[i] = value > hidden[i] ? value : kHiddenRow;
  }
  for (int sweep = thread; sweep < kMaxSweeps; sweep += threads) {
    work.rotated[matrix * kMaxSweeps + sweep] = 0;
  }
  if (thread == 0) {
    work.exponents[matrix] = exponent;
    work.norms[matrix] = squares;
  }
  __syncthreads();

  int k = 0;
  for (; finite && k < size; ++k) {
    const Largest pivot = largest(left, size);
    if (!(pivot.value > 0.0)) {
      break;
    }
    const int part = thread / size;  // threads beyond `parts` are idle
    if (part < parts) {
      const int from = static_cast<int64_t>(k) * part / parts;
      const int to = static_cast<int64_t>(k) * (part + 1) / parts;
      for (int i = thread - part * size; i < size; i += threads) {
        double sum = 0.0;
#pragma unroll 8
        for (int j = from; j < to; ++j) {
          const double* const column = columns + static_cast<int64_t>(j) * stride;
          sum += column[i] * column[pivot.at];
        }
        partial[static_cast<int64_t>(part) * size + i] = sum;
      }
    }
    __syncthreads();
    const double root = sqrt(pivot.value);
    double* const column = columns + static_cast<int64_t>(k) * stride;
    for (int i = thread; i < stride; i += threads) {
      double value = 0.0;
      if (i == pivot.at) {
        value = root;
        left[i] = kDone;
      } else if (i < size && left[i] != kDone) {
        const int64_t entry = i > pivot.at ? static_cast<int64_t>(i) * size + pivot.at
                                           : static_cast<int64_t>(pivot.at) * size + i;
        double rest = ldexp(a[entry], -exponent);
        for (int p = 0; p < parts; ++p) {
          rest -= partial[static_cast<int64_t>(p) * size + i];
        }
        value = rest / root;
        if (left[i] > 0.0) {
          const double remaining = left[i] - value * value;
          left[i] = remaining > hidden[i] ? remaining : kHiddenRow;
        }
      }
      column[i] = value;
    }
    __syncthreads();
  }

  for (int i = thread; i < size; i += threads) {  // rows without a pivot get the remaining columns
    if (left[i] != kDone) {
      int slot = k;
      for (int before = 0; before < i; ++before) {
        slot += left[before] != kDone;
      }
      fill[slot] = i;
    }
  }
  __syncthreads();
  for (int c = k + thread / kWarp; c < size; c += threads / kWarp) {
    for (int i = thread % kWarp; i < stride; i += kWarp) {
      const double value = i == fill[c] ? kFill : 0.0;
      columns[static_cast<int64_t>(c) * stride + i] = finite ? value : NAN;
    }
  }
}

// Round `round` of the n - 1 rounds in which n players (even) meet each other once; index < n / 2.
struct Meeting {
  int a, b;
};

__device__ Meeting meeting(int round, int index, int n) {
  if (index == 0) {
    return {round, n - 1};
  }
  const int a = round + index, b = round - index;
  return {a < n - 1 ? a : a - (n - 1), b < 0 ? b + (n - 1) : b};
}

// Makes two columns orthogonal; returns whether they were not. All lanes of a warp call it
// together: each half has its own columns, or 0 chunks. kHeld chunks of each column stay in
// registers; the rest of a longer column is read twice.
template <int kHeld>
__device__ bool rotate(double* x, double* y, int chunks, double tolerance) {
  const int lane = threadIdx.x % kLanes;
  double held_x[kHeld], held_y[kHeld];
  double xx = 0.0, yy = 0.0, xy = 0.0;
#pragma unroll
  for (int c = 0; c < kHeld; ++c) {
    held_x[c] = c < chunks ? x[kLanes * c + lane] : 0.0;
    held_y[c] = c < chunks ? y[kLanes * c + lane] : 0.0;
    xx += held_x[c] * held_x[c];
    yy += held_y[c] * held_y[c];
    xy += held_x[c] * held_y[c];
  }
  for (int c = kHeld; c < chunks; ++c) {
    const double p = x[kLanes * c + lane], q = y[kLanes * c + lane];
    xx += p * p;
    yy += q * q;
    xy += p * q;
  }
  xx = group_sum<kLanes>(xx);
  yy = group_sum<kLanes>(yy);
  xy = group_sum<kLanes>(xy);
  if (!(fabs(xy) > tolerance * sqrt(xx * yy))) {
    return false;
  }
  // From the smaller of the two angles that make the columns orthogonal.
  const double zeta = (yy - xx) / (2.0 * xy);
  const double tangent = copysign(1.0 / (fabs(zeta) + sqrt(1.0 + zeta * zeta)), zeta);
  const double secant = sqrt(1.0 + tangent * tangent);
  // Uses the tangent of half the angle, as a small correction to each entry: with a multiplication
  // by a rounded cosine, the lengths drift (errors of 4e-14 in the eigenvalues at l = 200, instead
  // of 3e-15).
  const double sine = tangent / secant, half = tangent / (1.0 + secant);
#pragma unroll
  for (int c = 0; c < kHeld; ++c) {
    if (c < chunks) {
      x[kLanes * c + lane] = held_x[c] - sine * (held_y[c] + half * held_x[c]);
      y[kLanes * c + lane] = held_y[c] + sine * (held_x[c] - half * held_y[c]);
    }
  }
  for (int c = kHeld; c < chunks; ++c) {
    const double p = x[kLanes * c + lane], q = y[kLanes * c + lane];
    x[kLanes * c + lane] = p - sine * (q + half * p);
    y[kLanes * c + lane] = q + sine * (p - half * q);
  }
  return true;
}

// Block (matrix, index) handles the two blocks of columns that meet in `round`. In round 0 it also
// rotates the pairs within its blocks. `sweeps` > 1 only if there are no more than two blocks.
template <int kHeld>
__global__ void __launch_bounds__(kMaxThreads, 1) sweep_columns(
    Workspace work, int size, int stride, int width, int blocks, int round, int first, int sweeps) {
  LORA_DYNAMIC_SHARED(double, shared);
  const int64_t matrix = blockIdx.x;
  int* const rotated = work.rotated + matrix * kMaxSweeps;
  if (first > 0 && rotated[first - 1] == 0) {
    return;
  }
  const Meeting met = meeting(round, blockIdx.y, blocks);
  const auto begin = [&](int block) { return block * width < size ? block * width : size; };
  const int begin_a = begin(met.a), count_a = begin(met.a + 1) - begin_a;
  const int begin_b = begin(met.b), count_b = begin(met.b + 1) - begin_b;
  const int count = count_a + count_b;
  double* const from_a = work.columns + (matrix * size + begin_a) * stride;
  double* const from_b = work.columns + (matrix * size + begin_b) * stride;
  double* const shared_b = shared + count_a * stride;
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int i = thread; i < count_a * stride; i += threads) {
    shared[i] = from_a[i];
  }
  for (int i = thread; i < count_b * stride; i += threads) {
    shared_b[i] = from_b[i];
  }
  __syncthreads();

  const bool within = round == 0;
  const int players = (count + 1) / 2 * 2;
  const int wider = count_a > count_b ? count_a : count_b;
  const int rounds = within ? players - 1 : wider;
  const int pairs = within ? players / 2 : wider;
  const double tolerance = 2.0 * kEpsilon * sqrt(static_cast<double>(size));
  bool changed = false;
  for (int sweep = first; sweep < first + sweeps; ++sweep) {
    bool any = false;
    for (int r = 0; r < rounds; ++r) {
      // Both halves of a warp loop together, because they shuffle together.
      for (int base = thread / kWarp * 2; base < pairs; base += threads / kLanes) {
        const int index = base + thread / kLanes % 2;
        Meeting pair{};
        bool valid = index < pairs;
        if (within) {
          pair = meeting(r, valid ? index : 0, players);
          valid &= pair.a < count && pair.b < count;
        } else {
          const int b = index + r < wider ? index + r : index + r - wider;
          pair = {index, count_a + b};
          valid &= index < count_a && b < count_b;
        }
        double* const x = shared + (valid ? pair.a : 0) * stride;
        double* const y = shared + (valid ? pair.b : 0) * stride;
        any |= rotate<kHeld>(x, y, valid ? stride / kLanes : 0, tolerance);
      }
      __syncthreads();
    }
    if (!__syncthreads_or(any)) {
      break;
    }
    changed = true;
    if (thread == 0) {
      rotated[sweep] = 1;  // every block that writes it writes the same value
    }
  }
  if (changed) {
    for (int i = thread; i < count_a * stride; i += threads) {
      from_a[i] = shared[i];
    }
    for (int i = thread; i < count_b * stride; i += threads) {
      from_b[i] = shared_b[i];
    }
  }
}

size_t finish_bytes(int size, int threads) {
  return sizeof(double) * (2 * static_cast<size_t>(size) + threads / kWarp) + sizeof(int) * size;
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    finish(Workspace work, double* values, double* vectors, int size, int stride) {
  LORA_DYNAMIC_SHARED(double, shared);
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  double* const squares = shared;          // [size], squared lengths of the columns
  double* const inverse = squares + size;  // [size], 1 / length of the column at that place
  double* const scratch = inverse + size;  // [warps]
  int* const order = reinterpret_cast<int*>(scratch + warps);  // [size], the column at that place
  const int64_t matrix = blockIdx.x;
  const double* const columns = work.columns + matrix * size * stride;
  values += matrix * size;
  vectors += matrix * size * size;

  for (int c = warp; c < size; c += warps) {
    double sum = 0.0;
    for (int i = lane; i < size; i += kWarp) {
      const double value = columns[static_cast<int64_t>(c) * stride + i];
      sum += value * value;
    }
    sum = group_sum<kWarp>(sum);
    if (lane == 0) {
      squares[c] = sum;
    }
  }
  __syncthreads();
  double found = 0.0;
  for (int c = thread; c < size; c += threads) {
    found += squares[c] * squares[c];
  }
  found = block_sum(found, scratch);
  const double norm = work.norms[matrix];
  const bool definite = isfinite(norm) && (norm == 0.0 || fabs(found - norm) <= kIndefinite * norm);
  const bool converged = work.rotated[matrix * kMaxSweeps + kMaxSweeps - 1] == 0;
  const double poison = definite && converged ? 0.0 : NAN;
  for (int c = thread; c < size; c += threads) {
    const double square = squares[c];
    int place = 0;
    for (int other = 0; other < size; ++other) {
      place += squares[other] > square || (!(squares[other] < square) && other < c);
    }
    order[place] = c;
    inverse[place] = 1.0 / sqrt(square) + poison;
    values[place] = (square < kZero ? 0.0 : ldexp(square, work.exponents[matrix])) + poison;
  }
  __syncthreads();
  for (int i = warp; i < size; i += warps) {
    for (int place = lane; place < size; place += kWarp) {
      vectors[static_cast<int64_t>(i) * size + place] =
          columns[static_cast<int64_t>(order[place]) * stride + i] * inverse[place];
    }
  }
}

using Sweep = void (*)(Workspace, int, int, int, int, int, int, int);

Sweep sweep_kernel(int chunks) {
  return chunks <= 2 ? sweep_columns<2> : chunks <= 6 ? sweep_columns<6> : sweep_columns<16>;
}

Workspace cut(void* memory, int64_t batch, int size) {
  Workspace work;
  work.columns = static_cast<double*>(memory);
  work.norms = work.columns + batch * size * column_stride(size);
  work.exponents = reinterpret_cast<int*>(work.norms + batch);
  work.rotated = work.exponents + batch;
  return work;
}

}  // namespace

size_t jacobi_eigh_workspace(int64_t batch, int size) {
  return static_cast<size_t>(batch) *
         (sizeof(double) * (static_cast<size_t>(size) * column_stride(size) + 1) +
          sizeof(int) * (1 + kMaxSweeps));
}

cudaError_t launch_jacobi_eigh(
    const double* matrices, double* values, double* vectors, void* workspace, int64_t batch,
    int size, cudaStream_t stream) {
  if (batch == 0 || size == 0) {
    return cudaSuccess;
  }
  size_t limit = 0;
  cudaError_t error = shared_memory_limit(limit);
  if (error != cudaSuccess) {
    return error;
  }
  const int stride = column_stride(size);
  const int row_threads = std::min(kMaxThreads, kWarp * ((2 * size + kWarp - 1) / kWarp));
  const size_t factor_shared = factor_bytes(size, row_threads);
  const size_t finish_shared = finish_bytes(size, row_threads);
  const size_t column_bytes = sizeof(double) * stride;
  if (std::max({factor_shared, finish_shared, 2 * column_bytes}) > limit) {
    return cudaErrorInvalidValue;
  }
  const int most = static_cast<int>(std::min<size_t>(kBlockColumns, limit / (2 * column_bytes)));
  const int blocks = 2 * ((size + 2 * most - 1) / (2 * most));
  const int width = (size + blocks - 1) / blocks;
  const int sweep_threads = kWarp * ((width + 1) / 2);
  const size_t sweep_shared = 2 * width * column_bytes;
  const Sweep sweep = sweep_kernel(stride / kLanes);
  const Workspace work = cut(workspace, batch, size);
  const auto grid = static_cast<unsigned>(batch);

  error = allow_shared_memory(factor, factor_shared);
  if (error == cudaSuccess) {
    error = allow_shared_memory(sweep, sweep_shared);
  }
  if (error == cudaSuccess) {
    error = allow_shared_memory(finish, finish_shared);
  }
  if (error != cudaSuccess) {
    return error;
  }
  LORA_LAUNCH(factor, grid, row_threads, factor_shared, stream, matrices, work, size, stride);
  const bool alone = blocks == 2;
  for (int first = 0; first < (alone ? 1 : kMaxSweeps); ++first) {
    for (int round = 0; round < blocks - 1; ++round) {
      LORA_LAUNCH(
          sweep, dim3(grid, static_cast<unsigned>(blocks / 2)), sweep_threads, sweep_shared, stream,
          work, size, stride, width, blocks, round, first, alone ? kMaxSweeps : 1);
    }
  }
  LORA_LAUNCH(
      finish, grid, row_threads, finish_shared, stream, work, values, vectors, size, stride);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lora
