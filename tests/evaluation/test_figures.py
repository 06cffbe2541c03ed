"""Figures hold what they are given, look the same on any page, and are reproducible."""

import numpy as np
import pytest
from PIL import Image

from radiance.base.tables import format_number
from radiance.evaluation.figures import (
    MAX_POINTS,
    Line,
    plot_image_grid,
    plot_intervals,
    plot_lines,
    render_svg,
    render_svg_element,
    show_figure,
)
from radiance.evaluation.statistics import Interval


def test_numbers_are_short():
    assert [format_number(x) for x in (0, 5e-5, 20000, 1.5e6)] == ["0", "5e-5", "20k", "1.5M"]


def test_a_long_line_keeps_its_spikes():
    points = [(i, 9.0 if i == 5001 else 1.0 + i % 2) for i in range(10_000)]
    figure = plot_lines("spike", "x", [Line("", points)])
    values = figure.axes[0].lines[0].get_ydata()
    assert len(values) <= MAX_POINTS + 2
    assert sorted(values)[-2:] == [2, 9]


def test_values_that_cannot_be_plotted_leave_gaps():
    points = [(1, 1.0), (2, float("nan")), (3, 0.0), (4, 2.0)]
    linear = plot_lines("gaps", "x", [Line("", points)]).axes[0].lines[0]
    assert linear.get_ydata() == pytest.approx([1, np.nan, 0, 2], nan_ok=True)
    log = plot_lines("gaps", "x", [Line("", points)], log_scale=True).axes[0].lines[0]
    assert log.get_ydata() == pytest.approx([1, np.nan, np.nan, 2], nan_ok=True)
    assert plot_lines("none", "x", [Line("", [(1, float("nan"))])]) is None
    assert plot_lines("none", "x", [Line("", [(1, 0.0)])], log_scale=True) is None


def test_a_legend_has_the_named_lines():
    lines = [Line("one", [(0, 1.0)]), Line("", [(0, 2.0)]), Line("$two", [(0, 3.0)])]
    figure = plot_lines("legend", "x", lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "$two"]
    assert not plot_lines("legend", "x", lines[1:2]).legends


def test_svg_is_reproducible_and_transparent():
    def draw() -> str:
        lines = [Line("name", [(0, 1.0), (1, 2.0)])]
        return render_svg(plot_lines("<loss & $x>", "x", lines, log_scale=True))

    svg = draw()
    assert svg == draw()
    assert "date" not in svg.lower()
    assert "&lt;loss &amp; $x&gt;" in svg
    assert "#ffffff" not in svg
    assert "#000000" not in svg


def test_an_svg_element_has_no_addresses():
    element = render_svg_element(plot_lines("t", "x", [Line("name", [(0, 1.0)])]))
    assert element.startswith("<svg")
    assert "http" not in element


def test_intervals_are_drawn_by_name_over_the_margin():
    intervals = {"a": Interval(1, 0.5, 2), "control": Interval(-5, -6, -4)}
    figure = plot_intervals("suite", "%", intervals, margin=0.4, gray_names=["control"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "control"]
    sampled = [line.get_xdata() for line in axes.lines if line.get_gid()]
    assert [list(ends) for ends in sampled] == [[0.5, 2], [-6, -4]]
    assert axes.lines[1].get_color() != axes.lines[3].get_color()


@pytest.mark.filterwarnings("error")
def test_no_intervals_make_an_empty_chart():
    (axes,) = plot_intervals("suite", "%", {}, margin=0.4).axes
    assert axes.get_ylim() == (0.5, -0.5)


def test_an_image_grid_labels_rows_and_columns():
    images = [Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.float32)] * 2
    (axes,) = plot_image_grid(images, ["a", "b"], ["x", "y"], "title").axes
    assert axes.images[0].get_array().shape == (11, 11, 3)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y"]
    with pytest.raises(ValueError, match="2 rows of 1 columns need 2 images, not 4"):
        plot_image_grid(images, ["a", "b"], ["x"], "title")


def test_a_figure_in_a_notebook_has_a_description(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    show_figure(plot_lines("", "", [Line("", [(0, 1.0), (1, 2.0)])]), "A line that rises.")
    data, metadata = shown[0]._repr_png_()
    assert metadata["alt"] == "A line that rises."
    assert data
