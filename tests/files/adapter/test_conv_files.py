"""Files of adapters of convolutions and attentions, and PEFT beside them."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    LoRAConfig,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
)
from lora_kernels.files.adapter.content import DIFFUSERS_FILE
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.checkpoint.verify import verify
from lora_kernels.files.serving.check import check

from ...support.packages import needs_peft
from ...support.running import quiet, trained

TARGETS = ["one", "two", "three", "attn"]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TWICE = "adds the update of attn.out_proj twice"
pytestmark = needs_peft


class Net(nn.Module):
    """A convolution of each kind and an attention."""

    def __init__(self, groups: int = 1, **options) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding="same")
        self.two = nn.Conv2d(4, 6, 3, stride=2, groups=groups, **{"padding": 1, **options})
        self.three = nn.Conv3d(4, 6, (1, 2, 3), bias=False)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, image, volume, tokens):
        attended, _ = self.attn(tokens, tokens, tokens)
        return self.one(x), self.two(image), self.three(volume), attended


def net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def inputs():
    generator = torch.Generator().manual_seed(3)
    sizes = (2, 4, 7), (2, 4, 5, 6), (2, 4, 2, 3, 4), (2, 3, 8)
    return [torch.randn(*size, generator=generator) for size in sizes]


@torch.no_grad()
def error(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of the outputs, relative to their size."""
    pairs = zip(model(*inputs()), other(*inputs()), strict=True)
    return max(float((y - want).abs().max() / want.abs().max()) for y, want in pairs)


def adapted(method="loram", residual="absorb", base=None, **options) -> nn.Module:
    model = net() if base is None else base
    options = {"r": 2, "target_modules": TARGETS, **options}
    quiet(model, LoRAConfig(init_lora_weights=method, residual=residual, **options))
    return trained(model)


def saved(model, folder, **options):
    """`save_adapter`, which tells of PEFT's attention."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*the update of \S+ twice")
        return save_adapter(model, folder, **options)


def in_peft(folder, base=None) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1")
        return peft.PeftModel.from_pretrained(net() if base is None else base, folder)


def by_peft(folder, base=None, **options) -> nn.Module:
    """A model that PEFT has adapted and saved."""
    import peft

    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options}
    config = peft.LoraConfig(init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1")
        model = trained(peft.get_peft_model(net() if base is None else base, config))
    model.save_pretrained(folder)
    return model


CASES = [("loram", "absorb"), ("loram", "implicit"), ("lora_xs", "absorb"), ("pissa", "implicit")]


class TestOurs:
    @pytest.mark.parametrize(("method", "residual"), CASES)
    def test_are_read_and_loaded_by_peft(self, method, residual, tmp_path):
        model = adapted(method, residual, rank_pattern={"three": 3}, alpha_pattern={"attn": 5})
        saved(model, tmp_path)
        other = net()
        load_adapter(other, tmp_path)
        assert error(other, model) <= (1e-6 if method == "lora_xs" else 0)  # R is multiplied in
        assert error(in_peft(tmp_path), model) <= 2e-6
        tensors = load_file(tmp_path / FILE)
        k = 3 if method == "lora_xs" else 6  # three's, of all
        shapes = {
            key.removeprefix("base_model.model."): list(t.shape) for key, t in tensors.items()
        }
        assert shapes == {
            "one.lora_A.weight": [k, 4, 3],
            "one.lora_B.weight": [6, k, 1],
            "two.lora_A.weight": [k, 4, 3, 3],
            "two.lora_B.weight": [6, k, 1, 1],
            "three.lora_A.weight": [k, 4, 1, 2, 3],
            "three.lora_B.weight": [6, k, 1, 1, 1],
            "attn.lora_A.weight": [k, 8],
            "attn.lora_B.weight": [24, k],
            "attn.base_layer.out_proj.lora_A.weight": [k, 8],
            "attn.base_layer.out_proj.lora_B.weight": [8, k],
        }
        assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(TARGETS)

    @pytest.mark.parametrize(
        "options", [{"format": "native"}, {"compress_to": 1}, {"dtype": "bfloat16"}]
    )
    def test_in_other_forms(self, options, tmp_path):
        model = adapted(residual="implicit")
        report = saved(model, tmp_path, **options)
        other = net()
        load_adapter(other, tmp_path)
        if "format" in options:
            assert error(other, model) == 0
            return
        assert error(in_peft(tmp_path), other) <= 2e-6
        limit = 0.02 if "dtype" in options else 1
        assert 1e-4 < report.error < limit and 1e-4 < error(other, model) < limit
        truncated = read_adapter(tmp_path)
        assert truncated.layers["two"].kernel == (3, 3)

    def test_biases(self, tmp_path):
        model = adapted(bias="lora_only")
        saved(model, tmp_path)
        other = net()
        load_adapter(other, tmp_path)
        assert error(other, model) == 0
        # PEFT trains no in_proj_bias, but loads it.
        assert "base_model.model.attn.base_layer.in_proj_bias" in load_file(tmp_path / FILE)
        assert "base_model.model.attn.base_layer.out_proj.base_layer.bias" in load_file(
            tmp_path / FILE
        )
        assert error(in_peft(tmp_path), model) <= 2e-6

    def test_are_merged(self, tmp_path):
        model = adapted(residual="implicit")
        saved(model, tmp_path)
        merged, other = merge_lora(copy.deepcopy(model)), net()
        load_adapter(other, tmp_path)
        assert error(merged, model) <= 2e-6 and error(merge_lora(other), merged) == 0

    def test_are_exchanged(self, tmp_path):
        model, other = adapted(residual="implicit"), adapted("pissa", "implicit")
        saved(model, tmp_path)
        hotswap_adapter(other, tmp_path)
        assert error(other, model) == 0
        with disable_adapters(other):
            assert error(other, net()) <= 1e-6

    def test_of_attentions_tell_of_peft(self, tmp_path):
        with pytest.warns(
            UserWarning, match=rf"{TWICE} \(its pull request 3774\): the file has half"
        ):
            save_adapter(adapted(), tmp_path)


class TestGroups:
    def test_ours_are_block_diagonal_in_peft(self, tmp_path):
        model = adapted(residual="implicit", base=net(groups=2))
        saved(model, tmp_path)
        other = net(groups=2)
        load_adapter(other, tmp_path)
        assert error(other, model) == 0
        assert error(in_peft(tmp_path, net(groups=2)), model) <= 2e-6
        A = load_file(tmp_path / FILE)["base_model.model.two.lora_A.weight"]
        assert list(A.shape) == [8, 4, 3, 3] and not A[:4, 2:].any() and not A[4:, :2].any()
        saved(model, tmp_path, compress_to=1)  # a plain adapter, without a recipe
        load_adapter(truncated := net(groups=2), tmp_path)
        assert error(in_peft(tmp_path, net(groups=2)), truncated) <= 2e-6

    def test_those_of_peft_are_no_update_of_the_weight(self, tmp_path):
        by_peft(tmp_path, net(groups=2))
        with pytest.raises(ValueError, match=r"'two' is a convolution with 2 groups.*other groups"):
            load_adapter(net(groups=2), tmp_path)


class TestPeft:
    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"two": 3}}])
    def test_trains_on_here_and_back(self, options, tmp_path):
        model = by_peft(tmp_path, **options)
        other = net()
        load_adapter(other, tmp_path)
        assert error(other, model) <= 2e-6
        saved(trained(other), tmp_path / "again")
        assert error(in_peft(tmp_path / "again"), other) <= 2e-6

    def test_options_of_biases(self, tmp_path):
        # PEFT stores a bias of B of an attention's in_proj, and never adds it.
        options = {"lora_bias": True, "target_modules": ["one", "two", "attn"]}
        model = by_peft(tmp_path, bias="lora_only", **options)
        other = net()
        load_adapter(other, tmp_path)
        assert error(other, model) <= 2e-6
        assert error(merge_lora(copy.deepcopy(other)), other) <= 2e-6
        saved(trained(other), tmp_path)
        assert error(in_peft(tmp_path), other) <= 2e-6

    def test_leaves_out_dilation_and_padding(self, tmp_path):
        base = net(padding_mode="reflect")
        for options, text in (
            ({"padding_mode": "reflect"}, "PEFT pads the input of lora_A with zeros"),
            ({"dilation": 2, "padding": 2}, "PEFT leaves out the dilation of lora_A"),
        ):
            model = adapted(base=net(**options))
            with pytest.warns(UserWarning, match=rf"another update of 1 layers.*two.*{text}"):
                saved(model, tmp_path / "ours")
            other = net(**options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load_adapter(other, tmp_path / "ours")
            assert error(other, model) == 0
        by_peft(tmp_path / "peft", base)
        with pytest.warns(UserWarning, match=r"if PEFT has trained this adapter, 1 of its layers"):
            load_adapter(net(padding_mode="reflect"), tmp_path / "peft")

    def test_of_a_later_version_may_add_once(self, tmp_path):
        by_peft(tmp_path)
        config = json.loads((tmp_path / CONFIG).read_text())
        before = read_adapter(tmp_path)
        (tmp_path / CONFIG).write_text(json.dumps(config | {"peft_version": "0.23.0"}))
        with pytest.warns(UserWarning, match=r"PEFT 0.23.0.*attn.out_proj"):
            after = read_adapter(tmp_path)
        B, twice = (state.layers["attn.out_proj"].lora_B for state in (after, before))
        assert torch.equal(2 * B, twice)


class TestBadFiles:
    def test_shapes_that_do_not_fit(self, tmp_path):
        saved(adapted(), tmp_path)
        tensors = load_file(tmp_path / FILE)
        key = "base_model.model.two.lora_B.weight"
        for other, text in (
            (torch.zeros(6, 3, 1, 1), "do not fit each other"),
            (torch.zeros(6, 4, 3, 3), "are not those of a convolution"),
            (torch.zeros(6, 4), "are not those of|do not fit"),
        ):
            save_file({**tensors, key: other}, tmp_path / FILE)
            with pytest.raises(ValueError, match=text):
                read_adapter(tmp_path)

    def test_other_kernels(self, tmp_path):
        class Flat(Net):
            def __init__(self) -> None:
                super().__init__()
                self.two = nn.Conv2d(4, 6, (1, 9))

        saved(adapted(), tmp_path)
        with pytest.raises(
            ValueError, match=r"two is a convolution with kernels \[3, 3\].*\[1, 9\]"
        ):
            load_adapter(Flat(), tmp_path)

        class Linear(Net):
            def __init__(self) -> None:
                super().__init__()
                self.two = nn.Linear(36, 6)

        with pytest.raises(ValueError, match=r"kernels \[3, 3\].*this model's is no convolution"):
            load_adapter(Linear(), tmp_path)


class TestDiffusersFiles:
    def test_are_for_a_component_and_factors(self, tmp_path):
        model = adapted(bias="lora_only", target_modules=["one", "two", "three"])
        with pytest.raises(ValueError, match=r"which model of a pipeline Net is.*component="):
            save_adapter(model, tmp_path, format="diffusers")
        with pytest.raises(
            ValueError, match=r"'base_model.model.one.base_layer.bias' too.*format='peft'"
        ):
            save_adapter(model, tmp_path, format="diffusers", component="unet")
        with pytest.raises(ValueError, match=r"component 'une'.*unet"):
            save_adapter(model, tmp_path, format="diffusers", component="une")
        with pytest.raises(ValueError, match=r"component is for format='diffusers'"):
            save_adapter(model, tmp_path, component="unet")
        assert not list(tmp_path.iterdir())

    def test_are_read_again(self, tmp_path):
        model = adapted(target_modules=["one", "two", "three"])
        report = save_adapter(model, tmp_path, format="diffusers", component="unet")
        assert [path.name for path in tmp_path.iterdir()] == [DIFFUSERS_FILE] == list(report.files)
        load_adapter(other := net(), tmp_path)
        assert error(other, model) == 0
        tensors = load_file(tmp_path / DIFFUSERS_FILE)
        save_file(tensors, tmp_path / DIFFUSERS_FILE)  # without options
        load_adapter(plain := net(), tmp_path)
        assert error(plain, model) <= 2e-6
        for name, text in (
            ("text_encoder.x.lora_A.weight", "adapters of"),
            ("unet.x.alpha", "alpha"),
        ):
            save_file({**tensors, name: torch.ones(1, 1)}, tmp_path / DIFFUSERS_FILE)
            with pytest.raises(ValueError, match=text):
                read_adapter(tmp_path)


class TestStreaming:
    """A model of transformers that has a convolution and an attention."""

    TARGETS = ("patch_embedding", "attention", "q_proj")

    @pytest.fixture(scope="class")
    @classmethod
    def base(cls, tmp_path_factory):
        from transformers import SiglipVisionConfig, SiglipVisionModel

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
        config = SiglipVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        folder = tmp_path_factory.mktemp("siglip")
        SiglipVisionModel(config).save_pretrained(folder)
        return folder

    def load(self, folder):
        from transformers import SiglipVisionModel

        return SiglipVisionModel.from_pretrained(folder).eval()

    def output(self, model):
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return model(pixel_values=pixels).pooler_output

    def test_merge(self, base, tmp_path):
        model = self.load(base)
        quiet(model, LoRAConfig(r=2, target_modules=self.TARGETS))
        saved(trained(model), tmp_path / "adapter")
        merge(base, tmp_path / "adapter", tmp_path / "merged")
        y = self.output(model)
        assert torch.allclose(self.output(self.load(tmp_path / "merged")), y, atol=1e-5)
        assert not torch.allclose(self.output(self.load(base)), y, atol=1e-2)
        assert all(step.passed for step in verify(tmp_path / "adapter", base))
        (result,) = check(tmp_path / "adapter", base, ["peft"])
        assert result.outcome == "right" and len(result.layers) == 4

    def test_initialize(self, base, tmp_path):
        import peft

        targets = [name for name in self.TARGETS if name != "attention"]
        for residual in ("absorb", "implicit"):
            config = LoRAConfig(r=2, target_modules=targets, residual=residual)
            initialize(base, tmp_path / residual, config)
        started, model = self.load(base), self.load(base)
        quiet(started, LoRAConfig(r=2, target_modules=targets, residual="implicit"))
        load_adapter(model, tmp_path / "implicit")
        for got, want in zip(model.parameters(), started.parameters(), strict=True):
            assert torch.equal(got, want)
        left = peft.PeftModel.from_pretrained(
            self.load(tmp_path / "absorb"), tmp_path / "absorb" / "adapter"
        )
        y = self.output(left.get_base_model().eval())
        assert torch.allclose(y, self.output(self.load(base)), atol=1e-5)

    def test_attentions_are_left_out(self, base, tmp_path):
        with pytest.raises(ValueError, match=r"'head.attention', but it is an attention"):
            initialize(base, tmp_path / "out", LoRAConfig(r=2, target_modules=["attention"]))
