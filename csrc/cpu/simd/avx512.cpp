#include "includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns about its own intrinsics
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define LORA_F16C
#define LORA_GATHER16
#define LORA_VECTOR_BYTES 64
#define LORA_STRIP_ROWS_2 12
#define LORA_STRIP_ROWS_1 24
#define LORA_ISA avx512
#include "dora_rows.h"
#include "float_strips.h"
#include "rows.h"
#include "squares.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#include "table.h"

const lora::Kernels& lora::kernels_avx512() {
  return avx512::table;
}
#endif
