// The rows of each expert, and their division into tasks that run in parallel.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace lora::grouped {

// `ends` and `rows` of lora::grouped_linear. Their values are checked: raises ValueError or
// IndexError.
class Groups {
 public:
  Groups(const at::Tensor& ends, const std::optional<at::Tensor>& rows, const at::Tensor& x);

  int64_t experts() const { return static_cast<int64_t>(firsts_.size()) - 1; }
  int64_t begin(int64_t expert) const { return firsts_[expert]; }
  int64_t end(int64_t expert) const { return firsts_[expert + 1]; }
  int64_t used() const { return firsts_.back(); }  // rows from here on belong to no expert
  int64_t size() const { return size_; }
  bool gathers() const { return rows_.has_value(); }
  const int64_t* rows() const { return rows_ ? rows_->const_data_ptr<int64_t>() : nullptr; }

 private:
  std::vector<int64_t> firsts_;
  std::optional<at::Tensor> rows_;
  int64_t size_;
};

// Rows [begin, end) of an expert, and columns [left, right) of its result.
struct Task {
  int64_t expert, begin, end, left, right;

  int64_t rows() const { return end - begin; }
  int64_t columns() const { return right - left; }
};

// The tasks of a result with `columns` columns, the largest first, each with at most `most_rows`
// rows and `most_columns` columns. The division depends on sizes alone, so that the bits do not
// depend on the number of threads.
std::vector<Task> cut(
    const Groups& groups, int64_t columns, int64_t most_rows, int64_t most_columns = INT64_MAX);

// A thread's matrices for a task: rows in the dtype of sums, rows in the model's dtype, a product
// in the model's dtype, a tile of a weight in float32, and a sum.
enum Slot { kWide, kNarrow, kProduct, kTile, kSum, kSlots };

// Matrices that one thread reuses for its tasks.
class Scratch {
 public:
  // Uninitialized. Each slot has one dtype and holds one matrix at a time.
  at::Tensor matrix(Slot slot, int64_t rows, int64_t columns, c10::ScalarType dtype);

 private:
  std::array<at::Tensor, kSlots> buffers_;
};

// Calls work(task, scratch) for every task. A thread that has finished takes the next task.
// Products within a task run on one thread.
void run(const std::vector<Task>& tasks, const std::function<void(const Task&, Scratch&)>& work);

}  // namespace lora::grouped
