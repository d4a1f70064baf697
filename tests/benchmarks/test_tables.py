"""Tables of README and docs: the pages have what the script makes, and it follows the CSV files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from benchmarks.tables import TABLES, tables
from benchmarks.tables.__main__ import main
from benchmarks.tables.aims import init_aim
from benchmarks.tables.results import RESULTS


@pytest.fixture
def results(tmp_path):
    """A copy of the CSV files."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png", "study"))
    return folder


def change(file: Path, column: str, text: str, **facts: str) -> None:
    """Put `text` into a column of the rows that match."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    found = [row for row in rows if all(row[key] == value for key, value in facts.items())]
    assert found
    for row in found:
        row[column] = text
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def page_with(folder: Path, *names: str) -> Path:
    page = folder / "page.md"
    blocks = [f"<!-- table {name} -->\n<!-- end of table {name} -->" for name in names]
    page.write_text("\n\n".join(["Before.", *blocks, "After.\n"]), encoding="utf-8")
    return page


def line_of(table: str, start: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(f"| {start} |"))


def test_the_pages_have_what_the_script_makes(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out + "\nRun python -m benchmarks.tables"


def test_check_names_the_page_that_differs_and_changes_nothing(tmp_path, results, capsys):
    page = page_with(tmp_path, "model", "host")
    before = page.read_text(encoding="utf-8")
    arguments = [str(page), "--results", str(results)]
    assert main(["--check", *arguments]) == 1
    assert "page.md differs" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == before
    assert main(arguments) == 0
    assert main(["--check", *arguments]) == 0
    made, filled = tables(results), page.read_text(encoding="utf-8")
    assert made["model"] in filled and made["host"] in filled
    assert filled.startswith("Before.\n\n<!-- table model -->\n| ") and filled.endswith("After.\n")


def test_a_changed_number_changes_the_table_and_the_check(tmp_path, results, capsys):
    page = page_with(tmp_path, "model")
    arguments = [str(page), "--results", str(results)]
    assert main(arguments) == 0
    change(results / "model.csv", "median_ms", "98765.4", variant="PEFT pissa")
    assert main(["--check", *arguments]) == 1
    assert main(arguments) == 0
    assert "| PEFT, `pissa` | 98.8 |" in page.read_text(encoding="utf-8")


# Of each table: a file, a column, rows, a number that nothing else has, and how it is printed.
CHANGES = {
    "init": ("init.csv", "median_ms", {"variant": "PEFT olora"}, "77123", "77,123"),
    "init_ranks": ("init_ranks.csv", "ratio", {"variant": "LoRAM r = 64"}, "1.0361", "1.04"),
    "layer": ("layer.csv", "ratio", {"variant": "plain composition"}, "7.123", "7.12"),
    "avx2_init": ("avx2/init.csv", "median_ms", {"variant": "LoRAM"}, "71.23", "71.2"),
    "avx2_svd": ("avx2/instruction_sets.csv", "ratio", {"operator": "minor_svd"}, "0.1234", "8.10"),
    "avx2_linear": ("avx2/instruction_sets.csv", "ratio", {"operator": "linear"}, "7.123", "7.12"),
    "model": ("model.csv", "ratio", {"variant": "add_lora loram"}, "7.123", "**7.1**"),
    "starts": ("starts.csv", "median_ms", {"start": "eva"}, "71234", "71.2"),
    "svd": ("svd_speedups.csv", "times_faster", {"peer": "scikit-learn"}, "71.23", "71.2"),
    "stream": ("stream_runs.csv", "init_loram_over_cp", {"run": "3"}, "1.25", "80 %"),
    "dora": ("dora.csv", "ratio", {"variant": "PEFT lora.Linear, DoRA"}, "7.123", "7.12"),
    "gpu_targets": ("nvidia-h100/predicted.csv", "predicted", {"aim": "≤ 15 ms"}, "9.871", "9.87"),
    "demo": ("demo.csv", "validation_loss_after", {"method": "LoRAM"}, "1.23456", "→ 1.235"),
    "families": ("families.csv", "verify", {"built": "ok"}, "FAIL", "**1448**"),
    "experts": ("experts.csv", "kept_mib", {"variant": "LoRAExperts"}, "71.23", "71.2 / "),
    "sharded": ("sharded.csv", "loss error", {"method": "PEFT, LoRA"}, "7.1e-05", "loss 7e-5"),
    "host": ("host.csv", "ours_us", {"tokens": "1"}, "71.23", "71.2"),
    "portable": ("portable.csv", "error_bf16", {"start": "pissa"}, "7.123e-02", "7.12 %"),
    "headline": ("svd_speedups.csv", "times_faster", {"peer": "scikit-learn"}, "71.23", "71.2"),
    "magnitudes": ("magnitudes.csv", "gain", {"r": "16"}, "0.77123", "median of 0.77"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_number_is_from_its_file(name, results):
    file, column, facts, number, shown = CHANGES[name]
    before = tables(results)[name]
    change(results / file, column, number, **facts)
    after = tables(results)[name]
    assert after.count(shown) > before.count(shown)
    assert f"benchmarks/results/{file}" in after


def test_the_caption_has_the_columns_of_the_file(results):
    for column, text in {
        "device": "Some CPU", "threads": "7", "kernels": "avx9", "torch": "9.8.7", "peft": "6.5.4"
    }.items():  # fmt: skip
        change(results / "layer.csv", column, text)
    caption = tables(results)["layer"].split("\n\n")[-1].replace("\n", " ")
    for text in ("Some CPU, 7 threads", "kernels avx9", "torch 9.8.7 (AVX512)", "PEFT 6.5.4"):
        assert text in caption


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [-0.1, 0.1])
def test_a_number_that_misses_its_aim_is_bold(results, dtype, more):
    ratio = init_aim(dtype, 16) + more
    change(results / "init.csv", "ratio", str(ratio), variant="LoRAM", dtype=dtype, r="16")
    cells = line_of(tables(results)["init"], f"4096×4096, {dtype}, r = 16").split(" | ")
    assert cells[3] == (f"**{ratio:.2f}**" if more > 0 else f"{ratio:.2f}")


def test_columns_that_a_file_has_not_are_left_out(results):
    heads = tables(results)["init"].partition("\n")[0]
    assert "PEFT `pissa`" in heads
    text = (results / "init.csv").read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if ",PEFT pissa," not in line]
    (results / "init.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    (results / "svd.csv").unlink()
    heads = tables(results)["init"].partition("\n")[0]
    assert "PEFT `pissa`" not in heads and "svd_lowrank" not in heads


def test_a_gpu_that_was_measured_fills_the_targets(results):
    for file in results.glob("nvidia-*/headline.csv"):
        file.unlink()
    start = "layer, 8192 tokens, 4096×4096, r = 16, forward"
    empty = tables(results)["gpu_targets"]
    assert line_of(empty, start).endswith(" |  |") and "Nothing is measured yet" in empty
    folder = results / "nvidia-x9"
    folder.mkdir()
    rows = [(start, "1.0612"), ("init, 224 projections, r = 16", "skipped: time | budget")]
    (folder / "headline.csv").write_text(
        "line,aim,measured,measured_ms,device,cpu,cuda,torch\n"
        + "".join(
            f'"{line}",,{value},0.3712,NVIDIA X9,AMD EPYC,13.0,2.13.0\n' for line, value in rows
        ),
        encoding="utf-8",
    )
    filled = tables(results)["gpu_targets"]
    assert "measured, X9" in filled.partition("\n")[0]
    assert line_of(filled, start).endswith("| **1.06 ×**, 0.371 ms |")
    assert r"| skipped: time \| budget |" in filled
    caption = filled.split("\n\n")[-1].replace("\n", " ")
    assert "NVIDIA X9 with AMD EPYC" in caption and "CUDA 13.0" in caption


def test_an_unknown_name_is_an_error_with_the_page_and_the_names(tmp_path, capsys):
    page = page_with(tmp_path, "layer", "layers")
    before = page.read_text(encoding="utf-8")
    assert main([str(page)]) == 1
    message = capsys.readouterr().err
    assert "page.md 'layers'" in message and "did you mean 'layer'" in message
    assert all(name in message for name in TABLES)
    assert page.read_text(encoding="utf-8") == before


def test_one_wrong_page_leaves_all_others_alone(tmp_path):
    right = page_with(tmp_path, "layer")
    wrong = tmp_path / "wrong.md"
    wrong.write_text("<!-- table layer -->\nnothing more\n", encoding="utf-8")
    before = right.read_text(encoding="utf-8")
    assert main([str(right), str(wrong)]) == 1
    assert right.read_text(encoding="utf-8") == before


def test_markers_within_a_line_are_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A table stands between `<!-- table NAME -->` and its end.\n", encoding="utf-8")
    assert main([str(page), "--check"]) == 0
