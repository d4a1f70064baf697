"""Whether all combinations are tested: LORA_KERNELS_TEST_ALL=1, set by continuous integration.

Without it, `make test` runs the large sweeps in full only for the best instruction set and mostly
skips them for the others, and compiles the Triton kernels ahead of time for one architecture only.
"""

from __future__ import annotations

import os

EXHAUSTIVE = os.environ.get("LORA_KERNELS_TEST_ALL") == "1"
