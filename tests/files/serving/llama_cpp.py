"""llama.cpp's logits of a last token, by the library inside the package xllamacpp.

    python llama_cpp.py LIBRARY MODEL.gguf VOCABULARY IDS [ADAPTER.gguf]

prints them as JSON. It is a process of its own: a version with other structures may crash it.
"""

from __future__ import annotations

import ctypes
import json
import sys


class Parameters(ctypes.Structure):
    """Larger than those of the library, which fills and reads the beginning."""

    _fields_ = (("bytes", ctypes.c_byte * 1024),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id")),
        ("logits", ctypes.c_void_p),
    )


_POINTER, _IDS = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
_SIGNATURES = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (Parameters, ()),
    "llama_context_default_params": (Parameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, Parameters)),
    "llama_init_from_model": (_POINTER, (_POINTER, Parameters)),
    "llama_adapter_lora_init": (_POINTER, (_POINTER, ctypes.c_char_p)),
    "llama_set_adapters_lora": (
        ctypes.c_int32,
        (_POINTER, ctypes.POINTER(_POINTER), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)),
    ),
    "llama_batch_get_one": (Batch, (_IDS, ctypes.c_int32)),
    "llama_decode": (ctypes.c_int32, (_POINTER, Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, ctypes.c_int32)),
}


def main(library: str, model: str, vocabulary: str, ids: str, *adapter: str) -> None:
    lib = ctypes.CDLL(library)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    context = lib.llama_init_from_model(loaded, lib.llama_context_default_params())
    for file in adapter:
        lora = lib.llama_adapter_lora_init(loaded, file.encode())
        if not lora:
            sys.exit("refused")
        lora, scale = (_POINTER * 1)(lora), (ctypes.c_float * 1)(1.0)
        if lib.llama_set_adapters_lora(context, lora, 1, scale) != 0:
            sys.exit("not set")
    tokens = json.loads(ids)
    array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points to it
    if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) != 0:
        sys.exit("not decoded")
    print(json.dumps(lib.llama_get_logits_ith(context, -1)[: int(vocabulary)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
