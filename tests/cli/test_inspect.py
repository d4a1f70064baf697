"""`lora-kernels inspect`: its output, exit codes, and errors of one line."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, __version__
from lora_kernels._utils.model_files import StoredTensor
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import write_adapter
from lora_kernels.files.checkpoint.weights import stored_weights
from lora_kernels.training import magnitude_report
from lora_kernels.training.magnitude import inspect_model, measure, measure_adapter

from ..support import ROOT
from ..support.adapters import one_layer

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def model() -> nn.Module:
    sizes = {"q_proj": (40, 30), "up_proj": (60, 40), "down_proj": (40, 60)}
    return nn.ModuleDict({name: nn.Linear(m, n) for name, (n, m) in sizes.items()})


@pytest.fixture
def file(model, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), path)
    return path


def write_peft(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.save_file(tensors, folder / ADAPTER_FILE)
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def inspected(path: Path, *arguments: str) -> list[tuple[str, ...]]:
    """These columns of the CSV; options for the command may follow them."""
    begin = next((k for k, name in enumerate(arguments) if name[0] == "-"), len(arguments))
    columns, options = arguments[:begin], arguments[begin:]
    out = path.parent / "out.csv"
    assert main(["inspect", str(path), "--quiet", "--csv", str(out), *options]) == 0
    return [tuple(line[column] for column in columns) for line in read(out)]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


class TestInspect:
    def test_table_csv_and_picture(self, model, file, tmp_path, capsys):
        out = tmp_path / "deep" / "out.csv"
        picture = tmp_path / "deep" / "out.png"
        arguments = ["inspect", str(file), "-r", "8", "--csv", str(out), "--picture", str(picture)]
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert all(
            word in printed.out for word in ("q_proj", "60 × 40", "ν[W]", "Q[r]", "k₁ loram")
        )
        assert "median" in printed.out and "ν[ΔW]" not in printed.out and printed.err == ""
        rows = {row.name: row for row in inspect_model(model, 8)}
        written = read(out)
        assert [line["name"] for line in written] == sorted(rows)
        for line in written:
            row = rows[line["name"]]
            for name in ("nu_weight", "rho", "gain", "log_gain", "beta", "k1_pissa", "k1_lora"):
                assert float(line[name]) == pytest.approx(getattr(row, name), rel=1e-6)
            assert line["nu_update"] == "" and "gains" not in line
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_options(self, model, file, tmp_path, capsys):
        out = tmp_path / "out.csv"
        arguments = [str(file), "--csv", str(out), "--quiet", "--targets", "up_proj", "q_proj"]
        assert main(["inspect", *arguments, "--randomized"]) == 0
        assert capsys.readouterr() == ("", "")
        lines = read(out)
        assert [line["name"] for line in lines] == ["q_proj", "up_proj"]
        assert {line["r"] for line in lines} == {"16"}
        want = measure(model["q_proj"].weight, method="randomized")
        assert float(lines[0]["gain"]) == want.gain

    def test_peft_adapter(self, model, tmp_path, capsys):
        """A folder that PEFT itself has written."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 8},
            alpha_pattern={"up_proj": 20},
            init_lora_weights=False,
        )
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "adapter")
        out, picture = tmp_path / "out.csv", tmp_path / "out.svg"
        arguments = ["inspect", str(tmp_path / "adapter")]
        assert main([*arguments, "--csv", str(out), "--picture", str(picture)]) == 0
        assert "ν[sBA]" in capsys.readouterr().out and picture.stat().st_size > 1000
        lines = read(out)
        assert [line["name"] for line in lines] == ["q_proj", "up_proj"]
        assert [line["r"] for line in lines] == ["4", "8"]
        for line in lines:
            layer = adapted.base_model.model[line["name"]]
            delta = layer.get_delta_weight("default").detach().double()
            assert float(line["norm_update"]) == pytest.approx(float(delta.norm()), rel=1e-5)
            assert float(line["nu_update"]) == pytest.approx(float(delta.square().mean()), rel=1e-5)
        for option in (["-r", "8"], ["--exact"], ["--randomized"]):
            assert main([*arguments, *option]) == 1
            assert f"{option[0]} is for models" in capsys.readouterr().err

    def test_targets_and_order(self, tmp_path, capsys):
        """Layer 2 before layer 10; s by the patterns, as PEFT computes it."""
        names = ("layers.10.q", "layers.2.q", "layers.2.v")
        tensors = {
            f"base_model.model.{name}.lora_{half}.weight": torch.randn(*shape)
            for name in names
            for half, shape in (("A", (2, 5)), ("B", (7, 2)))
        }
        config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {r"layers\.10\..*": 2, "v": 12}}
        assert inspected(write_peft(tmp_path / "a", tensors, **config), "name", "scaling") == [
            ("layers.2.q", "4.0"), ("layers.2.v", "6.0"), ("layers.10.q", "1.0")
        ]  # fmt: skip
        folder = write_peft(tmp_path / "b", tensors, **config, use_rslora=True)
        ((name, scaling),) = inspected(folder, "name", "scaling", "--targets", "v")
        assert name == "layers.2.v" and float(scaling) == pytest.approx(12 / 2**0.5)
        assert main(["inspect", str(folder), "--targets", "k"]) == 1
        assert "no module is called 'k'" in capsys.readouterr().err

    @pytest.mark.parametrize("start", ["loram", "pissa", "lora_xs", "lora"])
    def test_every_format(self, start, tmp_path):
        """The same numbers in both: those of A' = [A; A₀] and B' = [B, −B₀]."""
        state, delta = one_layer(init_lora_weights=start)
        layer = state.layers["block.1.q"]
        want = measure_adapter("block.1.q", *layer.update_factors(), layer.scaling)
        assert want.norm_update == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        columns = ("name", "r", "scaling", "nu_A", "nu_B", "norm_update")
        for format in ("peft", "native"):
            write_adapter(tmp_path / format, state, format=format)
            (line,) = inspected(tmp_path / format, *columns)
            assert line == tuple(str(getattr(want, column)) for column in columns)
        (tmp_path / "native" / "adapter_config.json").unlink()  # by a kill at the wrong moment
        assert inspected(tmp_path / "native", *columns) == [line]

    @pytest.mark.parametrize("method", ["loram", "pissa"])
    def test_the_start_beside_a_residual_base(self, method, llama, tmp_path):
        """A and B are the initial factors, whose product was subtracted from the base."""
        out = tmp_path / "out"
        assert main(["init", str(llama), str(out), "-r", "4", "--method", method, "--quiet"]) == 0
        lines = inspected(out / "adapter", "name", "r", "norm_update")
        assert len(lines) == 14 and {r for _, r, _ in lines} == {"4"}
        before = {weight.name: weight.load() for weight in stored_weights(llama)}
        for weight in stored_weights(out):
            (norm,) = (float(n) for name, _, n in lines if name == weight.name)
            assert norm == pytest.approx(float((before[weight.name] - weight.load()).norm()), 1e-4)

    def test_bad_adapters(self, tmp_path, capsys):
        pair = {"base_model.model.q.lora_A.weight": torch.randn(2, 5),
                "base_model.model.q.lora_B.weight": torch.randn(7, 2)}  # fmt: skip
        half = dict(list(pair.items())[:1])
        for tensors, config, match in (
            (half, {}, "lora_B of 'q' is missing"),
            ({"x": torch.zeros(2)}, {}, "has no lora_A and lora_B"),
            (pair, {"lora_alpha": 0}, "lora_alpha must be positive"),
            (pair, {"alpha_pattern": [1]}, "alpha_pattern must be a dict"),
            (pair, {"alpha_pattern": {"(": 1}}, "alpha_pattern has '(', not a regular"),
        ):
            folder = write_peft(tmp_path, tensors, **{"r": 2, "lora_alpha": 8, **config})
            assert main(["inspect", str(folder)]) == 1
            assert match in capsys.readouterr().err
        (tmp_path / ADAPTER_FILE).unlink()
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        assert main(["inspect", str(tmp_path)]) == 1
        assert "adapter_model.bin cannot be read" in capsys.readouterr().err

    def test_one_weight_at_a_time(self, file, monkeypatch):
        """Each weight is released before the next is loaded."""
        load, held, most = StoredTensor.load, [], []

        def counted(self):
            tensor = load(self)
            held.append(1)
            weakref.finalize(tensor, held.pop)
            most.append(len(held))
            return tensor

        monkeypatch.setattr(StoredTensor, "load", counted)
        assert main(["inspect", str(file), "--quiet"]) == 0
        assert len(most) == 3 and max(most) <= 2  # the loop's own name holds the last one


class TestErrors:
    @pytest.mark.parametrize(
        "arguments,match",
        [
            (["nowhere"], "nowhere does not exist"),
            (["{file}", "-r", "0"], "r must be at least 1"),
            (["{file}", "--targets", "up_prok"], "did you mean 'up_proj'?"),
            (["{file}", "--picture", "{file}.nonsense"], "nonsense"),
            (["{file}", "--csv", "{file}/x.csv"], "model.safetensors"),
            ([__file__], "is not a .safetensors file"),
        ],
    )
    def test_one_line(self, arguments, match, file, capsys):
        assert main(["inspect", *(a.format(file=file) for a in arguments)]) == 1
        printed = capsys.readouterr()
        assert match in printed.err and printed.err.startswith("lora-kernels inspect: ")
        assert printed.err.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments",
        [[], ["inspct", "x"], ["inspect"], ["inspect", "x", "-r", "a"],
         ["inspect", "x", "--exact", "--randomized"]],
    )  # fmt: skip
    def test_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2 and "usage: lora-kernels" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "package,extra,arguments",
        [("rich", "cli", []), ("matplotlib", "picture", ["--picture", "x.png"]),
         ("safetensors", "cli", ["--quiet"])],
    )  # fmt: skip
    def test_missing_extra(self, package, extra, arguments, file, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, package, None)
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        assert main(["inspect", str(file), *arguments]) == 1
        error = capsys.readouterr().err
        assert f"needs the package {package}: pip install 'lora-kernels[{extra}]'" in error
        assert error.count("\n") == 1


def test_help_and_version(capsys):
    for arguments, word in (
        (["--help"], "inspect"),
        (["inspect", "--help"], "examples:"),
        (["--version"], __version__),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 0 and word in capsys.readouterr().out


def test_as_a_program(file):
    command = [sys.executable, "-m", "lora_kernels.cli", "inspect", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "down_proj" in done.stdout and done.stderr == ""


def test_entry_point():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("lora-kernels ="))
    module, _, function = line.split('"')[1].partition(":")
    assert getattr(importlib.import_module(module), function) is main


class TestReport:
    def test_trained_layers(self, tmp_path):
        """ν[ΔW] has a column and bars if a layer has it."""
        model = nn.ModuleDict({"a": nn.Linear(20, 30), "b": LoRALinear(20, 30, r=4)})
        with torch.no_grad():
            model["b"].lora_A.add_(0.1)
        rows = inspect_model(model, 4)
        table = magnitude_report.make_table(rows)
        assert "ν[ΔW]" in [column.header.replace("\\", "") for column in table.columns]
        magnitude_report.write_csv(tmp_path / "x.csv", rows)
        a, b = read(tmp_path / "x.csv")
        assert a["nu_update"] == "" and float(b["nu_update"]) == rows[1].nu_update > 0
        magnitude_report.draw(tmp_path / "x.png", rows)
        assert (tmp_path / "x.png").stat().st_size > 1000

    def test_rows_without_values(self, tmp_path):
        """Weights that are zero, not finite, or too small for the rank."""
        weights = torch.zeros(9, 8), torch.full((9, 8), float("nan")), torch.randn(2, 8)
        rows = [measure(weight, 4, name=str(k)) for k, weight in enumerate(weights)]
        assert magnitude_report.make_table(rows).row_count == 4
        magnitude_report.write_csv(tmp_path / "x.csv", rows)
        assert [line["gain"] for line in read(tmp_path / "x.csv")] == ["nan"] * 3
        magnitude_report.draw(tmp_path / "x.png", rows)
        magnitude_report.draw(tmp_path / "y.png", rows[:1])
        adapter = measure_adapter("x", torch.zeros(2, 5), torch.zeros(4, 2), 1.0)
        magnitude_report.draw(tmp_path / "z.png", [adapter])

    def test_no_rows(self, tmp_path):
        for call in (
            lambda: magnitude_report.make_table([]),
            lambda: magnitude_report.write_csv(tmp_path / "x.csv", []),
            lambda: magnitude_report.draw(tmp_path / "x.png", []),
        ):
            with pytest.raises(ValueError, match="no rows"):
                call()
        assert not list(tmp_path.iterdir())
