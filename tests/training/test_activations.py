"""`capture_activations`: the sums, what is shared, what is left out, and the unchanged model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, capture_activations, load_adapter, save_adapter
from lora_kernels.init import EVA, Activations

from ..support.oracle import to_numpy
from ..support.packages import needs_safetensors, needs_transformers
from ..support.ranks import needs_ranks, on_ranks
from .test_gradients import assert_untouched, marked, state_of

SIZE = 12


class Block(nn.Module):
    """q, k and v get one tensor; up gets what o returned, changed in place."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(size, size), nn.Linear(size, size)
        self.k, self.v = nn.Linear(size, size), nn.Linear(size, size)
        self.up = nn.Linear(size, 2 * size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x).tanh() * self.k(x).tanh() + self.v(x)
        y = self.o(y)
        self.up(y.relu_())
        return x + y


class Model(nn.Module):
    def __init__(self, depth: int = 2, size: int = SIZE) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = self.dropout(block(x))
        return x


def batches_of(count: int = 3, rows: int = 4, length: int = 7) -> list[dict[str, torch.Tensor]]:
    mask = (torch.arange(length) < torch.randint(2, length, (count, rows, 1))).long()
    return [{"input_ids": torch.randint(30, (rows, length)), "attention_mask": own} for own in mask]


def recorded(model: nn.Module, batches, masks=None) -> dict[str, np.ndarray]:
    """All inputs of all linear layers [N, in], those where the mask is not 0."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = []
    masks = masks or [batch["attention_mask"] for batch in batches]
    kept: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_, args, name=name):
                found.setdefault(name, []).append(args[0][kept[-1] != 0].double())

            hooks.append(module.register_forward_pre_hook(hook))
    model.eval()
    with torch.no_grad():
        for batch, mask in zip(batches, masks, strict=True):
            kept.append(mask)
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: to_numpy(torch.cat(rows)) for name, rows in found.items()}


def error(found: Activations, rows: np.ndarray) -> float:
    """The largest relative error of the three sums."""
    assert found.count == len(rows) and found.in_features == rows.shape[1]
    pairs = [(found.total, rows.sum(0)), (found.squares, (rows**2).sum(0))]
    if found.gram is not None:
        pairs.append((found.gram, rows.T @ rows))
    return max(np.linalg.norm(to_numpy(x) - want) / np.linalg.norm(want) for x, want in pairs)


@pytest.mark.parametrize("where", ["cpu", None])
def test_sums(where, device):
    model = marked(Model()).to(device)
    batches = batches_of()
    moved = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    want = recorded(model, moved)
    model.train()
    model.blocks[1].eval()
    before = state_of(model)
    found = capture_activations(model, iter(batches), device=where, progress=False)
    assert_untouched(model, before)
    assert list(found) == [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, own in found.items():
        assert own.total.dtype == own.gram.dtype == torch.float32
        assert own.gram.device.type == (where or device)
        assert error(own, want[name]) <= 1e-6
    for block in ("blocks.0", "blocks.1"):
        q, k, v, o, up = (found[f"{block}.{name}"] for name in ("q", "k", "v", "o", "up"))
        assert q is k is v and len({id(own) for own in (q, o, up)}) == 3


def test_float32_sums_of_many_batches(device):
    """The error of 60 sums is that of a few roundings, also where a mean dwarfs the rest."""
    model = nn.Sequential(nn.Linear(SIZE, 3)).to(device)
    batches = [torch.randn(50, SIZE) + 30 * (torch.arange(SIZE) == 2) for _ in range(60)]
    found = capture_activations(model, batches, progress=False)["0"]
    rows = to_numpy(torch.cat(batches))
    assert error(found, rows) <= 1e-6
    centered = rows - rows.mean(0)
    axes, values = found.axes(3)
    want = np.linalg.svd(centered)
    assert to_numpy(values) == pytest.approx(want[1][:3] ** 2, rel=1e-4)
    assert np.abs(np.abs((to_numpy(axes) * want[2][:3]).sum(1)) - 1).max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, device):
    model = nn.Sequential(nn.Linear(SIZE, 3)).to(device, dtype)
    x = torch.randn(5, 9, SIZE).to(dtype)
    found = capture_activations(model, [x.to(device)], progress=False)["0"]
    assert found.gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Products of 16-bit numbers are exact in float32.
    assert error(found, to_numpy(x.reshape(-1, SIZE))) <= 1e-6


def test_masks(device):
    model = Model().to(device)
    batches = batches_of()
    for batch in batches:
        batch["labels"] = torch.where(torch.rand(4, 7) < 0.5, -100, 1)
    both = [(b["labels"] != -100) & (b["attention_mask"] != 0) for b in batches]
    moved = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    for options, masks in (
        ({}, None),
        ({"use_attention_mask": False}, [torch.ones(4, 7) for _ in batches]),
        ({"use_label_mask": True}, both),
        (
            {"use_attention_mask": False, "use_label_mask": True},
            [b["labels"] != -100 for b in batches],
        ),
    ):
        masks = None if masks is None else [mask.to(device) for mask in masks]
        want = recorded(model, moved, masks)
        found = capture_activations(model, batches, progress=False, **options)
        assert max(error(own, want[name]) for name, own in found.items()) <= 1e-6
        first = {"sketch": 5, **options}
        found = capture_activations(model, batches, progress=False, **first)
        assert max(error(own, want[name]) for name, own in found.items()) <= 1e-6
        assert all(own.gram is None and len(own.sketch) <= 5 for own in found.values())


class Flat(nn.Module):
    """Inputs in other sizes than [batch, length, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.pooled = nn.Linear(SIZE, 3), nn.Linear(SIZE, 3)

    def forward(self, x, attention_mask):
        self.pooled(input=x.mean(1))  # by its name
        return self.flat(x.view(-1, SIZE))


def test_masks_of_other_sizes():
    x, mask = torch.randn(4, 7, SIZE), (torch.rand(4, 7) < 0.5).long()
    found = capture_activations(Flat(), [{"x": x, "attention_mask": mask}], progress=False)
    assert error(found["flat"], to_numpy(x[mask != 0])) <= 1e-6
    assert error(found["pooled"], to_numpy(x.mean(1))) <= 1e-6


class Changing(nn.Module):
    """Which layers share an input changes from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, 3) for _ in range(4))

    def forward(self, xs, calls):
        for layer, x in calls:
            if x is None:  # changed in place, between two layers that share it
                xs[layer].mul_(2)
            else:
                self.layers[layer](xs[x])


CALLS = [
    # Shared by 0, 1 and 2 first, by the first two later.
    [[(0, 0), (1, 0), (2, 0), (3, 1)], [(0, 0), (1, 0), (2, 1), (3, 1)]],
    # 2 is not called, and then is.
    [[(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (3, 0)], [(2, 1), (1, 1), (0, 1), (3, 1)]],
    # One layer gets the same tensor twice, the others once.
    [[(0, 0), (1, 0), (0, 0)], [(1, 0), (0, 0), (0, 0)], [(1, 0), (2, 0), (3, 0)]],
    # In another order, with other inputs in between.
    [[(0, 0), (3, 1), (1, 0), (2, 0)], [(2, 0), (3, 1), (1, 0), (3, 0), (0, 0)], [(3, 1)]],
    # Changed in place between two layers that shared it before.
    [[(0, 0), (1, 0), (3, 1), (2, 1)], [(0, 0), (0, None), (1, 0), (1, None), (3, 1), (2, 1)]],
]


@pytest.mark.parametrize("calls", CALLS, ids=range(len(CALLS)))
@pytest.mark.parametrize("sketch", [None, 3 * SIZE])
def test_inputs_that_are_shared_at_times(calls, sketch):
    """Each layer has the sums of its own inputs, whoever else got them."""
    model = Changing()
    batches = [{"xs": [torch.randn(5, SIZE), torch.randn(6, SIZE)], "calls": own} for own in calls]
    want: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        xs = [x.clone() for x in batch["xs"]]
        for layer, x in batch["calls"]:
            if x is None:
                xs[layer].mul_(2)
            else:
                want.setdefault(f"layers.{layer}", []).append(xs[x].clone())
    found = capture_activations(model, batches, list(want), sketch=sketch, progress=False)
    for name, own in found.items():
        rows = to_numpy(torch.cat(want[name]))
        assert error(own, rows) <= 1e-6, name
        if sketch:
            assert np.linalg.norm(to_numpy(own.sketch.T @ own.sketch) - rows.T @ rows) <= 1e-4


def test_a_module_with_two_names():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    model.append(model[0])
    x = torch.randn(9, SIZE)
    found = capture_activations(model, [x], progress=False)
    assert found["0"] is found["2"] and found["0"].count == 18


class FaultError(Exception):
    pass


def test_after_an_error_the_model_is_as_before(device):
    model = marked(Model()).to(device)
    model.train()
    before = state_of(model)

    def batches():
        yield from batches_of(2)
        raise FaultError

    with pytest.raises(FaultError):
        capture_activations(model, batches(), progress=False)
    assert_untouched(model, before)

    def forward(model, batch):
        model(**{k: v.to(device) for k, v in batch.items()})
        raise FaultError

    with pytest.raises(FaultError):
        capture_activations(model, batches_of(), forward=forward, progress=False)
    assert_untouched(model, before)


def test_inference_mode():
    model, batches = Model(), batches_of()
    want = capture_activations(model, batches, progress=False)
    with torch.inference_mode():
        found = capture_activations(model, batches, progress=False)
        plain = nn.Sequential(nn.Linear(SIZE, 3))
        capture_activations(plain, [torch.randn(5, SIZE)], progress=False)
    assert torch.equal(found["blocks.0.q"].gram, want["blocks.0.q"].gram)


@pytest.mark.parametrize(
    "batches, options, kind, text",
    [
        ([], {}, ValueError, "batches is empty"),
        ([3.0], {}, TypeError, "a batch is float; without forward="),
        (None, {"targets": ["nothing"]}, ValueError, "no module is called 'nothing'"),
        (None, {"targets": ["embed"]}, TypeError, "'embed' is Embedding, which has no inputs x"),
        (None, {"sketch": 0}, ValueError, "sketch must be at least 1"),
        (None, {"forward": lambda m, b: None}, ValueError, "no input reached 10 of 10 targets"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=int), "attention_mask": torch.zeros(2, 3)}],
            {},
            ValueError,
            "all their positions are masked",
        ),
        (
            [{"input_ids": torch.ones(2, 3, dtype=int), "attention_mask": torch.zeros(2, 1, 3, 3)}],
            {},
            ValueError,
            r"attention_mask is \[2, 1, 3, 3\], not \[batch, length\]",
        ),
    ],
)
def test_bad_arguments(batches, options, kind, text):
    model = Model()
    before = state_of(model)
    with pytest.raises(kind, match=text):
        given = batches_of() if batches is None else batches
        capture_activations(model, given, progress=False, **options)
    assert_untouched(model, before)


def test_bad_inputs():
    model = nn.Sequential(nn.Linear(SIZE, 3))
    with pytest.raises(ValueError, match="the inputs of '0' hold NaN or Inf"):
        capture_activations(model, [torch.full((5, SIZE), torch.inf)], progress=False)
    with pytest.raises(TypeError, match=r"input of '0' is torch\.int64"):
        capture_activations(model, [torch.ones(5, SIZE, dtype=int)], progress=False)
    with pytest.raises(ValueError, match="has 12 columns: give the model batches"):
        capture_activations(model, [torch.randn(5, SIZE // 2)], progress=False)
    with pytest.raises(ValueError, match="on the meta device: load the model"):
        meta = nn.Sequential(nn.Linear(SIZE, 3, device="meta"))
        capture_activations(meta, [torch.randn(5, SIZE)], progress=False)
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapped)
        capture_activations(wrapped, [torch.randn(5, SIZE)], progress=False)


@needs_transformers
def test_of_encoders_and_decoders_and_experts():
    from ..support.tiny_models import mixtral

    model = mixtral()
    with pytest.raises(TypeError, match="holds experts"):
        capture_activations(model, [torch.ones(1, 4, dtype=int)], r".*experts\.gate_up_proj")
    ids = torch.randint(1, 20, (2, 6))
    found = capture_activations(model, [ids], progress=False)
    report = add_lora(
        model, LoRAConfig(r=2, init_lora_weights="lora_null"), activations=found, progress=False
    )
    assert {row.name for row in report.adapted} == set(found)
    for given in (found, None):
        with pytest.raises(ValueError, match="holds experts, and nothing measures"):
            add_lora(
                mixtral(),
                LoRAConfig(r=2, target_parameters=["gate_up_proj"], init_lora_weights="eva"),
                activations=given,
                progress=False,
            )
    model = Model()
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    with pytest.raises(ValueError, match="not the same ones of encoder and decoder"):
        capture_activations(model, batches_of(), progress=False)
    capture_activations(model, batches_of(), use_attention_mask=False, progress=False)


@needs_ranks
def test_ranks():
    """The sums of two ranks are those of one process; sketches keep the bound."""
    model, batches = Model(), batches_of(4)
    want = capture_activations(model, batches, progress=False)
    rows = recorded(model, batches)

    def work(rank: int):
        own = batches[2 * rank : 2 * rank + 2]
        whole = capture_activations(model, own, progress=False)
        sketch = capture_activations(model, own, sketch=8, progress=False)
        keep = ("count", "total", "squares", "gram", "sketch", "error")
        shared = whole["blocks.0.q"] is whole["blocks.0.v"]
        return shared, *(
            {n: {k: getattr(a, k) for k in keep} for n, a in found.items()}
            for found in (whole, sketch)
        )

    results = on_ranks(2, work)
    for shared, whole, sketch in results:
        assert shared
        for name, own in want.items():
            assert whole[name]["count"] == sketch[name]["count"] == own.count
            assert torch.allclose(whole[name]["gram"], own.gram, rtol=1e-5, atol=1e-5)
            S = to_numpy(sketch[name]["sketch"])
            left = np.linalg.eigvalsh(rows[name].T @ rows[name] - S.T @ S)
            assert left[0] >= -1e-4 and left[-1] <= sketch[name]["error"] + 1e-4
    for name in want:
        assert torch.equal(results[0][1][name]["gram"], results[1][1][name]["gram"])
        assert torch.equal(results[0][2][name]["sketch"], results[1][2][name]["sketch"])


@needs_ranks
def test_ranks_that_share_differently():
    """Layers that share an input on one rank only are summed apart; a layer that is called on one
    rank only has that rank's inputs; an error of one rank is that of all.
    """
    model = Changing()
    xs = [torch.randn(5, SIZE), torch.randn(6, SIZE)]
    calls = [[(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (2, 1), (3, 1)]]

    def work(rank: int):
        batch = {"xs": xs, "calls": calls[rank]}
        found = capture_activations(model, [batch], progress=False)
        text = ""
        try:
            capture_activations(model, [batch][:rank], progress=False)
        except (ValueError, RuntimeError) as failed:
            text = str(failed)
        return {name: own.gram for name, own in found.items()}, text

    for grams, text in on_ranks(2, work):
        inputs = {0: [0, 0], 1: [0, 0], 2: [0, 1], 3: [1]}
        for layer, own in inputs.items():
            rows = torch.cat([xs[k] for k in own])
            assert torch.allclose(grams[f"layers.{layer}"], rows.T @ rows, atol=1e-4)
        assert "batches is empty" in text or "failed on 1 other rank" in text


def test_eva_distributes_ranks():
    """By the largest explained variance ratios, at most ρ·r each; the sum is that of the ranks."""
    model, batches = Model(depth=3), batches_of(8)
    rows = recorded(model, batches)
    activations = capture_activations(model, batches, progress=False)
    config = LoRAConfig(
        r=3, lora_alpha=6, init_lora_weights=EVA(rho=2.0), alpha_pattern={"o": 12.0}
    )
    report = add_lora(model, config, activations=activations, progress=False)
    shares = []
    for order, (name, own) in enumerate(rows.items()):
        sigma = np.linalg.svd(own - own.mean(0), compute_uv=False)
        shares += [(-(value**2) / (sigma**2).sum(), order, name) for value in sigma[:6]]
    best = [name for _, _, name in sorted(shares)[: 3 * len(rows)]]
    want = {name: best.count(name) for name in rows if name in best}
    got = {row.name: row for row in report.adapted}
    assert {name: row.r for name, row in got.items()} == want
    for name, row in got.items():
        before = 12.0 if name.endswith(".o") else 6.0
        assert row.lora_alpha == pytest.approx(before * row.r / 3)
        assert model.get_submodule(name).lora_A.shape[0] == row.r
    for name in rows.keys() - want.keys():
        assert report.skipped[name] == "EVA gave it rank 0"
        assert type(model.get_submodule(name)) is nn.Linear


class Nested(nn.Module):
    """The name of one layer is the end of the others' names."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(SIZE, SIZE)
        self.one, self.two = (nn.ModuleDict({"q": nn.Linear(SIZE, SIZE)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.one["q"](x) + self.two["q"](x)


@needs_safetensors
@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize(
    "r, ranks", [(4, (2, 6, 4)), (4, (6, 4, 2)), (4, (4, 5, 3)), (2, (3, 0, 3)), (2, (4, 2, 0))]
)
def test_eva_of_names_that_end_in_others(r, ranks, format, tmp_path):
    """Every layer has its own rank and α, also in a file, and the sum is that of the ranks."""
    model, bare = Nested(), Nested()
    bare.load_state_dict(model.state_dict())
    names = ["q", "one.q", "two.q"]
    activations = {
        name: Activations.of(torch.randn(300, SIZE) * (1e-6 + (torch.arange(SIZE) < own)))
        if own
        else Activations.of(torch.randn(300, SIZE))
        for name, own in zip(names, ranks, strict=True)
    }
    config = LoRAConfig(r=r, lora_alpha=r, target_modules=["q"], init_lora_weights=EVA())
    report = add_lora(model, config, activations=activations, progress=False)
    want = {name: own for name, own in zip(names, ranks, strict=True) if own}
    assert {row.name: row.r for row in report.adapted} == want
    assert {row.name: row.lora_alpha for row in report.adapted} == want
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    save_adapter(model, tmp_path / "adapter", format=format)
    loaded = load_adapter(bare, tmp_path / "adapter", progress=False)
    assert {row.name: row.r for row in loaded.adapted} == want
    x = torch.randn(3, SIZE)
    assert torch.equal(model(x), bare(x))


@needs_safetensors
@pytest.mark.parametrize("format", ["native", "peft"])
def test_eva_is_saved(format, tmp_path):
    """A file has the ranks that were distributed, and no layer of rank 0."""
    model, batches = Model(depth=3), batches_of(8)
    bare = Model(depth=3)
    bare.load_state_dict(model.state_dict())
    activations = capture_activations(model, batches, progress=False)
    report = add_lora(
        model,
        LoRAConfig(r=2, init_lora_weights=EVA(rho=4)),
        activations=activations,
        progress=False,
    )
    assert len({row.r for row in report.adapted}) > 1
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    save_adapter(model, tmp_path / "adapter", format=format)
    loaded = load_adapter(bare, tmp_path / "adapter", progress=False)
    rows = [[(row.name, row.r, row.scaling) for row in r.adapted] for r in (loaded, report)]
    assert rows[0] == rows[1]
    batch = {"input_ids": batches[0]["input_ids"]}
    model.eval()
    bare.eval()
    assert (model(**batch) - bare(**batch)).abs().max() <= 1e-5


def test_add_lora_refuses():
    model, batches = Model(), batches_of()
    activations = capture_activations(model, batches, progress=False)
    before = state_of(model)
    for options, data, text in (
        ({"init_lora_weights": "eva"}, None, "EVA starts from the inputs of the layers: pass"),
        ({"init_lora_weights": "lora"}, activations, "LoRA does not use activations"),
        (
            {"init_lora_weights": "corda"},
            {k: v for k, v in activations.items() if k != "blocks.1.o"},
            r"activations has none for blocks\.1\.o",
        ),
        (
            {"init_lora_weights": "eva"},
            {**activations, "blocks.1.o": Activations.of(torch.zeros(9, SIZE))},
            r"blocks\.1\.o: .*zero",
        ),
        (
            {"init_lora_weights": "lora_null", "target_modules": ["embed", "q"]},
            activations,
            "embed: LoRANull starts from the inputs of a linear layer",
        ),
        (
            {"init_lora_weights": "eva", "target_modules": ["embed", "q"]},
            activations,
            "embed: EVA starts from the inputs of a linear layer",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            add_lora(model, LoRAConfig(r=2, **options), activations=data, progress=False)
        assert_untouched(model, before)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_null", "qera"])
@pytest.mark.parametrize("make", [lambda: nn.Conv1d(8, 8, 3), lambda: nn.MultiheadAttention(8, 2)])
def test_layers_without_inputs_are_refused(make, name):
    """Those that `capture_activations` refuses, whether or not activations are given."""
    model = nn.Sequential(nn.Linear(8, 8), make())
    config = LoRAConfig(r=2, target_modules=["0", "1"], init_lora_weights=name)
    for given in (None, {"0": Activations.of(torch.randn(20, 8))}):
        with pytest.raises(
            ValueError, match=r"^1 is \w+, which has no inputs .* leave it out with"
        ):
            add_lora(model, config, activations=given, progress=False)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="which has no inputs"):
        capture_activations(model, [torch.randn(2, 8)], ["1"])


def test_compiled_model():
    model, batches = Model(), batches_of()
    want = capture_activations(model, batches, progress=False)
    compiled = torch.compile(model, backend="eager")
    compiled(**batches[0])
    found = capture_activations(compiled, batches, progress=False)
    for own, other in zip(found.values(), want.values(), strict=True):
        assert torch.equal(own.gram, other.gram)
