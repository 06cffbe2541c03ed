"""Intervals against printed tables, SciPy's paired test, and how often they contain the truth."""

import numpy as np
import pytest
import scipy.stats

from radiance.base.errors import ConfigError
from radiance.evaluation.statistics import paired_differences, student_interval

# Two-sided quantiles of Student's t from printed tables: number of values, confidence, quantile.
TABLE = [(2, 0.95, 12.706), (3, 0.95, 4.303), (8, 0.95, 2.365), (8, 0.99, 3.499), (31, 0.90, 1.697)]


@pytest.mark.parametrize(("count", "confidence", "quantile"), TABLE)
def test_interval_agrees_with_printed_tables(count, confidence, quantile):
    values = np.random.default_rng(0).normal(3, 2, count)
    interval = student_interval(values, confidence)
    margin = quantile * np.std(values, ddof=1) / np.sqrt(count)
    mean = values.mean()
    assert interval == pytest.approx((mean, mean - margin, mean + margin), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_interval_agrees_with_the_t_quantile(scale):
    values = np.random.default_rng(0).normal(1, scale, 5)
    margin = scipy.stats.t.ppf(0.975, 4) * scipy.stats.sem(values)
    mean = values.mean()
    expected = (mean, mean - margin, mean + margin)
    assert student_interval(values) == pytest.approx(expected, rel=1e-12)


def test_interval_of_differences_agrees_with_the_paired_test():
    a, b = np.random.default_rng(0).normal(0, 1, (2, 8))
    interval = student_interval(
        paired_differences(dict(enumerate(a)), dict(reversed(list(enumerate(b)))))
    )
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert interval[1:] == pytest.approx(tuple(expected), rel=1e-9)


def test_interval_contains_the_truth_as_often_as_its_confidence():
    draws = np.random.default_rng(0).normal(1, 2, (500, 3))
    contains = [low <= 1 <= high for _, low, high in map(student_interval, draws)]
    assert 0.93 < np.mean(contains) < 0.97


def test_interval_of_equal_values_is_a_point():
    assert student_interval([2.0] * 4) == (2, 2, 2)
    assert str(student_interval([2.0] * 4)) == "2 (2 … 2)"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_interval_needs_two_finite_values(values):
    with pytest.raises(ConfigError, match="at least two seeds"):
        student_interval(values)


def test_pairs_have_the_same_seed():
    assert paired_differences({3: 5.0, 1: 2.0}, {1: 0.5, 3: 1.0}) == [1.5, 4.0]
    with pytest.raises(ConfigError, match="Seeds 2, 4 have no partner"):
        paired_differences({1: 0.0, 2: 0.0}, {1: 0.0, 4: 0.0})
