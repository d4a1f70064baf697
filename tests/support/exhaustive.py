"""Whether all combinations are tested: LORA_KERNELS_TEST_ALL=1, as continuous integration sets it.

Without it, `make test` leaves out of the lower instruction sets most of the large sweeps that the
best one runs in full, and compiles the Triton kernels ahead of time for one architecture only.
"""

from __future__ import annotations

import os

EXHAUSTIVE = os.environ.get("LORA_KERNELS_TEST_ALL") == "1"
