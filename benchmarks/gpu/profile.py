"""Run six kernels once each under a profiler, after an unprofiled run that compiles them:

ncu --profile-from-start off python -m benchmarks.gpu.profile
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import lora_kernels  # noqa: F401  (registers the operators)
from benchmarks.gpu.targets.plan import FULL, Plan


def kernels(device: torch.device, plan: Plan, dtype: torch.dtype) -> dict[str, Callable]:
    """The kernels by name, with the sizes of the headline table."""
    from lora_kernels.triton_kernels.linear import decode, gemm, grads, shrink

    (n, k), m, r = plan.layer_shape, plan.layer_tokens, plan.layer_cases[0][0]

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).div_(shape[-1] ** 0.5)

    x, few, dy, z = make(m, k), make(plan.decode_tokens[0], k), make(m, n), make(m, r)
    weight, A, B = make(n, k), make(r, k, dtype=torch.float32), make(n, r, dtype=torch.float32)
    coefficient = torch.tensor(1e-6, dtype=torch.float64, device=device)
    on_gpu = device.type == "cuda"
    hopper = on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
    count = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 2
    config = next(iter(gemm.CONFIGS))
    found = {
        "shrink": lambda: shrink.shrink(x, A, None, 0.0, None),
        "decode": lambda: decode.decode(
            few, weight, None, A, B, 1.0, 0.0, None, None, None, hopper
        ),
        "dz and dB": lambda: grads.dz_dB(dy, B, None, z, 1.0, True),
        "dA": lambda: grads.dA(z, x, torch.float32, 0.0, None),
        "subtract_dst_": lambda: torch.ops.lora.subtract_dst_(weight, coefficient, r),
    }
    if hopper or not on_gpu:
        found["gemm"] = lambda: gemm.gemm(config, count, x, weight, False, z, B, 1.0)
    return found


def main() -> int:
    """Return 0, 1 if a kernel failed, or 2 without a GPU."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu.profile: no CUDA GPU here", file=sys.stderr)
        return 2
    runs = kernels(torch.device("cuda"), FULL, torch.bfloat16)
    failed = 0
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        except Exception as error:  # profile the remaining kernels
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{len(runs) - failed} of {len(runs)} kernels ran")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
