"""RULER's scores, and intervals of their means."""

import random

import pytest

from vllm_s2o.quality.tasks import statistics
from vllm_s2o.quality.tasks.scoring import match_all, match_part


@pytest.mark.parametrize(
    "answer, expected, all_of_them, any_of_them",
    [
        ("4711", ["4711"], 1, 1),
        (" The number is 4711.\n", ["4711"], 1, 1),
        ("47 11", ["4711"], 0, 0),
        ("abcde, FGHIJ", ["ABCDE", "fghij"], 1, 1),
        ("one\x00two", ["one", "two", "onetwo"], 2 / 3, 1),
        ("two", ["one", "two"], 0.5, 1),
        ("two two", ["one", "two", "three", "four"], 0.25, 1),
        ("", ["one"], 0, 0),
    ],
)
def test_scores(answer, expected, all_of_them, any_of_them):
    assert match_all(answer, expected) == pytest.approx(all_of_them)
    assert match_part(answer, expected) == any_of_them


def test_a_score_is_the_mean_with_the_interval_of_agresti_and_coull():
    found = statistics.score([[1.0] * 7 + [0.0] * 3])
    centre = 9 / 14  # two right and two wrong ones more
    half = 1.959964 * (centre * (1 - centre) / 14) ** 0.5
    assert found == pytest.approx((70, 100 * (centre - half), 100 * (centre + half)))
    assert found.ci95 == pytest.approx(70 - 100 * (centre - half))


def test_a_difference_has_the_interval_of_agresti_and_min():
    pairs = [(1.0, 1.0)] * 5 + [(0.0, 1.0)] * 2 + [(1.0, 0.0)]
    found = statistics.difference([pairs])
    worse, better, count = 2.5, 1.5, 10  # half a sample more in each of the four cells
    centre = (better - worse) / count
    half = 1.959964 * ((worse + better) / count - centre**2) ** 0.5 / count**0.5
    assert found == pytest.approx((-12.5, 100 * (centre - half), 100 * (centre + half)))


@pytest.mark.parametrize("value, count", [(1.0, 4), (0.0, 16), (1.0, 100)])
def test_equal_scores_are_not_taken_for_certain(value, count):
    found = statistics.score([[value] * count])
    assert found.mean == 100 * value and 0 <= found.low <= found.mean <= found.high <= 100
    assert found.ci95 > 100 / count
    same = statistics.difference([[(value, value)] * count])
    assert same.mean == 0 and same.low == pytest.approx(-same.high) and same.high > 90 / count


def test_more_samples_make_it_narrower_and_shares_narrower_than_extremes():
    few, many = (statistics.score([[1.0, 0.0] * count]) for count in (5, 50))
    assert many.ci95 < few.ci95 / 2
    assert statistics.score([[0.5] * 20]).ci95 < statistics.score([[1.0, 0.0] * 10]).ci95


@pytest.mark.parametrize("sizes", [(100, 100), (100, 30), (400, 30), (500, 20, 20)])
def test_95_of_100_intervals_hold_the_truth(sizes):
    """Of groups of any sizes, each of which counts the same."""
    rng, shares = random.Random(0), (0.7, 0.4, 0.3)[: len(sizes)]
    truth, held = 100 * sum(shares) / len(shares), 0
    for _ in range(1000):
        found = statistics.score(
            [[float(rng.random() < share) for _ in range(size)] for size, share in zip(sizes, shares, strict=True)]
        )
        held += found.low <= truth <= found.high
    assert 925 < held < 975


def test_a_mean_over_tasks_is_uncertain_only_by_samples_inside_of_them():
    easy, hard = [1.0] * 20, [0.0] * 20
    found = statistics.score([easy, hard])
    assert found.mean == 50 and found.ci95 < statistics.score([[1.0, 0.0] * 20]).ci95 / 2
    assert statistics.score([easy, [0.0]]).mean == 50, "each task counts the same"
