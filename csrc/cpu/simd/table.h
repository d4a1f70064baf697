// The table of function pointers of the instruction set LORA_ISA.
#pragma once

namespace lora {
namespace LORA_ISA {
namespace {
const Kernels table{
    subtract_rows,
    sums,
    gather_row,
    dropout_row,
    kRowsOf2 > 0 ? 2 : 1,
    strip_f32,
    strip_f64,
    widen_row,
    kSquareBytes,
    row_squares_f32,
    row_squares_f64,
    column_squares_f32,
    column_squares_f64,
    dora_scale_row,
    dora_scale_grad_row};
}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
