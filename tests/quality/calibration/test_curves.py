"""The sample stands for the whole prompt."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from attention_layer import make_inputs

from vllm_s2o.attention import plan_step
from vllm_s2o.params import S2OParams
from vllm_s2o.plan import causal_pairs
from vllm_s2o.quality.calibration.curves import EVERY, TAUS, dense_share, layer_curves, least_density, rule_of, sample
from vllm_s2o.quality.selection import S2O, tiles_of
from vllm_s2o.quality.sweep import sweep


def test_tiles_come_from_all_of_the_prompt_and_from_every_place_of_a_segment():
    places = set()
    for layer in range(30):
        tiles = sample(8192, 128, 0, "a text", layer)
        assert [tile // EVERY for tile in tiles] == list(range(8))
        places.update(tile % 4 for tile in tiles)  # of segments of 512
    assert places == {0, 1, 2, 3}


def test_the_seed_decides():
    assert sample(8192, 128, 0, "a text", 3) == sample(8192, 128, 0, "a text", 3)
    others = [sample(8192, 128, *given) for given in ((1, "a text", 3), (0, "another", 3), (0, "a text", 4))]
    assert all(other != sample(8192, 128, 0, "a text", 3) for other in others)


@pytest.mark.parametrize("tokens, count", [(128, 1), (300, 3), (1024, 8), (2048, 8), (16384, 16), (16385, 16)])
def test_short_prompts_have_enough_tiles(tokens, count):
    tiles = sample(tokens, 128, 0, "a text", 0)
    assert len(set(tiles)) == count and max(tiles) < -(-tokens // 128)


@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
def test_the_rule_is_what_the_parameters_say(ranking):
    params = S2OParams(segment_len=256, ranking=ranking, stop_interval=3, num_classes=64, tile_size=64, key_block=32)
    rank = {"kv_head": "kvhead", "query_head": "queryhead"}[ranking]
    assert rule_of(params) == S2O(256, rank, interval=3, num_classes=64, tile=64, key_block=32, values=TAUS)


@pytest.mark.parametrize("tokens, tail", [(8192, 0), (8192, 128), (8191, 128), (1000, 300), (200, 500)])
def test_the_dense_end_is_that_of_the_plan(tokens, tail):
    params = S2OParams(segment_len=256, dense_tail=tail)
    waves = plan_step([tokens], [tokens], params, 2).waves
    ends = [
        wave.segments[tile.segment].query_pos + tile.first + row + 1
        for wave in waves for tile in wave.tiles if tile.share == 0 for row in range(tile.rows)
    ]  # fmt: skip
    assert dense_share(tokens, params) == pytest.approx(sum(ends) / causal_pairs(tokens, tokens))


@pytest.mark.parametrize("tokens, tail", [(2048, 0), (2048, 128), (2000, 300)])
def test_the_least_density_is_what_the_loosest_threshold_visits(tokens, tail):
    """Where all keys weigh the same, no step gains as much, and each tile stops after its first one."""
    query, key, value, scale = make_inputs(tokens, num_heads=1, num_kv_heads=1)
    params = S2OParams(segment_len=256, dense_tail=tail, key_block=32)
    rule = replace(rule_of(params), values=(0.999,))
    ends = sum(  # tiles of the end visit everything
        tile.end - tile.first for tile in tiles_of(tokens, 128) if tail and tile.end > tokens - tail
    )
    chosen = range(-(-(tokens - ends) // 128))
    visited = sweep(0 * query, key, value, scale, {"it": rule}, chosen=chosen)["it"]["density"].item()
    pairs = visited * causal_pairs(tokens - ends, tokens - ends) + causal_pairs(ends, tokens)
    assert least_density(tokens, params) == pytest.approx(pairs / causal_pairs(tokens, tokens))


def test_the_dense_end_is_in_every_density():
    figures = {"density": [[0.2, 0.4], [0.4, 0.6]], "mse": [[0.0, 1.0]] * 2, "rel_error": [[0.0, 0.5]] * 2}
    parts = SimpleNamespace(done={("a text", 3): {"rule": figures}})
    plain, dense = (layer_curves(parts, ["a text"], 3, "rule", 1, share) for share in (0.0, 0.25))
    assert plain.density.tolist() == [pytest.approx([0.3, 0.5])]
    assert dense.density.tolist() == [pytest.approx([0.475, 0.625])]
    assert dense.error.tolist() == plain.error.tolist()


def test_samples_give_the_figures_of_the_whole_prompt():
    """On average, for both segment lengths: a sample at one place of the segments would favour the longer ones."""
    inputs = make_inputs(2048, num_heads=2, num_kv_heads=1)
    values = (0.02, 0.3)
    rules = {str(length): S2O(length, tile=64, values=values) for length in (128, 256)}
    whole = sweep(*inputs, rules, tile_size=64)
    means = {name: {"density": 0.0, "mse": 0.0} for name in rules}
    count = 12
    for layer in range(count):
        found = sweep(*inputs, rules, tile_size=64, chosen=sample(2048, 64, 0, "a text", layer))
        for name, figures in means.items():
            for figure in figures:
                figures[figure] += found[name][figure].mean(0).numpy() / count
    for name, figures in means.items():
        assert figures["density"] == pytest.approx(whole[name]["density"].mean(0).numpy(), rel=0.06)
        assert figures["mse"] == pytest.approx(whole[name]["mse"].mean(0).numpy(), rel=0.35)
