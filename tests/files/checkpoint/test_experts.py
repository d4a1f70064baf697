"""Checkpoints of mixtures: starting and merging experts tensor by tensor gives what `add_lora` and
`merge_lora` give in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from lora_kernels._utils.model_files import JOURNAL_FOLDER
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.folder import ModelFolder
from lora_kernels.files.checkpoint.initialize import initialize, recent, starts_from_files
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.checkpoint.residual import read_start
from lora_kernels.files.checkpoint.verify import verify
from lora_kernels.files.io import blocks
from lora_kernels.files.io.journal import JournaledFolder
from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.model.lora import adapter_state

from ...support.running import logits, move
from ...support.tiny_experts import EXPERTS, expert_parameters, tiny_experts
from ...support.tiny_experts import FAMILIES as ALL_FAMILIES
from .folders import fingerprint

transformers = pytest.importorskip("transformers", minversion="5.0")

R = 4
NAMES = ["experts.gate_up_proj", "experts.down_proj"]
BOTH = {"r": R, "lora_alpha": 12, "target_parameters": NAMES, "target_modules": ["q_proj"]}
FAMILIES = ("Qwen3Moe", "GptOss")
GATE_UP, DOWN = (f"model.layers.0.mlp.{name}" for name in NAMES)
METHODS = [name for name in initializer_names() if starts_from_files(get_initializer(name))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with a tensor for each expert, and with one for all, in several shards."""
    made = {}
    for family, dtype in (("Qwen3Moe", torch.float32), ("GptOss", torch.bfloat16)):
        made[family] = tmp_path_factory.mktemp("models") / family
        tiny_experts(family, dtype).save_pretrained(made[family], max_shard_size="14KB")
    names = ModelFolder(made["Qwen3Moe"]).entries
    expert = "model.layers.0.mlp.experts.3"
    assert names[f"{expert}.gate_proj.weight"][0] != names[f"{expert}.up_proj.weight"][0]
    return made


def loaded(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of the base, without adapters."""
    return {n: p for n, p in model.named_parameters() if "lora_" not in n}


def assert_starts(folder: Path, model: nn.Module) -> None:
    """The residual base and the start in the folder are those of the adapted model."""
    base = dict(loaded(folder).named_parameters())
    for name, weight in plain(model).items():
        assert torch.equal(base[name], weight), name
    start, expected = read_start(folder / "adapter"), adapter_state(model)
    assert list(start.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        own = start.layers[name]
        assert torch.equal(own.lora_A, layer.lora_A) and torch.equal(own.lora_B, layer.lora_B)
        assert own.scaling == layer.scaling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["loram", "pissa", "loftq"])
def test_absorb_is_what_add_lora_does(family, method, folders, tmp_path):
    config = LoRAConfig(**BOTH, init_lora_weights=method)
    done = initialize(folders[family], tmp_path / "out", config)
    assert (done.layers, done.residual, done.skipped) == (3, "absorb", done.skipped)
    assert not any("experts" in name for name in done.skipped)
    model = loaded(folders[family])
    add_lora(model, config, progress=False)
    assert_starts(tmp_path / "out", model)


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_every_form_of_files(family, tmp_path):
    model = tiny_experts(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    names = [".".join(n.split(".")[-2:]) for n in expert_parameters(model)]
    config = LoRAConfig(r=R, target_modules=None, target_parameters=names)
    initialize(tmp_path / "model", tmp_path / "out", config)
    add_lora(model, config, progress=False)
    base = dict(type(model).from_pretrained(tmp_path / "out").named_parameters())
    for name in expert_parameters(model):
        assert torch.equal(base[name], model.get_parameter(name)), name


def test_files_that_are_transposed_on_loading(tmp_path):
    """As the published ones of qwen3_vl_moe, which transformers does not write."""
    model = tiny_experts("Qwen3VLMoe")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    names = expert_parameters(model)
    tensors = load_file(file)
    save_file({n: t.mT.contiguous() if n in names else t for n, t in tensors.items()}, file)
    config = LoRAConfig(r=R, target_modules=None, target_parameters=NAMES)
    initialize(tmp_path / "model", tmp_path / "out", config)
    add_lora(model, config, progress=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        assert torch.equal(after[name].mT, model.get_parameter(name)), name


@pytest.mark.parametrize("parameters", [NAMES[:1], NAMES[1:]])
def test_one_projection_alone(parameters, folders, tmp_path):
    config = LoRAConfig(r=R, target_modules=None, target_parameters=parameters)
    for family in FAMILIES:
        done = initialize(folders[family], tmp_path / family, config)
        assert done.layers == 1
        model = loaded(folders[family])
        add_lora(model, config, progress=False)
        assert_starts(tmp_path / family, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_implicit_is_a_native_adapter_of_the_base(family, folders, tmp_path):
    for method in ("loram", "lora_xs"):
        config = LoRAConfig(**BOTH, init_lora_weights=method, residual="implicit")
        initialize(folders[family], tmp_path / method, config)
        model, ours = loaded(folders[family]), loaded(folders[family])
        add_lora(model, config, progress=False)
        load_adapter(ours, tmp_path / method, progress=False)
        start, expected = read_adapter(tmp_path / method), adapter_state(model)
        for name, layer in expected.layers.items():
            own = start.layers[name]
            for key in ("lora_A", "lora_B", "lora_R", "start_A", "start_B"):
                one, other = getattr(own, key), getattr(layer, key)
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other), (name, key)
            if own.experts:
                W = model.get_parameter(name).detach().double()
                assert own.weight_norm.tolist() == pytest.approx(W.norm(dim=(1, 2)).tolist())
        with torch.no_grad():
            assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_every_start(method, folders, tmp_path):
    """Experts with tensors in different shards give what the joined ones give in memory."""
    config = LoRAConfig(**BOTH, init_lora_weights=method)
    initializer = config.initializer
    out = tmp_path / "out"
    initialize(folders["Qwen3Moe"], out, config)
    absorbed = (out / "adapter").is_dir()
    assert absorbed == initializer.changes_base
    state = read_start(out / "adapter") if absorbed else read_adapter(out)
    layer = state.layers[GATE_UP]
    A, B = layer.lora_A, layer.lora_B
    assert A.shape == (EXPERTS, R, 32) and B.shape == (EXPERTS, 48, R)
    drawn = getattr(initializer, "seed", 0) is None
    if drawn:  # of each expert by itself
        factor = A if A[0].any() else B
        assert not torch.equal(factor[0], factor[1])
    if absorbed and not initializer.rewrites_base:
        before = loaded(folders["Qwen3Moe"]).get_parameter(GATE_UP)
        after = loaded(out).get_parameter(GATE_UP)
        expected = before.double() - layer.scaling * B.double() @ A.double()
        assert (after.double() - expected).abs().max() <= 1e-6 * before.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_blocks_threads_and_limits_give_the_same_bytes(
    family, folders, tmp_path, monkeypatch
):
    config = LoRAConfig(**BOTH, init_lora_weights="pissa")
    out = tmp_path / "out"
    initialize(folders[family], out, config)
    expected = fingerprint(out)
    out.rename(tmp_path / "first")  # the recipe has its name: the same again
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(recent.RecentStarts.__init__, "__defaults__", (0,))
    initialize(folders[family], out, config)
    assert fingerprint(out) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_runs_continue_to_the_same_bytes(family, folders, tmp_path, monkeypatch):
    """After each number of finished shards, also between the two tensors of an expert."""
    config, out = LoRAConfig(**BOTH), tmp_path / "out"
    initialize(folders[family], out, config)
    expected = fingerprint(out)
    out.rename(tmp_path / "first")
    finish = JournaledFolder.finish

    def stopping(self, name, record, in_place=True):
        finish(self, name, record, in_place)
        raise KeyboardInterrupt

    stops = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(JournaledFolder, "finish", stopping)
            try:
                initialize(folders[family], out, config)
            except KeyboardInterrupt:
                assert (out / JOURNAL_FOLDER).is_dir()
                stops += 1
            else:
                break
    assert stops > 1 and fingerprint(out) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_cast(family, folders, tmp_path):
    """The residual is rounded once, to the new dtype."""
    initialize(folders[family], tmp_path / "wide", LoRAConfig(**BOTH), dtype=torch.float32)
    initialize(folders[family], tmp_path / "cast", LoRAConfig(**BOTH), dtype=torch.float16)
    wide, cast = loaded(tmp_path / "wide"), loaded(tmp_path / "cast")
    for name in (GATE_UP, DOWN):
        rounded = wide.get_parameter(name).to(torch.float16)
        difference = (cast.get_parameter(name).float() - rounded.float()).abs()
        assert (difference <= 2.0**-10 * rounded.float().abs() + 2.0**-24).all()
        assert cast.get_parameter(name).dtype == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
def test_absorb_train_with_peft_convert(family, folders, tmp_path, capsys):
    peft = pytest.importorskip("peft", minversion="0.19")
    out, trained, adapter = tmp_path / "out", tmp_path / "trained", tmp_path / "adapter"
    assert main([
        *("init", str(folders[family]), str(out), "-r", "4", "--targets", "q_proj"),
        *("--dtype", "float32", "--target-parameters", *NAMES),
    ]) == 0  # fmt: skip
    assert "3 layers start with loram" in capsys.readouterr().out
    base = loaded(folders[family]).float()
    want = logits(base)
    model = peft.PeftModel.from_pretrained(loaded(out), out / "adapter", is_trainable=True)
    with torch.no_grad():
        assert (logits(model) - want).abs().max() <= 2e-5 * want.abs().max()
        assert (logits(loaded(out)) - want).abs().max() > 1e-3 * want.abs().max()
    move(model)
    model.save_pretrained(trained)
    with torch.no_grad():
        after = logits(model)
    assert (after - want).abs().max() > 1e-2 * want.abs().max()

    assert main(["convert", str(trained), str(adapter), "--start", str(out / "adapter")]) == 0
    ours = loaded(folders[family]).float()
    load_adapter(ours, adapter, is_trainable=False, progress=False)
    with torch.no_grad():
        assert (logits(ours) - after).abs().max() <= 2e-5 * after.abs().max()
    on_original = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        assert (logits(on_original) - after).abs().max() <= 2e-5 * after.abs().max()


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> dict[str, Path]:
    """Trained adapters in the native format and both layouts of PEFT's."""
    made = {}
    for family in FAMILIES:
        model = loaded(folders[family]).float()
        config = LoRAConfig(**BOTH, residual="implicit")
        add_lora(model, config, progress=False)
        move(model)
        folder = tmp_path_factory.mktemp("adapters") / family
        save_adapter(model, folder / "native", format="native")
        save_adapter(model, folder / "stacked", experts="stacked")
        if family == "Qwen3Moe":
            save_adapter(model, folder / "each", experts="each")
        made[family] = folder
    return made


KINDS = [
    *(("Qwen3Moe", kind) for kind in ("native", "stacked", "each")),
    *(("GptOss", kind) for kind in ("native", "stacked")),
]


@pytest.mark.parametrize("family,kind", KINDS)
def test_merge_is_what_merge_lora_does(family, kind, folders, adapters, tmp_path):
    done = merge(folders[family], adapters[family] / kind, tmp_path / "out")
    assert done.layers == 3
    model = loaded(folders[family])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    load_adapter(model, adapters[family] / kind, progress=False)
    merged, found = dict(merge_lora(model).named_parameters()), loaded(tmp_path / "out")
    for name, weight in found.named_parameters():
        eps = torch.finfo(weight.dtype).eps
        difference = (weight.float() - merged[name].float()).abs()
        assert (difference <= eps * merged[name].float().abs() + 1e-7).all(), name
        adapted = name in (GATE_UP, DOWN) or name.endswith("q_proj.weight")
        assert torch.equal(weight, before[name]) != adapted


@pytest.mark.parametrize("family,kind", KINDS)
def test_verify(family, kind, folders, adapters):
    checks = list(verify(adapters[family] / kind, folders[family]))
    assert all(check.passed is not False for check in checks), checks
    names = [check.name for check in checks if check.passed]
    assert "lora_kernels.load_adapter" in names and ("PEFT" in names) == (kind != "native")


def test_convert_between_layouts(folders, adapters, tmp_path):
    """By the names of the base's files."""
    stacked, each = adapters["Qwen3Moe"] / "stacked", adapters["Qwen3Moe"] / "each"
    base = ["--base", str(folders["Qwen3Moe"])]
    for source, layout, like in ((stacked, "each", each), (each, "stacked", stacked)):
        out = tmp_path / layout
        assert main(["convert", str(source), str(out), "--experts", layout, *base]) == 0
        got, want = (load_file(f / "adapter_model.safetensors") for f in (out, like))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_convert_renames_experts_too(adapters, tmp_path):
    arguments = ["--rename", "model", "language_model.model"]
    for kind in ("native", "each"):
        out = tmp_path / kind
        assert main(["convert", str(adapters["Qwen3Moe"] / kind), str(out), *arguments]) == 0
        state, before = read_adapter(out), read_adapter(adapters["Qwen3Moe"] / kind)
        assert list(state.layers) == [f"language_model.{name}" for name in before.layers]
        assert set(state.config.target_parameters) == set(before.config.target_parameters)
        stored = load_file(out / "adapter_model.safetensors")
        expert = "base_model.model.language_model.model.layers.0.mlp.experts.3.up_proj"
        assert f"{expert}.lora_A.weight" in stored


class TestErrors:
    """One line that says what is wrong; nothing is written."""

    def refused(self, folder: Path, tmp_path: Path, match: str, **options) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            initialize(folder, tmp_path / "out", LoRAConfig(**(BOTH | options)))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    def changed(self, tmp_path: Path, change, family: str = "Qwen3Moe") -> Path:
        folder = tmp_path / "model"
        tiny_experts(family).save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return folder

    def test_an_expert_is_missing(self, tmp_path, adapters):
        name = "model.layers.0.mlp.experts.2.up_proj.weight"
        folder = self.changed(tmp_path, lambda tensors: tensors.pop(name))
        match = rf"gate_up_proj' of .*, but '{name}' is not in the files"
        self.refused(folder, tmp_path, match)
        with pytest.raises(ValueError, match=match):
            merge(folder, adapters["Qwen3Moe"] / "native", tmp_path / "out")

    def test_there_is_an_expert_too_many(self, tmp_path):
        def add(tensors):
            like = tensors["model.layers.0.mlp.experts.0.up_proj.weight"]
            tensors["model.layers.0.mlp.experts.4.up_proj.weight"] = like.clone()

        folder = self.changed(tmp_path, add)
        self.refused(folder, tmp_path, r"config\.json does not have '.*experts\.4\.up_proj")

    def test_another_shape(self, tmp_path):
        def halve(tensors):
            name = "model.layers.0.mlp.experts.1.gate_proj.weight"
            tensors[name] = tensors[name][:12].clone()

        folder = self.changed(tmp_path, halve)
        self.refused(folder, tmp_path, r"is \[24, 32\] by config\.json, \[12, 32\] in the files")

    def test_quantized(self, tmp_path):
        def quantize(tensors):
            for name in list(tensors):
                if ".experts." in name:
                    tensors[name] = tensors[name].to(torch.float8_e4m3fn)

        folder = self.changed(tmp_path, quantize)
        self.refused(folder, tmp_path, r"it is quantized in the files \('.*' is F8_E4M3\)")

    def test_mxfp4(self, tmp_path):
        def quantize(tensors):
            tensors.pop(GATE_UP)
            tensors[f"{GATE_UP}_blocks"] = torch.zeros(4, 32, 24, dtype=torch.uint8)

        folder = self.changed(tmp_path, quantize, "GptOss")
        self.refused(folder, tmp_path, "gate_up_proj' of .*, but it is quantized in the files")

    def test_different_dtypes(self, tmp_path):
        def widen(tensors):
            name = "model.layers.0.mlp.experts.1.gate_proj.weight"
            tensors[name] = tensors[name].double()

        folder = self.changed(tmp_path, widen)
        self.refused(folder, tmp_path, r"parts of it in different dtypes \(F32, F64\)")

    def test_options(self, folders, tmp_path):
        folder = folders["Qwen3Moe"]
        self.refused(
            folder, tmp_path, "rank 30 is larger than .* of model.*experts.down_proj", r=30
        )
        self.refused(folder, tmp_path, "lora_dropout must be 0", lora_dropout=0.1)
        match = "matches no parameter|has no|not in the model|experts.gate_proj"
        self.refused(folder, tmp_path, match, target_parameters=["experts.gate_proj"])

    def test_an_unknown_model(self, tmp_path):
        folder = self.changed(tmp_path, lambda tensors: None)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"model_type": "unheard_of"}))
        self.refused(folder, tmp_path, "target_parameters needs a model that transformers knows")

    def test_an_adapter_of_other_experts(self, folders, adapters, tmp_path):
        tiny_experts("Qwen3Moe", num_experts=3).save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match=r"is \[4, 48, 32\], of .* \[3, 48, 32\]"):
            merge(tmp_path / "model", adapters["Qwen3Moe"] / "native", tmp_path / "out")


def test_without_target_parameters_experts_are_left_out(folders, tmp_path):
    done = initialize(folders["Qwen3Moe"], tmp_path / "out", LoRAConfig(r=R))
    assert "target_parameters" in done.skipped["model.layers.0.mlp.experts"]
