#include "grouped.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>

#include "serial_blas.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lora::grouped {
namespace {

// Fewer tasks than kTasks are divided by columns too, if each task then keeps enough work.
constexpr int64_t kTasks = 32, kLeastColumns = 128;

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

// While an object exists, MKL and libraries that use OpenMP run on one thread within this thread.
class OneThread {
 public:
#ifdef _OPENMP
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
#else
  OneThread() = default;
#endif
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
#ifdef _OPENMP
  int before_;
#endif
  SerialBlas blas_;
};

void take_tasks(
    const std::vector<Task>& tasks, std::atomic<size_t>& next,
    const std::function<void(const Task&, Scratch&)>& work) {
  // at::parallel_for does not copy this state to other threads.
  const at::AutoDispatchBelowADInplaceOrView guard;
  Scratch scratch;
  for (size_t t = next++; t < tasks.size(); t = next++) {
    work(tasks[t], scratch);
  }
}

}  // namespace

Groups::Groups(const at::Tensor& ends, const std::optional<at::Tensor>& rows, const at::Tensor& x)
    : firsts_{0}, size_(x.size(0)) {
  if (rows) {
    rows_ = rows->contiguous();
    size_ = rows_->size(0);
  }
  const auto last = ends.contiguous();
  const auto* end = last.const_data_ptr<int32_t>();
  for (int64_t e = 0; e < last.size(0); ++e) {
    TORCH_CHECK_VALUE(
        end[e] >= firsts_.back(), "ends must not decrease, got ", end[e], " for expert ", e,
        " after ", firsts_.back());
    TORCH_CHECK_VALUE(
        end[e] <= size_, "ends must not exceed the number of rows, ", size_, ", got ", end[e],
        " for expert ", e);
    firsts_.push_back(end[e]);
  }
  const auto* row = this->rows();
  for (int64_t i = 0; row != nullptr && i < size_; ++i) {
    TORCH_CHECK_INDEX(
        0 <= row[i] && row[i] < x.size(0), "rows must be row numbers of x, at least 0 and below ",
        x.size(0), ", got ", row[i], " at position ", i);
  }
}

std::vector<Task> cut(
    const Groups& groups, int64_t columns, int64_t most_rows, int64_t most_columns) {
  int64_t blocks = 0;
  for (int64_t e = 0; e < groups.experts(); ++e) {
    blocks += divide_up(groups.end(e) - groups.begin(e), most_rows);
  }
  const int64_t wanted = divide_up(kTasks, std::max<int64_t>(1, blocks));
  const int64_t pieces = std::max(
      {int64_t{1}, std::min(wanted, columns / kLeastColumns), divide_up(columns, most_columns)});
  const int64_t width = std::max<int64_t>(1, divide_up(divide_up(columns, pieces), 16) * 16);
  std::vector<Task> tasks;
  for (int64_t e = 0; e < groups.experts(); ++e) {
    const int64_t count = groups.end(e) - groups.begin(e);
    const int64_t step = divide_up(count, std::max<int64_t>(1, divide_up(count, most_rows)));
    for (int64_t begin = groups.begin(e); begin < groups.end(e); begin += step) {
      const int64_t end = std::min(groups.end(e), begin + step);
      for (int64_t left = 0; left == 0 || left < columns; left += width) {
        tasks.push_back({e, begin, end, left, std::min(columns, left + width)});
      }
    }
  }
  std::stable_sort(
      tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows() > b.rows(); });
  return tasks;
}

at::Tensor Scratch::matrix(Slot slot, int64_t rows, int64_t columns, c10::ScalarType dtype) {
  auto& buffer = buffers_[slot];
  if (!buffer.defined() || buffer.numel() < rows * columns) {
    buffer = at::empty({rows * columns}, dtype);
  }
  return buffer.as_strided({rows, columns}, {columns, 1});
}

void run(const std::vector<Task>& tasks, const std::function<void(const Task&, Scratch&)>& work) {
  std::atomic<size_t> next{0};
  const auto workers =
      std::min(static_cast<int64_t>(tasks.size()), static_cast<int64_t>(at::get_num_threads()));
  if (workers <= 1) {
    const OneThread alone;  // outside of a parallel region, a product would use all threads
    take_tasks(tasks, next, work);
    return;
  }
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) { take_tasks(tasks, next, work); });
}

}  // namespace lora::grouped
