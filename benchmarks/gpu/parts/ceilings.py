"""The device's ceilings, compared with those of an H200."""

from __future__ import annotations

from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import Session
from benchmarks.gpu.targets.costs import H200


def run(session: Session) -> None:
    """Write ceilings.csv and .png."""
    machine, plan = session.machine, session.plan
    rows = [
        {
            "ceiling": "copy, bytes read + written",
            "size": f"{plan.copy_bytes / 2**20:g} MiB",
            "dtype": "fp32",
            "measured": machine.copy / 1e12,
            "unit": "TB/s",
            "h200_earlier": H200.copy / 1e12,
        },
        {
            "ceiling": "matmul, random data",
            "size": f"{plan.gemm}³",
            "dtype": "bf16",
            "measured": machine.matmul / 1e12,
            "unit": "TFLOP/s",
            "h200_earlier": H200.matmul / 1e12,
        },
    ]
    shown = {"ceiling": "ceiling", "size": "size", "dtype": "dtype", "measured": "measured"}
    shown |= {"unit": "unit", "h200_earlier": "an H200 earlier"}
    session.publish("ceilings", f"Ceilings, {session.environment['device']}", rows, shown)
    bars = [
        Bar(f"{row['ceiling']}, {row['unit']}", row["measured"] / row["h200_earlier"])
        for row in rows
    ]
    title = f"Ceilings, {session.environment['device']}"
    aim_bars(session.out / "ceilings.png", title, bars, "relative to an H200 measured earlier")
