"""Tries the installed package: `python smoke.py 0.2.0 compiled` or `python smoke.py 0.2.0 pure`.

It is run by the Python of an environment that has the wheel, outside the checkout, and needs
nothing but the wheel's dependencies.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lora_kernels
    from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, ops, save_adapter

version, kind = sys.argv[1:]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))


def check_import() -> None:
    assert lora_kernels.__version__ == version, lora_kernels.__version__
    assert Path(lora_kernels.__file__).is_relative_to(sys.prefix), lora_kernels.__file__
    reasons = [str(w.message) for w in caught if "compiled CPU kernels" in str(w.message)]
    if kind == "compiled":
        assert not reasons, reasons
        assert "baseline" in ops.cpu_capabilities()
    else:
        assert len(reasons) == 1, reasons
        assert ops.cpu_capability() == "reference"


def check_training() -> None:
    """A start, a step, the files, and the merged weights."""
    x = torch.linspace(-1, 1, 5 * 48).reshape(5, 48)
    for start in ("loram", "pissa", "lora"):
        base, adapted, loaded = model(), model(), model()
        add_lora(adapted, LoRAConfig(r=4, lora_alpha=4, init_lora_weights=start))
        torch.testing.assert_close(adapted(x), base(x), rtol=1e-4, atol=1e-5)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        adapted(x).square().mean().backward()
        optimizer.step()
        assert (adapted(x) - base(x)).abs().max() > 1e-3
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(adapted, folder)
            load_adapter(loaded, folder)
        torch.testing.assert_close(loaded(x), adapted(x), rtol=0, atol=0)
        want = adapted(x).detach()
        merge_lora(adapted)
        torch.testing.assert_close(adapted(x), want, rtol=1e-4, atol=1e-5)


def check_svd() -> None:
    weight = torch.linspace(-1, 1, 96 * 80).reshape(96, 80).sin()
    got = lora_kernels.svd.truncated(weight, 2)
    torch.testing.assert_close(got.S, torch.linalg.svdvals(weight)[:2], rtol=1e-4, atol=1e-4)
    assert (got.U.shape, got.Vh.shape) == ((96, 2), (2, 80))


def check_command() -> None:
    command = str(Path(sys.executable).parent / "lora-kernels")
    done = subprocess.run([command, "env", "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)["lora_kernels"]
    assert told["version"] == version, told
    assert (told["compiled_kernels"] is None) == (kind == "pure"), told


check_import()
check_training()
check_svd()
check_command()
print(f"lora_kernels {version}, {kind}: torch {torch.__version__}, {ops.cpu_capability()}: works")
