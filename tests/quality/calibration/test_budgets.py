"""Thresholds for a budget, on curves that are written down."""

import itertools

import numpy
import pytest

from vllm_s2o.config import ModelTraits, S2OParams
from vllm_s2o.quality.calibration import search
from vllm_s2o.quality.calibration.choose import cheapest
from vllm_s2o.quality.calibration.curves import Curves
from vllm_s2o.quality.calibration.search import DENSE, Budget, CalibrationError
from vllm_s2o.quality.calibration.speed import ranking_cost

TRAITS = ModelTraits("model", "LlamaForCausalLM", 1, 4, 1, 64)
VALUES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def curves(*heads: tuple[float, float], floor: float = 0.05) -> Curves:
    """One for each (error at tau 0.1, share of keys that matters)."""
    taus = numpy.array(VALUES)
    density = [floor + (1 - floor) / (1 + taus / 1e-3 * share) for _, share in heads]
    error = [scale * (taus / 0.1) ** 1.5 for scale, _ in heads]
    return Curves(numpy.array(density), numpy.array(error))


EASY, MIXED, HARD = curves((1e-4, 9), (2e-4, 9)), curves((1e-4, 5), (3e-1, 0.2)), curves((9.0, 0.01), (9.0, 0.01))


def every(layer: Curves) -> list[search.Choice]:
    return [search.take(layer, at) for at in itertools.product(range(len(VALUES)), repeat=len(layer.density))]


@pytest.mark.parametrize("layer", [EASY, MIXED], ids=["easy", "mixed"])
@pytest.mark.parametrize("allowed", [1e-4, 1e-3, 1e-2, 1e-1])
def test_an_error_is_met_with_few_pairs(layer, allowed):
    """Within a twentieth of what trying everything finds; one threshold for all heads where that is nearly as good."""
    found = search.within_error(layer, allowed)
    best = min((choice for choice in every(layer) if choice.error <= allowed), key=lambda choice: choice.density)
    assert found == DENSE if best.density > search.DENSE_FROM else found.error <= allowed
    if not found.dense:
        assert found.density <= best.density * 1.05


def test_heads_have_their_own_thresholds_where_it_pays():
    assert len(set(search.within_error(MIXED, 1e-2).at)) == 2
    assert len(set(search.within_error(EASY, 1e-2).at)) == 1
    alike = curves((1e-2, 5), (1.01e-2, 5))
    assert len(set(search.within_error(alike, 1e-3).at)) == 1


def test_a_layer_that_cannot_skip_enough_is_dense():
    assert search.within_error(HARD, 1e-4) == DENSE


@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
def test_a_density_is_met_with_the_least_error(density):
    layers = [EASY, MIXED, MIXED]
    found = search.within_density(layers, density)
    assert density * 0.6 < search.mean_density(found) <= density
    error = sum(choice.error for choice in found)
    for index in range(len(VALUES)):  # no single threshold is better
        single = [search.same_everywhere(layer, index) for layer in layers]
        assert search.mean_density(single) > search.mean_density(found) or sum(c.error for c in single) >= error


def test_the_single_threshold_may_lie_between_swept_ones_and_any_layer_may_be_sparse():
    layers, worst = [EASY, MIXED], 0.02
    threshold, density = search.best_single(layers, [False, False], worst, VALUES)
    assert 0.01 < threshold < 0.03
    swept = [search.mean_density([search.same_everywhere(c, index) for c in layers]) for index in (3, 4)]
    assert swept[1] < density < swept[0]
    assert search.best_single(layers, [True, False], worst, VALUES) == (threshold, density), "none need be dense"
    # A layer in which no threshold is good enough may be kept dense.
    hard = curves((1e3, 5), (1e3, 5))
    threshold, _ = search.best_single([EASY, hard], [False, True], 1e-2, VALUES)
    assert threshold == VALUES[-1]


@pytest.mark.parametrize("lengths", [(256, 512), (512, 256)])
def test_a_density_below_all_is_told_and_one_segment_length_is_enough(lengths):
    """Longer segments visit more of their own keys, whatever the threshold."""
    floors = {256: 0.05, 512: 0.4}
    given = {str(length): [curves((1e-4, 9), (2e-4, 9), floor=floors[length])] for length in lengths}
    params = {str(length): S2OParams(segment_len=length) for length in lengths}
    rule, choices = cheapest(Budget(target_density=0.2), given, params, TRAITS)
    assert rule == "256" and search.mean_density(choices) <= 0.2
    with pytest.raises(CalibrationError, match=r"^A density of 0\.01 cannot be reached: .* at least 0\.05\d of the "):
        cheapest(Budget(target_density=0.01), given, params, TRAITS)


def test_more_rankings_cost_more():
    """Pairs that shorter segments leave out must be worth the rankings."""
    given = {name: [curves((1e-4, 9), floor=floor)] for name, floor in (("256", 0.05), ("512", 0.07))}
    chosen, cost = {}, {}
    for ranking in ("kv_head", "query_head"):
        params = {name: S2OParams(segment_len=int(name), ranking=ranking) for name in given}
        chosen[ranking], _ = cheapest(Budget(max_relative_error=0.02), given, params, TRAITS)
        cost[ranking] = ranking_cost(params["512"], TRAITS)
        assert ranking_cost(params["256"], TRAITS) == 2 * cost[ranking], "twice as many segments"
    assert 2 < cost["query_head"] / cost["kv_head"] < 4, "four heads read the keys once"
    assert chosen == {"kv_head": "256", "query_head": "512"}
