"""`initialize`: residuals and starts against float64; everything else unchanged, byte by byte."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.initialize import initialize, starts_from_files
from lora_kernels.files.checkpoint.residual import read_start
from lora_kernels.files.checkpoint.weights import stored_weights
from lora_kernels.files.io import pipeline
from lora_kernels.init import (
    LoRAXS,
    get_initializer,
    initializer_names,
    register_initializer,
)
from lora_kernels.init.base import _REGISTRY
from lora_kernels.layers.state import dst_start
from lora_kernels.model.config import LoRAConfig

from ...support.oracle import ROUNDING, dst_basis, loram_beta
from .conftest import SHAPES, odd_shards
from .folders import (
    TORCH,
    as_float64,
    fingerprint,
    random_tensor,
    read_file,
    write_file,
    write_model,
)

METHODS = [name for name in initializer_names() if starts_from_files(get_initializer(name))]
R = 4


def config(**options) -> LoRAConfig:
    return LoRAConfig(**{"r": R, "lora_alpha": 12, **options})


def read_model(folder) -> dict:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_file(file)[0]
    return tensors


def read_pairs(folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of a PEFT adapter in float64."""
    tensors = {
        k: as_float64(v) for k, v in read_file(folder / "adapter_model.safetensors")[0].items()
    }
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
        )
        for name in names
    }


def is_target(name: str) -> bool:
    return name.split(".")[-2:-1] and name.split(".")[-2] in SHAPES and name.endswith(".weight")


def check_residual(W, W_res, A, B, scaling, dtype) -> None:
    """|W_res + s·BA − W| is one rounding of W_res, and of float32 for each of the r + 3 steps
    before it, on the size of what is added up.
    """
    size = np.abs(W) + scaling * np.abs(B) @ np.abs(A)
    bound = ROUNDING[dtype] + (R + 3) * ROUNDING[torch.float32]
    if dtype == torch.float16:
        size = size + 2.0**-14  # subnormals
    assert (np.abs(W_res + scaling * B @ A - W) <= bound * size).all()


class TestAbsorb:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_loram_residual_and_start(self, rslora, odd_model, tmp_path):
        out = tmp_path / "out"
        done = initialize(odd_model, out, config(use_rslora=rslora))
        assert (done.layers, done.residual, done.resumed) == (9, "absorb", 0)
        scaling = 12 / (R**0.5 if rslora else R)
        before, after = read_model(odd_model), read_model(out)
        pairs = read_pairs(out / "adapter")
        assert len(pairs) == 9
        for name, (A, B) in pairs.items():
            stored = before[f"{name}.weight"]
            W, W_res = as_float64(stored), as_float64(after[f"{name}.weight"])
            beta = loram_beta(W, R)
            n, m = W.shape
            # β comes from a sum in float64, the factors are rounded to float32.
            np.testing.assert_allclose(A, beta * dst_basis(m, R).T, rtol=1e-6, atol=1e-7 * beta)
            np.testing.assert_allclose(B, beta * dst_basis(n, R), rtol=1e-6, atol=1e-7 * beta)
            check_residual(W, W_res, A, B, scaling, TORCH[stored[0]])

    def test_all_else_is_kept(self, odd_model, tmp_path):
        """Names, the bytes of headers, order, the index, other files, and other tensors' bytes."""
        out = tmp_path / "out"
        initialize(odd_model, out, config())
        for file in odd_model.glob("*.safetensors"):
            old, new = file.read_bytes(), (out / file.name).read_bytes()
            start = 8 + int.from_bytes(old[:8], "little")
            assert len(old) == len(new) and old[:start] == new[:start]
            before, after = read_file(file)[0], read_file(out / file.name)[0]
            assert list(before) == list(after)
            for name, stored in before.items():
                assert (stored == after[name]) == (not is_target(name)), name
        for name in ("model.safetensors.index.json", "config.json", "tokenizer.json",
                     "extra/pooling.json"):  # fmt: skip
            assert (out / name).read_bytes() == (odd_model / name).read_bytes()
        written = {str(p.relative_to(out)) for p in out.rglob("*")}
        assert "pytorch_model.bin" not in written  # the weights with the start still in them
        shards = {f"part-{k}-of-3.safetensors" for k in (1, 2, 3)}
        assert written == shards | {
            "model.safetensors.index.json", "config.json", "tokenizer.json", "extra",
            "extra/pooling.json", "adapter", "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        }  # fmt: skip

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method(self, method, tmp_path):
        model, out = tmp_path / "model", tmp_path / "out"
        write_model(model, odd_shards(dtypes=("F32", "F64")))
        if method == "lora_xs":
            with pytest.raises(ValueError, match="R between frozen factors"):
                initialize(model, out, config(init_lora_weights=method, residual="absorb"))
            assert not out.exists()
            return
        initialize(model, out, config(init_lora_weights=method, residual="absorb"))
        before, after = read_model(model), read_model(out)
        for name, (A, B) in read_pairs(out / "adapter").items():
            stored = before[f"{name}.weight"]
            W, W_res = as_float64(stored), as_float64(after[f"{name}.weight"])
            if not get_initializer(method).changes_base:
                assert stored == after[f"{name}.weight"]
                continue
            if method == "loftq":  # the base is its quantized values, the start what they lack
                W_start = W_res + 3.0 * B @ A
                assert 0 < np.linalg.norm(W - W_start) < np.linalg.norm(W - W_res)
                continue
            check_residual(W, W_res, A, B, 3.0, TORCH[stored[0]])
            assert np.linalg.norm(W - W_res) > 1e-3 * np.linalg.norm(W)

    def test_drawn_starts_have_their_own_seeds(self, odd_model, tmp_path):
        pairs = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            options = {"init_lora_weights": "init_ab"}
            initialize(odd_model, tmp_path / name, config(**options), seed=seed)
            pairs.append(read_pairs(tmp_path / name / "adapter"))
        one = "model.layers.0.q_proj"
        assert all(np.array_equal(pairs[0][n][0], pairs[1][n][0]) for n in pairs[0])
        assert not np.array_equal(pairs[0][one][0], pairs[2][one][0])
        assert not np.array_equal(pairs[0][one][0], pairs[0]["model.layers.1.q_proj"][0])

    @pytest.mark.parametrize("method,dtype", [("loram", "float16"), ("pissa", "bfloat16"),
                                              ("loram", "float32")])  # fmt: skip
    def test_cast(self, method, dtype, odd_model, tmp_path):
        """The residual is rounded once, to the new dtype; other floats are cast, and fp8 and
        integers keep their bytes.
        """
        out, kind = tmp_path / "out", getattr(torch, dtype)
        (odd_model / "config.json").write_text('{"model_type": "llama", "dtype": "float64"}')
        initialize(odd_model, out, config(init_lora_weights=method), dtype=kind)
        before, after = read_model(odd_model), read_model(out)
        assert list(before) == list(after)
        pairs, size = read_pairs(out / "adapter"), 0
        for name, stored in before.items():
            new = after[name]
            size += len(new[2])
            assert new[1] == stored[1]
            if stored[0] not in TORCH:
                assert new == stored
                continue
            assert TORCH[new[0]] == kind
            if is_target(name):
                A, B = pairs[name.removesuffix(".weight")]
                check_residual(as_float64(stored), as_float64(new), A, B, 3.0, kind)
            else:
                want = torch.from_numpy(as_float64(stored)).to(TORCH[stored[0]]).to(kind)
                assert np.array_equal(as_float64(new), want.double().numpy())
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": size, "total_parameters": 1}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        for file in odd_model.glob("*.safetensors"):
            old, new = read_file(file)[1], read_file(out / file.name)[1]
            assert list(old) == list(new) or set(old) == set(new)
            assert old["__metadata__"] == new["__metadata__"]

    def test_single_file(self, tmp_path):
        model, out = tmp_path / "model", tmp_path / "out"
        write_model(model, odd_shards(dtypes=("F32",)), index=False)
        initialize(model, out, config())
        assert (out / "model.safetensors").is_file()
        assert not (out / "model.safetensors.index.json").exists()

    def test_large_tensors_are_cut(self, odd_model, tmp_path, monkeypatch):
        """The same bytes for any size of blocks and any number of threads."""
        from lora_kernels.files.io import blocks

        initialize(odd_model, tmp_path / "a", config(), dtype=torch.bfloat16)
        for name, size, threads in (("b", 64, 1), ("c", 1000, 5)):
            monkeypatch.setattr(blocks, "BLOCK", size)
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            monkeypatch.setattr(pipeline, "AHEAD", size)
            initialize(odd_model, tmp_path / name, config(), dtype=torch.bfloat16)
            a, b = fingerprint(tmp_path / "a"), fingerprint(tmp_path / name)
            del a["adapter/adapter_model.safetensors"], b["adapter/adapter_model.safetensors"]
            del a["adapter/adapter_config.json"], b["adapter/adapter_config.json"]
            assert a == b
            assert (
                read_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")[0]
                == (read_file(tmp_path / name / "adapter" / "adapter_model.safetensors")[0])
            )

    def test_targets(self, odd_model, tmp_path):
        targets, excluded = ["q_proj", "layers.1.up_proj"], ["layers.2.q_proj"]
        chosen = config(target_modules=targets, exclude_modules=excluded)
        initialize(odd_model, tmp_path / "out", chosen)
        names = {"model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.up_proj"}
        assert set(read_pairs(tmp_path / "out" / "adapter")) == names
        values = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        # The shortest endings that mean exactly these.
        assert set(values["target_modules"]) == {"0.q_proj", "1.q_proj", "1.up_proj"}
        before, after = read_model(odd_model), read_model(tmp_path / "out")
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {f"{name}.weight" for name in names}


class TestImplicit:
    @pytest.mark.parametrize(
        "method", [*(m for m in METHODS if m != "loftq"), LoRAXS(retain_part="bottom")], ids=str
    )
    def test_native_adapter(self, method, odd_model, tmp_path):
        """The factors are those of the initializer; the base is named, not copied."""
        out = tmp_path / "out"
        initialize(odd_model, out, config(init_lora_weights=method, residual="implicit"))
        written = {p.name for p in out.iterdir()}
        assert written == {"adapter_config.json", "adapter_native.safetensors"}
        state = read_adapter(out)
        assert state.base_model == str(odd_model) and state.config.residual == "implicit"
        weights = {weight.name: weight.load() for weight in stored_weights(odd_model)}
        assert list(state.layers) == list(weights)
        for name, layer in state.layers.items():
            W = weights[name]
            norm = np.linalg.norm(W.double().numpy())
            assert layer.weight_norm == pytest.approx(norm, rel=1e-12)
            initializer = get_initializer(method)
            assert layer.changes_base == initializer.changes_base
            assert (layer.lora_R is not None) == initializer.has_R
            assert layer.trains == initializer.trains
            if getattr(initializer, "seed", 0) is not None:
                want = initializer(W, R, layer.scaling)
                assert torch.equal(layer.lora_A, want.lora_A)
                assert torch.equal(layer.lora_B, want.lora_B)
            if layer.changes_base:
                start_A, start_B = layer.start_factors()
                assert torch.equal(start_A, layer.lora_A) and torch.equal(start_B, layer.lora_B)

    def test_auto(self, odd_model, tmp_path):
        """A start that is zero needs no residual base."""
        for method, residual in (("lora", "implicit"), ("loram", "absorb")):
            chosen = config(init_lora_weights=method)
            assert initialize(odd_model, tmp_path / method, chosen).residual == residual


class TestStartFolder:
    @pytest.mark.parametrize("method", ["loram", "pissa"])
    def test_is_what_was_taken_out(self, method, odd_model, tmp_path):
        out = tmp_path / "out"
        initialize(odd_model, out, config(init_lora_weights=method))
        state = read_start(out / "adapter")
        assert state.base_model == str(odd_model)
        for layer in state.layers.values():
            A0, B0 = layer.start_factors()
            assert torch.equal(A0, layer.lora_A) and torch.equal(B0, layer.lora_B)
            if method == "loram":
                again = dst_start(layer.lora_A, layer.lora_B, layer.beta)
                assert torch.equal(again[0], layer.lora_A)

    def test_is_no_adapter_of_the_original(self, odd_model, tmp_path):
        initialize(odd_model, tmp_path / "out", config())
        with pytest.raises(ValueError, match=r"is the start of .*out, which was subtracted"):
            read_adapter(tmp_path / "out" / "adapter")
        state = read_adapter(tmp_path / "out" / "adapter", residual_base=True)
        assert state.base_model == str(tmp_path / "out")
        for layer in state.layers.values():
            assert not layer.changes_base and layer.scaling == 3.0
        values = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == str(tmp_path / "out")


class TestErrors:
    @pytest.mark.parametrize(
        "bad,match",
        [
            (np.zeros((24, 16)), r"layers\.1\.q_proj\.weight: .*is zero"),
            (np.full((24, 16), np.nan), r"layers\.1\.q_proj\.weight: .*NaN or Inf"),
        ],
    )
    def test_bad_weights(self, bad, match, odd_model, tmp_path):
        file = odd_model / "part-2-of-3.safetensors"
        tensors, header = read_file(file)
        content = torch.from_numpy(bad).bfloat16().view(torch.uint8).numpy().tobytes()
        tensors["model.layers.1.q_proj.weight"] = ("BF16", (24, 16), content)
        write_file(file, tensors, header["__metadata__"])
        with pytest.raises(ValueError, match=match):
            initialize(odd_model, tmp_path / "out", config())
        assert not (tmp_path / "out").exists()

    def test_overflow(self, tmp_path):
        rng = np.random.default_rng(0)
        shard = {"q_proj.weight": random_tensor(rng, "F32", (8, 8))}
        shard["norm.weight"] = ("F32", (2,), np.array([1e5, 1], np.float32).tobytes())
        write_model(tmp_path / "model", [shard])
        with pytest.raises(
            ValueError, match=r"norm\.weight: its values exceed the range of torch\.float16"
        ):
            initialize(tmp_path / "model", tmp_path / "out", config(), dtype=torch.float16)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "options,match",
        [
            ({"init_lora_weights": "lora_ga"}, r"'lora_ga' starts from the loss .*ture_gradients"),
            *(
                ({"init_lora_weights": name}, rf"'{name}' starts from the inp.*ture_activations")
                for name in ("corda", "eva", "lora_null", "qera")
            ),
            ({"init_lora_weights": "kasa"}, "'kasa' trains a diagonal .*load the model and add_"),
            ({"use_dora": True}, r"use_dora=True .* load the model and use add_lora"),
            ({"r": 17}, r"rank 17 is larger than min\(n, m\) = 16 of model\.layers\.0"),
            ({"target_modules": ["embed_tokens"]}, "is an embedding by its name"),
            ({"target_modules": ["q_prok"]}, "did you mean 'q_proj'"),
            ({"exclude_modules": ["q_prok"]}, "did you mean 'q_proj'"),
            ({"modules_to_save": ["norm"]}, "modules_to_save is for models that are loaded"),
            ({"bias": "all"}, "bias is for models that are loaded"),
            ({"layers_to_transform": 1}, "layers_to_transform is for models that are loaded"),
        ],
    )
    def test_options(self, options, match, odd_model, tmp_path):
        with pytest.raises(ValueError, match=match):
            initialize(odd_model, tmp_path / "out", config(**options))
        assert not (tmp_path / "out").exists()

    def test_implicit_writes_no_base(self, odd_model, tmp_path):
        with pytest.raises(ValueError, match="dtype is for a base that is written"):
            initialize(odd_model, tmp_path / "out", config(residual="implicit"), dtype=torch.half)

    def test_tied_head(self, odd_model, tmp_path):
        tensors, header = read_file(odd_model / "part-1-of-3.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        write_file(odd_model / "part-1-of-3.safetensors", tensors, header["__metadata__"])
        (odd_model / "config.json").write_text('{"tie_word_embeddings": true}')
        with pytest.raises(ValueError, match="lm_head is tied to the embedding"):
            initialize(odd_model, tmp_path / "out", config(target_modules=["lm_head"]))

    def test_twice(self, odd_model, tmp_path):
        """A residual base cannot have another start."""
        initialize(odd_model, tmp_path / "once", config())
        with pytest.raises(
            ValueError, match="once is a residual base, from which a start was subtr"
        ):
            initialize(tmp_path / "once", tmp_path / "twice", config())

    @pytest.mark.parametrize("out", [".", "inside", ".."])
    def test_folders_in_each_other(self, out, odd_model):
        with pytest.raises(ValueError, match="are inside each other"):
            initialize(odd_model, odd_model / out, config())

    def test_no_model(self, tmp_path, odd_model):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            initialize(tmp_path / "nowhere", tmp_path / "out", config())
        with pytest.raises(ValueError, match="is a file: give the folder"):
            initialize(odd_model / "config.json", tmp_path / "out", config())
        (odd_model / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            initialize(odd_model, tmp_path / "out", config())

    def test_full_disk(self, odd_model, tmp_path, monkeypatch):
        from lora_kernels.files.checkpoint import folder

        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"disk has 0\.0 GB free"):
            patch.setattr(folder.shutil, "disk_usage", lambda path: type("", (), {"free": 10})())
            initialize(odd_model, tmp_path / "out", config())
        # Nothing was written: the same folder takes what needs less room.
        initialize(odd_model, tmp_path / "out", config(), dtype=torch.half)


def test_own_method(odd_model, tmp_path):
    """A registered initializer and its factors."""
    from lora_kernels.init import Initializer, Start

    class Halves(Initializer):
        changes_base = True

        def __call__(self, weight, r, scaling=1.0, gradient=None):
            n, m = weight.shape
            return Start(weight.new_full((r, m), 0.5), weight.new_full((n, r), 0.01))

    register_initializer("halves", Halves)
    try:
        initialize(odd_model, tmp_path / "out", config(init_lora_weights="halves"))
    finally:
        del _REGISTRY["halves"]
    before, after = read_model(odd_model), read_model(tmp_path / "out")
    name = "model.layers.0.q_proj.weight"
    W = as_float64(before[name])
    np.testing.assert_allclose(
        as_float64(after[name]), W - 3 * R * 0.5 * 0.01, rtol=1e-6, atol=1e-7
    )
