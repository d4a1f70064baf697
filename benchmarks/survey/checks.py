"""The checks of one class: its layers' start, gradients, files, and the command line."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from lora_kernels.cli import main as cli
from lora_kernels.model.report import LoRAReport

from .compare import TOLERANCE, difference, differing_weight, disturb, floating_state, sensitivity
from .families import (
    CannotBuildError,
    forward,
    inputs_for,
    one_line,
    outputs,
    time_limit,
    tiny_model,
)

CHECKS = {
    "start": "`add_lora` does not change the outputs",
    "gradient": "the gradients of every adapter follow from that of its weight",
    "reload": "`save_adapter`, then `load_adapter` on a fresh base: the same outputs",
    "peft": "the same adapter in plain PEFT: the same outputs and weights",
    "merge": "`merge_lora`: the same outputs",
    "cli_merge": "`lora-kernels merge`: the same outputs and weights",
    "cli_init": "`lora-kernels init`, its start in plain PEFT: the outputs and weights of the base",
    "verify": "`lora-kernels verify` finds nothing wrong",
}
SECONDS = 60  # for all checks of a class
GRADIENT_TOLERANCE = 1e-2
_RANK = 4


class LeftOutError(Exception):
    """A check says nothing about the package here; the text gives the reason."""


class RefusedError(Exception):
    """The package raises an error because it does not support this."""


class WrongError(Exception):
    """The package computes something wrong."""


@dataclass
class Row:
    """What the survey found out about one class."""

    name: str
    family: str
    built: str = "ok"
    parameters: int = 0
    layers: int = 0
    inputs: str = ""
    effect: float = math.nan
    skipped: str = ""
    checks: dict[str, str] = field(default_factory=dict)


@dataclass
class Subject:
    """A base in a folder, its outputs, and the adapter that all checks share."""

    load: Callable[..., Any]
    folder: Path
    inputs: dict[str, Any]
    before: list[Tensor]
    adapted: Any = None
    report: LoRAReport | None = None
    expected: list[Tensor] = field(default_factory=list)
    merged: dict[str, Tensor] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def survey_class(name: str, family: str) -> Row:
    """Run all checks of a class; no error is raised."""
    row = Row(name, family)
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        try:
            with time_limit(SECONDS):
                subject = _subject(row, name, Path(folder))
                _run_checks(row, subject)
        except CannotBuildError as error:
            row.built = str(error)
        except LeftOutError as error:
            row.built = f"left out: {error}"
        except Exception as error:
            row.built = f"left out: {one_line(error)}"
    return row


def timed_survey(named: tuple[str, str]) -> tuple[Row, float]:
    """The result of `survey_class` for a (class, family), and its seconds."""
    start = time.perf_counter()
    return survey_class(*named), time.perf_counter() - start


def quiet() -> None:
    """Silence other packages, and switch off the network."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _subject(row: Row, name: str, folder: Path) -> Subject:
    import transformers

    model: Any = tiny_model(name)
    inputs = inputs_for(model)
    before = outputs(model, inputs)
    row.parameters = sum(p.numel() for p in model.parameters())
    row.inputs = " ".join(inputs)
    if difference(outputs(model, inputs), before) > 0:
        raise LeftOutError("two forwards differ")
    model_class = getattr(transformers, name)

    def load(path: Path = folder / "base") -> Any:
        return model_class.from_pretrained(path, dtype=torch.float32).eval()

    try:
        model.save_pretrained(folder / "base")
        again = load()
    except Exception as error:
        raise LeftOutError(f"transformers cannot save and load it: {one_line(error)}") from error
    off = difference(outputs(again, inputs), before)
    if off > 1e-6:
        raise LeftOutError(f"not reproducible by transformers: reloaded it differs by {off:.1e}")
    if lost := differing_weight(floating_state(again), floating_state(model)):
        raise LeftOutError(f"not reproducible by transformers: {lost}, differ when reloaded")
    return Subject(load, folder, inputs, before)


def _run_checks(row: Row, subject: Subject) -> None:
    torch.manual_seed(1)
    _run(row, "start", lambda: _start(row, subject))
    if subject.report is None:
        for check in ("gradient", "reload", "peft", "merge", "cli_merge", "verify"):
            row.checks[check] = "-"
        _run(row, "cli_init", lambda: _cli_init(subject))
        return
    _run(row, "gradient", lambda: _gradient(subject))
    _perturb(subject.adapted)
    subject.expected = outputs(subject.adapted, subject.inputs)
    row.effect = difference(subject.expected, subject.before)
    _run(row, "reload", lambda: _reload(subject))
    _run(row, "merge", lambda: _merge(subject))
    saved = (subject.adapter / "adapter_config.json").exists()
    for check, function in (("peft", _peft), ("cli_merge", _cli_merge)):
        if saved:
            _run(row, check, partial(function, subject))
        else:
            row.checks[check] = "-"
    if saved:
        _run(row, "verify", lambda: _verify(subject, row.checks["peft"]))
    else:
        row.checks["verify"] = "-"
    _run(row, "cli_init", lambda: _cli_init(subject))


def _run(row: Row, check: str, function: Callable[[], str]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.checks[check] = function()
    except LeftOutError as error:
        row.checks[check] = f"left out: {error}"
    except RefusedError as error:
        row.checks[check] = f"refused: {error}"
    except WrongError as error:
        row.checks[check] = f"FAIL {error}"
    except TimeoutError as error:
        row.checks[check] = f"left out: {error}"
        raise
    except Exception as error:
        row.checks[check] = f"FAIL {one_line(error)}"


# --- in memory ------------------------------------------------------------------------------------


def _start(row: Row, subject: Subject) -> str:
    subject.adapted = subject.load()
    with _recorded(subject.warned):
        try:
            report = add_lora(subject.adapted, LoRAConfig(r=_RANK), progress=False)
        except ValueError as error:
            raise RefusedError(_short(str(error))) from error
    subject.report = report
    row.layers = len(report.adapted)
    row.skipped = _grouped(report.skipped)
    return _same(subject, outputs(subject.adapted, subject.inputs), subject.before)


def _gradient(subject: Subject) -> str:
    """Compare dA and dB of every layer with those that follow from the gradient of the base's
    weight.
    """
    base = subject.load().requires_grad_(True)
    try:
        found = _backward(base, subject.inputs)
    except Exception as error:
        raise LeftOutError(f"the base has no backward here: {one_line(error)}") from error
    if not found:
        raise LeftOutError("the outputs of the base have no gradient")
    names = [row.name for row in subject.report.adapted] if subject.report else []
    wanted = _used_gradients(base, names)
    if not wanted:
        raise LeftOutError("the base uses none of the adapted layers on these inputs")
    if not _backward(subject.adapted, subject.inputs):
        raise WrongError("the outputs of the adapted model have no gradient")
    adapters = {name: subject.adapted.get_submodule(name).adapter("default") for name in wanted}
    shared = _shared_weights(base)
    alone = [name for name in wanted if id(base.get_submodule(name).weight) not in shared]
    missing = [name for name in alone if not _has_gradient(adapters[name])]
    if missing:
        raise WrongError(f"no gradient in {len(missing)} layers, such as {missing[0]}")
    floor = 1e-5 * max((float(gradient.norm()) for gradient in wanted.values()), default=0.0)
    errors = {name: _gradient_error(adapters[name], wanted[name], floor) for name in alone}
    worst = max(errors.values(), default=0.0)
    unused = len(names) - len(wanted)
    note = f" ({unused} of {len(names)} not used by the base on these inputs)" if unused else ""
    wrong = [name for name, off in errors.items() if off > GRADIENT_TOLERANCE]
    if wrong:
        rounding = _gradient_sensitivity(subject, wanted, wrong, floor)
        text = f"off by {worst:.1e} in {len(wrong)} layers, such as {wrong[0]}"
        if worst <= 10 * rounding:
            raise LeftOutError(f"{text}, but rounding alone makes {rounding:.0e}")
        raise WrongError(f"{text} (rounding makes {rounding:.0e})")
    return f"ok {worst:.0e}{note}"


def _used_gradients(base: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """{layer: ∂loss/∂W [out, in]} of the layers whose gradient is not zero."""
    found = {}
    for name in names:
        layer: Any = base.get_submodule(name)
        gradient = layer.weight.grad
        if gradient is not None:
            found[name] = gradient if isinstance(layer, nn.Linear) else gradient.T
    largest = max((float(gradient.norm()) for gradient in found.values()), default=0.0)
    return {name: g for name, g in found.items() if float(g.norm()) > 1e-7 * largest}


def _has_gradient(adapter: Any) -> bool:
    gradients = (adapter.lora_A.grad, adapter.lora_B.grad)
    return all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _gradient_sensitivity(
    subject: Subject, wanted: dict[str, Tensor], names: Sequence[str], floor: float
) -> float:
    """How far a relative change of 1e-6 in the weights moves the base's own gradients."""
    worst = 0.0
    for seed in range(3):
        base = subject.load().requires_grad_(True)
        with torch.no_grad():
            disturb(base, seed)
        _backward(base, subject.inputs)
        found = _used_gradients(base, names)
        for name in names:
            off = (found[name] - wanted[name]).norm() if name in found else wanted[name].norm()
            worst = max(worst, float(off / (wanted[name].norm() + floor)))
    return worst


def _backward(model: Any, inputs: dict[str, Any]) -> bool:
    """Backward from the sum of all outputs, weighted at random; False if none has a gradient."""
    generator = torch.Generator().manual_seed(3)
    terms = []
    for tensor in forward(model, inputs):
        weights = torch.randn(tensor.shape, generator=generator)  # drawn for constant outputs too
        finite = tensor.isfinite()
        if tensor.requires_grad:
            terms.append((tensor[finite] * weights[finite]).sum())
    if terms:
        torch.stack(terms).sum().backward()
    return bool(terms)


def _shared_weights(model: nn.Module) -> set[int]:
    """Weights that several modules share: each module contributes a part of their gradient."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _gradient_error(adapter: Any, gradient: Tensor, floor: float) -> float:
    """The error of dA and dB. For y = x (W + s (B A - B0 A0))^T: dB = s G A^T, dA = s B^T G."""
    pairs = (
        (adapter.lora_B.grad, adapter.scaling * gradient @ adapter.lora_A.detach().T),
        (adapter.lora_A.grad, adapter.scaling * adapter.lora_B.detach().T @ gradient),
    )
    return max(float((got - right).norm() / (right.norm() + floor)) for got, right in pairs)


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _merge(subject: Subject) -> str:
    merge_lora(subject.adapted)
    subject.merged = floating_state(subject.adapted)
    return _same(subject, outputs(subject.adapted, subject.inputs), subject.expected)


# --- files ----------------------------------------------------------------------------------------


def _reload(subject: Subject) -> str:
    with _recorded(subject.warned):
        save_adapter(subject.adapted, subject.adapter)
    fresh = subject.load()
    load_adapter(fresh, subject.adapter, progress=False)
    states = floating_state(fresh), floating_state(subject.adapted)
    return _same(subject, outputs(fresh, subject.inputs), subject.expected, *states)


def _peft(subject: Subject) -> str:
    try:
        return _in_peft(subject, subject.load(), subject.adapter, subject.expected, subject.merged)
    except LeftOutError:
        raise
    except Exception as error:
        if subject.warned:
            return f"warned: {subject.warned[0]} (PEFT: {_text(error)})"
        raise


def _in_peft(
    subject: Subject,
    model: Any,
    adapter: Path,
    expected: Sequence[Tensor],
    weights: dict[str, Tensor],
) -> str:
    """Compare the outputs of PEFT's model, and W + ΔW of its layers, with the expected ones."""
    from peft import PeftModel

    with _silenced():
        try:
            wrapped: Any = PeftModel.from_pretrained(model, adapter).eval()
        except NotImplementedError as error:
            _refuse_what_peft_cannot(subject, error)
            raise
        plain = wrapped.get_base_model()
        got = outputs(plain, subject.inputs)
        try:
            outputs(wrapped, subject.inputs, like=plain)
        except Exception as error:
            kind = type(wrapped).__name__
            raise WrongError(f"{kind} cannot run the model: {one_line(error)}") from error
    found = floating_state(plain) | _updated_weights(plain)
    weights = {name: weight for name, weight in weights.items() if name in found}
    return _same(subject, got, expected, found, weights)


def _refuse_what_peft_cannot(subject: Subject, error: Exception) -> None:
    """Raises LeftOutError if PEFT cannot adapt the model with its own adapter either."""
    from peft import LoraConfig, get_peft_model

    try:
        get_peft_model(subject.load(), LoraConfig(r=_RANK, target_modules="all-linear"))
    except type(error):
        raise LeftOutError(f"PEFT cannot adapt this class: {one_line(error)}") from error


@torch.no_grad()
def _updated_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + ΔW of the layers that PEFT adapts."""
    from peft.tuners.lora import Linear

    return {
        f"{name}.weight": layer.get_base_layer().weight + layer.get_delta_weight(layer_adapter)
        for name, layer in model.named_modules()
        if type(layer) is Linear
        for layer_adapter in layer.active_adapters
    }


# --- command line ---------------------------------------------------------------------------------


def _command(*words: object) -> tuple[int, str]:
    """The exit status, and what was printed."""
    with _silenced() as text:
        status = cli([str(word) for word in words])
    return status, _short(text.getvalue())


def _cli_merge(subject: Subject) -> str:
    target = subject.folder / "merged"
    status, text = _command("merge", subject.base, subject.adapter, target, "--quiet")
    if status:
        raise RefusedError(text)
    model = subject.load(target)
    states = floating_state(model), subject.merged
    return _same(subject, outputs(model, subject.inputs), subject.expected, *states)


def _cli_init(subject: Subject) -> str:
    note = ""
    for rank in (_RANK, 2, 1):
        start = subject.folder / f"start{rank}"
        status, text = _command("init", subject.base, start, "-r", rank, "--quiet")
        if status == 0:
            return _started(subject, start, text) + note
        if rank == 1 or "larger than min" not in text:
            raise RefusedError(text)
        note = note or f" (r = {_RANK} is refused: {text})"
    raise AssertionError


def _started(subject: Subject, start: Path, printed: str) -> str:
    try:
        weights = floating_state(subject.load())
        return _in_peft(subject, subject.load(start), start / "adapter", subject.before, weights)
    except LeftOutError:
        raise
    except Exception as error:
        if printed:
            return f"warned: {printed} (PEFT: {_text(error)})"
        raise


def _verify(subject: Subject, peft: str) -> str:
    """`peft` is the verdict on plain PEFT; `verify` should reach the same verdict."""
    status, text = _command("verify", subject.adapter, subject.base, "--quiet")
    if status == 0:
        return "ok"
    if text:  # a one-line error
        raise RefusedError(text)
    os.environ["COLUMNS"] = "400"
    with _silenced() as table:
        cli(["verify", str(subject.adapter), str(subject.base)])
    lines = [line.replace("│", " ") for line in table.getvalue().splitlines()]
    wrong = [" ".join(line.split()) for line in lines if "WRONG" in line]
    text = _short("; ".join(wrong))
    known = peft.startswith(("warned", "left out: PEFT cannot"))
    if known and all("PEFT" in line for line in wrong):
        return f"warned: {text}"
    raise WrongError(text)


# --- small things ---------------------------------------------------------------------------------


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, (WrongError, LeftOutError)) else one_line(error)


def _same(
    subject: Subject,
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    found: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """The verdict on outputs, and on weights if any are given."""
    off = difference(got, expected)
    rounding = 0.0
    if off > TOLERANCE:
        rounding = sensitivity(subject.load, subject.inputs, subject.before)
        if off > 10 * rounding:
            raise WrongError(f"outputs differ by {off:.1e} (rounding makes {rounding:.0e})")
    if lost := differing_weight(found or {}, weights or {}):
        raise WrongError(f"(these inputs do not show it) {lost}, differ")
    if rounding > 1e-3:
        raise LeftOutError(f"outputs differ by {off:.0e}, but rounding alone makes {rounding:.0e}")
    return f"ok {off:.0e}" + (f" (rounding alone makes {rounding:.0e})" if rounding else "")


def _grouped(skipped: dict[str, str]) -> str:
    """Each reason, with the number of its layers and the name of one layer."""
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault(reason, []).append(name)
    return " | ".join(f"{len(n)} x {n[0]}: {reason}" for reason, n in groups.items())


@contextlib.contextmanager
def _recorded(found: list[str]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found += [_short(str(w.message)) for w in caught if issubclass(w.category, UserWarning)]


@contextlib.contextmanager
def _silenced() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def _short(text: str, limit: int = 300) -> str:
    """The text on one line, without the names of temporary folders."""
    text = re.sub(r"/[\w/.-]*/tmp\w+/?", "", " ".join(text.split()))
    return text[:limit]
