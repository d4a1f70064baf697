#include "kernels_includes.h"

#define LORA_ISA baseline
#include "kernels_bits.h"
#include "kernels_impl.h"
#include "kernels_strip.h"
#include "kernels_strip_rows.h"
#include "kernels_table.h"

const lora::Kernels& lora::kernels_baseline() {
  return baseline::table;
}
