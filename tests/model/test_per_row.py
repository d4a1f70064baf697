"""`adapters_per_row`: each row of a batch with its own adapter, bit for bit as in a batch alone."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    adapters_per_row,
    disable_adapters,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.model.install import adapted_layers
from tests.support.exhaustive import EXHAUSTIVE, thinned
from tests.support.packages import needs_transformers
from tests.support.quantized import linear_8bit
from tests.support.running import move, quiet, snapshot, token_ids

pytestmark = needs_transformers
NAMES = ["b", None, "a", "b", "a"]
IDS = token_ids(5, 7)
PADDED = torch.ones_like(IDS)
PADDED[1, :3] = PADDED[2, :2] = 0


def adapted(model, **options):
    """With adapters "a" and "b", which differ in rank."""
    options = {"residual": "implicit", "target_modules": "all-linear"} | options
    for name, r in (("a", 3), ("b", 2)):
        quiet(model, LoRAConfig(r=r, **options), adapter_name=name)
        move(model, 0.05, seed=r)
    return model.eval()


def tiny(kind: str, **options):
    from tests.support import tiny_models

    return getattr(tiny_models, kind)(**options)


@torch.no_grad()
def alone(model, run, names=NAMES):
    """`run(rows)` of the rows of each adapter on their own, a result for each row."""
    found = {}
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name is None:
            with disable_adapters(model):
                results = run(rows)
        else:
            set_adapter(model, name)
            results = run(rows)
        found |= dict(zip(rows, results, strict=True))
    return [found[row] for row in range(len(names))]


@torch.no_grad()
def check(model, run, names=NAMES):
    """The rows of one batch have the bits of batches alone; the results."""
    want = alone(model, run, names)
    with adapters_per_row(model, names):
        got = run(list(range(len(names))))
    assert len(got) == len(want)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "mamba", "bert"])
def test_a_forward_has_the_bits_of_batches_alone(kind, dtype):
    model = adapted(tiny(kind).to(dtype))
    got = check(model, lambda rows: model(IDS[rows], attention_mask=PADDED[rows]).logits)
    assert not torch.equal(got[0], model(IDS).logits[0])  # of "a", the last one that was active


HOW = [{}, {"num_beams": 2}, {"cache_implementation": "static"}]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("kind", "dtype", "how"), thinned(product(["llama", "gpt2", "mixtral"], DTYPES, HOW), 5)
)
def test_generate_has_the_bits_of_batches_alone(kind, dtype, how):
    """With a static cache, `generate` makes one mask for all rows, as here for rows alone."""
    model = adapted(tiny(kind).to(dtype))
    mask = PADDED if "cache_implementation" not in how else torch.ones_like(PADDED)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def tokens(rows):
        out = model.generate(IDS[rows], attention_mask=mask[rows], **options, **how)
        return out.sequences if "num_beams" in how else torch.stack(out.logits, 1)

    check(model, tokens)


def test_several_sequences_of_a_row_have_its_adapter():
    model = adapted(tiny("llama"))

    def tokens(rows):
        out = model.generate(
            IDS[rows], max_new_tokens=3, pad_token_id=0, num_beams=3, num_return_sequences=2
        )
        return out.view(len(rows), 2, -1)

    check(model, tokens)


def test_a_cache_goes_from_call_to_call():
    from transformers import DynamicCache

    model = adapted(tiny("llama"))

    def twice(rows):
        cache = DynamicCache(config=model.config)
        first = model(IDS[rows, :4], past_key_values=cache)
        assert first.past_key_values is cache and cache.get_seq_length() == 4
        assert cache.layers[0].keys.shape[0] == len(rows)
        return model(IDS[rows, 4:], past_key_values=cache).logits

    check(model, twice)


def test_an_encoder_and_a_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)
    model = adapted(T5ForConditionalGeneration(config).eval())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    check(model, lambda rows: model.generate(IDS[rows], attention_mask=PADDED[rows], **options))
    check(model, lambda rows: model.encoder(IDS[rows]).last_hidden_state)


def test_values_are_those_of_peft(tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel

    ours = adapted(tiny("llama"))
    for name in ("a", "b"):
        save_adapter(ours, tmp_path / name, adapter_name=name, format="peft")
    theirs = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.eval()
    names = ["__base__" if name is None else name for name in NAMES]
    with torch.no_grad(), adapters_per_row(ours, names):
        got = ours(IDS, attention_mask=PADDED).logits
    with torch.no_grad():
        want = theirs(IDS, attention_mask=PADDED, adapter_names=names).logits
    torch.testing.assert_close(got[PADDED.bool()], want[PADDED.bool()], rtol=1e-4, atol=1e-5)


def test_an_absorbed_start_is_added_back_for_the_base():
    model = tiny("llama")
    ids = IDS[:3]
    base = model(ids).logits
    quiet(model, LoRAConfig(r=2, residual="absorb"), adapter_name="a")
    move(model, 0.05)
    model.eval()
    got = check(model, lambda rows: model(ids[rows]).logits, [None, "a", None])
    torch.testing.assert_close(got[0], base[0], rtol=1e-4, atol=1e-5)


def test_saved_modules_biases_embeddings_and_partial_adapters():
    model = tiny("gpt2")
    options = {"residual": "implicit", "bias": "all", "modules_to_save": ["ln_f"]}
    quiet(model, LoRAConfig(r=2, target_modules=["wte", "c_attn"], **options), adapter_name="a")
    move(model, 0.05)
    quiet(model, LoRAConfig(r=3, target_modules=["c_fc"], residual="implicit"), adapter_name="b")
    move(model, 0.05, seed=1)
    check(model.eval(), lambda rows: model(IDS[rows]).logits)


def test_dora_and_quantized_layers():
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp.up_proj = linear_8bit(block.mlp.up_proj)
    check(adapted(model), lambda rows: model(IDS[rows]).logits)


def test_compiled_models():
    """In whole graphs, and not compiled again for another context."""
    layers = [nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)]
    model = adapted(nn.Sequential(*layers))
    x, graphs = torch.randn(5, 8), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    got = check(run, lambda rows: run(x[rows]))
    known = len(graphs)
    with torch.no_grad(), adapters_per_row(run, NAMES):
        assert torch.equal(run(x), got)
    assert len(graphs) == known
    if EXHAUSTIVE:
        model.compile(backend=backend, fullgraph=True, dynamic=True)
        check(model, lambda rows: model(x[rows]), NAMES[:3])


class Vision(nn.Module):
    """A model whose images are not the rows of the batch, with experts that see flat tokens."""

    def __init__(self):
        super().__init__()
        self.see, self.mix = nn.Linear(4, 8), nn.Linear(8, 8)
        self.flat = nn.Linear(8, 8)

    def forward(self, x, images):
        x = self.mix(x) + self.see(images).mean(0)
        return self.flat(x.flatten(0, 1)).view(x.shape)


def test_arguments_that_are_not_of_the_rows():
    torch.manual_seed(0)
    model = adapted(Vision(), target_modules=["mix", "flat"])
    x, images = torch.randn(5, 3, 8), torch.randn(7, 4)
    check(model, lambda rows: model(x[rows], images))
    model = adapted(Vision(), target_modules=["see"])
    with pytest.raises(ValueError, match=r"see cannot have an adapter .* is 7, .* got 5 names"):
        check(model, lambda rows: model(x[rows], images))


class Transposed(nn.Module):
    """Rows first, but not for the layer inside; `images` makes the call one of the whole batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x, images=None):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def test_layers_with_the_batch_in_dimension_1():
    model = Transposed().eval()
    quiet(model, LoRAConfig(r=2, target_modules=["linear1"]))
    move(model)
    x, names = torch.randn(3, 3, 8), ["default", None, "default"]
    check(model.eval(), lambda rows: model(x[rows]), names)
    with pytest.raises(ValueError, match=r"^layer cannot have .* in dimension 1"):
        check(model, lambda rows: model(x[rows], torch.ones(7)), names)


class Masked(nn.Module):
    """A model that calls the padding [rows, L] what torch's encoder calls its mask [L, S]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x, mask, src_mask=None):
        x = self.layer(self.conv(x).mT, src_mask, src_key_padding_mask=mask)
        return x.masked_fill(mask[..., None], 0)


@pytest.mark.parametrize("length", [5, 6])
def test_masks_of_the_rows_and_masks_of_positions(length):
    torch.manual_seed(0)
    model = adapted(Masked(), target_modules=["conv", "self_attn", "linear1"])
    x, mask = torch.randn(5, 4, length), torch.zeros(5, length, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    for other in (None, causal):
        check(model, lambda rows, other=other: model(x[rows], mask[rows], other))


def test_masks_of_compiled_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer = torch.compile(adapted(layer, target_modules=["linear1"]), backend="eager")
    x, causal = torch.randn(5, 5, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    check(layer, lambda rows: layer(x[rows], causal), NAMES)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modules_of_torchscript():
    scripted = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))
    model = adapted(nn.Sequential(nn.Linear(4, 4), scripted), target_modules=["0"])
    x = torch.randn(5, 4)
    check(model, lambda rows: model(x[rows]))


def test_rows_keep_their_memory_format():
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 2)]
    model = adapted(nn.Sequential(*layers), target_modules=["0", "2"])
    model.to(memory_format=torch.channels_last)
    x = torch.randn(5, 8, 6, 5)
    check(model, lambda rows: model(x[rows].contiguous(memory_format=torch.channels_last)))
    with torch.no_grad(), adapters_per_row(model, NAMES):
        got = model(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_model_is_as_before_after_an_error_and_inside():
    model = adapted(tiny("llama"))
    set_adapter(model, "a")
    want = model(IDS).logits
    unchanged = snapshot(model)
    with pytest.raises(RuntimeError, match="mine"), adapters_per_row(model, NAMES):
        model(IDS)
        assert {layer.active_adapter for layer in adapted_layers(model).values()} == {"a"}
        other = copy.deepcopy(model)
        raise RuntimeError("mine")
    unchanged()
    assert torch.equal(model(IDS).logits, want)
    assert torch.equal(other(IDS).logits, want)


def test_an_error_in_a_call_leaves_the_model_as_it_was():
    model = adapted(tiny("llama"))
    unchanged = snapshot(model)
    handle = model.model.norm.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError), adapters_per_row(model, NAMES):
        model(IDS)
    handle.remove()
    unchanged()


def test_threads_wait_for_each_other():
    model = adapted(tiny("llama"))
    want = alone(model, lambda rows: model(IDS[rows]).logits)
    found = []
    with torch.no_grad(), adapters_per_row(model, NAMES):

        def run():
            with torch.no_grad():
                found.extend(model(IDS).logits for _ in range(3))

        threads = [threading.Thread(target=run) for _ in range(3)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(found) == 9
    assert all(torch.equal(g, w) for got in found for g, w in zip(got, want, strict=True))


def test_disabled_adapters_and_adapters_that_change_inside():
    model = adapted(tiny("llama"))
    with adapters_per_row(model, NAMES):
        with disable_adapters(model):
            base = model(IDS).logits
        mixed = model(IDS).logits
        set_adapter(model, "b")
        assert torch.equal(model(IDS).logits, mixed)
        quiet(model, LoRAConfig(r=2, residual="implicit"), adapter_name="c")
        assert torch.equal(model.eval()(IDS).logits, mixed)
        assert torch.equal(base[1], mixed[1]) or torch.allclose(base[1], mixed[1])
        unload_lora(model)
        with pytest.raises(ValueError, match="has no adapters"):
            model(IDS)
    assert torch.equal(model(IDS).logits, base)


def test_gradients_reach_the_inputs():
    model = adapted(tiny("llama"))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(IDS)
    embedded.requires_grad_()
    with adapters_per_row(model, NAMES):
        model(inputs_embeds=embedded).logits.square().sum().backward()
    assert bool(embedded.grad.abs().sum((1, 2)).all())


def test_bad_inputs(tmp_path):
    model = adapted(tiny("llama"))
    unchanged = snapshot(model)

    def enter(names, m=model):
        with adapters_per_row(m, names):
            m(IDS)

    with pytest.raises(ValueError, match=r"unknown adapter 'aa': .*a, b; did you mean 'a'\?"):
        enter(["aa"] * 5)
    for names in ("a", {"a"}, [1] * 5):
        with pytest.raises(TypeError, match="names must be"):
            enter(names)
    with pytest.raises(ValueError, match="names is empty"):
        enter([])
    for count in (1, 3, 10):
        with pytest.raises(ValueError, match=rf"its first dimension is 5, .* got {count} names"):
            enter(["a"] * count)
    with pytest.raises(ValueError, match="got 2 names"), adapters_per_row(model, ["a", None]):
        model(IDS[:4])  # not a row's repetitions
    with (
        adapters_per_row(model, NAMES),
        pytest.raises(ValueError, match="in a context of adapters_per_row already"),
    ):
        enter(NAMES)
    with adapters_per_row(model, NAMES), pytest.raises(ValueError, match="loss has no part for"):
        model(IDS, labels=IDS)
    with pytest.raises(ValueError, match="has no adapters"):
        enter(["a"], tiny("llama"))
    with pytest.raises(ValueError, match="training mode"):
        enter(NAMES, model.train())
    model.eval()
    with adapters_per_row(model, NAMES), pytest.raises(ValueError, match="for inference"):
        model.train()(IDS)
    model.eval()
    unchanged()


def test_dataclasses_and_calls_without_tensors():
    @dataclass(frozen=True)
    class Out:
        y: torch.Tensor
        count: int = 3

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x = torch.tensor(x) if isinstance(x, list) else x
            return Out(self.linear(x))

    model, x = adapted(Model()), torch.randn(5, 4)
    check(model, lambda rows: model(x[rows]).y)
    with torch.no_grad(), adapters_per_row(model, NAMES):
        assert model(x).count == 3
        assert torch.equal(model(x.tolist()).y, model(x).y)
