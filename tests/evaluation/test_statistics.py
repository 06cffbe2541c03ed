"""Intervals against tables, SciPy's own tests, and how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats

from radiance.base.errors import ConfigError
from radiance.evaluation.statistics import paired_differences, student_interval

# Two-sided quantiles of Student's t as printed in tables, by the number of values.
TABLE = [(2, 0.95, 12.706), (3, 0.95, 4.303), (8, 0.95, 2.365), (8, 0.99, 3.499), (31, 0.90, 1.697)]


@pytest.mark.parametrize(("count", "confidence", "quantile"), TABLE)
def test_the_table_of_student(count, confidence, quantile):
    values = np.random.default_rng(0).normal(3, 2, count)
    found = student_interval(values, confidence)
    half = quantile * np.std(values, ddof=1) / np.sqrt(count)
    assert found == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), rel=1e-3
    )


def test_scipy_gives_the_same_for_pairs():
    a, b = np.random.default_rng(0).normal(0, 1, (2, 8))
    found = student_interval(
        paired_differences(dict(enumerate(a)), dict(reversed(list(enumerate(b)))))
    )
    assert found[1:] == pytest.approx(
        tuple(scipy.stats.ttest_rel(a, b).confidence_interval(0.95)), rel=1e-9
    )


def test_the_truth_lies_inside_as_often_as_promised():
    draws = np.random.default_rng(0).normal(1, 2, (500, 3))
    inside = [low <= 1 <= high for _, low, high in map(student_interval, draws)]
    assert 0.93 < np.mean(inside) < 0.97


def test_no_scatter():
    assert student_interval([2.0] * 4) == (2, 2, 2)
    assert str(student_interval([2.0] * 4)) == "2 (2 … 2)"


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")]])
def test_what_has_no_interval(values):
    with pytest.raises(ConfigError, match="at least two seeds"):
        student_interval(values)


def test_pairs_are_of_one_seed():
    assert paired_differences({3: 5.0, 1: 2.0}, {1: 0.5, 3: 1.0}) == [1.5, 4.0]
    with pytest.raises(ConfigError, match="Seeds 2, 4 have no partner"):
        paired_differences({1: 0.0, 2: 0.0}, {1: 0.0, 4: 0.0})
