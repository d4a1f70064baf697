"""A sharded model on two devices, with NCCL: `add_lora`, a step with FSDP2, tensor parallelism.

With only one GPU, the part is skipped, and a line says so. On a CPU it runs with gloo.
"""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.common.shapes import shape_name
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.sharded import LARGEST_ERROR, measured
from benchmarks.gpu.targets.plan import Plan

PROCESSES = 2
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
LONGEST = 120.0  # seconds for both processes, with imports; also ends a hanging collective


def missing(device: torch.device) -> str:
    """Why the part cannot run here; empty if it can."""
    if not dist.is_available():
        return "torch is built without torch.distributed"
    backend = BACKENDS[device.type]
    if not dist.is_backend_available(backend):
        return f"torch is built without {backend}"
    if device.type == "cuda" and torch.cuda.device_count() < PROCESSES:
        return f"it needs {PROCESSES} GPUs, and there is {torch.cuda.device_count()}"
    return ""


def work(rank: int, kind: str, plan: Plan, folder: str, seconds: float) -> None:
    """Run one process; the first process writes its rows to the folder."""
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    dist.init_process_group(
        BACKENDS[kind],
        store=dist.FileStore(f"{folder}/store", PROCESSES),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=seconds),
        device_id=device if kind == "cuda" else None,
    )
    rows = measured(device, plan)
    if rank == 0:
        torch.save(rows, f"{folder}/rows")
    dist.barrier()
    dist.destroy_process_group()


def rows_of_processes(kind: str, plan: Plan, seconds: float) -> list[dict[str, object]]:
    """The rows of the first process; raises if a process fails, or takes longer than `seconds`."""
    # A fork saves the imports, but is not possible in a process that has used CUDA.
    method = "spawn" if kind == "cuda" or torch.cuda.is_initialized() else "fork"
    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + seconds
        arguments = (kind, plan, folder, seconds)
        context = multiprocessing.start_processes(
            work, arguments, PROCESSES, join=False, start_method=method
        )
        try:
            while not context.join(1.0):
                if time.monotonic() > end:
                    raise TimeoutError(f"the processes took longer than {seconds:.0f} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return torch.load(Path(folder) / "rows")


def run(session: Session) -> None:
    """Write sharded.csv and .png."""
    plan, kind = session.plan, session.device.type
    reason = missing(session.device)
    if reason:
        session.console.print(f"sharded: left out, {reason}", highlight=False)
        return
    if session.over:
        rows: list[dict[str, object]] = [{"what": "all", "failure": SKIPPED}]
    else:
        rows = rows_of_processes(kind, plan, min(LONGEST, max(session.seconds_left, 10.0)))
    facts = {"processes": PROCESSES, "backend": BACKENDS[kind], "blocks": plan.sharded_blocks}
    facts |= {"shape": shape_name(plan.sharded_shape), "tokens": plan.sharded_tokens}
    facts |= {"r": plan.sharded_rank, "dtype": "bf16", "adapter_dtype": "fp32"}
    rows = [{**row, **facts} for row in rows]
    shown = {"what": "what", "variant": "layout", "median_ms": "ms", "ratio": "× the first"}
    shown |= {"aim": "aim", "differing": "other bits", "gradient_error": "error of gradients"}
    shown |= {"failure": "failure"}
    title = f"{plan.sharded_blocks} blocks on {PROCESSES} devices, {session.environment['device']}"
    session.publish("sharded", title, rows, shown)
    bars = [
        Bar(f"{row['what']}: {row['variant']}", row["ratio"], row.get("aim") or None)
        for row in rows
        if not row["failure"]
    ]
    aim_bars(session.out / "sharded.png", title, bars, "× the first of each group")
    check(rows)


def check(rows: list[dict[str, object]]) -> None:
    """Raise RuntimeError for a result that is wrong, not only slow."""
    for row in rows:
        where = f"{row['what']}, {row.get('variant')}"
        if row["failure"] and row["failure"] != SKIPPED:
            raise RuntimeError(f"{where}: {row['failure']}")
        if row.get("differing"):
            raise RuntimeError(f"{where}: {row['differing']} entries of W, A, B have other bits")
        if not row.get("gradient_error", 0.0) <= LARGEST_ERROR:
            raise RuntimeError(f"{where}: gradients are {row['gradient_error']} off")
