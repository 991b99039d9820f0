"""What a config costs: against logits and attention that are computed whole."""

import math

import causal_lm
import pytest
import torch

from vllm_s2o.config import load_config
from vllm_s2o.quality import cost
from vllm_s2o.quality.capture import attention_inputs, dense_attention, open_model

TOKENS = 700
# Random weights attend to everything: few rows at a time, and few keys, find a stop.
GIVEN = {"min_seq_len": 1, "segment_len": 128, "tile_size": 16, "key_block": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(str(causal_lm.save(tmp_path_factory.mktemp("llama"), initializer_range=0.1)), TOKENS)


@pytest.fixture(scope="module")
def model(source):
    return source.load(torch.device("cpu"))


@pytest.fixture(scope="module")
def ids(source):
    return source.prompt("prose", TOKENS)


def test_without_a_threshold_nothing_is_lost(source, model, ids):
    found, layers = cost.measure(model, ids, load_config(source.traits, {**GIVEN, "threshold": 0}))
    assert found.density == 1.0 and found.rel_error < 1e-9 and found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1.0 and found.perplexity == pytest.approx(found.dense_perplexity, rel=1e-5)
    assert len(layers) == source.traits.num_layers


def test_the_dense_figures_are_the_models_own(source, model, ids):
    found, _ = cost.measure(model, ids, load_config(source.traits, {**GIVEN, "threshold": 0.3}))
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert found.dense_perplexity == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_layers_and_next_tokens_of_a_sparse_run(source, model, ids):
    config = load_config(source.traits, {**GIVEN, "threshold": 0.3, "layers": [{"layers": 1, "threshold": "dense"}]})
    found, layers = cost.measure(model, ids, config)
    by_layer = {layer.layer: layer for layer in layers}
    assert by_layer[1].density == 1.0 and by_layer[1].rel_error == 0.0
    assert by_layer[0].density < 0.9 and by_layer[0].rel_error > 1e-6
    (first,) = attention_inputs(model, ids, [0])  # what enters layer 0 is the same in both runs
    exact, (out, density) = dense_attention(first), cost.sparse_attention(first, config.layer(0))
    error = (out - exact).square().mean() / exact.square().mean()
    assert by_layer[0] == (0, pytest.approx(density), pytest.approx(error.item(), rel=1e-4))
    assert 0 < found.kl < 1 and found.agreement < 1.0
    assert found.density == pytest.approx(sum(layer.density for layer in layers) / len(layers))


def test_figures_of_next_tokens_against_whole_logits(model):
    torch.manual_seed(0)
    size, ids = model.config.hidden_size, [token % 256 for token in range(cost.POSITIONS + 9)]
    dense, sparse = torch.randn(2, len(ids), size)
    kl, agreement, surprise, dense_surprise = cost.next_tokens(model, dense, sparse, ids)
    with torch.no_grad():
        a, b = (model.get_output_embeddings()(states).log_softmax(-1) for states in (dense, sparse))
    assert kl == pytest.approx(
        torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean").item(), rel=1e-4
    )
    assert agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).float().mean().item())
    targets = torch.tensor(ids[1:])
    assert surprise == pytest.approx(torch.nn.functional.nll_loss(b[:-1], targets).item(), rel=1e-5)
    assert dense_surprise == pytest.approx(torch.nn.functional.nll_loss(a[:-1], targets).item(), rel=1e-5)


def test_a_config_that_leaves_all_dense_is_refused(source, model, ids):
    given = {"layers": [{"layers": f"0-{source.traits.num_layers - 1}", "threshold": "dense"}]}
    with pytest.raises(cost.CostError, match="there is nothing to measure"):
        cost.measure(model, ids, load_config(source.traits, {**GIVEN, **given}))


def test_sparse_attention_is_judged_whatever_the_shortest_sparse_prompt_is(source, model, ids):
    found, above = (
        cost.measure(model, ids, load_config(source.traits, {**GIVEN, "threshold": 0.3, "min_seq_len": least}))
        for least in (1, TOKENS + 1)
    )
    assert above == found and found[0].density < 1


def test_the_mean_over_prompts():
    one = cost.Cost(0.2, 1e-3, 0.9, 0.1, 4.0, 2.0)
    other = one._replace(density=0.4, perplexity=9.0)
    found = cost.mean([one, other])
    assert found.density == pytest.approx(0.3) and found.perplexity == pytest.approx(6.0)
    assert found.dense_perplexity == pytest.approx(2.0)
