"""A sweep adds up parts of a tile; the rules themselves, the whole square and the kernels say what must come out."""

import pytest
import torch
from attention_layer import Inputs, make_inputs

from vllm_s2o import S2OParams, prefill_attention
from vllm_s2o.quality.selection import METHODS, S2O, heads_of, method
from vllm_s2o.quality.selection.blocks import PBS, BlockMean, FlashPrefill, FlexPrefill, XAttention
from vllm_s2o.quality.selection.exact import TopK, TopP
from vllm_s2o.quality.selection.ranked import RANKINGS
from vllm_s2o.quality.sweep import FIGURES, sweep, visits


class FineTopP(TopP):
    """In steps so small that some bound is near each density."""

    values = (1 - 1e-7, 1 - 1e-6, 0.99999, 0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6)


TILE = 32
SMALL = {"tile": TILE, "key_block": 16}
RULES = {
    "s2o": S2O(64, **SMALL),
    "s2o_every_block": S2O(64, interval=1, growing=False, **SMALL),
    "s2o_sorted": S2O(64, num_classes=None, **SMALL),
    **{f"s2o_{ranking}": S2O(128, ranking, interval=2, **SMALL) for ranking in RANKINGS},
    "pbs": PBS(TILE, 64),
    "pbs_one_block": PBS(TILE, TILE),
    "block_mean": BlockMean(TILE),
    "flashprefill": FlashPrefill(TILE),
    "flashprefill_bare": FlashPrefill(TILE, sink=1, window=1, full=0),
    "xattention": XAttention(TILE, stride=4),
    "flexprefill": FlexPrefill(TILE, min_budget=64),
    "flexprefill_query_aware": FlexPrefill(TILE, min_budget=64, tau=0.5),
    "top_k": TopK(),
    "top_p": FineTopP(),
}
# A multiple of all blocks; and a rest that is no multiple of any, 1 token in the last tile.
LENGTHS = [384, 417]


@pytest.fixture(scope="module", params=LENGTHS)
def inputs(request) -> Inputs:
    return make_inputs(request.param)


@pytest.fixture(scope="module")
def swept(inputs):
    return sweep(*inputs, RULES, tile_size=TILE)


def by_the_rule(inputs: Inputs, name: str, value: float) -> list[torch.Tensor]:
    """Pairs that the oracle visits, for each head [tokens, tokens] bool."""
    tokens = len(inputs.key)
    pairs = []
    for head in heads_of(inputs.query, inputs.key, inputs.scale):
        visited = RULES[name].select(head, value)
        if len(visited) != tokens:
            visited = visited.repeat_interleave(TILE, 0)[:tokens]
        pairs.append(visited & inputs.causal)
    return pairs


@pytest.mark.parametrize("name", RULES)
def test_a_sweep_is_what_the_rule_gives_over_the_whole_square(inputs, swept, name):
    rule = RULES[name]
    total = len(inputs.key) * (len(inputs.key) + 1) // 2
    assert all(swept[name][figure].shape == (4, len(rule.values)) for figure in FIGURES)
    for index in (0, 2, len(rule.values) // 2, len(rule.values) - 1):
        for head, pairs in enumerate(by_the_rule(inputs, name, rule.values[index])):
            found = {figure: swept[name][figure][head, index].item() for figure in FIGURES}
            # Weights are summed in another order: where a row keeps the fewest that suffice, one more may be needed.
            slack = 1e-4 if name == "top_p" else 0.5 / total
            assert found["density"] == pytest.approx(pairs.sum().item() / total, abs=slack)
            weights = inputs.weights(head)
            dense, kept = weights @ inputs.values_of(head), weights * pairs
            mass = kept.sum(-1, keepdim=True)
            mse = (kept @ inputs.values_of(head) / mass - dense).square().mean().item()
            assert found["mse"] == pytest.approx(mse, rel=1e-3, abs=1e-9)
            assert found["rel_error"] == pytest.approx(mse / dense.square().mean().item(), rel=1e-3, abs=1e-9)
            assert found["retained_mass"] == pytest.approx(mass.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_less_looseness_visits_more(swept, name):
    density = swept[name]["density"]
    assert (density.diff(dim=1) <= 0).all() and (density[:, 0] > density[:, -1]).all()
    assert (swept[name]["masked_density"] >= density).all()


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith("s2o")])
def test_a_threshold_of_0_is_dense_attention(swept, name):
    assert RULES[name].values[0] == 0
    assert (swept[name]["density"][:, 0] == 1).all()
    assert (swept[name]["rel_error"][:, 0] < 1e-11).all(), "but for rounding"
    assert torch.allclose(swept[name]["retained_mass"][:, 0], torch.ones(4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("implementation", ["naive", "cpu"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
@pytest.mark.parametrize("more", [{}, {"dense_tail": 40, "reference_len": 100}], ids=["plain", "as-shipped"])
def test_s2o_stops_where_the_kernels_stop(inputs, implementation, interval, ranking, more):
    """For each threshold the same pairs and the same output as `prefill_attention`, from one pass over the history."""
    tokens, page = len(inputs.key), 16
    rule = S2O(64, ranking.replace("_", ""), interval=interval, values=(0.0, 0.003, 0.02, 0.1), **SMALL, **more)
    pages = -(-tokens // page)
    caches = [
        torch.cat([t, t.new_zeros(pages * page - tokens, *t.shape[1:])]).unflatten(0, (pages, page))
        for t in (inputs.key, inputs.value)
    ]
    mine = []
    for index, head in enumerate(heads_of(inputs.query, inputs.key, inputs.scale)):
        tiles = [visited["s2o"] for _, visited in visits(head, inputs.values_of(index), {"s2o": rule}, TILE)]
        mine.append((torch.cat([tile.output for tile in tiles], 1), sum(tile.pairs for tile in tiles)))
    seen = set()
    for at, threshold in enumerate(rule.values):
        out, stats = prefill_attention(
            inputs.query, *caches, block_table=torch.arange(pages, dtype=torch.int32)[None],
            query_start_loc=torch.tensor([0, tokens], dtype=torch.int32),
            seq_lens=torch.tensor([tokens], dtype=torch.int32), scale=inputs.scale, return_stats=True,
            params=S2OParams(
                threshold=threshold, segment_len=64, tile_size=TILE, key_block=16, stop_interval=interval,
                ranking=ranking, **{"dense_tail": 0, **more},
            ),
            implementation=implementation,
        )  # fmt: skip
        for head, (output, pairs) in enumerate(mine):
            assert pairs[at].item() == stats.visited_pairs[0, head].item()
            torch.testing.assert_close(output[at], out[:, head], rtol=1e-4, atol=1e-5)
        seen.add(stats.visited_pairs.sum().item())
    assert len(seen) == len(rule.values), "each threshold stops elsewhere"


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith("top")])
def test_no_method_is_below_the_bound(swept, name):
    """At each of a method's densities, exact top-p with no more pairs errs less."""
    density, error = swept[name]["density"].mean(0), swept[name]["mse"].mean(0)
    bound_density, bound = swept["top_p"]["density"].mean(0), swept["top_p"]["mse"].mean(0)
    compared = 0
    for at in range(len(density)):
        affordable = bound[bound_density <= density[at]]
        if len(affordable) and error[at] > 1e-9:  # below that it is rounding
            assert affordable.min() < error[at]
            compared += 1
    assert compared


def test_masked_work_is_whole_tiles_times_whole_blocks(inputs, swept):
    tokens = len(inputs.key)
    total, tiles = tokens * (tokens + 1) // 2, -(-tokens // TILE)
    blocks = sum(range(1, tiles + 1)) * TILE * TILE
    assert torch.allclose(swept["block_mean"]["masked_density"][:, 0], torch.tensor(blocks / total).double())
    # A tile of PBS-Attn computes its whole segment, two tiles' worth, as far as the prompt goes.
    pairs = sum(min(at // 2 * 2 + 2, tokens / TILE) for at in range(tiles)) * TILE * TILE
    assert torch.allclose(swept["pbs"]["masked_density"][:, 0], torch.tensor(pairs / total).double())
    # S2O's own segment is cut to key blocks of 16.
    ends = [-(-min((at + 1) * TILE, tokens) // 16) * 16 for at in range(tiles)]
    assert torch.allclose(swept["s2o"]["masked_density"][:, 0], torch.tensor(sum(ends) * TILE / total).double())
    assert torch.equal(swept["top_p"]["masked_density"], swept["top_p"]["density"]), "single pairs mask nothing"


def test_gains_before_an_outlier_count():
    """One key has a logit 130 above all others, and is ranked last: what was visited before must not be 0."""
    plain = make_inputs(256, num_heads=2, num_kv_heads=1)
    query, key = plain.query.clone(), plain.key.clone()
    key[100] = 0
    key[100, 0, 5] = 700
    query[:, 0, 5], query[:, 1, 5] = 1.05, -2.1
    inputs = plain._replace(query=query, key=key)
    rule = S2O(64, interval=1, values=(0.0, 0.02, 0.2), **SMALL)
    found = sweep(*inputs, {"s2o": rule}, tile_size=TILE)["s2o"]
    for index, head in enumerate(heads_of(inputs.query, inputs.key, inputs.scale)):
        for at, value in enumerate(rule.values):
            pairs = (rule.select(head, value).repeat_interleave(TILE, 0) & inputs.causal).sum().item()
            assert found["density"][index, at].item() * 256 * 257 / 2 == pytest.approx(pairs)
    assert found["mse"].isfinite().all()


def test_progress_is_told_all_pairs(inputs):
    told = []
    sweep(*inputs, {"block_mean": RULES["block_mean"]}, tile_size=TILE, progress=told.append)
    assert sum(told) == 4 * len(inputs.key) * (len(inputs.key) + 1) // 2


def test_half_precision_is_computed_in_single():
    inputs = make_inputs(192)
    halves = [t.bfloat16() for t in inputs[:3]]
    found = sweep(*halves, inputs.scale, {"pbs": RULES["pbs"]}, tile_size=TILE)
    expected = sweep(*(t.float() for t in halves), inputs.scale, {"pbs": RULES["pbs"]}, tile_size=TILE)
    assert torch.equal(found["pbs"]["mse"], expected["pbs"]["mse"])


def test_bad_arguments_are_told_in_a_sentence(inputs):
    query, key, value, scale = inputs
    with pytest.raises(ValueError, match=r"^key and value must be of one shape, got \[\d+, 2, 32\] and "):
        sweep(query, key, value[:-1], scale, RULES, tile_size=TILE)
    with pytest.raises(ValueError, match=r"^query must be .* with heads a multiple of kv_heads, got .*, 3, 32\]"):
        sweep(query[:, :3], key, value, scale, RULES, tile_size=TILE)
    with pytest.raises(ValueError, match=r"^s2o selects for tiles of 32 queries, not of 128$"):
        sweep(query, key, value, scale, RULES)
    with pytest.raises(ValueError, match=r"^PBS-Attn's segment must be a multiple of its block: 48 is none of 32$"):
        PBS(32, 48)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_names(name):
    assert method(name).values


def test_variants_of_s2o_have_names():
    assert method("s2o_512") == S2O()
    assert method("s2o_512_kvhead") == S2O(ranking="kvhead") != S2O()
    assert method("s2o_256_mean_first1") == S2O(256, "mean", interval=1)
    assert method("s2o_256_first1_tail64_ref8192") == S2O(256, interval=1, dense_tail=64, reference_len=8192)
    assert method("s2o_256_every1_sorted") == S2O(256, interval=1, growing=False, num_classes=None)
    assert method("s2o_256").layouts == method("s2o_256_every2").layouts != method("s2o_256_mean").layouts


@pytest.mark.parametrize(
    "name", ["s2o", "s2o_", "s2o_100", "s2o_0", "s2o_256_best", "s2o_256_every0", "s2o_256_tail", "dense", ""]
)
def test_what_is_no_method_is_told_in_a_sentence(name):
    with pytest.raises(ValueError, match=rf"^There is no method {name}: variants of S2O are .*Others are pbs, "):
        method(name)
