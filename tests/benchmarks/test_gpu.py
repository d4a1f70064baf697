"""The GPU benchmarks, on a CPU with tiny shapes: what they write, and what they predict."""

from __future__ import annotations

import csv
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need what `make test` installs")

from rich.console import Console  # noqa: E402

from benchmarks.common.harness import Timing  # noqa: E402
from benchmarks.gpu import experts, peers  # noqa: E402
from benchmarks.gpu.__main__ import PARTS, main  # noqa: E402
from benchmarks.gpu.parts import sharded  # noqa: E402
from benchmarks.gpu.parts.grid import to_best_peer  # noqa: E402
from benchmarks.gpu.session import slug  # noqa: E402
from benchmarks.gpu.targets import costs, expert_costs  # noqa: E402
from benchmarks.gpu.targets.costs import H200  # noqa: E402
from benchmarks.gpu.targets.experts import Layer, Projection  # noqa: E402
from benchmarks.gpu.targets.plan import FULL  # noqa: E402
from benchmarks.gpu.targets.predict import lines  # noqa: E402

TINY = replace(
    FULL,
    name="tiny",
    copy_bytes=2**12,
    gemm=32,
    operator_shapes=((32, 16),),
    list_length=2,
    operator_ranks=(2,),
    model=(((16, 16), 2), ((24, 16), 1)),
    init_ranks=(2, 4),
    svd_shapes=1,
    layer_shape=(16, 16),
    layer_tokens=32,
    layer_cases=((2, 0.0), (2, 0.1)),
    grid_shapes=((24, 16),),
    grid_tokens=(8,),
    grid_ranks=(2,),
    decode_tokens=(1, 4),
    decode_rank=2,
    decode_layers=2,
    experts_layer=Layer(2, 2, 8, 16, 16, 8),
    experts_stack=Projection(2, 24, 16, 8),
    experts_rank=8,
    sharded_shape=(24, 16),
    sharded_blocks=2,
    sharded_tokens=4,
    sharded_rank=2,
    rounds=2,
    grid_rounds=1,
    burst_ms=0.1,
    grid_burst_ms=0.1,
)
CPU = torch.device("cpu")
# The files written by each part, with their columns.
FILES = {
    "ceilings": {"ceilings": {"ceiling", "measured", "unit", "h200_earlier"}},
    "operators": {"operators": {"shape", "dtype", "median_ms", "gb_per_s", "share_of_copy", "aim"}},
    "init": {"init": {"projections", "r", "dtype", "median_ms", "floor_ms", "times_floor"}},
    "layer": {
        "layer": {"shape", "tokens", "r", "dropout", "dtype", "pass", "variant", "ratio", "aim"},
    },
    "decode": {"decode": {"shape", "tokens", "r", "layers", "variant", "median_ms", "ratio"}},
    "memory": {"memory": {"shape", "tokens", "variant", "peak_mib", "growth_mib", "ratio", "aim"}},
    "experts": {"experts": {"what", "shape", "tokens", "r", "pass", "variant", "peak_gb", "aim"}},
    "sharded": {
        "sharded": {"what", "variant", "processes", "backend", "ratio", "differing", "aim"},
    },
    "svd": {"init_svd": {"what", "shape", "one_layer_s", "extrapolated_s", "times_ours"}},
    "grid": {
        "layer_grid": {"shape", "tokens", "r", "pass", "clock", "variant", "ours_to_best_peer"},
    },
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(out: Path, *argv: str, plan=TINY) -> int:
    return main([*argv, "--out", str(out)], device=CPU, plan=plan)


def test_every_part_leaves_its_files_and_every_target_is_measured(tmp_path):
    assert run(tmp_path) == 0
    assert set(FILES) == set(PARTS)
    for name, columns in [item for files in FILES.values() for item in files.items()]:
        rows = read(tmp_path / f"{name}.csv")
        assert rows, name
        assert columns | {"device", "torch", "plan"} <= set(rows[0])
        failures = {row.get("failure", "") for row in rows}
        assert failures <= {"", peers.NOT_INSTALLED, "left out of the tiny plan"}
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    table = {row["line"]: row for row in read(tmp_path / "headline.csv")}
    assert list(table) == [line.name for line in lines(H200, TINY)]
    assert all(row["measured"] for row in table.values())
    assert (tmp_path / "headline.png").stat().st_size > 1000


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Drawing pictures would take most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


def test_later_part_keeps_the_earlier_figures(tmp_path, no_pictures):
    assert run(tmp_path, "init") == run(tmp_path, "decode") == 0
    for row in read(tmp_path / "headline.csv"):
        of_svd = row["line"].endswith(("exact SVD", "PiSSA"))
        assert bool(row["measured"]) == (row["line"].startswith(("init", "decode")) and not of_svd)
        assert bool(row["measured_on"]) == bool(row["measured"])


def test_spent_budget_is_said(tmp_path, capsys, no_pictures):
    parts = ("operators", "layer", "decode", "memory", "grid")
    assert run(tmp_path, *parts, "--minutes", "0") == 0
    for name in (*parts[:-1], "layer_grid"):
        assert {row["failure"] for row in read(tmp_path / f"{name}.csv")} <= {
            "skipped: time budget",
            peers.NOT_INSTALLED,
        }
    assert "was spent" in capsys.readouterr().out
    assert not any(row["met"] for row in read(tmp_path / "headline.csv"))


def test_svd_alone_takes_the_time_of_an_earlier_init(tmp_path, no_pictures):
    assert run(tmp_path, "init") == run(tmp_path, "svd") == 0
    rows = [row for row in read(tmp_path / "init_svd.csv") if row["shape"].startswith("all")]
    assert rows and all(float(row["times_ours"]) > 0 for row in rows)


def test_several_parts_run_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ran = []

    def child(command):
        ran.append(command)
        return subprocess.CompletedProcess(command, 1 if "layer" in command else 0)

    monkeypatch.setattr(subprocess, "run", child)
    assert main(["layer", "ceilings", "memory", "--out", str(tmp_path), "--minutes", "3"]) == 1
    assert [command[3] for command in ran] == ["ceilings", "layer", "memory"]
    assert all(command[1:3] == ["-m", "benchmarks.gpu"] for command in ran)
    assert all(command[-1] == str(tmp_path) for command in ran)


def test_without_a_gpu_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "--predict" in err


def predicted(tmp_path: Path, device: str) -> dict[str, dict[str, str]]:
    assert main(["--predict", "--out", str(tmp_path)]) == 0
    return {row["line"]: row for row in read(tmp_path / device / "predicted.csv")}


def microseconds(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[f"{name}_us"]) for name in costs.Cost().parts}


def test_prediction_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(costs.HostTimes, "measured", lambda: costs.HostTimes(300e-6, 1500e-6))
    table = predicted(tmp_path, "nvidia-h200")
    assert not any(row["measured"] or row["measured_ms"] for row in table.values())

    # 32 layers × (4 × 4096² + 3 × 4096 × 11008) elements × 2 bytes: 12.952 GB; thrice at 4.3 TB/s.
    init = table["init, 224 projections, r = 16"]
    assert init["aim"] == "≤ 1.3 × floor"
    assert float(init["floor_ms"]) == pytest.approx(9.0363, rel=1e-4)
    # A, B: 64 B × 32 × (4 × 8192 + 3 × 15104) = 159.91 MB, 37.2 μs more. Six launches of 1 μs, four
    # copies of 4 μs. The host: the first launch after 300 μs, and 8 μs until it knows the end. It
    # answers to the statistics 24 μs after them, while A and B keep the device busy for 53 μs.
    assert microseconds(init) == pytest.approx(
        {
            "host": 308,
            "launches": 6,
            "bytes": 9036.3 + 37.2,
            "flops": 0,
            "serial": 1,
            "workspace": 0,
            "copies": 16,
        },
        rel=1e-4,
    )

    # 2 × 8192 × 4096² flops = 347.95 μs at 790 TFLOP/s; z Bᵀ 2 × 8192 × 4096 × 16: 1.359 μs. The
    # shrink reads x, 67.109 MB, and A, z, 0.262 MB each: 15.729 μs. 1024 tiles on 132: 8 × 0.8 μs.
    layer = table["layer, 8192 tokens, 4096×4096, r = 16, forward"]
    assert float(layer["floor_ms"]) == pytest.approx(0.34795, rel=1e-4)
    ours = 347.947 + 1.359 + 15.729 + 8 * 0.8 + 2
    assert sum(microseconds(layer).values()) == pytest.approx(ours, rel=1e-4)
    assert float(layer["predicted_ms"]) == pytest.approx(1e-3 * ours, rel=1e-4)
    assert float(layer["predicted"]) == pytest.approx(ours / 348.947, rel=1e-4)
    assert microseconds(layer)["serial"] == pytest.approx(6.4)


def test_prediction_of_an_h100_is_slower_where_bytes_count(tmp_path):
    h200, h100 = (predicted(tmp_path, f"nvidia-{name}") for name in ("h200", "h100"))
    assert h200.keys() == h100.keys()
    for name, row in h200.items():
        if row["predicted_ms"]:
            assert float(h100[name]["predicted_ms"]) > 0.98 * float(row["predicted_ms"])
            total = 1e3 * float(row["predicted_ms"])
            assert sum(microseconds(row).values()) == pytest.approx(total, rel=1e-5)
    stats = microseconds(h100["frobenius_stats, 4096×4096, bf16"])
    assert stats["bytes"] == pytest.approx(2 * 4096**2 / 3e6, rel=1e-5)


def test_a_late_host_is_seen_in_the_prediction():
    def cost(first: float, subtraction: float) -> costs.Cost:
        return costs.init_cost(H200, FULL, 16, costs.HostTimes(first, subtraction))

    soon = cost(0.3e-3, 1.5e-3)
    assert cost(1.3e-3, 1.5e-3).total == pytest.approx(soon.total + 1e-3)
    assert cost(0.3e-3, 3.0e-3).total == soon.total  # the statistics take longer
    late = cost(0.3e-3, 6.0e-3)
    assert late.total > soon.total + 2e-3 and late.bytes == soon.bytes


def test_a_host_slower_than_the_device_is_seen_in_a_layer_s_prediction():
    host = costs.HostTimes(layer=250e-6)
    assert costs.layer_costs(H200, 8192, (4096, 4096), 16, False, host=host)[0].host == 0
    small, _ = costs.layer_costs(H200, 64, (4096, 4096), 16, False, host=host)
    assert small.host > 0 and small.total == pytest.approx(250e-6)


def test_host_times_come_from_what_was_measured(tmp_path):
    assert costs.HostTimes.measured(tmp_path) == costs.HostTimes()
    rows = "launch,median_us\nstats_kernel,250\nsubtract_kernel,1250\n"
    (tmp_path / "host_init.csv").write_text(rows, encoding="utf-8")
    assert costs.HostTimes.measured(tmp_path) == costs.HostTimes(250e-6, 1250e-6)
    rows = "tokens,mode,total_us\n512,training,90\n8192,training,110\n8192,inference,80\n"
    (tmp_path / "host.csv").write_text(rows, encoding="utf-8")
    assert costs.HostTimes.measured(tmp_path).layer == pytest.approx(110e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_addmm_peer_has_the_gradients_of_the_naive_one(dropout):
    linear = torch.nn.Linear(7, 5, bias=False).requires_grad_(False)
    naive, addmm = peers.Naive(linear, 3, dropout), peers.Addmm(linear, 3, dropout)
    addmm.load_state_dict(naive.state_dict())
    x, dy = torch.randn(4, 7, requires_grad=True), torch.randn(4, 5)
    results = []
    for layer in (naive, addmm):
        layer.scaling = 1.7
        torch.manual_seed(1)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)])
    torch.testing.assert_close(*results)


def test_projections_of_experts_have_the_same_gradients():
    stacks = [experts.Stack.random(3, *shape, 4, CPU) for shape in ((16, 8), (8, 8))]
    stacks = [replace(stack, weight=stack.weight.float()) for stack in stacks]
    routing = experts.Routing.random(10, 3, 2, CPU)
    routing = replace(routing, weights=routing.weights.detach().float().requires_grad_())
    x, dy = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8)
    wanted = [x, routing.weights, *stacks[0].factors, *stacks[1].factors]
    results = []
    for name in (experts.OURS, experts.SPLIT, experts.FORMULA):
        y = experts.block(x, *stacks, routing, experts.PROJECTIONS[name])
        results.append([y, *torch.autograd.grad(y, wanted, dy)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


def test_prediction_of_experts_by_hand():
    """One parameter [128, 2048, 768] with 4096 rows: W is 402.65 MB; 32 rows an expert."""
    p = FULL.experts_stack
    assert (p.tile, p.padded) == (64, 4096 + 128 * 32)
    ours, formula = expert_costs.stack_costs(H200, p, 16, costs.HostTimes(layer=0.0))
    # Megabytes: x and dX, y and dY in bf16; A and B in fp32; z and dz.
    x, dy, z, A, B = 6.291456, 16.777216, 0.131072, 6.291456, 16.777216
    W = 402.653184
    forward = (x + A + z) + (W + x + dy + B + z)
    backward = (dy + B + z) + (W + x + dy + A + z) + (x + A + z) + (dy + B + z)
    assert ours.bytes == pytest.approx((forward + backward) * 1e6 / 4.3e12, rel=1e-6)
    # PEFT's reads W and writes the sum, writes that one's gradient, and reads this twice.
    merged = 2 * W + 2 * (W + x + dy) + (W + x + dy) + 2 * W
    assert formula.bytes == pytest.approx(merged * 1e6 / 4.3e12, rel=1e-6)
    _, formula = expert_costs.stack_costs(costs.H100, p, 16, costs.HostTimes(layer=0.0))
    assert formula.total == pytest.approx(0.97e-3, rel=2e-3)
    # 133 parts of dB, [16, 2048] in fp32, beside what stays.
    peak = W + 2 * (A + B) + 2 * (x + dy) + 2 * z + 133 * 16 * 2048 * 4e-6
    assert expert_costs.stack_bytes(p, 16) == pytest.approx(peak * 1e6, rel=1e-6)


def test_best_peer():
    timings = [
        Timing("ours", {0: 3.0}),
        Timing("naive", {0: 4.0}),
        Timing("addmm_", {0: 2.0}),
        Timing("PEFT", failure="not installed"),
    ]
    assert to_best_peer(timings) == (1.5, "addmm_")


def test_sharded_is_left_out_with_one_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name == "nccl")
    session = SimpleNamespace(device=torch.device("cuda"), plan=TINY, console=Console(width=150))
    sharded.run(session)
    said = "sharded: left out, it needs 2 GPUs, and there is 1"
    assert capsys.readouterr().out.splitlines() == [said]


def test_sharded_processes_that_hang_are_ended(monkeypatch):
    monkeypatch.setattr(sharded, "measured", lambda device, plan: time.sleep(100))
    with pytest.raises(TimeoutError, match="took longer than 1 s"):
        sharded.rows_of_processes("cpu", TINY, 1.0)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"differing": 1}, "1 entries of W, A, B have other bits"),
        ({"gradient_error": 0.5}, "gradients are 0.5 off"),
        ({"gradient_error": float("nan")}, "gradients are nan off"),
        ({"failure": "fails: RuntimeError: no"}, "fails: RuntimeError: no"),
    ],
)
def test_sharded_says_what_is_wrong(row, text):
    good = {"what": "step", "variant": "FSDP2", "failure": "", "differing": 0}
    sharded.check([good, {"what": "all", "failure": "skipped: time budget"}])
    with pytest.raises(RuntimeError, match=f"step, FSDP2: {text}"):
        sharded.check([good | row])


def test_slug():
    assert slug("NVIDIA H200") == "nvidia-h200"
