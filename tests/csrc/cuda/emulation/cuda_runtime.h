// Stands in for CUDA's header, so that a C++ compiler builds csrc/cuda/*.cu and a CPU runs them.
//
// Blocks run one after another. The threads of a block are fibers that switch only where CUDA's
// threads wait for each other (barriers, shuffles), which makes a run reproducible, and in between
// each runs alone, which is as far out of step as a race could wish: with the order of the threads
// reversed or mixed, a kernel without races gives the same bits. Shared memory is filled with NaN
// before each block and guarded behind its end. A barrier that not all threads reach is an error,
// and so is more shared memory than was asked for with cudaFuncSetAttribute.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

namespace emulation {

constexpr size_t kDefaultShared = 48 * 1024, kGuard = 256, kStack = 64 * 1024;
constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr unsigned char kGuardByte = 0xA5, kNaN = 0xFF;

enum class Order { kForward, kReversed, kMixed };

struct Settings {
  size_t shared_limit = 232448;
  Order order = Order::kForward;
};
inline Settings settings;
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> allowed_shared;
inline int64_t launches = 0;

inline void fail(cudaError_t error) {
  if (last_error == cudaSuccess) last_error = error;
}

// Where threads meet: a block, or a warp. Values are kept for two meetings, since the first thread
// past one may be in the next before the last has read.
struct Meeting {
  unsigned members = 0, arrived = 0;
  uint64_t number = 0;
  bool any[2] = {false, false};
  uint64_t value[2][kWarp];
};

struct Fiber {
  jmp_buf context;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started = false, done = true;
  dim3 index;
  unsigned thread = 0;
  Meeting* waits_for = nullptr;
  uint64_t waits_past = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept between blocks
  std::vector<Meeting> warps;
  Meeting all;
  std::function<void()> body;
  std::vector<char> shared;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t origin;
};
inline Block block;

inline void leave() {
  if (!_setjmp(block.current->context)) _longjmp(block.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    block.body();
    block.current->done = true;
    leave();
  }
}

inline void enter(Fiber& fiber) {
  block.current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// Returns which of the two sets of values belongs to this meeting.
__attribute__((noinline)) inline int meet(Meeting& meeting, bool predicate) {
  Fiber& self = *block.current;
  const uint64_t number = meeting.number;
  const int slot = static_cast<int>(number & 1);
  meeting.any[slot] |= predicate;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    meeting.any[slot ^ 1] = false;
    ++meeting.number;
  } else {
    self.waits_for = &meeting;
    self.waits_past = number;
    leave();
    self.waits_for = nullptr;
  }
  return slot;
}

inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Order::kReversed) {
    std::reverse(order.begin(), order.end());
  } else if (settings.order == Order::kMixed) {
    static uint32_t state = 12345;
    for (unsigned i = count; i > 1; --i) {
      state = state * 1664525u + 1013904223u;
      std::swap(order[i - 1], order[(state >> 8) % i]);
    }
  }
  return order;
}

inline void run_block(size_t shared_bytes, unsigned threads) {
  block.shared.resize(shared_bytes + kGuard + 16);
  std::memset(block.shared.data(), kNaN, block.shared.size());
  std::memset(block.shared.data() + shared_bytes, kGuardByte, kGuard);
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  block.warps.assign(warps, Meeting{});
  block.all = Meeting{};
  block.all.members = threads;
  while (block.fibers.size() < threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
    block.fibers.back()->stack.reset(new char[kStack]);
  }
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *block.fibers[t];
    fiber.done = false;
    fiber.thread = t;
    fiber.waits_for = nullptr;
    fiber.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    ++block.warps[t / kWarp].members;
  }
  unsigned done = 0;
  bool progress = true;
  while (done < threads && progress) {
    progress = false;
    for (const unsigned warp : order_of(warps)) {
      const unsigned lanes = block.warps[warp].members;
      const auto order = order_of(lanes);
      for (bool ran = true; ran;) {
        ran = false;
        for (const unsigned lane : order) {
          Fiber& fiber = *block.fibers[warp * kWarp + lane];
          if (fiber.done || (fiber.waits_for && fiber.waits_for->number == fiber.waits_past)) {
            continue;
          }
          enter(fiber);
          ran = progress = true;
          done += fiber.done;
        }
      }
    }
  }
  if (done < threads) {  // some wait for others that never come
    fail(cudaErrorLaunchFailure);
    block.fibers.clear();
  }
  for (size_t i = 0; i < kGuard; ++i) {
    if (static_cast<unsigned char>(block.shared[shared_bytes + i]) != kGuardByte) {
      return fail(cudaErrorIllegalAddress);
    }
  }
}

inline void launch(
    const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> body) {
  ++launches;
  const unsigned count = threads.x * threads.y * threads.z;
  const auto found = allowed_shared.find(kernel);
  const size_t allowed =
      std::max(kDefaultShared, found == allowed_shared.end() ? size_t{0} : found->second);
  if (count == 0 || count > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > allowed) {
    return fail(cudaErrorInvalidConfiguration);
  }
  gridDim = grid;
  blockDim = threads;
  block.body = std::move(body);
  const auto order = order_of(grid.x * grid.y * grid.z);
  for (const unsigned b : order) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(shared_bytes, count);
  }
}

template <typename T>
T shuffle(T value, unsigned (*from)(unsigned, unsigned), unsigned argument) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned lane = block.current->thread % kWarp;
  Meeting& warp = block.warps[block.current->thread / kWarp];
  std::memcpy(&warp.value[warp.number & 1][lane], &value, sizeof(T));
  const int slot = meet(warp, false);
  std::memcpy(&value, &warp.value[slot][from(lane, argument) % kWarp], sizeof(T));
  return value;
}

}  // namespace emulation

#define LORA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::emulation::launch(                                        \
      reinterpret_cast<const void*>(kernel), grid, block, shared, [=] { (kernel)(__VA_ARGS__); })
#define LORA_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::emulation::block.shared.data())

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(emulation::settings.shared_limit);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > emulation::settings.shared_limit) return cudaErrorInvalidValue;
  emulation::allowed_shared[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

inline void __syncthreads() {
  emulation::meet(emulation::block.all, false);
}
inline int __syncthreads_or(int predicate) {
  const int slot = emulation::meet(emulation::block.all, predicate != 0);
  return emulation::block.all.any[slot];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) emulation::fail(cudaErrorLaunchFailure);  // no kernel here needs less
  const auto from = [](unsigned lane, unsigned argument) { return lane ^ argument; };
  return emulation::shuffle<T>(value, from, static_cast<unsigned>(lane_mask));
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline void sincospi(double x, double* sine, double* cosine) {
  const double quarters = std::nearbyint(2.0 * x), angle = (x - 0.5 * quarters) * M_PI;
  const double s = std::sin(angle), c = std::cos(angle);
  const auto quadrant = static_cast<int64_t>(quarters) & 3;
  *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
  *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}
using std::copysign;
using std::fabs;
using std::fmax;
using std::ilogb;
using std::isfinite;
using std::ldexp;
using std::log;
using std::sqrt;
