"""Means over heads and layers, and points between those that were swept."""

import math

import pytest

from vllm_s2o.quality.curves import Point, at_density, at_error, matched, mean_curve


def power_law(density: float) -> Point:
    """A straight line in logarithms: a tenth of the density, a thousand times the error."""
    return Point(density, 1.2 * density, 5e-6 * density**-3, 1e-6 * density**-3, 1 - 0.1 * density)


CURVE = tuple(map(power_law, (0.05, 0.12, 0.4, 0.9)))


def test_the_mean_is_taken_at_each_value_over_all_heads_of_all_sweeps():
    def sweep(*density):
        return {figure: [list(head) for head in density] for figure in Point._fields}

    curve = mean_curve([sweep((0.9, 0.1), (0.7, 0.3)), sweep((0.8, 0.2))])
    assert [point.density for point in curve] == pytest.approx([0.2, 0.8]), "ascending"
    assert curve[0] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.9])
def test_a_point_at_a_density_lies_on_the_line_in_logarithms(density):
    found = at_density(CURVE, density)
    assert found.density == density
    assert found[:4] == pytest.approx(power_law(density)[:4], rel=1e-9)
    neighbours = [point.retained_mass for point in CURVE]
    assert min(neighbours) <= found.retained_mass <= max(neighbours)


@pytest.mark.parametrize("density", [0.049, 0.91])
def test_nothing_is_said_of_densities_that_were_not_swept(density):
    assert at_density(CURVE, density) is None


def test_a_point_at_an_error_is_where_the_line_meets_it():
    found = at_error(CURVE, 1e-4)
    assert found.rel_error == 1e-4
    assert found[:3] == pytest.approx(power_law(1e-6 ** (1 / 3) * 1e-4 ** (-1 / 3))[:3], rel=1e-9)
    assert at_error(CURVE, 1e-2) is None, "all points err less"
    assert at_error(CURVE, 1e-7) is None, "all points err more"


def test_the_first_density_that_reaches_an_error_counts():
    bumpy = [
        power_law(0.1)._replace(rel_error=e, density=d) for d, e in ((0.1, 1e-1), (0.2, 1e-3), (0.3, 1e-1), (0.4, 0))
    ]
    assert at_error(tuple(bumpy), 1e-2).density == pytest.approx(math.sqrt(0.1 * 0.2))


@pytest.mark.parametrize("nothing", [0.0, 2e-13])
def test_nothing_is_said_between_an_error_and_none(nothing):
    """A line to the logarithm of nothing would say anything."""
    curve = (power_law(0.1), power_law(0.5), Point(1.0, 1.2, nothing, nothing, 1.0))
    assert at_density(curve, 0.4) is not None
    assert at_density(curve, 0.5) == curve[1]
    assert at_density(curve, 0.6) is None
    assert at_density(curve, 1.0) == curve[2]
    assert at_error(curve, 0.9 * curve[1].rel_error) is None
    assert at_error(curve, 1.1 * curve[1].rel_error).density == pytest.approx(0.5, rel=0.05)


def test_of_what_does_not_err_anything_is_said():
    curve = (Point(0.2, 0.3, 0.0, 0.0, 1.0), Point(1.0, 1.2, 0.0, 0.0, 1.0))
    assert at_density(curve, 0.4).mse < 1e-29


def test_a_table_has_the_densities_and_errors_that_are_there():
    found = matched(CURVE)
    assert [point.density for point in found[:4]] == [0.1, 0.15, 0.2, 0.3]
    assert [point.rel_error for point in found[4:]] == [3e-3], "no point errs as much as 1e-2"
    steep = tuple(point._replace(rel_error=100 * point.rel_error) for point in CURVE)
    assert [point.rel_error for point in matched(steep)[4:]] == [1e-2, 3e-3]
