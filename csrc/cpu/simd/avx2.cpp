#include "includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LORA_F16C
#define LORA_GATHER8
#define LORA_VECTOR_BYTES 32
#define LORA_STRIP_ROWS_1 6
#define LORA_ISA avx2
#include "dora_rows.h"
#include "float_strips.h"
#include "rows.h"
#include "squares.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#include "table.h"

const lora::Kernels& lora::kernels_avx2() {
  return avx2::table;
}
#endif
