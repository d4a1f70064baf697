"""Adapters in folders: training continues from them, and errors say what is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels import (
    add_lora,
    disable_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels._utils.safetensors import save_tensors
from lora_kernels.files.adapter.content import NATIVE_FILE
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.init import LoRAM, PiSSA, get_initializer, initializer_names
from lora_kernels.model.config import AdapterState, LoRAConfig

from ...support.adapters import (
    FACTORS,
    IDS,
    LLAMA_LAYERS,
    adapt,
    assert_agree,
    assert_same,
    one_layer,
    peft_config,
    peft_logits,
    tiny_model,
    train,
    write_plain,
)
from ...support.oracle import to_numpy

safetensors = pytest.importorskip("safetensors.torch")

# LoftQ's adapters are those of a base that it makes: tests/model/test_quantized.py has them.
NAMES = [n for n in initializer_names() if not get_initializer(n).rewrites_base]


class OddNames(nn.Module):
    """Its modules have names that begin as those of factors, or that PEFT gives to wrappers."""

    def __init__(self):
        super().__init__()

        def tower(*names):
            layers = nn.Sequential()
            for name in names:
                layers.add_module(name, nn.Linear(8, 8))
            return layers

        self.q, self.lora_B, self.lora_head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.lora_tower = tower("lora_A", "weight")
        self.parts = tower("original_module", "modules_to_save")
        self.start_norm = nn.BatchNorm1d(8)  # with an integer buffer

    def forward(self, x):
        x = self.start_norm(self.lora_head(self.lora_B(self.q(x))))
        return self.parts(self.lora_tower(x))


class TestRoundTrip:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("form", ["peft", "native"])
    @pytest.mark.parametrize("name", NAMES)
    def test_training_goes_on_from_the_same_bits(self, name, form, residual, tmp_path):
        state, delta = one_layer(init_lora_weights=name, residual=residual)
        report = write_adapter(tmp_path, state, format=form)
        assert all((tmp_path / n).stat().st_size == size for n, size in report.files.items())
        got = read_adapter(tmp_path)
        layer = got.layers["block.1.q"]
        if state.layers["block.1.q"].middle() is None or form == "native":
            assert not report.folded
            assert_same(got, state)
        else:  # said in the report: R A, or diag(λ) A, is one matrix now
            assert report.folded == ("block.1.q",) and "only format='native'" in str(report)
            assert layer.middle() is None
        right, left = layer.update_factors()
        product = layer.scaling * to_numpy(left) @ to_numpy(right)
        # Starts are rounded to float32, and so is R A.
        size = np.linalg.norm(to_numpy(left)) * np.linalg.norm(to_numpy(right)) * layer.scaling
        assert np.linalg.norm(product - delta) <= 2.0**-22 * size

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_sizes(self, form, tmp_path):
        """A recomputable start is one number, others are stored; PEFT gets the full rank."""
        sizes = {}
        for name in ("loram", "pissa"):
            state, _ = one_layer(400, 480, init_lora_weights=name)
            sizes[name] = write_adapter(tmp_path / name, state, format=form).files
        pair = 4 * (400 + 480) * 4
        file = NATIVE_FILE if form == "native" else ADAPTER_FILE
        assert sizes["pissa"][file] - 2 * pair in range(300, 4000)
        loram = pair if form == "native" else 2 * pair
        assert sizes["loram"][file] - loram in range(300, 4000)

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_configurations(self, form, tmp_path):
        config = LoRAConfig(
            r=3,
            target_modules=["q", "k"],
            exclude_modules=r".*\.9\..*",
            lora_dropout=0.25,
            scaling="alpha_sqrt",
            init_lora_weights=LoRAM(track=PiSSA(seed=3), statistic="variance"),
            modules_to_save=["head"],
            layers_to_transform=(0, 1),
            layers_pattern="block",
            rank_pattern={r"1\.q": 5},
            alpha_pattern={"k": 100.5},
            task_type="CAUSAL_LM",
            bias="all",
        )
        layers = {}
        for name in ("block.0.q", "block.1.q", "block.11.q", "block.0.k"):
            layers[name], _ = adapt(nn.Linear(12, 20, dtype=torch.float64), config, name)
        extra = {"head.weight": torch.randn(3, 4).bfloat16(), "norm.bias": torch.randn(5)}
        state = AdapterState(config, layers, extra, None)
        write_adapter(tmp_path, state, format=form)
        assert_same(read_adapter(tmp_path), state)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_factors(self, dtype, tmp_path):
        """They are float32 in PEFT's format and get their own dtype back when they are read."""
        for name in ("loram", "pissa"):
            state, _ = one_layer(init_lora_weights=name)
            layer = state.layers["block.1.q"]
            narrow = {
                k: getattr(layer, k).to(dtype) for k in FACTORS if getattr(layer, k) is not None
            }
            state.layers["block.1.q"] = replace(layer, **narrow)
            write_adapter(tmp_path / name, state)
            stored = safetensors.load_file(tmp_path / name / ADAPTER_FILE)
            assert {t.dtype for t in stored.values()} == {torch.float32}
            assert_same(read_adapter(tmp_path / name), state)

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_the_same_adapter_gives_the_same_bytes(self, form, tmp_path):
        state, _ = one_layer()
        for k in "ab":
            write_adapter(tmp_path / k, state, format=form)
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    def test_shared_and_strided_factors(self, tmp_path):
        state, _ = one_layer(init_lora_weights="lora")
        layer = state.layers["block.1.q"]
        pool = torch.randn(96, 40)
        state.layers = {
            n: replace(layer, lora_A=pool[:48].T[:4], lora_B=pool[:4].T) for n in ("a", "b")
        }
        for form in ("peft", "native"):
            write_adapter(tmp_path, state, format=form)
            assert_same(read_adapter(tmp_path), state)

    def test_initializer_that_is_not_registered_here(self, tmp_path):
        state, _ = one_layer()
        write_adapter(tmp_path, state, format="native")
        tensors = safetensors.load_file(tmp_path / NATIVE_FILE)
        with safetensors.safe_open(tmp_path / NATIVE_FILE, "pt") as file:
            recipe = json.loads(file.metadata()["lora_kernels"])
        recipe["config"]["init_lora_weights"] = {"name": "Mine", "options": None}
        metadata = {"lora_kernels": json.dumps(recipe)}
        safetensors.save_file(tensors, tmp_path / NATIVE_FILE, metadata)
        with pytest.warns(UserWarning, match="started with 'Mine', which is not registered"):
            got = read_adapter(tmp_path)
        assert torch.equal(got.layers["block.1.q"].lora_A, state.layers["block.1.q"].lora_A)


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    form=st.sampled_from(["peft", "native"]),
    residual=st.sampled_from(["absorb", "implicit"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    rule=st.sampled_from(["lora", "rslora"]),
    sizes=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    alpha=st.floats(0.1, 100.0),
    data=st.data(),
)
def test_any_layer(tmp_path_factory, name, form, residual, dtype, rule, sizes, alpha, data):
    """For any shapes the same ΔW is restored, and PEFT's file alone has it too."""
    largest = {"lora_ga": min(sizes) // 2, "kasa": min(sizes) - 1}.get(name, min(sizes))
    r = data.draw(st.integers(1, largest))
    r = 2 * ((r + 1) // 2) if name == "orthogonal" and r < min(sizes) else r
    assume(name != "orthogonal" or r % 2 == 0)
    config = LoRAConfig(r=r, lora_alpha=alpha, scaling=rule, init_lora_weights=name)
    linear = nn.Linear(*sizes, dtype=dtype)
    layer, delta = adapt(linear, config, residual=residual)
    state = AdapterState(config, {"a.b": layer})
    folder = tmp_path_factory.mktemp("layer")
    write_adapter(folder, state, format=form)
    got = read_adapter(folder)
    if layer.middle() is None or form == "native":
        assert_same(got, state)
    right, left = got.layers["a.b"].update_factors()
    scaling = layer.scaling
    if form == "peft":
        tensors = safetensors.load_file(folder / ADAPTER_FILE)
        right, left = (tensors[f"base_model.model.a.b.lora_{k}.weight"] for k in "AB")
        written = peft_config(folder)
        root = math.sqrt(written["r"]) if written["use_rslora"] else written["r"]
        assert written["r"] == len(right)
        scaling = written["lora_alpha"] / root
    left, right = to_numpy(left), to_numpy(right)
    # Starts are rounded to float32, and so is R A.
    size = scaling * np.linalg.norm(left) * np.linalg.norm(right)
    assert np.linalg.norm(scaling * left @ right - delta) <= 2.0**-22 * size


class TestModels:
    """save_adapter and load_adapter."""

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize(
        "form,name",
        [
            *itertools.product(["peft", "native"], ["loram", "pissa", "lora"]),
            *itertools.product(["native"], ["lora_xs", "kasa"]),  # PEFT's has no place for R and λ
        ],
    )
    def test_training_goes_on_as_if_it_had_not_stopped(self, form, name, residual, tmp_path):
        config = LoRAConfig(
            r=4,
            lora_alpha=4,
            init_lora_weights=name,
            residual=residual,
            rank_pattern={r"0\.self_attn\.q_proj": 7},
            modules_to_save=["norm"],
        )
        through = copy.deepcopy(tiny_model("llama"))
        add_lora(through, config)
        optimizer = train(through, 2)
        save_adapter(through, tmp_path, format=form)
        train(through, 2, optimizer)

        resumed = copy.deepcopy(tiny_model("llama"))
        load_adapter(resumed, tmp_path)
        train(resumed, 2, optimizer)
        with torch.no_grad():
            assert torch.equal(resumed(IDS).logits, through(IDS).logits)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("name", ["loram", "lora_xs", "kasa"])
    def test_plain_peft_on_the_original_base(self, name, kind, tmp_path):
        model = copy.deepcopy(tiny_model(kind))
        config = LoRAConfig(
            r=4, init_lora_weights=name, modules_to_save=["norm", "ln_f"][kind == "gpt2" :][:1]
        )
        add_lora(model, config)
        train(model, 2)
        with torch.no_grad():
            want = model(IDS).logits
        save_adapter(model, tmp_path)
        assert all("." not in target for target in peft_config(tmp_path)["target_modules"])
        assert_agree(peft_logits(tiny_model(kind), tmp_path)[1], want.double())
        fresh = copy.deepcopy(tiny_model(kind))
        load_adapter(fresh, tmp_path, is_trainable=False)
        assert not any(p.requires_grad for p in fresh.parameters())
        with torch.no_grad():
            assert_agree(fresh(IDS).logits, want.double())
            with disable_adapters(fresh):
                assert_agree(fresh(IDS).logits, tiny_model(kind)(IDS).logits.double())

    def test_one_of_several(self, tmp_path):
        model = copy.deepcopy(tiny_model("llama"))
        for name, targets in (("first", ["q_proj"]), ("second", ["v_proj", "up_proj"])):
            config = LoRAConfig(r=3, target_modules=targets, residual="implicit")
            add_lora(model, config, adapter_name=name)
            train(model, 1)
            save_adapter(model, tmp_path / name)
        save_adapter(model, tmp_path / "again", adapter_name="first")
        for file in (tmp_path / "first").iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        fresh = copy.deepcopy(tiny_model("llama"))
        for name in ("first", "second"):
            load_adapter(fresh, tmp_path / name, adapter_name=name)
        for name in ("first", "second"):
            for each in (model, fresh):
                set_adapter(each, name)
            with torch.no_grad():
                assert torch.equal(fresh(IDS).logits, model(IDS).logits)
            assert_agree(
                peft_logits(tiny_model("llama"), tmp_path / name)[1], model(IDS).logits.double()
            )

    def test_compiled(self, tmp_path):
        model = copy.deepcopy(tiny_model("llama"))
        add_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
        save_adapter(model, tmp_path / "a")
        save_adapter(torch.compile(model), tmp_path / "b")
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    @pytest.mark.parametrize("before", [False, True])
    def test_blocks_that_are_wrapped(self, before, tmp_path):
        """Blocks that are compiled or checkpointed: files have the names of the plain model."""
        wrapper = pytest.importorskip(
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
        ).checkpoint_wrapper

        def wrapped(model):
            blocks = model.model.layers
            blocks[0] = torch.compile(blocks[0], backend="eager")
            blocks[1] = wrapper(blocks[1])
            return model

        base = tiny_model("llama")
        model = wrapped(copy.deepcopy(base)) if before else copy.deepcopy(base)
        add_lora(model, LoRAConfig(r=2, modules_to_save=["input_layernorm"]))
        train(model, 2)
        want = model(IDS).logits
        save_adapter(model if before else wrapped(model), tmp_path)
        assert_agree(peft_logits(base, tmp_path)[1], want.double())
        plain = copy.deepcopy(base)
        load_adapter(plain, tmp_path)
        assert torch.equal(plain.eval()(IDS).logits, want)
        again = wrapped(copy.deepcopy(base))
        load_adapter(again, tmp_path)
        assert torch.equal(again.eval()(IDS).logits, want)
        # As PEFT writes it for such a model.
        file = tmp_path / ADAPTER_FILE
        tensors = safetensors.load_file(file)
        write = {k.replace(".layers.0.", ".layers.0._orig_mod."): v for k, v in tensors.items()}
        safetensors.save_file({f"_orig_mod.{k}": v for k, v in write.items()}, file)
        plain = copy.deepcopy(base)
        load_adapter(plain, tmp_path)
        assert_agree(plain.eval()(IDS).logits, want.double())

    @pytest.mark.parametrize("bias", ["none", "all"])
    @pytest.mark.parametrize("form", ["peft", "native", "PEFT's"])
    @pytest.mark.parametrize(
        "saved",
        ["lora_head", "lora_tower", "start_norm", "lora_A", "parts", "original_module"],
    )
    def test_modules_with_names_as_of_factors(self, saved, form, bias, tmp_path):
        """A module of the model may be called as a part of PEFT's or our own tensors."""
        base = OddNames()
        model = copy.deepcopy(base)
        options = {"r": 2, "target_modules": ["lora_B", "q"], "modules_to_save": [saved]}
        if form != "PEFT's":
            add_lora(model, LoRAConfig(bias=bias, **options))
        elif saved in ("lora_A", "parts"):
            pytest.skip("PEFT takes them for its own")
        else:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(bias=bias, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        x = torch.randn(3, 8)
        want = model.eval()(x)
        if form == "PEFT's":
            model.save_pretrained(tmp_path)
        else:
            save_adapter(model, tmp_path, format=form)
        loaded = copy.deepcopy(base)
        load_adapter(loaded, tmp_path)
        assert_agree(loaded.eval()(x), want.double())
        assert (want - base.eval()(x)).abs().max() > 0.01

    def test_a_layer_with_two_names(self, tmp_path):
        """PEFT adapts it under one name only."""
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
        model.append(model[0])
        base = copy.deepcopy(model)
        add_lora(model, LoRAConfig(r=2, init_lora_weights="init_ab"))
        with pytest.warns(UserWarning, match="PEFT will not adapt 2, which is another name"):
            save_adapter(model, tmp_path)
        load_adapter(base, tmp_path)
        x = torch.randn(3, 8)
        assert torch.equal(base(x), model(x))

    def test_what_does_not_fit_changes_nothing(self, tmp_path):
        model = copy.deepcopy(tiny_model("llama"))
        add_lora(model, LoRAConfig(r=2, modules_to_save=["norm"]))
        save_adapter(model, tmp_path / "a")
        other = copy.deepcopy(tiny_model("gpt2"))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"layer 'model\.layers\.0.*GPT2LMHeadModel"):
            load_adapter(other, tmp_path / "a")
        state = read_adapter(tmp_path / "a")
        name = "model.layers.1.mlp.down_proj"
        layer = state.layers[name]
        state.layers[name] = replace(layer, lora_A=torch.randn(2, 95))
        write_adapter(tmp_path / "b", state)
        with pytest.raises(
            ValueError, match=r"down_proj is for a weight \[64, 95\], this model has"
        ):
            load_adapter(other := copy.deepcopy(tiny_model("llama")), tmp_path / "b")
        assert other.state_dict().keys() == tiny_model("llama").state_dict().keys()
        state.layers[name] = layer
        state.extra = {"model.nrom.weight": torch.randn(64)}
        write_adapter(tmp_path / "c", state)
        with pytest.raises(ValueError, match=r"'model\.nrom\.weight'.*did you mean 'model\.norm"):
            load_adapter(other, tmp_path / "c")
        for key, tensor in tiny_model("llama").state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor)
        assert before.keys() == tiny_model("gpt2").state_dict().keys()

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_another_base(self, form, tmp_path):
        """A warning for a base from which a start was subtracted already, as after PEFT's PiSSA."""
        model = copy.deepcopy(tiny_model("llama"))
        add_lora(model, LoRAConfig(r=8, init_lora_weights="pissa"))
        save_adapter(model, tmp_path, format=form)
        other = copy.deepcopy(tiny_model("llama"))
        with torch.no_grad():
            other.get_submodule(LLAMA_LAYERS[0]).weight.mul_(0.97)
        with pytest.warns(
            UserWarning, match="another base, or one from which a start was subtracted"
        ):
            load_adapter(other, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_adapter(copy.deepcopy(tiny_model("llama")), tmp_path)


class TestRecompression:
    @pytest.mark.parametrize("name", ["loram", "pissa", "lora", "lora_sb"])
    @pytest.mark.parametrize("keep", [1, 3, 4, 20])
    def test_against_the_svd_of_the_dense_update(self, name, keep, tmp_path):
        config = LoRAConfig(r=4, lora_alpha=12, init_lora_weights=name)
        layers, deltas = {}, {}
        for layer in ("a.q", "a.k"):
            layers[layer], deltas[layer] = adapt(nn.Linear(48, 40), config)
        report = write_adapter(tmp_path, AdapterState(config, layers), compress_to=keep)
        got = read_adapter(tmp_path)
        lost = total = 0.0
        for layer, delta in deltas.items():
            U, S, Vh = np.linalg.svd(delta)
            best = (U[:, :keep] * S[:keep]) @ Vh[:keep]
            state = got.layers[layer]
            assert not state.changes_base and state.scaling == 1.0
            assert state.r == min(keep, layers[layer].update_factors()[0].shape[0])
            product = state.scaling * to_numpy(state.lora_B) @ to_numpy(state.lora_A)
            right, left = layers[layer].update_factors()
            size = float(right.norm() * left.norm()) * 3  # of what is rounded
            assert np.linalg.norm(product - best) <= 2.0**-22 * size
            want = np.linalg.norm(S[keep:]) / np.linalg.norm(S)
            assert math.isclose(report.errors[layer], want, rel_tol=1e-4, abs_tol=1e-6)
            lost, total = lost + np.sum(S[keep:] ** 2), total + np.sum(S**2)
            if keep < 4:  # cut: √σ is in both
                norms = [np.sum(to_numpy(f) ** 2) for f in (state.lora_A, state.lora_B)]
                assert np.allclose(norms, S[:keep].sum(), rtol=1e-5)
        assert math.isclose(report.error, math.sqrt(lost / total), rel_tol=1e-4, abs_tol=1e-6)
        assert "relative error of" in str(report)

    def test_zero_update(self, tmp_path):
        state, _ = one_layer(init_lora_weights="lora")
        state.layers["block.1.q"].lora_B.zero_()
        report = write_adapter(tmp_path, state, compress_to=2)
        assert report.error == 0.0 and read_adapter(tmp_path).layers["block.1.q"].r == 2

    def test_bad_ranks(self, tmp_path):
        state, _ = one_layer()
        with pytest.raises(ValueError, match="compress_to must be at least 1, got 0"):
            write_adapter(tmp_path, state, compress_to=0)
        with pytest.raises(TypeError, match="compress_to must be an integer"):
            write_adapter(tmp_path, state, compress_to=1.5)
        with pytest.raises(ValueError, match="needs format='peft'"):
            write_adapter(tmp_path, state, compress_to=2, format="native")
        assert list(tmp_path.iterdir()) == []


class TestBadFiles:
    """Errors are one line that names the file."""

    def refused(self, folder, match, error=ValueError):
        with pytest.raises(error, match=match) as caught:
            read_adapter(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_damaged_bytes(self, form, tmp_path):
        state, _ = one_layer()
        write_adapter(tmp_path, state, format=form)
        file = tmp_path / (NATIVE_FILE if form == "native" else ADAPTER_FILE)
        whole = file.read_bytes()
        header = int.from_bytes(whole[:8], "little")
        for damaged in (
            b"",
            whole[:5],
            whole[: header // 2],
            whole[:-1],
            whole + b"x",
            (2**62).to_bytes(8, "little") + whole[8:],
            (99 * 2**20).to_bytes(8, "little") + whole[8:],
            b"\x80\x02}q\x00." + whole,  # a pickle
        ):
            file.write_bytes(damaged)
            self.refused(tmp_path, f"{file.name} is damaged or not a safetensors file")
        # A byte of the recipe, and of the numbers.
        file.write_bytes(whole.replace(b'\\"version\\": 2', b'\\"version\\": 9'))
        self.refused(tmp_path, "of version 9, this package reads up to version 2: update")
        file.write_bytes(whole.replace(b'\\"config\\"', b'\\"confug\\"'))
        self.refused(tmp_path, f"{file.name}: its recipe is damaged")
        file.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
        self.refused(tmp_path, f"{file.name}: .* holds NaN or Inf")

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_tensors_that_do_not_go_with_the_recipe(self, form, tmp_path):
        state, _ = one_layer(init_lora_weights="pissa")
        write_adapter(tmp_path, state, format=form)
        file = tmp_path / (NATIVE_FILE if form == "native" else ADAPTER_FILE)
        tensors = safetensors.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        key = next(k for k in tensors if "lora_A" in k)
        other = key.replace("block.1", "block.2")
        for change, match in (
            ({key: None}, "lora_A of 'block.1.q' is missing"),
            ({key: tensors[key][:3]}, "do not fit each other"),
            ({key: tensors[key].int()}, "is torch.int32, not a floating-point"),
            ({key: tensors[key][None]}, "not those of a linear layer"),
            (
                {other: tensors[key] + 0, other.replace("A", "B"): tensors[key] + 1},
                "recipe of 'block.2.q'",
            ),
        ):
            changed = {k: v for k, v in (tensors | change).items() if v is not None}
            safetensors.save_file({k: v.contiguous() for k, v in changed.items()}, file, metadata)
            self.refused(tmp_path, match)

    def test_plain_files(self, tmp_path):
        pair = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
        for change, match in (
            ({"lora_A": None}, "lora_A of 'a.q' is missing"),
            ({"lora_B": None}, "lora_B of 'a.q' is missing"),
            ({"lora_A": torch.randn(3, 6)}, "do not fit each other"),
            (
                {"lora_A": torch.randn(3, 6), "lora_B": torch.randn(5, 3)},
                "has rank 3, the configuration says 2: they belong to different adapters",
            ),
            ({"lora_embedding_A": torch.randn(2, 6)}, "of a linear layer and of an embedding"),
            ({"lora_magnitude_vector": torch.randn(6)}, "it belongs to DoRA"),
            ({"lora_A": torch.full((2, 6), math.inf)}, "holds NaN or Inf"),
            ({"lora_A": torch.zeros(2, 6, dtype=torch.int8)}, "is torch.int8, not a floating"),
        ):
            tensors = {k: v for k, v in (pair | change).items() if v is not None}
            write_plain(tmp_path, tensors)
            self.refused(tmp_path, f"{ADAPTER_FILE}: .*{match}")
        write_plain(tmp_path, pair)
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        tensors["a.q.lora_A.weight"] = torch.randn(2, 6)
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        self.refused(tmp_path, "lora_A of 'a.q' exists twice")
        for config, match in (
            ({"peft_type": "IA3"}, "peft_type is 'IA3': only 'LORA'"),
            ({"r": "2"}, "r must be an integer"),
            ({"lora_alpha": -1}, "lora_alpha must be positive"),
            ({"lora_alpha": 10**400}, "too large"),
            ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
            ({"bias": "some"}, "unknown bias 'some'"),
            ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ):
            write_plain(tmp_path, **config)
            self.refused(tmp_path, match)
        (tmp_path / ADAPTER_CONFIG).write_text("{")
        self.refused(tmp_path, f"{ADAPTER_CONFIG} is not valid JSON")
        (tmp_path / ADAPTER_CONFIG).write_text("[]")
        self.refused(tmp_path, f"{ADAPTER_CONFIG} does not hold a JSON object")
        (tmp_path / ADAPTER_CONFIG).unlink()
        self.refused(tmp_path, f"{ADAPTER_CONFIG} is missing beside it")

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path, "has no adapter_native.safetensors or", FileNotFoundError)
        self.refused(tmp_path / "no", "is not a folder", FileNotFoundError)
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        self.refused(tmp_path, "adapter_model.bin cannot be read: save it", FileNotFoundError)
        write_plain(tmp_path / "second")  # as PEFT saves those that are not called "default"
        self.refused(tmp_path, "adapters in its subfolders second", FileNotFoundError)

    def test_edited_configuration(self, tmp_path):
        """PEFT would compute with a different s than this package."""
        state, _ = one_layer()
        write_adapter(tmp_path, state)
        written = peft_config(tmp_path)
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written | {"lora_alpha": 1}))
        self.refused(tmp_path, r"says lora_alpha = 1, but this was saved with 8: it was edited")
        same = {"revision": "x", "rank_pattern": None, "lora_alpha": 8.0}
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written | same))
        assert_same(read_adapter(tmp_path), state)
        (tmp_path / ADAPTER_CONFIG).unlink()
        assert_same(read_adapter(tmp_path), state)

    def test_what_cannot_be_written(self, tmp_path):
        good, _ = one_layer()
        write_adapter(tmp_path, good)
        for change, match in (
            ({"lora_A": torch.full((4, 48), math.nan)}, "lora_A of 'block.1.q' holds NaN or Inf"),
            ({"lora_A": torch.zeros(0)}, "not those of a linear layer"),  # a shard of ZeRO-3
            ({"lora_B": torch.zeros(40, 3)}, "do not fit each other"),
            (
                {"lora_R": torch.zeros(3, 3)},
                r"lora_R of 'block.1.q' is \[3, 3\], expected \[4, 4\]",
            ),
        ):
            layers = {"block.1.q": replace(good.layers["block.1.q"], **change)}
            with pytest.raises(ValueError, match=match):
                write_adapter(tmp_path, replace(good, layers=layers))
        with pytest.raises(ValueError, match="has no layers"):
            write_adapter(tmp_path, replace(good, layers={}))
        with pytest.raises(ValueError, match=r"unknown format 'pefd'.*did you mean 'peft'"):
            write_adapter(tmp_path, good, format="pefd")
        with pytest.raises(ValueError, match=r"'n\.bias' holds NaN"):
            write_adapter(tmp_path, replace(good, extra={"n.bias": torch.tensor([math.nan])}))
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="is a file: give a folder"):
            write_adapter(tmp_path / "file", good)
        assert_same(read_adapter(tmp_path), good)


def test_nothing_is_pickled(tmp_path):
    state, _ = one_layer()
    for form in ("peft", "native"):
        write_adapter(tmp_path, state, format=form)
        for file in tmp_path.iterdir():
            assert re.fullmatch(r"adapter_config\.json|.*\.safetensors", file.name)


def test_no_room(tmp_path):
    with pytest.raises(OSError, match=r"x\.safetensors could not be written"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "no" / "x.safetensors", {})
