"""`lora-kernels init`: computes starts for a checkpoint that may be larger than memory."""

from __future__ import annotations

import argparse
import sys
import time

from .._utils.progress import byte_bar
from ..files.checkpoint.initialize import InitSummary, initialize, starts_from_files
from ..files.checkpoint.residual import ADAPTER
from ..files.io.journal import Ranks
from ..init import get_initializer, initializer_names
from ..model.config import LoRAConfig
from ..model.report import listed
from ._options import (
    RANKS,
    Commands,
    add_command,
    add_dtype,
    add_overwrite,
    add_path,
    add_quiet,
    add_start,
    add_targets,
    dtype_of,
    targets_of,
)

_DESCRIPTION = f"""\
Computes a start for the linear layers of a model, tensor by tensor, without loading the model.

--residual absorb (the default if the start is not zero): OUT_DIR becomes a complete model, from
whose weights the start was subtracted, and OUT_DIR/adapter becomes the start, as a PEFT adapter of
that model. Both together are the original model. Train the adapter with plain PEFT; then
`lora-kernels convert` turns the trained adapter into an adapter of the original model.

--residual implicit (the default if the start is zero): the base does not change. OUT_DIR becomes a
native adapter of MODEL_DIR, for lora_kernels.load_adapter.

The layers are those of the model that transformers makes of MODEL_DIR, without those that PEFT
would not find again. If transformers does not know the model, layers are chosen by their names, and
the summary says so. Shards, their order, headers and names, the index and all other files are kept;
weights in other formats are not copied. Peak memory is the largest weight, its copies if it is
cast, and 128 MiB; experts are processed one by one. Repeat the same command to continue a killed
run.

{RANKS}--device cuda then gives each process of a machine a GPU of its own.
"""
_EXAMPLES = """\
examples:
  lora-kernels init models/Llama-3-8B start --method loram -r 16 --lora-alpha 16
  lora-kernels init models/Llama-3-8B start --method pissa -r 64 --targets q_proj v_proj
  lora-kernels init models/Llama-3-8B adapter --method loram --residual implicit
  lora-kernels init models/gpt2-fp32 start --dtype bfloat16 --device cuda
  lora-kernels init models/Qwen3-30B-A3B start -r 16 \\
      --target-parameters experts.gate_up_proj experts.down_proj
  torchrun --nproc-per-node 8 -m lora_kernels.cli init models/Llama-3-70B start --method pissa

training on OUT_DIR:
  model = AutoModelForCausalLM.from_pretrained("start")
  model = PeftModel.from_pretrained(model, "start/adapter", is_trainable=True)
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "init", "compute a start for a model on disk", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "MODEL_DIR", "folder of a Hugging Face model with safetensors files")
    add_path(parser, "OUT_DIR", "a new folder")
    names = [name for name in initializer_names() if starts_from_files(get_initializer(name))]
    add_start(parser, names)
    add_targets(parser)
    parser.add_argument(
        "--target-parameters",
        nargs="+",
        metavar="NAME",
        help="3-D parameters of experts, by their names or last parts (experts.gate_up_proj "
        "experts.down_proj): each expert gets a start of its own",
    )
    parser.add_argument(
        "--exclude", nargs="+", metavar="NAME", help="layers to exclude, as for --targets"
    )
    parser.add_argument(
        "--residual", choices=("absorb", "implicit"), default="auto", help="see above"
    )
    add_dtype(parser)
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="s is ALPHA / r (default 8)"
    )
    parser.add_argument("--rslora", action="store_true", help="s is ALPHA / sqrt(r)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random starts (default 0)")
    parser.add_argument(
        "--device", default="cpu", help="where starts are computed: cpu (default), cuda ..."
    )
    add_overwrite(parser, "OUT_DIR")
    add_quiet(parser, "summary")
    parser.set_defaults(run=_init, resumes=True)


def _init(options: argparse.Namespace) -> None:
    config = LoRAConfig(
        r=options.r,
        target_modules=targets_of(options),
        exclude_modules=options.exclude,
        target_parameters=options.target_parameters,
        lora_alpha=options.lora_alpha,
        use_rslora=options.rslora,
        init_lora_weights=options.method,
        residual=options.residual,
    )
    ranks = Ranks.of_environment()
    quiet = options.quiet or not ranks.is_main
    begin = time.perf_counter()
    with byte_bar("init", not quiet) as progress:
        done = initialize(
            options.model_dir,
            options.out_dir,
            config,
            dtype=dtype_of(options),
            device=options.device,
            seed=options.seed,
            overwrite=options.overwrite,
            sync=options.sync,
            progress=progress,
            ranks=ranks,
        )
    if not quiet:
        print(_summary(done, options, time.perf_counter() - begin), file=sys.stdout)


def _summary(done: InitSummary, options: argparse.Namespace, seconds: float) -> str:
    size = f"{done.size / 1e9:.2f} GB in {seconds:.1f} s"
    if done.resumed:
        size += f", {done.resumed / 1e9:.2f} GB in earlier runs"
    head = f"{done.layers} layers start with {options.method}, r = {options.r} ({size})"
    out = options.out_dir
    for reason in dict.fromkeys(done.skipped.values()):
        names = [name for name, why in done.skipped.items() if why == reason]
        head += f"\nnot started: {listed(names)}: {reason}"
    if done.assumption:
        head += f"\n{done.assumption}"
    if done.residual == "implicit":
        return f"{head}\n{out}: a native adapter of {options.model_dir}, for load_adapter"
    return (
        f"{head}\n{out}: the model minus the start; {out / ADAPTER}: the start, for PEFT\n"
        f"after training: lora-kernels convert TRAINED ADAPTER --start {out / ADAPTER}"
    )
