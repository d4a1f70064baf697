"""Peak memory on a checkpoint several times larger than the limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.files.io.pipeline import AHEAD

from ...support import ROOT
from ...support.exhaustive import EXHAUSTIVE

pytest.importorskip("psutil")
SIDE, COUNT, SHARDS = 2048, 12, 4  # 16 MiB each, 768 MiB

CODE = """
import sys
from pathlib import Path
import numpy as np, torch
from benchmarks.common.memory import PeakGrowth
from lora_kernels.model.config import LoRAConfig
from lora_kernels.files.checkpoint.initialize import initialize
from tests.files.checkpoint.folders import random_tensor, write_model

folder, side, count, shards = Path(sys.argv[1]), *map(int, sys.argv[2:5])
config = LoRAConfig(r=16, residual=sys.argv[5])
dtype = None if sys.argv[6] == "None" else getattr(torch, sys.argv[6])
rng = np.random.default_rng(0)
write_model(folder / "small", [{"q.weight": random_tensor(rng, "F32", (64, 64))}])
initialize(folder / "small", folder / "warm", config, dtype=dtype)
with PeakGrowth(sharp=True) as growth:
    initialize(folder / "model", folder / "out", config, dtype=dtype)
print(growth.mib)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The same tensor under many names."""
    import numpy as np

    from .folders import random_tensor, write_model

    tensor = random_tensor(np.random.default_rng(0), "F32", (SIDE, SIDE))
    shards = [
        {f"layers.{shard * COUNT + k}.q_proj.weight": tensor for k in range(COUNT)}
        for shard in range(SHARDS)
    ]
    folder = tmp_path_factory.mktemp("memory")
    write_model(folder / "model", shards)
    return folder


# Each takes 6 s; the cast one holds the most.
PEAKS = [("absorb", "bfloat16"), ("absorb", None), ("implicit", None)]


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 runs it")
@pytest.mark.parametrize("residual,dtype", PEAKS)
def test_peak(residual, dtype, model, tmp_path):
    """The largest tensor, twice if it is cast, the bound on what is ahead, and 32 MiB for the rest:
    A and B of a few layers, the interpreter's own.
    """
    (tmp_path / "model").symlink_to(model / "model")
    arguments = [str(n) for n in (tmp_path, SIDE, COUNT, SHARDS, residual, dtype)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    largest = SIDE * SIDE * 4 / 2**20
    limit = largest * (1 if dtype is None else 1.5) + AHEAD / 2**20 + 32
    size = json.loads((model / "model" / "model.safetensors.index.json").read_text())
    assert size["metadata"]["total_size"] / 2**20 > 4 * limit
    assert float(done.stdout) < limit


EXPERTS_CODE = """
import sys
from pathlib import Path
import torch
from benchmarks.common.memory import PeakGrowth
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.model.config import LoRAConfig
from tests.support.tiny_experts import tiny_experts

family, folder, names = sys.argv[1], Path(sys.argv[2]), ["experts.gate_up_proj"]
config = LoRAConfig(r=8, target_modules=None, target_parameters=names)
tiny_experts(family).save_pretrained(folder / "small")
initialize(folder / "small", folder / "warm", config)
with PeakGrowth(sharp=True) as growth:
    initialize(folder / "model", folder / "out", config)
print(growth.mib)
"""


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1")
@pytest.mark.parametrize("family", ["GptOss", "Qwen3Moe"])
def test_experts(family, tmp_path):
    """Not the experts' parameter of 512 MiB, but one expert, and the factors of all."""
    from ...support.tiny_experts import tiny_experts

    pytest.importorskip("transformers", minversion="5.0")
    count = {"GptOss": "num_local_experts", "Qwen3Moe": "num_experts"}[family]
    width = {"GptOss": "intermediate_size", "Qwen3Moe": "moe_intermediate_size"}[family]
    sizes = {count: 128, width: 512, "hidden_size": 1024, "head_dim": 64}
    tiny_experts(family, **sizes).save_pretrained(tmp_path / "model", max_shard_size="200MB")
    done = subprocess.run(
        [sys.executable, "-c", EXPERTS_CODE, family, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    factors = 128 * 8 * 2048 * 4 / 2**20
    assert float(done.stdout) < AHEAD / 2**20 + 3 * 4 + 3 * factors + 32
