#include "includes.h"

#define LORA_ISA baseline
#include "dora_rows.h"
#include "float_strips.h"
#include "rows.h"
#include "squares.h"
#include "table.h"

const lora::Kernels& lora::kernels_baseline() {
  return baseline::table;
}
