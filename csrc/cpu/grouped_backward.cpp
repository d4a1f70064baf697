#include "grouped_backward.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "grouped.h"
#include "grouped_product.h"
#include "grouped_rows.h"

namespace lora::grouped {
namespace {

// Gradients of repeated rows of x are first stored separately: this many numbers at a time, but at
// least kLeastWidth columns of dx.
constexpr int64_t kApart = 1 << 22, kLeastWidth = 256;

// How many of an expert's rows, and of its columns, a product of rank r reads at a time.
constexpr int64_t kRowsAtOnce = 256, kColumnsAtOnce = 512;

struct Backward {
  const Groups& groups;
  const Operand dy, x;
  const at::Tensor& weight;
  const Factors factors;
  const at::Tensor& z;
  const Mask mask;
  const double scaling;
  const Precision precision;

  // dz and the start's counterpart: s dy [B, -B0], [S, total_rank] in the dtype of sums.
  at::Tensor through_B() const {
    const auto out = at::empty({groups.size(), factors.total_rank()}, sums());
    run(cut(groups, 0, kMostRows), [&](const Task& task, Scratch& scratch) {
      auto part = out.narrow(0, task.begin, task.rows());
      const auto rows = dy.wide(task.begin, task.end, 0, weight.size(1), false, scratch);
      at::addmm_out(part, part, rows, factors.up(task.expert), 0, scaling);
    });
    return out;
  }

  // The gradient of rows of x [S, K] in the columns of `task`, into `out` in the dtype of sums.
  void gradient(
      const Task& task, const at::Tensor& dz, const at::Tensor& out, Scratch& scratch) const {
    const auto rows = precision.narrow
                          ? dy.narrow(task.begin, task.end, scratch)
                          : dy.wide(task.begin, task.end, 0, weight.size(1), false, scratch);
    const auto part = weight.select(0, task.expert).narrow(1, task.left, task.columns());
    multiply(precision, out, rows, part, scratch);
    if (factors.total_rank() == 0) {
      return;
    }
    auto sum = out;
    const auto through = dz.narrow(0, task.begin, task.rows());
    const auto down = factors.down(task.expert).narrow(1, task.left, task.columns());
    if (!mask.active()) {
      sum.addmm_(through, down);
      return;
    }
    const int64_t r = factors.rank();
    auto dropped = scratch.matrix(kWide, task.rows(), task.columns(), precision.sums);
    at::mm_out(dropped, through.narrow(1, 0, r), down.narrow(0, 0, r));
    mask.apply_(dropped, task.begin, task.left);
    sum.add_(dropped);
    if (factors.start_A) {
      sum.addmm_(through.narrow(1, r, r), down.narrow(0, r, r));
    }
  }

  at::Tensor of_x(const at::Tensor& dz) const {
    const auto dx = at::empty_like(x.matrix);
    if (groups.gathers()) {
      add_repeated(dz, dx);
      return dx;
    }
    run(cut(groups, dx.size(1), kMostRows), [&](const Task& task, Scratch& scratch) {
      const auto where = dx.narrow(0, task.begin, task.rows()).narrow(1, task.left, task.columns());
      if (precision.model == precision.sums) {
        gradient(task, dz, where, scratch);
        return;
      }
      const auto sum = scratch.matrix(kSum, task.rows(), task.columns(), precision.sums);
      gradient(task, dz, sum, scratch);
      where.copy_(sum);
    });
    dx.narrow(0, groups.used(), groups.size() - groups.used()).zero_();
    return dx;
  }

  void add_repeated(const at::Tensor& dz, const at::Tensor& dx) const {
    const Origins origins(groups, dx.size(0));
    const int64_t used = groups.used(), columns = dx.size(1);
    const int64_t most = kApart / std::max<int64_t>(1, used) / kLeastWidth * kLeastWidth;
    const int64_t width = std::min(columns, std::max(kLeastWidth, most));
    const auto apart = at::empty({used, width}, sums());
    for (int64_t left = 0; left < columns; left += width) {
      const int64_t count = std::min(width, columns - left);
      run(cut(groups, count, kMostRows), [&](Task task, Scratch& scratch) {
        const auto where =
            apart.narrow(0, task.begin, task.rows()).narrow(1, task.left, task.columns());
        task.left += left, task.right += left;
        gradient(task, dz, where, scratch);
      });
      origins.add_up(apart.narrow(1, 0, count), dx.narrow(1, left, count));
    }
  }

  // dA = dz^T drop(x).
  at::Tensor of_A(const at::Tensor& dz) const {
    return per_expert(factors.A, 2, [&](const Task& task, int64_t begin, int64_t end, Scratch& s) {
      const auto rows = x.wide(begin, end, task.left, task.right, mask.active(), s);
      if (mask.active()) {
        mask.apply_(rows, begin, task.left);
      }
      const auto of_z = dz.narrow(0, begin, end - begin).narrow(1, 0, factors.rank());
      return std::pair(of_z.t(), rows);
    });
  }

  // dB = s dy^T z.
  at::Tensor of_B() const {
    const auto scaled = z.to(precision.sums) * scaling;
    return per_expert(factors.B, 1, [&](const Task& task, int64_t begin, int64_t end, Scratch& s) {
      const auto rows = dy.wide(begin, end, task.left, task.right, false, s);
      return std::pair(rows.t(), scaled.narrow(0, begin, end - begin));
    });
  }

  // A tensor like `stack`: for each expert, the sum over its rows of products of two factors, whose
  // columns are divided along dimension `along`.
  template <typename Pair>
  at::Tensor per_expert(const at::Tensor& stack, int64_t along, const Pair& factors_of) const {
    const auto out = at::zeros(stack.sizes(), stack.options());
    const bool direct = stack.scalar_type() == precision.sums;
    const auto tasks = cut(groups, stack.size(along), groups.size() + 1, kColumnsAtOnce);
    run(tasks, [&](const Task& task, Scratch& scratch) {
      const auto where = out.select(0, task.expert).narrow(along - 1, task.left, task.columns());
      auto sum =
          direct ? where : scratch.matrix(kSum, where.size(0), where.size(1), precision.sums);
      for (int64_t begin = task.begin; begin < task.end; begin += kRowsAtOnce) {
        const int64_t end = std::min(task.end, begin + kRowsAtOnce);
        const auto [a, b] = factors_of(task, begin, end, scratch);
        at::addmm_out(sum, sum, a, b, begin == task.begin ? 0 : 1, 1);
      }
      if (!direct) {
        where.copy_(sum);
      }
    });
    return out;
  }

  at::Tensor of_bias() const {
    const auto out = at::zeros({groups.experts(), weight.size(1)}, dy.matrix.options());
    run(cut(groups, weight.size(1), groups.size() + 1), [&](const Task& task, Scratch&) {
      auto where = out.select(0, task.expert).narrow(0, task.left, task.columns());
      const auto rows = dy.matrix.narrow(0, task.begin, task.rows());
      at::sum_out(where, rows.narrow(1, task.left, task.columns()), {0});
    });
    return out;
  }

 private:
  at::TensorOptions sums() const { return x.matrix.options().dtype(precision.sums); }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& ends,
    const std::optional<at::Tensor>& rows, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const at::Tensor& z, double scaling, double dropout, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& start_A, const std::optional<at::Tensor>& start_B,
    std::array<bool, 4> needs) {
  const auto [needs_x, needs_bias, needs_A, needs_B] = needs;
  const Groups groups(ends, rows, x);
  const Precision precision(x.scalar_type());
  const Backward backward{
      groups,
      Operand{grad.contiguous(), nullptr, precision},
      Operand{x.contiguous(), groups.rows(), precision},
      weight,
      Factors{lora_A, lora_B, start_A, start_B, precision},
      z,
      Mask(dropout, seed),
      scaling,
      precision};
  const auto dz = needs_x || needs_A ? backward.through_B() : at::Tensor();
  const auto none = [&] { return at::empty({0}, x.options()); };
  return {
      needs_x ? backward.of_x(dz) : none(), needs_bias ? backward.of_bias() : none(),
      needs_A ? backward.of_A(dz) : none(), needs_B ? backward.of_B() : none()};
}

}  // namespace lora::grouped
