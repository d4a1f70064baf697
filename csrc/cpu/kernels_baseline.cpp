#include "kernels_includes.h"

#define LORA_ISA baseline
#include "kernels_impl.h"
#include "kernels_table.h"
#include "strip_impl.h"
#include "strip_rows.h"

const lora::Kernels& lora::kernels_baseline() {
  return baseline::table;
}
