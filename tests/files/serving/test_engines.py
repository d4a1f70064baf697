"""Each engine's rules against an oracle: the update that the engine would apply, in float64 NumPy,
from the rule's text, is the trained one exactly when `check` says so.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import warnings

import numpy as np
import pytest
import torch

from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.serving.check import RIGHT, TOLERANCE, check
from lora_kernels.files.serving.convert import convert
from lora_kernels.files.serving.engines import ENGINES

from ...support.tiny_models import llama

safetensors = pytest.importorskip("safetensors.torch")

PREFIX = "base_model.model."
ENDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def round_f16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def write(folder, config: dict, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A folder of PEFT."""
    folder.mkdir(exist_ok=True)
    base = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "bias": "none"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(base | config))
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous()
    safetensors.save_file(tensors, folder / ADAPTER_FILE)


class Adapter:
    """A random adapter, and its folder in one of three forms: "plain", "doubled" (the old form:
    [A; A0], [B, -B0] with the configuration's s) and "portable" (s folded in, one rank).
    """

    def __init__(self, seed: int, form: str = "") -> None:
        self.rng = rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.form = form or rng.choice(("plain", "plain", "doubled", "portable"))
        ends = rng.sample(ENDS, rng.randint(1, len(ENDS)))
        if rng.random() < 0.6:  # so that SGLang can join them
            ends += ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"]
        self.names = [f"model.layers.{i}.{end}" for i in (0, 1) for end in ENDS if end in ends]
        self.r = rng.choice((1, 2, 4, 6))
        self.alpha = rng.choice((self.r, 8, 16, 3, 5.5, 4.0, 0.25))
        self.rslora = rng.random() < 0.3
        self.rank_pattern, self.alpha_pattern = {}, {}
        if rng.random() < 0.3:
            self.rank_pattern = {rng.choice(ends): rng.choice((1, 3, self.r))}
        if rng.random() < 0.3:
            self.alpha_pattern = {f"^{re.escape(rng.choice(self.names))}": rng.choice((2, 7.5))}
        self.dtype = rng.choice(DTYPES)
        self.move = 10.0 ** rng.uniform(-4, 0)  # how far training moved the factors

    def pattern(self, patterns: dict, name: str, default: float) -> float:
        """PEFT's rule: the first pattern that matches an end of whole parts."""
        found = [v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        return found[0] if found else default

    def own_rank(self, name: str) -> int:
        return int(self.pattern(self.rank_pattern, name, self.r))

    def own_scale(self, name: str) -> float:
        r, alpha = self.own_rank(name), self.pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def save(self, folder) -> None:
        start = {}
        for name in self.names:
            r, rows, cols = self.own_rank(name), self.rng.randint(16, 40), self.rng.randint(16, 40)
            start[name] = (self.random(r, cols), self.random(rows, r))
        moved = {
            name: tuple(f + self.move * self.random(*f.shape) for f in factors)
            for name, factors in start.items()
        }
        config = {"r": self.r, "lora_alpha": self.alpha, "use_rslora": self.rslora,
                  "rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern,
                  "target_modules": sorted({n.rpartition(".")[2] for n in self.names})}  # fmt: skip
        if self.form != "portable" and self.rng.random() < 0.1:
            config["target_modules"] = r"model\.layers\..*_proj"
        if self.form == "plain":
            factors = moved
        elif self.form == "doubled":
            factors = {
                n: (torch.cat([A, start[n][0]]), torch.cat([B, -start[n][1]], 1))
                for n, (A, B) in moved.items()
            }
            # s stays that of the training: α grows as the rank, or its root, does.
            grow = math.sqrt(2) if self.rslora else 2
            config["r"] = 2 * self.r
            config["lora_alpha"] = self.alpha * grow
            config["rank_pattern"] = {k: 2 * v for k, v in self.rank_pattern.items()}
            config["alpha_pattern"] = {k: grow * v for k, v in self.alpha_pattern.items()}
        else:
            k = 2 * max(self.own_rank(name) for name in self.names)
            factors = {}
            for name, (A, B) in moved.items():
                A0, B0 = start[name]
                right = torch.cat([A, A - A0, torch.zeros(k - 2 * A.shape[0], A.shape[1])])
                left = self.own_scale(name) * torch.cat([B - B0, B0], 1)
                left = torch.cat([left, torch.zeros(B.shape[0], k - 2 * A.shape[0])], 1)
                factors[name] = (right, left)
            config |= {"r": k, "lora_alpha": k, "use_rslora": False, "rank_pattern": {},
                       "alpha_pattern": {}}  # fmt: skip
        self.config = config
        self.factors = {n: (A.to(self.dtype), B.to(self.dtype)) for n, (A, B) in factors.items()}
        write(folder, config, self.factors)

    # The rules, from here on of the folder alone.

    def peft_scale(self, name: str) -> float:
        r = self.pattern(self.config["rank_pattern"], name, self.config["r"])
        alpha = self.pattern(self.config["alpha_pattern"], name, self.config["lora_alpha"])
        return alpha / (math.sqrt(r) if self.config["use_rslora"] else r)

    def trained(self, name: str) -> np.ndarray:
        A, B = map(as_numpy, self.factors[name])
        return self.peft_scale(name) * B @ A

    def applied(self, engine: str, name: str) -> np.ndarray:
        """ΔW of an engine that loads the adapter onto a bfloat16 base."""
        A, B = map(as_numpy, self.factors[name])
        rank = A.shape[0]
        if engine == "peft":  # float32 factors, s of its own configuration
            return self.peft_scale(name) * B @ A
        if engine == "vllm":  # one s, multiplied into B in bfloat16
            r = self.config["r"]
            root = math.sqrt(r) if self.config["use_rslora"] else r
            s = np.float32(self.config["lora_alpha"] / root)
            B16 = round_bf16(B)
            B16 = B16 if s == 1 else round_bf16(B16 * s)
            return B16.astype(np.float64) @ round_bf16(A).astype(np.float64)
        if engine == "sglang":  # one α / r
            s = self.config["lora_alpha"] / self.config["r"]
            return s * round_bf16(B).astype(np.float64) @ round_bf16(A).astype(np.float64)
        s = self.config["lora_alpha"] / rank
        if engine == "llama.cpp":  # float32 file, α / rank of the tensor
            return s * B @ A
        narrow = round_bf16 if self.dtype is torch.bfloat16 else round_f16
        return s * narrow(B).astype(np.float64) @ narrow(A).astype(np.float64)

    def refused(self, engine: str) -> bool:
        config, names = self.config, self.names
        ends = {n.rpartition(".")[2] for n in names}
        ranks = {A.shape[0] for A, _ in self.factors.values()}
        if engine == "sglang":
            patterned = bool(config["rank_pattern"] or config["alpha_pattern"])
            joined = bool(ends & {"q_proj", "k_proj", "v_proj"})
            joined = joined and not {"q_proj", "v_proj"} <= ends
            joined |= "up_proj" in ends and "gate_proj" not in ends
            no_list = not isinstance(config["target_modules"], list)
            return patterned or joined or no_list or ranks != {config["r"]}
        if engine == "ollama":
            whole = type(config["lora_alpha"]) is int
            wide = any(A.shape[0] > min(A.shape[1], B.shape[0]) for A, B in self.factors.values())
            return not whole or wide
        return False

    def errors(self, engine: str) -> dict[str, float]:
        found = {}
        for name in self.names:
            want = self.trained(name)
            found[name] = np.linalg.norm(self.applied(engine, name) - want) / np.linalg.norm(want)
        return found


@pytest.mark.parametrize("seed", range(60))
def test_right_exactly_when_the_oracle_is(seed, tmp_path):
    adapter = Adapter(seed)
    adapter.save(tmp_path)
    engines = ["vllm", "sglang", "llama.cpp", "ollama", "peft"]
    for result in check(tmp_path, engines=engines):
        # Ollama treats q and k of Llama apart, see below.
        rotated = ("q_proj", "k_proj") if result.engine == "ollama" else ()
        errors = adapter.errors(result.engine)
        assert bool(result.verdict.refusals) == adapter.refused(result.engine), result.verdict
        assert [layer.name for layer in result.layers] == sorted(adapter.names)
        for layer in result.layers:
            if layer.name.endswith(rotated) and rotated:
                assert not layer.is_right and layer.error is None
                continue
            error = errors[layer.name]
            assert math.isclose(layer.error, error, rel_tol=1e-6, abs_tol=1e-9)
            assert layer.is_right == (error <= TOLERANCE)
        if not any(n.endswith(rotated) for n in adapter.names if rotated):
            right = max(errors.values()) <= TOLERANCE and not adapter.refused(result.engine)
            assert (result.outcome == RIGHT) == right


def test_the_property_test_sees_both_outcomes(tmp_path):
    """Each engine has adapters that are right and such that are not, and all forms occur."""
    seen: dict[str, set[bool]] = {engine: set() for engine in ("vllm", "sglang", "llama.cpp")}
    forms = set()
    for seed in range(60):
        adapter = Adapter(seed)
        adapter.save(tmp_path / str(seed))
        forms.add(adapter.form)
        for engine, outcomes in seen.items():
            errors = adapter.errors(engine)
            outcomes.add(not adapter.refused(engine) and max(errors.values()) <= TOLERANCE)
    assert forms == {"plain", "doubled", "portable"}
    assert all(outcomes == {True, False} for outcomes in seen.values())


@pytest.mark.parametrize("seed", range(60))
def test_portable_folders_are_right_in_all_engines(seed, tmp_path):
    """Whatever the starts, scalings and patterns were."""
    adapter = Adapter(seed, "portable")
    adapter.dtype = torch.float32
    adapter.names = [f"model.layers.{i}.{end}" for i in (0, 1) for end in ENDS]
    adapter.save(tmp_path)
    results = check(tmp_path, engines=["vllm", "sglang", "llama.cpp", "peft"])
    assert {result.engine: result.outcome for result in results} == dict.fromkeys(
        ("vllm", "sglang", "llama.cpp", "peft"), RIGHT
    )
    assert all(math.isclose(la.strength, 1) for result in results for la in result.layers)


def rotated_by_ollama(A: np.ndarray, heads: int) -> np.ndarray:
    """convert_llama_adapter.go's `repack`, index by index: the memory of A [r, in] is taken for
    [heads, 2, in / heads / 2, r], and its second and third dimensions change places.
    """
    r, features = A.shape
    flat, half = A.reshape(-1), features // heads // 2
    moved = np.empty_like(flat)
    position = 0
    for head in range(heads):
        for i in range(half):
            for part in range(2):
                row = (head * 2 + part) * half + i
                moved[position : position + r] = flat[row * r : (row + 1) * r]
                position += r
    return moved.reshape(r, features)


def gguf_row(row: int, rows: int, heads: int) -> int:
    """Where a row of Llama's q or k is in a GGUF file: halves of a head become neighbors."""
    d = rows // heads
    head, inside = divmod(row, d)
    part, i = divmod(inside, d // 2)
    return head * d + 2 * i + part


@pytest.mark.parametrize("end,heads", [("q_proj", 4), ("k_proj", 2)])
def test_ollama_rotates_the_wrong_factor(end, heads, tmp_path):
    """The error of Llama's q and k, computed in the order of rows of the GGUF file."""
    model = llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    out = 8 * heads
    name = f"model.layers.0.self_attn.{end}"
    A, B = torch.randn(4, 32).half().float(), torch.randn(out, 4).half().float()
    write(tmp_path / "a", {"r": 4, "lora_alpha": 8, "target_modules": [end]}, {name: (A, B)})
    (result,) = check(tmp_path / "a", tmp_path / "base", ["ollama"])
    order = [gguf_row(row, out, heads) for row in range(out)]
    want = np.empty((out, 32))
    want[order] = as_numpy(B) @ as_numpy(A)
    got = as_numpy(B) @ rotated_by_ollama(as_numpy(A), 4)  # q's number of heads for k, too
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert math.isclose(result.layers[0].error, error, rel_tol=1e-9) and error > 0.5
    assert result.outcome == "wrong"


def test_strength_is_that_of_peft(tmp_path):
    """s of every layer is PEFT's own `scaling`, and ΔW its `get_delta_weight`."""
    peft = pytest.importorskip("peft")
    from lora_kernels.files.serving.stored import read_stored
    from lora_kernels.files.serving.updates import trained_update

    model = llama()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 1.5, r".*1\.self_attn.q_proj": 9},
    )
    adapted = peft.get_peft_model(model, config)
    _randomize(adapted)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    stored = read_stored(tmp_path)
    assert len(stored.layers) == 7
    for name, layer in stored.layers.items():
        module = adapted.base_model.model.get_submodule(name)
        update = trained_update(stored, layer)
        assert math.isclose(update.scale, module.scaling["default"])
        delta = update.scale * update.left.double() @ update.right.double()
        delta = delta.T if layer.kind == "embedding" else delta
        assert_same_update(delta, module.get_delta_weight("default"))


def test_experts_in_peft_layout(tmp_path):
    """ΔW of each expert is PEFT's, where its factors share one tensor."""
    peft = pytest.importorskip("peft")
    from lora_kernels.files.serving.stored import read_stored
    from lora_kernels.files.serving.updates import experts_of, trained_update

    from ...support.tiny_models import mixtral

    model = mixtral()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        _randomize(adapted)
        adapted.save_pretrained(tmp_path)
    stored = read_stored(tmp_path)
    outer = adapted.base_model.model.model.layers[0].mlp.experts
    wrappers = {w.parameter_name: w for w in (outer, outer.base_layer)}
    parameters = {"base_layer": "gate_up_proj", "experts": "down_proj"}
    for end, parameter in parameters.items():
        (layer,) = (la for la in stored.layers.values() if la.name.endswith(end))
        assert experts_of(stored, layer) == 4
        update = trained_update(stored, layer)
        delta = update.scale * update.left.double() @ update.right.double()
        want = wrappers[parameter].get_delta_weight("default")
        want = want if want.shape == delta.shape else want.mT
        assert_same_update(delta, want)
    outcomes = {result.engine: result for result in check(tmp_path)}
    assert outcomes["peft"].outcome == RIGHT
    wrong = [layer.name for layer in outcomes["vllm"].layers if not layer.is_right]
    assert wrong and all(name.endswith("experts") for name in wrong)  # of the pattern
    bare = [layer for layer in outcomes["sglang"].layers if not layer.effect]
    assert {layer.name.rpartition(".")[2] for layer in bare} == {"base_layer", "experts"}
    assert any("experts" in refusal.rule for refusal in outcomes["llama.cpp"].verdict.refusals)


def test_convolutions(tmp_path):
    """ΔW of a convolution is PEFT's."""
    peft = pytest.importorskip("peft")
    from lora_kernels.files.serving.stored import CONVOLUTION, read_stored
    from lora_kernels.files.serving.updates import trained_update

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    _randomize(adapted)
    adapted.save_pretrained(tmp_path)
    stored = read_stored(tmp_path)
    (layer,) = stored.layers.values()
    assert layer.kind == CONVOLUTION
    update = trained_update(stored, layer)
    delta = update.scale * update.left.double() @ update.right.double()
    want = adapted.base_model.model[0].get_delta_weight("default")
    assert_same_update(delta.reshape(want.shape), want)
    for result in check(tmp_path, engines=["vllm", "sglang", "llama.cpp", "ollama"]):
        assert any("onvolution" in r.rule or "converted file" in r.rule
                   for r in result.verdict.refusals)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_strength_is_that_of_diffusers(seed, tmp_path):
    """s of every layer, with and without options in the header, as diffusers and PEFT set it."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.peft import PeftAdapterMixin

    class Model(torch.nn.Module, PeftAdapterMixin):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(16, 16) for _ in range(3))

    rng = random.Random(seed)
    ranks = {name: rng.choice((2, 4, 8)) for name in "abc"}
    tensors = {}
    for name, r in ranks.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(r, 16)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(16, r)
    options = {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": list("abc"),
               "rank_pattern": ranks, "alpha_pattern": {"b": 5}}  # fmt: skip
    header = {f"transformer.{key}": value for key, value in options.items()}
    metadata = {"lora_adapter_metadata": json.dumps(header)} if seed % 2 else None
    safetensors.save_file(tensors, tmp_path / "a.safetensors", metadata)
    model = Model()
    model.load_lora_adapter(str(tmp_path), weight_name="a.safetensors", adapter_name="x")
    (result,) = check(tmp_path / "a.safetensors")
    for layer in result.layers:
        end = layer.name.removeprefix("transformer.")
        assert math.isclose(layer.scale, model.get_submodule(end).scaling["x"])
    assert result.outcome == RIGHT


def test_pissa_of_peft_is_right_in_peft_alone(tmp_path):
    """PEFT makes the start again; others add factors of a changed base to the original one."""
    peft = pytest.importorskip("peft")
    model = llama(initializer_range=0.1)
    ids = torch.arange(24).reshape(2, 12)
    config = peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj", "v_proj"], r=4)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(tmp_path / "start")
    _randomize(adapted, 0.01)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
    outcomes = {result.engine: result for result in check(tmp_path)}
    assert outcomes["peft"].outcome == RIGHT and outcomes["vllm"].outcome == "refused"
    assert outcomes["sglang"].outcome == outcomes["llama.cpp"].outcome == "wrong"
    assert all("--start" in layer.remedy for layer in outcomes["llama.cpp"].layers)
    convert(tmp_path, tmp_path / "converted", start=tmp_path / "start")
    assert [result.outcome for result in check(tmp_path / "converted")] == [RIGHT] * 4


def _randomize(model, spread: float = 1.0) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(spread * torch.randn_like(parameter))


def assert_same_update(got: torch.Tensor, want: torch.Tensor) -> None:
    """PEFT's is computed in float32: some roundings of its size."""
    want = want.detach()
    assert float((got - want).norm()) <= 1e-6 * float(want.norm())


def test_every_engine_says_as_of_which_version():
    assert list(ENGINES) == ["vllm", "sglang", "llama.cpp", "ollama", "diffusers", "peft"]
    assert all(re.search(r"\d", engine.as_of) for engine in ENGINES.values())
    modules = [type(engine).__module__ for engine in ENGINES.values()]
    assert len(set(modules)) == 1
