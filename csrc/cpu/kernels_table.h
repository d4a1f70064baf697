// The table of pointers of the instruction set LORA_ISA; included once by each kernels_<isa>.cpp.

#define LORA_STRINGIFY_(x) #x
#define LORA_STRINGIFY(x) LORA_STRINGIFY_(x)

namespace lora {
namespace LORA_ISA {
namespace {
const Kernels table{
    LORA_STRINGIFY(LORA_ISA),
    subtract_rows,
    sums,
    gather_row,
    dropout_row,
    strip_f32,
    strip_f64,
    widen_row};
}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
