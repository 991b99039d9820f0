"""Captured queries, keys and values are those that the model's own attention computed with."""

import functools
import gc
import math
import sys
import weakref

import causal_lm
import pytest
import torch
from processes import ROOT, run

from vllm_s2o.config import load_config
from vllm_s2o.quality import capture as module
from vllm_s2o.quality.capture import CaptureError, attention_inputs, capture, load, save
from vllm_s2o.quality.text import first_tokens

TOKENS = 300
IDS = torch.randint(256, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def layers_of(model):
    return model.base_model.layers


def passes_through(part, model, ids=IDS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters and leaves a part of each layer's attention, [tokens, features], when the model runs by itself."""
    seen, hooks = [], []
    for layer in layers_of(model):
        submodule = getattr(layer.self_attn, part)
        hooks.append(submodule.register_forward_hook(lambda _, given, out: seen.append((given[0][0], out[0]))))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def dense(layer) -> torch.Tensor:
    """[tokens, heads * size], written out: the whole square."""
    group = layer.query.shape[1] // layer.key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (layer.key, layer.value))
    logits = torch.einsum("qhd,khd->hqk", layer.query, key) * layer.scale
    causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return causal_lm.save(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "granite"])
def test_what_is_captured_gives_the_models_own_attention(kind):
    """Against eager attention, which is another code. Granite's scale is its own, Qwen3 normalises before RoPE."""
    own = {"attention_multiplier": 0.05} if kind == "granite" else {"sliding_window": None}
    model = causal_lm.make(kind, **own if kind in ("granite", "mistral") else {})
    model.set_attn_implementation("eager")
    expected = [given for given, _ in passes_through("o_proj", model)]
    found = attention_inputs(model, IDS, [0, 1, 2])
    assert model.config._attn_implementation == "eager", "as it was"
    for layer, own in zip(found, expected, strict=True):
        assert layer.query.shape == (TOKENS, causal_lm.NUM_HEADS, causal_lm.HEAD_SIZE)
        assert layer.key.shape == layer.value.shape == (TOKENS, causal_lm.NUM_KV_HEADS, causal_lm.HEAD_SIZE)
        torch.testing.assert_close(dense(layer), own, rtol=1e-3, atol=1e-4)
    assert {layer.scale for layer in found} == {0.05 if kind == "granite" else causal_lm.HEAD_SIZE**-0.5}


def test_only_the_wanted_layers_are_kept_in_their_order():
    model = causal_lm.make()
    everything = attention_inputs(model, IDS, [0, 1, 2])
    found = attention_inputs(model, IDS, [2, 0])
    assert [layer.index for layer in found] == [2, 0]
    assert torch.equal(found[0].query, everything[2].query) and torch.equal(found[1].value, everything[0].value)
    assert not torch.equal(everything[0].query, everything[2].query)


def test_nothing_holds_the_model_or_the_layers_afterwards():
    """At 64K tokens they are gigabytes."""
    model = causal_lm.make()
    (layer,) = attention_inputs(model, IDS, [1])
    ends = weakref.ref(model), weakref.ref(layer.query)
    del model, layer
    gc.collect()
    assert [end() for end in ends] == [None, None]


def test_no_square_of_tokens_exists(monkeypatch):
    """Of the kernels that PyTorch has, only those run that hold a block at a time; and no mask is made."""
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    allowed, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*tensors, attn_mask=None, **options):
        assert attn_mask is None
        allowed.append(set(_cur_sdpa_kernel_backends()))
        return sdpa(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    attention_inputs(causal_lm.make(), IDS, [0])
    assert allowed == [{SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION}] * causal_lm.NUM_LAYERS


@pytest.mark.parametrize(
    "kind, fields, said",
    [
        ("mistral", {"sliding_window": 64}, "layer 0 has a sliding window of 64 tokens"),
        ("gemma2", {"sliding_window": 4096, "attn_logit_softcapping": 30.0}, "layer 0 has a soft cap on its logits"),
    ],
)
def test_attention_that_is_not_plain_is_refused(kind, fields, said):
    with pytest.raises(CaptureError, match=rf"^The attention of {said}: S2O runs no such layer\.$"):
        attention_inputs(causal_lm.make(kind, **fields), IDS, [1])


def test_a_window_that_holds_the_prompt_is_none():
    (layer,) = attention_inputs(causal_lm.make("mistral", sliding_window=TOKENS), IDS, [1])
    assert len(layer.query) == TOKENS


def test_a_model_that_goes_around_the_interface_is_refused(monkeypatch):
    model = causal_lm.make()
    for layer in layers_of(model):
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(CaptureError, match=r"^LlamaForCausalLM ran without calling transformers' attention interface"):
        attention_inputs(model, IDS, [1])


# -- from a checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, factor", [(causal_lm.CONTEXT, 1.0), (4 * causal_lm.CONTEXT, 4.0)])
def test_a_prompt_beyond_the_context_runs_with_yarn(checkpoint, tokens, factor):
    """YaRN turns slow frequencies slower, leaves fast ones alone, and makes queries and keys longer."""
    from transformers import AutoTokenizer

    captured = capture(str(checkpoint), tokens, [0])
    assert (captured.num_tokens, captured.rope_factor) == (tokens, factor)
    (layer,) = captured.layers
    assert len(layer.query) == tokens
    ids = first_tokens(AutoTokenizer.from_pretrained(checkpoint), "code", 16)
    plain = passes_through("k_proj", causal_lm.make(), ids)[0][1].unflatten(
        -1, (causal_lm.NUM_KV_HEADS, -1)
    )  # before RoPE
    longer = 1 + 0.1 * math.log(factor)
    torch.testing.assert_close(layer.key[:16].norm(dim=-1), plain.norm(dim=-1) * longer, rtol=1e-4, atol=1e-5)
    # The halves of a head are the two coordinates that turn together: the fastest pair and the slowest one.
    half = causal_lm.HEAD_SIZE // 2
    for pair, frequency in ((0, 1.0), (half - 1, 10_000 ** -((half - 1) / half) / factor)):
        before = torch.complex(plain[..., pair], plain[..., pair + half])
        after = torch.complex(layer.key[:16, :, pair], layer.key[:16, :, pair + half])
        expected = torch.polar(torch.tensor(longer), torch.arange(16) * frequency)[:, None]
        torch.testing.assert_close(after / before, expected.expand_as(before), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "rope, said",
    [
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "plain RoPE, and this model's is linear"),
        (None, "plain RoPE, and this model's is missing"),
    ],
)
def test_rope_that_cannot_be_extended_is_refused(rope, said):
    config = causal_lm.make().config
    config.rope_parameters = rope
    assert module.extend_rope(config, causal_lm.CONTEXT) == 1.0
    with pytest.raises(
        CaptureError, match=rf"ends at 512 tokens and cannot be extended to 513 .*: that takes {said}\.$"
    ):
        module.extend_rope(config, causal_lm.CONTEXT + 1)


def test_default_layers_are_the_first_middle_and_last_sparse_one(checkpoint, monkeypatch):
    from transformers import AutoConfig

    smollm2 = module.ModelTraits("SmolLM2-135M-Instruct", "LlamaForCausalLM", 30, 9, 3, 64)
    assert module.default_layers(smollm2) == [0, 15, 29]
    dense = {"layers": [{"layers": [0, 29], "threshold": "dense"}]}
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_config", functools.partial(load_config, additional=dense))
        assert module.default_layers(smollm2) == [1, 15, 28]
    traits = module.model_traits(str(checkpoint), AutoConfig.from_pretrained(checkpoint))
    assert traits == module.ModelTraits(str(checkpoint), "LlamaForCausalLM", 3, 4, 2, 64)
    assert module.default_layers(traits) == [0, 1, 2]


def test_a_file_holds_what_was_captured_and_where_it_comes_from(checkpoint, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("to be or not to be " * 50)
    captured = capture(str(checkpoint), 64, [2, 0], str(own))
    assert [layer.index for layer in captured.layers] == [0, 2]
    assert captured.versions["torch"].split("+")[0] == torch.__version__.split("+")[0] and set(captured.versions) == {
        "torch",
        "transformers",
        "python",
    }
    save(captured, tmp_path / "folder" / "a.safetensors")
    again = load(tmp_path / "folder" / "a.safetensors")
    assert again._replace(layers=()) == captured._replace(layers=())
    assert again.text == str(own) and again.traits.num_layers == 3
    for layer, kept in zip(captured.layers, again.layers, strict=True):
        assert (layer.index, layer.scale) == (kept.index, kept.scale)
        assert all(torch.equal(getattr(layer, part), getattr(kept, part)) for part in ("query", "key", "value"))


def test_the_command_writes_a_file(checkpoint, tmp_path):
    out = tmp_path / "a.safetensors"
    command = [sys.executable, "-P", "-m", "vllm_s2o.quality.capture", checkpoint, "--tokens", "1024", "--out", out]
    told = run([*command, "--text", "prose"], ROOT, PYTHONPATH=str(ROOT))
    assert told == f"{out}: layers 0, 1, 2, 1024 tokens of prose, YaRN x2"
    assert load(out).layers[0].query.shape == (1024, 4, 64)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tokens", "0"], "A prompt has at least 1 token, not 0."),
        (["--tokens", "8", "--layers", "3"], "There is no layer 3: {model} has layers 0 to 2."),
        (["--tokens", "8", "--layers", "-1"], "There is no layer -1: {model} has layers 0 to 2."),
        (["--tokens", "8", "--text", "poetry"], "The text poetry cannot be read: No such file or directory; "),
    ],
)
def test_bad_input_is_told_in_a_sentence(checkpoint, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setattr(sys, "argv", ["capture", str(checkpoint), "--out", str(tmp_path / "unwritten"), *arguments])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code.startswith("capture: " + said.format(model=checkpoint))
    assert "\n" not in caught.value.code
    assert not (tmp_path / "unwritten").exists()


def test_a_model_that_is_none_is_told_in_a_sentence(tmp_path):
    with pytest.raises(CaptureError, match=r"^The model .* cannot be loaded: .*\.$"):
        capture(str(tmp_path), 8)


def test_a_file_that_cannot_be_written_or_read_is_told_in_a_sentence(checkpoint, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CaptureError, match=r"^Cannot write .*a: .*\.$"):
        save(capture(str(checkpoint), 8, [0]), tmp_path / "file" / "a")
    with pytest.raises(CaptureError, match=r"^Cannot read .*missing: .*\.$"):
        load(tmp_path / "missing")
    with pytest.raises(CaptureError, match=r"^Cannot read .*file: .*\.$"):
        load(tmp_path / "file")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CaptureError, match=r"other holds no captured attention\.$"):
        load(tmp_path / "other")
