"""The rules of each engine: what it does with an adapter, according to its source.

An engine is a function from an adapter (and its base's configuration) to a `Verdict`. If an engine
changes a rule, change it here, together with the version in `as_of`.
"""

from __future__ import annotations

from . import diffusers, llama_cpp, ollama, peft, sglang, vllm

ENGINES = {
    engine.name: engine
    for engine in (
        vllm.ENGINE,
        sglang.ENGINE,
        llama_cpp.ENGINE,
        ollama.ENGINE,
        diffusers.ENGINE,
        peft.ENGINE,
    )
}
