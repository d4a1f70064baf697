"""PiSSA, OLoRA and the like by PEFT: loaded onto PEFT's residual base, converted to the original
base by the adapter that was saved before training, and read as PEFT itself has converted them.
"""

from __future__ import annotations

import copy
import json
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels import load_adapter, save_adapter, unload_lora
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.checkpoint.verify import verify
from lora_kernels.files.serving.convert import convert

from ...support.packages import needs_peft
from ...support.peft_models import MODELS, adapted
from ...support.running import close, logits, move, same_bits, train, weights_of
from ...support.tiny_models import llama

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = needs_peft

UNNAMED = "says that"  # in the warning if neither adapter names a start of PEFT
LARGE = 1e4  # roundings, of a base that PEFT has rounded in float32
OPTIONS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    {"modules_to_save": ["norm"]},
    {"r": 20},  # more than some layers' min(out, in), where PEFT's rank is smaller
]


def trained_by_peft(
    folder: Path, base: nn.Module, init: str, named: bool = True, lr: float = 1e-2, **options
):
    """The trained PEFT model; the adapter before training in "start", after it in "trained".
    `named`: whether the files name the start, as PEFT's guides do not.
    """
    model = adapted(base, init_lora_weights=init, **options)
    config = model.peft_config["default"]
    config.init_lora_weights = init if named else True
    model.save_pretrained(folder / "start")
    train(model.train(), lr=lr)
    model.eval().save_pretrained(folder / "trained")
    config.init_lora_weights = init
    return model


def with_config(folder: Path, **values) -> Path:
    """Changes fields of the configuration in place."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("kind", MODELS)
def test_loads_onto_the_base_that_peft_made(kind, init, tmp_path):
    if kind == "gpt2" and init == "olora":
        pytest.skip("PEFT's OLoRA takes Conv1D's weight for that of a linear layer")
    model = trained_by_peft(tmp_path, MODELS[kind](), init)
    want = logits(model)
    with pytest.raises(ValueError, match=r"(?s)residual_base=True.*convert --start"):
        load_adapter(MODELS[kind](), tmp_path / "trained", progress=False)
    base = model.unload()
    before = weights_of(base)
    load_adapter(base, tmp_path / "trained", residual_base=True, progress=False)
    assert close(logits(base), want)
    save_adapter(base, tmp_path / "again")
    unload_lora(base)
    assert same_bits(weights_of(base), before)
    load_adapter(base, tmp_path / "again", progress=False)
    assert close(logits(base), want)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_by_the_start(init, options, named, tmp_path):
    """What PEFT computes on its residual base, on the original one; and what plain PEFT computes
    there with the result.
    """
    peft = pytest.importorskip("peft")
    base = llama()
    model = trained_by_peft(tmp_path, base, init, named, **options)
    want = logits(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = convert(tmp_path / "trained", tmp_path / "out", start=tmp_path / "start")
    assert any(UNNAMED in str(warning.message) for warning in caught) is not named
    assert saved.layers == 14
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "out", progress=False)
    assert close(logits(ours), want, LARGE)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    assert close(logits(again), want, LARGE)
    unload_lora(ours)
    assert close(logits(ours), logits(base), LARGE)
    state = read_adapter(tmp_path / "out")
    assert {layer.r for layer in state.layers.values()} == {
        m.lora_A["default"].weight.shape[0] for m in model.modules() if hasattr(m, "lora_A")
    }
    assert ("model.norm.weight" in state.extra) == ("modules_to_save" in options)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_agrees_with_peft_s_own(init, tmp_path):
    model = trained_by_peft(tmp_path, llama(), init, lr=1e-3)
    convert(tmp_path / "trained", tmp_path / "out", start=tmp_path / "start")
    model.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    ours, theirs = read_adapter(tmp_path / "out"), read_adapter(tmp_path / "theirs")
    assert ours.layers.keys() == theirs.layers.keys()
    for name, layer in ours.layers.items():
        assert torch.equal(layer.lora_A, theirs.layers[name].lora_A)
        assert torch.equal(layer.lora_B, theirs.layers[name].lora_B)
        for got, expected in zip(
            layer.start_factors(), theirs.layers[name].start_factors(), strict=True
        ):
            assert torch.equal(got, expected)
        assert layer.scaling == theirs.layers[name].scaling
    assert ours.config.init_lora_weights == init


def test_the_command(tmp_path, capsys):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = trained_by_peft(tmp_path, base, "pissa")
    paths = [str(tmp_path / name) for name in ("trained", "out")]
    assert main(["convert", *paths]) != 0
    assert "--start" in capsys.readouterr().err
    assert main(["convert", *paths, "--start", str(tmp_path / "start")]) == 0
    merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert close(logits(merged), logits(model), LARGE)
    assert all(check.passed for check in verify(tmp_path / "out", tmp_path / "base"))


class TestRefusedStarts:
    @pytest.fixture
    def trained(self, tmp_path):
        trained_by_peft(tmp_path, llama(), "pissa")
        return tmp_path / "trained"

    def refused(self, trained: Path, start: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            convert(trained, trained.parent / "out", start=start)
        assert not (trained.parent / "out").exists()

    @pytest.mark.parametrize(
        "options,match",
        [
            ({"r": 2}, "has r = 4, its start 2"),
            ({"lora_alpha": 4}, "has scaling = 2, its start 1"),
            ({"init_lora_weights": "olora"}, "'pissa', .*start is a start of 'olora'"),
            ({"init_lora_weights": True}, "is not a start: B = 0, so that nothing was subtracted"),
            ({"init_lora_weights": "gaussian"}, "is not a start: B = 0"),
        ],
        ids=str,
    )
    def test_another_start(self, options, match, trained):
        start = trained.parent / "other" / "start"
        adapted(llama(), **{"init_lora_weights": "pissa"} | options).save_pretrained(start)
        self.refused(trained, start, match)

    def test_another_model(self, trained):
        start = trained.parent / "other" / "start"
        adapted(llama(intermediate_size=64), init_lora_weights="pissa").save_pretrained(start)
        self.refused(trained, start, "different shapes")
        adapted(llama(num_hidden_layers=3), init_lora_weights="pissa").save_pretrained(start)
        self.refused(trained, start, r"lacks 'model\.layers\.2")

    def test_no_adapter_and_no_start(self, trained):
        self.refused(trained, trained.parent, "is not a start")
        loftq = with_config(trained.parent / "start", init_lora_weights="loftq")
        self.refused(trained, loftq, "PEFT has made a new base")

    def test_converted_adapters(self, trained):
        """One that is of the original base already is neither a start nor trained from one."""
        out = trained.parent / "done"
        convert(trained, out, start=trained.parent / "start")
        self.refused(out, trained.parent / "start", "of the original base already")
        self.refused(trained, out, "is not a start")

    @pytest.mark.parametrize("named", [True, False])
    def test_the_trained_adapter_itself(self, named, tmp_path):
        trained_by_peft(tmp_path, llama(), "pissa", named)
        trained = tmp_path / "trained"
        (tmp_path / "link").symlink_to(trained)
        for folder in (trained, tmp_path / "start" / ".." / "trained", tmp_path / "link"):
            self.refused(trained, folder, "is the trained adapter itself.*before training.*--start")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            again = in_dtype(trained, tmp_path / "copy", dtype)
            why = "lora_B are not orthogonal" if named else "the same factors in every layer"
            self.refused(trained, again, why)
            self.refused(again, trained, why)

    @pytest.mark.parametrize("init", ["pissa", True, "gaussian"])
    def test_an_adapter_that_was_not_trained(self, init, tmp_path):
        """Nothing is left of it, whatever the dtype that it was saved in."""
        trained_by_peft(tmp_path, llama(), "pissa")
        start = with_config(tmp_path / "start", init_lora_weights=init)
        for dtype in (torch.float32, torch.bfloat16):
            same = in_dtype(start, tmp_path / "trained", dtype)
            self.refused(same, start, "the same factors in every layer.*was not trained")

    def test_one_trained_factor_is_enough(self, tmp_path):
        trained_by_peft(tmp_path, llama(), "pissa")
        file = shutil.copytree(tmp_path / "start", tmp_path / "moved") / ADAPTER_FILE
        tensors = safetensors.load_file(file)
        next(t for name, t in tensors.items() if "lora_A" in name)[0, 0] += 1
        safetensors.save_file(tensors, file)
        assert convert(tmp_path / "moved", tmp_path / "out", start=tmp_path / "start").layers == 14

    @pytest.mark.parametrize("inits", [(True, True), ("gaussian", True), (False, "orthogonal")])
    def test_ordinary_lora_is_told_apart_by_a_warning(self, inits, tmp_path):
        for seed, init in enumerate(inits):
            model = adapted(llama())
            move(model, seed=seed)
            model.save_pretrained(tmp_path / str(seed))
            with_config(tmp_path / str(seed), init_lora_weights=init)
        with pytest.warns(UserWarning, match=f"{UNNAMED}.*PEFT's guides.*wrong if.*ordinary LoRA"):
            convert(tmp_path / "1", tmp_path / "out", start=tmp_path / "0")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
    def test_a_start_has_orthogonal_columns_and_a_checkpoint_has_not(self, init, dtype, tmp_path):
        model = started_by_peft(init)
        model.save_pretrained(tmp_path / "first")
        for name in ("middle", "trained"):
            train(model.train())
            model.save_pretrained(tmp_path / name)
        first = in_dtype(tmp_path / "first", tmp_path / "start", dtype)
        middle = in_dtype(tmp_path / "middle", tmp_path / "checkpoint", dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(tmp_path / "trained", tmp_path / "fine", start=first)
        why = f"not a start: the columns of lora_B.*by '{init.partition('_niter')[0]}'"
        self.refused(tmp_path / "trained", middle, why)
        # The name in one of the two is enough.
        with_config(middle, init_lora_weights=True)
        self.refused(tmp_path / "trained", middle, why)


def started_by_peft(init: str) -> nn.Module:
    """A PEFT model with the start, made of random data if it needs some."""
    peft = pytest.importorskip("peft")
    model, options = llama(), {}
    generator = torch.Generator().manual_seed(3)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        out, cols = layer.weight.shape
        if init == "lora_ga":
            layer._peft_loraga_grad = torch.randn(out, cols, generator=generator)
            options = {"lora_ga_config": peft.LoraGAConfig()}
        elif init == "corda":  # W·C = U·S·Vᵀ, and V is multiplied by the inverse of C
            x = torch.randn(cols, 2 * cols, generator=generator)
            C = x @ x.T
            U, S, Vh = torch.linalg.svd(layer.weight.detach() @ C, full_matrices=False)
            U, S, V = U[:, -4:], S[-4:], (Vh[-4:] @ C.inverse()).T
            layer.eigens = types.SimpleNamespace(U_WC=U, S_WC=S, V_WC=V)
    return adapted(model, init_lora_weights=init, **options)


def in_dtype(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """A copy of an adapter with tensors in another dtype."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    tensors = safetensors.load_file(folder / ADAPTER_FILE)
    safetensors.save_file({k: t.to(dtype) for k, t in tensors.items()}, out / ADAPTER_FILE)
    return out


class TestConvertedByPeft:
    """[A; A₀], [B, −B₀] in a file of PEFT."""

    def converted(self, folder: Path, init: str, **options) -> tuple[nn.Module, Path]:
        model = trained_by_peft(folder, llama(), init, lr=1e-3, **options)
        model.save_pretrained(
            folder / "theirs", path_initial_model_for_weight_conversion=folder / "start"
        )
        return model, folder / "theirs"

    @pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_is_held_as_a_start(self, init, options, tmp_path):
        model, folder = self.converted(tmp_path, init, **options)
        tensors = safetensors.load_file(folder / ADAPTER_FILE)
        state = read_adapter(folder)
        config = model.peft_config["default"]
        assert state.config.r == config.r and state.config.lora_alpha == pytest.approx(
            config.lora_alpha
        )
        for name, layer in state.layers.items():
            A, B = (tensors[f"base_model.model.{name}.lora_{k}.weight"].double() for k in "AB")
            trained = model.get_base_model().get_submodule(name)
            assert layer.r == len(A) // 2 and layer.changes_base and layer.residual == "implicit"
            assert layer.scaling == pytest.approx(trained.scaling["default"], rel=1e-12)
            assert layer.r == state.config.layer_rank(name)
            assert layer.scaling == pytest.approx(state.config.layer_scaling(name), rel=1e-12)
            want = trained.scaling["default"] * B @ A
            right, left = layer.update_factors()
            got = layer.scaling * left.double() @ right.double()
            assert (got - want).norm() <= 1e-6 * want.norm()
        base = llama()
        load_adapter(base, folder, progress=False)
        assert close(logits(base), logits(model), LARGE)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_survives_16_bits_once_it_is_saved_again(self, init, tmp_path):
        _, folder = self.converted(tmp_path, init)
        model = llama()
        load_adapter(model, folder, progress=False)
        save_adapter(model, tmp_path / "ours")

        def errors(path: Path) -> list[float]:
            s = json.loads((path / ADAPTER_CONFIG).read_text())
            s = s["lora_alpha"] / s["r"]
            tensors = safetensors.load_file(path / ADAPTER_FILE)
            found = []
            for name, layer in read_adapter(folder).layers.items():
                A, B = (
                    tensors[f"base_model.model.{name}.lora_{k}.weight"].bfloat16().double()
                    for k in "AB"
                )
                right, left = layer.update_factors()
                want = layer.scaling * left.double() @ right.double()
                found.append(float((s * B @ A - want).norm() / want.norm()))
            return found

        assert max(errors(tmp_path / "ours")) <= 0.005
        assert min(errors(folder)) > 0.005

    def test_other_adapters_keep_their_rank(self, tmp_path):
        model = adapted(llama())
        move(model)
        model.save_pretrained(tmp_path / "plain")
        assert all(not s.changes_base for s in read_adapter(tmp_path / "plain").layers.values())
        _, folder = self.converted(tmp_path, "pissa")
        tensors = safetensors.load_file(folder / ADAPTER_FILE)
        key = next(key for key in tensors if key.endswith("lora_B.weight"))
        tensors[key] = tensors[key].abs()  # one layer does not cancel
        safetensors.save_file(tensors, folder / ADAPTER_FILE)
        assert {layer.r for layer in read_adapter(folder).layers.values()} == {8}
        zeros = {k: torch.zeros_like(t) for k, t in tensors.items()}
        safetensors.save_file(zeros, folder / ADAPTER_FILE)
        assert {layer.r for layer in read_adapter(folder).layers.values()} == {8}


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_conversion_keeps_all_that_was_trained(init, tmp_path):
    """Rows of the embedding and the bias of B; no field of the trained state is lost."""
    base = llama()
    options = {"trainable_token_indices": [1, 5], "lora_bias": True}
    try:
        model = trained_by_peft(tmp_path, base, init, True, **options)
    except ValueError:  # PEFT has no bias of B with these starts
        model = trained_by_peft(tmp_path, base, init, True, trainable_token_indices=[1, 5])
    convert(tmp_path / "trained", tmp_path / "out", start=tmp_path / "start")
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "out", progress=False)
    assert close(logits(ours), logits(model), LARGE)
    assert read_adapter(tmp_path / "out").rows


def test_every_field_survives_conversions():
    """Of `AdapterState` and `LayerState`, through each function that makes another state."""
    from lora_kernels.files.adapter.compression import truncated
    from lora_kernels.files.checkpoint.residual import trained_from
    from lora_kernels.files.serving.rename import renamed
    from lora_kernels.layers.state import LayerState
    from lora_kernels.model.config import AdapterState, LoRAConfig, TokenRows

    def layer(start: bool) -> LayerState:
        A, B = torch.randn(4, 6), torch.randn(5, 4)
        factors = {"start_A": torch.randn(4, 6), "start_B": torch.randn(5, 4)} if start else {}
        return LayerState(A, B, 2.0, 8.0, weight_norm=3.0, lora_bias=torch.randn(5), **factors)

    config = LoRAConfig(r=4, lora_alpha=8, target_modules=["q"], init_lora_weights="pissa")
    rows = {"model.e.weight": TokenRows((1, 2), torch.randn(2, 6))}
    extra = {"model.norm.weight": torch.randn(6)}
    trained = AdapterState(config, {"model.q": layer(False)}, extra, "residual", rows, ((0, 1),))
    first = AdapterState(config, {"model.q": layer(True)}, {}, "original")
    for got in (
        trained_from(first, trained),
        renamed(trained, "model", "x"),
        truncated(trained, 2),
    ):
        assert len(got.extra) == len(got.rows) == len(got.layers) == 1
        assert got.replication == ((0, 1),)
        (own,) = got.layers.values()
        assert own.lora_bias is not None and own.weight_norm == 3.0
    got = trained_from(first, trained)
    assert got.base_model == "original" and got.layers["model.q"].changes_base
    repeated = AdapterState(config, trained.layers, {}, None, {}, ((0, 2), (1, 2)))
    with pytest.raises(ValueError, match="repeats blocks"):
        trained_from(first, repeated)


def test_a_saved_module_without_tensors(tmp_path):
    """PEFT's own conversion of PiSSA drops them."""
    from safetensors.torch import load_file, save_file

    trained_by_peft(tmp_path, llama(), True, modules_to_save=["lm_head"])
    file = tmp_path / "trained" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file)
    with pytest.raises(ValueError, match="modules_to_save names 'lm_head', but the file has no"):
        read_adapter(tmp_path / "trained")
