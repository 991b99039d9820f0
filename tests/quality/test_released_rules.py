"""The rules of other projects against their released code, where the variable VLLM_S2O_PEERS names checkouts:

    VLLM_S2O_PEERS="pbs=PATH flashprefill=PATH flexprefill=PATH xattention=PATH"

Their Triton kernels run in Triton's interpreter, those that it still knows: PBS-Attn's attention is taken from its
plain path. Compared is what is selected, and the output of PBS-Attn and FlashPrefill too.
"""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_layer import make_inputs
from processes import ROOT

from vllm_s2o.quality.selection import blocks, heads_of

CHECKOUTS = dict(entry.split("=", 1) for entry in os.environ.get("VLLM_S2O_PEERS", "").split())
BLOCK = 128

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are to run in Triton's interpreter")


def checkout(name: str) -> Path:
    if name not in CHECKOUTS:
        pytest.skip(f"no checkout of {name} is named in VLLM_S2O_PEERS")
    return Path(CHECKOUTS[name])


@pytest.fixture(params=[1280, 1300], ids=["whole blocks", "a short last block"])
def inputs(request):
    return make_inputs(request.param, head_size=64)


@pytest.fixture
def peers(monkeypatch):
    """benchmarks/peers.py: it knows how to import each project."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("peers")
    for name in [name for name in sys.modules if name in ("peers", "inputs") or name.partition(".")[0] == "pbs_attn"]:
        del sys.modules[name]


def repeated(inputs) -> list[torch.Tensor]:
    """[1, heads, tokens, size] each, as many KV heads as heads."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (inputs.key, inputs.value))
    return [t.transpose(0, 1)[None].contiguous() for t in (inputs.query, key, value)]


def ours(rule: blocks.BlockRule, inputs, value: float) -> torch.Tensor:
    """[heads, query blocks, key blocks] bool"""
    return torch.stack([rule.blocks(head, value) for head in heads_of(inputs.query, inputs.key, inputs.scale)])


def output(inputs, index: int, visited: torch.Tensor) -> torch.Tensor:
    """One head's attention over visited [tiles, tokens]."""
    pairs = visited.repeat_interleave(BLOCK, 0)[: len(inputs.key)]
    weights = inputs.weights(index) * pairs
    return weights @ inputs.values_of(index) / weights.sum(-1, keepdim=True)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the diagonal: later blocks are nobody's."""
    causal = torch.ones(expected.shape[-2:], dtype=torch.bool).tril()
    assert (causal & ~expected).any(), "of a selection of everything nothing could be told"
    assert torch.equal(found & causal, expected & causal)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_pbs_attn(inputs, peers, threshold, monkeypatch):
    monkeypatch.syspath_prepend(checkout("pbs"))
    module = importlib.import_module("pbs_attn.src.pbs")
    rule = blocks.PBS()
    with (
        peers.recorded(module, "permuted_block_selection") as selected,
        peers.recorded(module, "apply_permutation") as permuted,
    ):
        out = module.permuted_block_sparse_attn_fwd(
            *repeated(inputs), block_size=BLOCK, segment_size=rule.segment, threshold=threshold, causal=True,
            use_triton=False,
        )[0]  # fmt: skip
    inside = selected[0][2]
    earlier = inside.cumsum(1) == 0  # its own segment is computed whole, and later ones are not
    for index, head in enumerate(heads_of(inputs.query, inputs.key, inputs.scale)):
        order = rule.permutation(head)
        assert torch.equal(order, permuted[0][1][0, index])
        mine, expected = rule.chosen(rule.scores(head, order), order, threshold), selected[0][1][0, index]
        assert (earlier & ~expected).any()
        assert torch.equal(mine & earlier, expected & earlier)
        torch.testing.assert_close(
            output(inputs, index, rule.select(head, threshold)), out[index], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_block_means_are_pbs_attns_baseline(inputs, peers, threshold, monkeypatch):
    """Its baseline's own file imports a CUDA extension, but scores and choice are PBS-Attn's functions."""
    monkeypatch.syspath_prepend(checkout("pbs"))
    module = importlib.import_module("pbs_attn.src.utils")
    padded = [torch.nn.functional.pad(t, (0, 0, 0, -t.shape[2] % BLOCK)) for t in repeated(inputs)]
    count = padded[0].shape[2] // BLOCK
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    expected = module.select_blocks(module.block_pooled_attn(*padded[:2], BLOCK, causal), threshold)[0]
    expected[..., 0] = True
    assert_equal(ours(blocks.BlockMean(), inputs, threshold), expected | torch.eye(count, dtype=torch.bool))


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.18])
def test_flashprefill(inputs, peers, alpha, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    inputs = inputs._replace(query=4 * inputs.query)  # logits with mean keys are close to one another
    problem = SimpleNamespace(**inputs._asdict(), num_tokens=len(inputs.key))
    peer = peers.FlashPrefill(problem, checkout("flashprefill"))
    for kernel in (peer.module.compute_mean_vector, peer.module.compute_block_score, peer.module._flash_forward):
        kernel.configs = kernel.configs[:1]  # nothing is to be timed
    # The interpreter makes integers of a mask that joins a number's comparison with a tensor's, and refuses to store.
    store = InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_masked_store",
        lambda self, pointers, values, mask, *rest: store(
            self, pointers, values, TensorHandle(mask.data.astype(bool), mask.dtype), *rest
        ),
    )
    with torch.compiler.set_stance("force_eager"), peers.recorded(peer.module, "deal_output_score") as found:
        out = peer.attend(alpha)
    places, counts = found[0][0][0], found[0][1][0]  # [query blocks, key blocks, heads], [query blocks, heads]
    count = len(places)
    listed = torch.arange(count)[None, :, None] < counts[:, None]
    expected = torch.zeros(count, count + 1, places.shape[2], dtype=torch.bool)
    expected = expected.scatter(1, torch.where(listed, places, count), True)[:, :count].permute(2, 0, 1)
    rule = blocks.FlashPrefill()
    assert_equal(ours(rule, inputs, alpha), expected)
    for index, head in enumerate(heads_of(inputs.query, inputs.key, inputs.scale)):
        torch.testing.assert_close(output(inputs, index, rule.select(head, alpha)), out[:, index], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.98])
def test_flexprefill(inputs, peers, gamma, tau):
    module = peers.load_file(checkout("flexprefill") / "flex_prefill" / "ops" / "flex_prefill_attention.py")
    count = -(-len(inputs.key) // BLOCK)
    places = module.get_active_blocks(*(t[None] for t in inputs[:3]), BLOCK, gamma, 2, count, tau)[0]
    expected = torch.stack([torch.zeros(count * count, dtype=torch.bool).index_fill(0, p, True) for p in places])
    found = ours(blocks.FlexPrefill(tau=tau, min_budget=2 * BLOCK), inputs, gamma)
    assert_equal(found, expected.unflatten(1, (count, count)))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_xattention(peers, threshold, stride):
    """The rule is that of the prompt's later chunks. In the first one the released code writes the diagonal over the
    mask of the first block: it forces one block less than it counts, and takes one more than it needs."""
    source = checkout("xattention") / "xattn" / "src"
    kernels, utils = peers.load_file(source / "kernels.py"), peers.load_file(source / "utils.py")
    chunk = 128 * stride  # its products take 128 groups of tokens at a time
    tokens = chunk + 5 * BLOCK + 20
    inputs = make_inputs(tokens, num_heads=2, num_kv_heads=1, head_size=64)
    query, key = (torch.nn.functional.pad(t, (0, 0, 0, 2 * chunk - tokens)) for t in repeated(inputs)[:2])
    groups = chunk // stride, 2 * chunk // stride
    weights = kernels.flat_group_gemm_fuse_reshape(query[:, :, chunk:].contiguous(), key, stride, *groups)
    sums = kernels.softmax_fuse_block_sum(
        weights, BLOCK // stride, BLOCK // stride, *groups, -(-tokens // stride),
        1.4426950408889634 * inputs.scale / stride,
    )  # fmt: skip
    expected = utils.find_blocks_chunked(sums, chunk // BLOCK, threshold, None, False, "prefill", True)[0]
    found = ours(blocks.XAttention(stride=stride), inputs, threshold)[:, chunk // BLOCK :]
    rows, count = found.shape[1:]
    expected = expected[:, :rows, :count]
    causal = torch.ones(rows, count, dtype=torch.bool).tril(chunk // BLOCK)
    assert (causal & ~expected).any()
    assert torch.equal(found, expected & causal)
