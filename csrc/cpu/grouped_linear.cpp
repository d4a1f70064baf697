// lora::grouped_linear's forward. Each task multiplies up to kMostRows rows of one expert on one
// thread. The rows are gathered from x into memory of that size.
//
// A lower bound on the time is that of the products with W. At rank 16, forward and backward add
// six thin products, 4.7 % of the operations at N = K = 1024. Measured on Zen 4 (both projections,
// float32, CPU time of 1 thread) as a multiple of torch's grouped_mm without an adapter: 1.11 with
// 64 rows per expert, 1.07 to 1.09 with 256, 1.21 with 32 (H = 512). With 2 threads on an idle
// machine, the elapsed time was 0.60 to 0.91 of grouped_mm's.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "grouped.h"
#include "grouped_backward.h"
#include "grouped_product.h"

namespace lora::grouped {
namespace {

struct Forward {
  const Groups& groups;
  const Operand x;
  const at::Tensor& weight;
  const Optional& bias;
  const Factors factors;
  const Mask mask;
  const double scaling;
  const Precision precision;
  const at::Tensor y, z;
  const at::Tensor ranks;  // [S, total_rank] in the dtype of sums; z, and the start's product

  // The columns of the rank products, for the rows of one task.
  void rank_rows(const Task& task, Scratch& scratch) const {
    const int64_t r = factors.rank(), columns = x.matrix.size(1);
    if (factors.total_rank() == 0) {
      return;
    }
    const auto rows = x.wide(task.begin, task.end, 0, columns, mask.active(), scratch);
    const auto down = factors.down(task.expert);
    auto out = ranks.narrow(0, task.begin, task.rows());
    if (!mask.active()) {
      at::mm_out(out, rows, down.t());
    } else {
      auto adapter = out.narrow(1, 0, r), start = out.narrow(1, r, factors.total_rank() - r);
      if (factors.start_A) {
        at::mm_out(start, rows, down.narrow(0, r, r).t());
      }
      mask.apply_(rows, task.begin, 0);
      at::mm_out(adapter, rows, down.narrow(0, 0, r).t());
    }
    if (!ranks.is_same(z)) {
      z.narrow(0, task.begin, task.rows()).copy_(out.narrow(1, 0, r));
    }
  }

  void result(const Task& task, Scratch& scratch) const {
    const auto where = y.narrow(0, task.begin, task.rows()).narrow(1, task.left, task.columns());
    const bool direct = precision.model == precision.sums;
    auto sum = direct ? where : scratch.matrix(kSum, task.rows(), task.columns(), precision.sums);
    const auto rows = precision.narrow
                          ? x.narrow(task.begin, task.end, scratch)
                          : x.wide(task.begin, task.end, 0, x.matrix.size(1), false, scratch);
    const auto part = weight.select(0, task.expert).narrow(0, task.left, task.columns());
    multiply(precision, sum, rows, part.t(), scratch);
    if (factors.total_rank() > 0) {
      const auto up = factors.up(task.expert).narrow(0, task.left, task.columns());
      sum.addmm_(ranks.narrow(0, task.begin, task.rows()), up.t(), 1, scaling);
    }
    if (bias) {
      sum.add_(bias->select(0, task.expert).narrow(0, task.left, task.columns()));
    }
    if (!direct) {
      where.copy_(sum);
    }
  }

  void operator()() const {
    const int64_t columns = y.size(1);
    const auto tasks = cut(groups, columns, kMostRows);
    run(cut(groups, 0, kMostRows), [&](const Task& t, Scratch& s) { rank_rows(t, s); });
    run(tasks, [&](const Task& t, Scratch& s) { result(t, s); });
    const int64_t rest = groups.size() - groups.used();
    y.narrow(0, groups.used(), rest).zero_();
    z.narrow(0, groups.used(), rest).zero_();
  }
};

std::tuple<at::Tensor, at::Tensor> grouped_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const at::Tensor& ends,
    const Optional& rows, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling,
    double dropout, const Optional& seed, const Optional& start_A, const Optional& start_B) {
  const Groups groups(ends, rows, x);
  const Precision precision(x.scalar_type());
  const Factors factors{lora_A, lora_B, start_A, start_B, precision};
  const auto y = at::empty({groups.size(), weight.size(1)}, x.options());
  const auto z = at::empty({groups.size(), factors.rank()}, x.options());
  const bool apart = start_A || precision.model != precision.sums;
  const auto ranks =
      apart ? at::empty({groups.size(), factors.total_rank()}, x.options().dtype(precision.sums))
            : z;
  const Operand operand{x.contiguous(), groups.rows(), precision};
  Forward{groups,  operand,   weight, bias, factors, Mask(dropout, seed),
          scaling, precision, y,      z,    ranks}();
  return {y, z};
}

}  // namespace
}  // namespace lora::grouped

namespace lora {

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("grouped_linear_forward", grouped::grouped_linear_forward);
  m.impl("grouped_linear_backward", grouped::grouped_linear_backward);
}

}  // namespace lora
