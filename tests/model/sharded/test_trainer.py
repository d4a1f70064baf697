"""transformers' Trainer with accelerate's FSDP2: the losses of DDP, checkpoints that resume, and
adapters that can be saved, disabled and unloaded afterwards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import RankFailed, needs_ranks, on_ranks
from ...support.sharded import logits, shared_folder
from ...support.tiny_models import VOCABULARY, llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, DistributedType, PartialState  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

STARTS: dict[str, dict[str, Any]] = {
    "loram": {},
    "implicit": {"residual": "implicit"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa implicit": {"init_lora_weights": "pissa", "residual": "implicit"},
    "lora_xs": {"init_lora_weights": "lora_xs"},
    "init_ab": {"init_lora_weights": "init_ab"},
}
ROWS = torch.randint(1, VOCABULARY, (16, 10), generator=torch.Generator().manual_seed(2))


class Run(NamedTuple):
    """How a model is trained: with DDP, or with FSDP2 and this kind of checkpoint. `lacking`: what
    the processes but the first have for weights when they are adapted, as under `accelerate launch`
    with cpu_ram_efficient_loading: "nan" for memory that nobody wrote, or "meta".
    """

    state: str = ""  # FULL or SHARDED
    efficient: bool = False
    lacking: str = ""


DDP = Run()
RUNS = [
    Run("FULL"),
    Run("SHARDED"),
    Run("FULL", True),
    Run("SHARDED", True),
    Run("FULL", True, "nan"),
    Run("SHARDED", True, "meta"),
]
SOME = [("pissa implicit", Run("SHARDED", True, "meta"))]
# Where starts are drawn without a seed, only a part of the runs draws the same.
SAME_LOSSES = [name for name in STARTS if name != "init_ab"]


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


def fsdp_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """accelerate shards on accelerators only, and passes over FSDP without a word elsewhere."""
    begin = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    patch.setattr(AcceleratorState, "__init__", patched)


def without_weights(model: nn.Module, kind: str) -> nn.Module:
    if kind == "nan":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
    if kind == "meta":
        buffers = dict(model.named_buffers())
        model.to("meta")
        for name, buffer in buffers.items():
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, buffer)
    return model


def trained(name: str, run: Run, folder: Path, resumed: bool = False) -> tuple[Any, list[float]]:
    """The model after two steps, and the losses of the steps."""
    transformers.logging.set_verbosity_error()
    AcceleratorState._reset_state(reset_partial_state=True)
    own, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(variable, None)
        if run.lacking:
            os.environ[variable] = "true"
    options: dict[str, Any] = {}
    if run.state:
        fsdp = {"version": 2, "state_dict_type": f"{run.state}_STATE_DICT"}
        fsdp |= {"cpu_ram_efficient_loading": run.efficient}
        fsdp |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options = {"fsdp": True, "fsdp_config": fsdp}
    with pytest.MonkeyPatch.context() as patch:
        if run.state:
            fsdp_on_a_cpu(patch)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            save_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            seed=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        model = llama()
        if dist.get_rank():
            without_weights(model, run.lacking)
        add_lora(model, LoRAConfig(r=4, **STARTS[name]), progress=False)
        trainer = Trainer(model, arguments, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resumed else None)
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, steps


def life(name: str, run: Run, resume: bool) -> dict[str, Any]:
    """What can be seen of a run: losses, and outputs at all later stages."""
    folder = shared_folder()
    model, losses = trained(name, run, folder)
    assert type(model).__name__.startswith("FSDP") == bool(run.state)
    found: dict[str, Any] = {"losses": losses, "trained": logits(model.eval())}
    save_adapter(model, folder / "adapter", format="native")
    other = llama()
    load_adapter(other, folder / "adapter", progress=False)
    found["loaded"] = logits(other)
    with disable_adapters(model):
        found["disabled"] = logits(model)
    found["unloaded"] = logits(unload_lora(model))
    if resume:
        model, found["resumed losses"] = trained(name, run, folder, resumed=True)
        found["resumed"] = logits(model.eval())
        found["merged"] = logits(merge_lora(model))
    return found


def check(ours: dict[str, Any], ddp: dict[str, Any] | None) -> None:
    base = logits(llama())
    for stage, want in {
        "loaded": ours["trained"],
        "disabled": base,
        "unloaded": base,
        "resumed": ours["trained"],
        "merged": ours["trained"],
    }.items():
        if stage in ours:
            torch.testing.assert_close(ours[stage], want, rtol=0, atol=2e-6, msg=stage)
    assert float((ours["trained"] - base).abs().max()) > 1e-3
    assert ours.get("resumed losses", ours["losses"]) == pytest.approx(ours["losses"], abs=1e-5)
    if ddp is not None:
        assert ours["losses"] == pytest.approx(ddp["losses"], abs=1e-5)


@needs_ranks
def test_losses_of_ddp_and_all_that_follows():
    """Here and there one of many combinations; `test_all` has the others."""
    names = dict.fromkeys(name for name, _ in SOME)

    def work(rank: int):
        plain = {name: {"losses": trained(name, DDP, shared_folder())[1]} for name in names}
        return plain, [life(name, run, resume=index == 0) for index, (name, run) in enumerate(SOME)]

    for plain, lives in on_ranks(2, work, 120):
        for (name, _), ours in zip(SOME, lives, strict=True):
            check(ours, plain[name])


@needs_ranks
@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 runs it")
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_all(name, run):
    def work(rank: int):
        plain = trained(name, DDP, shared_folder())[1] if name in SAME_LOSSES else None
        return plain and {"losses": plain}, life(name, run, resume=True)

    for plain, ours in on_ranks(2, work, 180):
        check(ours, plain)


class TestWeightsOfTheFirstRankOnly:
    """What `add_lora` and `load_adapter` do under `accelerate launch`."""

    @needs_ranks
    def test_starts_and_saved_tensors_are_those_of_the_first(self, tmp_path):
        want = llama()
        config = LoRAConfig(r=4, residual="implicit", modules_to_save=["lm_head"])
        add_lora(want, config, progress=False)
        save_adapter(want, tmp_path)

        def work(rank: int):
            os.environ |= {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            }
            found = []
            for kind in ("nan", "meta"):
                for loads in (False, True):
                    model = llama()
                    if rank:
                        without_weights(model, kind)
                    if loads:
                        load_adapter(model, tmp_path, progress=False)
                    else:
                        add_lora(model, config, progress=False)
                    own = model.state_dict()
                    found.append({n: t for n, t in own.items() if "adapters." in n or "head" in n})
            model = llama()
            if rank:
                without_weights(model, "nan")
            config_of_zero = LoRAConfig(r=4, target_modules=["q_proj"])
            if rank == 0:
                with torch.no_grad():
                    model.model.layers[1].self_attn.q_proj.weight.zero_()
            with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: weight is zero"):
                add_lora(model, config_of_zero, progress=False)
            if rank == 0:
                model.model.layers[0].self_attn.q_proj.to("meta")
            with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight is on the"):
                add_lora(model, config_of_zero, progress=False)
            return found

        state = want.state_dict()
        for rank in on_ranks(2, work):
            assert not isinstance(rank, RankFailed)
            for found in rank:
                assert found
                for name, tensor in found.items():
                    torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)
