"""The search alone, on curves that are known."""

import numpy
import pytest

from vllm_s2o.quality.calibration import search
from vllm_s2o.quality.calibration.curves import Curves
from vllm_s2o.quality.calibration.search import DENSE, Choice

EASY = Curves(numpy.array([[1.0, 0.4, 0.1]] * 2), numpy.array([[0.0, 1e-4, 1e-3]] * 2))
HARD = Curves(numpy.array([[1.0, 0.4, 0.1], [1.0, 0.95, 0.9]]), numpy.array([[0.0, 1e-4, 1e-3], [0.0, 0.2, 0.4]]))
"""One head that can be sparse beside one that cannot."""


def test_heads_get_thresholds_of_their_own_where_that_pays():
    assert search.within_error(EASY, 3e-3) == Choice((2, 2), pytest.approx(0.1), pytest.approx(2e-3))
    found = search.within_error(HARD, 3e-3)
    assert found.at == (2, 0) and found.density == pytest.approx(0.55) and found.error == pytest.approx(1e-3)


def test_one_threshold_where_heads_of_their_own_save_little():
    curves = Curves(numpy.array([[1.0, 0.2, 0.195], [1.0, 0.2, 0.1]]), numpy.array([[0.0, 1e-3, 2e-3]] * 2))
    assert search.within_error(curves, 2.5e-3).at == (1, 1)


def test_a_layer_is_dense_where_it_would_visit_nearly_everything():
    curves = Curves(numpy.array([[1.0, 0.95]]), numpy.array([[0.0, 1e-3]]))
    assert search.within_error(curves, 1e-2) == DENSE


@pytest.mark.parametrize("density", [0.9, 0.5, 0.31])
def test_a_density_is_kept_and_spent_where_it_helps(density):
    found = search.within_density([EASY, HARD], density)
    assert search.mean_density(found) <= density
    assert found[1].dense or found[1].density >= found[0].density


def test_the_best_single_threshold_is_the_loosest_that_no_layer_suffers_from():
    values = (0.0, 0.01, 0.1)
    assert search.best_single([EASY, HARD], [False, False], 2e-3, values) == (0.0, 1.0)
    assert search.best_single([EASY, HARD], [False, True], 2e-3, values) == (0.1, pytest.approx(0.55))
    assert search.best_single([Curves(HARD.density, HARD.error + 1)], [False], 0.5, values) is None
