"""`capture_gradients`: the sums, their memory, and the unchanged model."""

from __future__ import annotations

import copy
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, capture_gradients

from ..support.oracle import ROUNDING
from ..support.packages import needs_real_model
from ..support.ranks import needs_ranks, on_ranks

SIZE = 24


class Stack(nn.Module):
    """Linear layers of one size, each followed by tanh; "head" has another size."""

    def __init__(self, depth: int = 4, size: int = SIZE, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(depth))
        self.head = nn.Linear(size, 3)
        self.use_reentrant = checkpointing

    def forward(self, x):
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x).tanh()
            else:
                run = lambda x, block=block: block(x).tanh()  # noqa: E731
                x = checkpoint(run, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def mean_square(model, batch):
    return model(batch).square().mean()


def batches_of(count=3, size=SIZE, dtype=torch.float32, device="cpu"):
    return [torch.randn(5, size).to(device, dtype) for _ in range(count)]


def plain_sums(model, batches, loss=mean_square) -> dict[str, torch.Tensor]:
    """With plain autograd, in float64: Σ over the batches of each weight's gradient."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    model.zero_grad()
    for batch in batches:
        loss(model, batch.double() if batch.is_floating_point() else batch).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def state_of(model):
    """Everything that must not change."""
    return (
        [(n, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
         for n, p in model.named_parameters()],
        [m.training for m in model.modules()],
        [dict(m._forward_hooks) | dict(m._backward_hooks) for m in model.modules()],
        [p._post_accumulate_grad_hooks or {} for p in model.parameters()],
    )  # fmt: skip


def assert_untouched(model, before) -> None:
    flags, modes, hooks, parameter_hooks = state_of(model)
    for (name, flag, grad, value), (_, old_flag, old_grad, old_value) in zip(
        flags, before[0], strict=True
    ):
        assert flag == old_flag and grad is old_grad, name
        assert value is None or torch.equal(value, old_value), name
    assert (modes, hooks, parameter_hooks) == before[1:]


def marked(model):
    """A model with various flags, gradients and modes."""
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)  # some weights and some biases
        if index % 4 < 2:
            parameter.grad = torch.randn_like(parameter)
    model.blocks[1].eval()
    return model


@pytest.mark.parametrize("where", ["cpu", None])
@pytest.mark.parametrize("checkpointing", [None, False])
def test_sums(checkpointing, where, device):
    model = marked(Stack(checkpointing=checkpointing)).to(device)
    batches = batches_of(device=device)
    before = state_of(model)
    want = plain_sums(model, batches)
    got = capture_gradients(model, iter(batches), loss=mean_square, device=where)
    assert_untouched(model, before)
    assert list(got) == [*(f"blocks.{k}" for k in range(4)), "head"]
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32 and not gradient.requires_grad
        assert gradient.device.type == (where or device)
        reference = want[f"{name}.weight"].to(gradient.device)
        # Each entry is a float32 sum of a few products, after at most four layers.
        assert (gradient - reference).norm() <= 64 * ROUNDING[torch.float32] * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype, device):
    """A bfloat16 model's gradients are bfloat16, and the sum is not: 40 equal batches give 40 times
    one gradient to float32's rounding, where a bfloat16 sum would have stopped growing.
    """
    model = Stack().to(device, dtype)
    batch = batches_of(1, dtype=dtype, device=device)[0]
    one = capture_gradients(model, [batch], loss=mean_square)
    many = capture_gradients(model, [batch] * 40, loss=mean_square)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    for name, gradient in many.items():
        assert gradient.dtype == want
        error = (gradient - 40 * one[name]).norm()
        assert error <= 40 * ROUNDING[want] * gradient.norm()
    reference = plain_sums(model, [batch])
    for name, gradient in one.items():
        error = (gradient.to(device) - reference[f"{name}.weight"]).norm()
        # A few roundings of the dtype in each of up to five layers, forward and backward.
        assert error <= 16 * ROUNDING[dtype] * reference[f"{name}.weight"].norm()


class Alive(TorchDispatchMode):
    """Counts tensors of a weight's size that were created inside and are still alive."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.nbytes, self.now, self.peak = weights[0].untyped_storage().nbytes(), 0, 0
        self._known = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage) -> None:
        key = storage._cdata
        if storage.nbytes() == self.nbytes and key not in self._known:
            self._known.add(key)
            self.now += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._known.discard(key)
        self.now -= 1


def test_no_more_than_one_gradient_is_alive():
    """Besides the sums; plain autograd, counted the same way, holds one for every layer."""
    depth = 12
    model, batches = Stack(depth), batches_of(3)
    weights = [block.weight for block in model.blocks]
    with Alive(weights) as ordinary:
        mean_square(model, batches[0]).backward()
    assert ordinary.peak >= depth
    model.zero_grad()
    with Alive(weights) as ours:
        sums = capture_gradients(
            model, batches, [f"blocks.{k}" for k in range(depth)], loss=mean_square
        )
    assert ours.now == depth and ours.peak <= depth + 1
    assert len(sums) == depth


class TestSharedWeights:
    def test_tied(self, device):
        """One sum under both names, over all uses of the weight."""
        model = Stack().to(device)
        model.blocks[2].weight = model.blocks[0].weight
        batches = batches_of(device=device)
        want = plain_sums(model, batches)["blocks.0.weight"]
        got = capture_gradients(model, batches, loss=mean_square)
        assert got["blocks.0"] is got["blocks.2"] and len(got) == 5
        error = (got["blocks.0"].to(device) - want).norm()
        assert error <= 64 * ROUNDING[torch.float32] * want.norm()

    def test_one_module_twice(self, device):
        model = Stack().to(device)
        model.blocks.append(model.blocks[0])
        batches = batches_of(device=device)
        got = capture_gradients(model, batches, ["0", "4"], loss=mean_square)
        assert list(got) == ["blocks.0", "blocks.4"] and got["blocks.0"] is got["blocks.4"]
        want = plain_sums(model, batches)["blocks.0.weight"]
        error = (got["blocks.0"].to(device) - want).norm()
        assert error <= 64 * ROUNDING[torch.float32] * want.norm()

    def test_tied_to_an_embedding(self, device):
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).to(device)
        model[1].weight = model[0].weight
        ids = [torch.randint(11, (2, 4)).to(device)]
        got = capture_gradients(model, ids, ["1"], loss=mean_square)["1"]
        want = plain_sums(model, ids)["0.weight"]
        assert (got.to(device) - want).norm() <= 64 * ROUNDING[torch.float32] * want.norm()


@pytest.mark.parametrize("size", [SIZE, 17])
def test_conv1d_is_transposed(size, device):
    """GPT-2's layer: y = x W + b with W [in, out]; also a square one."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(size, SIZE)).to(device)
    batches = batches_of(device=device)
    got = capture_gradients(model, batches, loss=mean_square)["0"]
    want = plain_sums(model, batches)["0.weight"].T
    assert got.shape == (size, SIZE)
    assert (got.to(device) - want).norm() <= 64 * ROUNDING[torch.float32] * want.norm()


def test_an_adapted_layer(device):
    """The gradient of the frozen base weight; the factors get none."""
    model = Stack().to(device)
    model.blocks[1] = LoRALinear.from_linear(model.blocks[1], r=4)
    batches = batches_of(device=device)
    before = state_of(model)
    got = capture_gradients(model, batches, ["blocks.1"], loss=mean_square)["blocks.1"]
    assert_untouched(model, before)
    model.blocks[1] = model.blocks[1].to_linear()
    want = plain_sums(model, batches)["blocks.1.weight"]
    assert (got.to(device) - want).norm() <= 64 * ROUNDING[torch.float32] * want.norm()


class TestWhatRaises:
    @pytest.mark.parametrize("where", ["forward", "backward", "iteration"])
    def test_leaves_the_model_alone(self, where, device):
        model = marked(Stack()).to(device)
        before = state_of(model)

        def loss(model, batch):
            value = mean_square(model, batch)
            if where == "forward" and batch.sum() > 1e6:
                raise KeyError("forward")
            if where == "backward" and batch.sum() > 1e6:
                value = Bomb.apply(value)
            return value

        def batches():
            yield torch.randn(5, SIZE, device=device)
            if where == "iteration":
                raise KeyError("iteration")
            yield torch.full((5, SIZE), 1e6, device=device)

        with pytest.raises(KeyError, match=where):
            capture_gradients(model, batches(), loss=loss)
        assert_untouched(model, before)
        # It can be used again.
        capture_gradients(model, batches_of(device=device), loss=mean_square)

    def test_unreached_target(self):
        model = Stack()
        model.spare = nn.Linear(4, 4)
        with pytest.raises(ValueError, match=r"no gradient reached 1 of 6 targets \(spare\)"):
            capture_gradients(model, batches_of(), loss=mean_square)
        assert model.spare.weight.grad is None

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_reentrant_checkpointing(self):
        """With a frozen embedding no gradient flows through it; if the input requires one, as after
        Hugging Face's `enable_input_require_grads`, the result is right.
        """
        model = Stack(checkpointing=True)
        with pytest.raises(ValueError, match="use_reentrant=False"):
            capture_gradients(model, batches_of(), loss=mean_square)
        batches = [batch.requires_grad_() for batch in batches_of()]
        got = capture_gradients(model, batches, loss=mean_square)
        model.use_reentrant = None
        want = plain_sums(model, [batch.detach() for batch in batches])
        for name, gradient in got.items():
            reference = want[f"{name}.weight"]
            assert (gradient - reference).norm() <= 64 * ROUNDING[torch.float32] * reference.norm()

    @pytest.mark.parametrize(
        "targets,error,match",
        [
            (["bloks.1"], ValueError, "no module is called 'bloks.1'; did you mean 'blocks.1'"),
            (["head", "q_proj"], ValueError, "no module is called 'q_proj'; the linear layers"),
            (r"blocks\.9", ValueError, "no module's whole name matches"),
            ("blocks.(", ValueError, "not a regular expression"),
            ([], ValueError, "targets is empty"),
            ([7], TypeError, "got int in the list"),
            (["blocks"], TypeError, "'blocks' is ModuleList; a target must be"),
            ([nn.Linear(2, 2)], ValueError, "no module of this model"),
            ({"a": nn.Tanh()}, TypeError, "'a' is Tanh"),
        ],
    )
    def test_bad_targets(self, targets, error, match):
        with pytest.raises(error, match=match):
            capture_gradients(Stack(), batches_of(), targets, loss=mean_square)

    @pytest.mark.parametrize(
        "batches,loss,error,match",
        [
            ([], mean_square, ValueError, "batches is empty"),
            ([torch.randn(5, SIZE)], None, TypeError, "a batch is a torch.float32 tensor"),
            (["text"], None, TypeError, "a batch is str; without loss="),
            (
                torch.zeros(2, 5, dtype=torch.long),
                None,
                ValueError,
                r"\[batch, length\], got \[5\]",
            ),
            ([{"x": torch.randn(5, SIZE)}], None, ValueError, "gave no .loss: put labels"),
            (batches_of(), lambda m, x: m(x), ValueError, r"one element, got shape \[5, 3\]"),
            (batches_of(), lambda m, x: 1.0, ValueError, "one element, got float"),
            (batches_of(), lambda m, x: x.sum(), ValueError, "does not depend on any target"),
            (batches_of(), lambda m, x: m(x).sum() * float("nan"), ValueError, "batch 1 is nan"),
        ],
    )
    def test_bad_batches(self, batches, loss, error, match):
        with pytest.raises(error, match=match):
            capture_gradients(Stack(), batches, loss=loss)

    def test_inference_mode(self):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of it"):
            capture_gradients(Stack(), batches_of(), loss=mean_square)

    def test_overflow(self):
        """A finite loss with a gradient too large for float16."""
        model = Stack().half()
        with pytest.raises(ValueError, match="holds NaN or Inf; float16 overflows"):
            capture_gradients(
                model,
                batches_of(dtype=torch.float16),
                ["head"],
                loss=lambda m, x: (m(x).float() * 1e6).sum(),
            )

    def test_bad_weights(self):
        model = Stack()
        nn.utils.parametrizations.weight_norm(model.blocks[0])
        with pytest.raises(TypeError, match=r"'blocks.0' is ParametrizedLinear; a target must be"):
            capture_gradients(model, batches_of(), ["blocks.0"], loss=mean_square)
        found = capture_gradients(model, batches_of(), loss=mean_square)  # as add_lora
        assert list(found) == ["blocks.1", "blocks.2", "blocks.3", "head"]
        model = Stack()
        sharded = type("Sharded", (torch.Tensor,), {})
        model.head.weight = nn.Parameter(torch.randn(3, SIZE).as_subclass(sharded))
        with pytest.raises(TypeError, match=r"'head' is Linear; a target must be .* of its own"):
            capture_gradients(model, batches_of(), ["head"], loss=mean_square)
        with pytest.raises(ValueError, match="on the meta device: load it first"):
            capture_gradients(Stack().to("meta"), batches_of(), loss=mean_square)


class Bomb(torch.autograd.Function):
    """Raises in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyError("backward")


def test_targets(device):
    """Names, endings, a regular expression, modules, a dict."""
    model = Stack().to(device)
    batches = batches_of(device=device)
    full = capture_gradients(model, batches, loss=mean_square)
    for targets, names in (
        (["1", "head"], ["blocks.1", "head"]),
        (["blocks.3"], ["blocks.3"]),
        (r"blocks\.[02]", ["blocks.0", "blocks.2"]),
        ("ALL-linear", list(full)),
        ([model.head, model.blocks[0]], ["blocks.0", "head"]),
    ):
        got = capture_gradients(model, batches, targets, loss=mean_square)
        assert list(got) == names
        for name in names:
            torch.testing.assert_close(got[name], full[name])
    got = capture_gradients(model, batches, {"mine": model.head}, loss=mean_square)
    torch.testing.assert_close(got["mine"], full["head"])
    assert list(capture_gradients(model.head, batches, loss=mean_square)) == [""]


class TestProgress:
    def test_bar(self, monkeypatch, capsys):
        pytest.importorskip("rich")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        for progress in (True, False):
            capture_gradients(Stack(), iter(batches_of()), loss=mean_square, progress=progress)
            printed = capsys.readouterr()
            assert ("gradients" in printed.err) == progress and printed.out == ""

    def test_none_without_rich_or_terminal(self, monkeypatch, capsys):
        want = capture_gradients(Stack(), batches_of(), loss=mean_square)
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        got = capture_gradients(Stack(), batches_of(), loss=mean_square)
        assert list(got) == list(want) and capsys.readouterr() == ("", "")


@needs_real_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_real_model(real_model, checkpointing, device):
    """Frozen SmolLM2 with dicts and with plain ids; the tied head is not a target."""
    model = copy.deepcopy(real_model).to(device).requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # it has no dropout
    ids = torch.randint(1000, (2, 12)).to(device)
    dicts = [{"input_ids": ids, "labels": ids, "use_cache": False}]
    got = capture_gradients(model, dicts)
    assert len(got) == 210 and "lm_head" not in got
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(m.training == checkpointing for m in model.modules())
    same = capture_gradients(model, [ids], ["layers.29.mlp.up_proj"])
    name = "model.layers.29.mlp.up_proj"
    torch.testing.assert_close(same[name], got[name])
    weight = model.get_submodule(name).weight.requires_grad_(True)
    (want,) = torch.autograd.grad(model(**dicts[0]).loss, weight)
    assert (got[name].to(device) - want).norm() <= 1e-5 * want.norm()


def _rank(rank: int, fail: bool) -> dict[str, torch.Tensor] | str:
    """One of two processes."""
    torch.manual_seed(0)
    model = Stack()
    batches = batches_of(4)[2 * rank : 2 * rank + 2]
    if fail and rank == 1:
        batches[1] = batches[1][:, :3]
    try:
        result = capture_gradients(model, batches, loss=mean_square)
    except RuntimeError as error:
        result = str(error)
    with pytest.raises(TypeError, match=r"pass model\.module"):
        wrapped = nn.parallel.DistributedDataParallel(model)
        capture_gradients(wrapped, batches, loss=mean_square)
    return result


@pytest.mark.parametrize("fail", [False, True])
@needs_ranks
def test_two_processes(fail):
    """Both get the sum over all batches; if one fails, the other says so instead of waiting."""
    results = on_ranks(2, lambda rank: _rank(rank, fail))
    if fail:
        assert results[0] == "capture_gradients failed on 1 other rank(s)"
        assert "shapes cannot be multiplied" in results[1]
        return
    torch.manual_seed(0)
    model = Stack()
    want = plain_sums(model, batches_of(4))
    for result in results:
        for name, gradient in result.items():
            reference = want[f"{name}.weight"]
            assert (gradient - reference).norm() <= 64 * ROUNDING[torch.float32] * reference.norm()
