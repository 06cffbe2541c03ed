"""Results of different things are never mixed, and a table has the numbers worked out by hand."""

import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from radiance import config
from radiance.ablation import results as results_module
from radiance.ablation.comparison import (
    compare_variants,
    correct_holm,
    decide_verdict,
    first_step_below,
)
from radiance.ablation.gate import format_gate_report
from radiance.ablation.report import draw_figure, format_suite_report
from radiance.ablation.results import (
    Result,
    ResultFolder,
    ResultKey,
    check_comparable,
    get_code_version,
    hash_config,
    read_result,
)
from radiance.ablation.suite import Gate, Precondition, Scale, Suite
from radiance.ablation.trial import hash_variant
from radiance.base.errors import OutputError

KEY = ResultKey("toy", "base", "cpu", (0, 1, 2), "c0ffee", "h-base", "data")
LOSSES = {
    "base": (1.0, 1.1, 0.9),
    "worse": (1.2, 1.32, 1.11),
    "near": (1.001, 1.099, 0.9),
    "blind": (2.0, 2.1, 1.95),
}


def make_result(variant: str, **key) -> Result:
    losses = dict(enumerate(LOSSES[variant]))
    curve = [(10, {seed: 3 * loss for seed, loss in losses.items()}), (20, losses)]
    cost = {"parameters": 12345, "flops": 2e9, "seconds": 61.0, "skipped_steps": 0}
    metrics, conditions = (
        {"validation_loss": losses},
        {
            "own, validation_loss": losses,
            "other": {seed: 2 * loss for seed, loss in losses.items()},
        },
    )
    bins = [
        losses,
        {
            seed: loss * (1.5 if variant == "worse" else 1)
            for seed, loss in dict(enumerate(LOSSES["base"])).items()
        },
    ]
    key = replace(KEY, variant=variant, config=f"h-{variant}", **key)
    return Result(
        key,
        {"learning_rate_factor": 1.0, "average": "0.9", "losses": {}},
        metrics,
        conditions,
        bins,
        curve,
        cost,
        {"devices": ["cpu"]},
    )


def make_suite(**changes) -> Suite:
    variants = {
        "base": (),
        "worse": ("model.masking=off",),
        "near": ("model.masking=strict",),
        "blind": ("data.caption_dropout=1",),
    }
    shapes = config.Shapes(caption_lengths="short", max_tokens=20)
    data = config.Data(source="shapes", shapes=shapes)
    run = config.Config(data=data, train=config.Train(steps=20))
    scales = {"cpu": Scale(run, num_images=8, num_seeds=3), "gpu": Scale(run), "pod": Scale(run)}
    arguments = dict(
        name="toy",
        question="?",
        metric="validation_loss",
        base="base",
        controls=("blind",),
        margin=0.01,
        variants=variants,
        scales=scales,
    )
    return Suite(**arguments | changes)


def test_a_written_result_is_read_unchanged(tmp_path):
    results = ResultFolder(tmp_path)
    results.write(make_result("worse"))
    assert (
        results.find(make_result("worse").key)
        == make_result("worse")
        == read_result(tmp_path / "worse.json")
    )
    assert results.find(make_result("near").key) is None


@pytest.mark.parametrize(
    "other",
    [
        dict(commit="c0ffee+1"),
        dict(data="others"),
        dict(scale="gpu"),
        dict(seeds=(0, 1)),
        dict(suite="toys"),
    ],
)
def test_a_result_of_another_commit_data_scale_seeds_or_suite_is_refused(tmp_path, other):
    results = ResultFolder(tmp_path)
    results.write(make_result("base"))
    for variant in ("base", "near"):  # another variant, and the same
        with pytest.raises(config.ConfigError, match=next(iter(other))):
            results.write(make_result(variant, **other))
    assert results.find(KEY) == make_result("base")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_result_of_another_config_is_refused(tmp_path):
    results, base = ResultFolder(tmp_path), make_result("base")
    results.write(base)
    changed = replace(KEY, config="another")
    with pytest.raises(config.ConfigError, match="config"):
        results.find(changed)
    with pytest.raises(config.ConfigError, match="another config"):
        results.read_all({"base": "another"})
    assert results.read_all({"base": "h-base", "near": "h-near"}) == {"base": base}
    check_comparable(
        KEY, replace(KEY, variant="near", config="another"), tmp_path
    )  # different variants have different configs
    assert changed.name != KEY.name  # their run directories differ too
    (tmp_path / "near.json").write_text("[]")
    with pytest.raises(OutputError, match=r"near.json is damaged .*: move it away"):
        results.find(KEY)


def test_hashes_depend_on_every_setting():
    run = config.Config()
    assert hash_config(run, 1) == hash_config(config.Config(), 1)
    assert (
        len(
            {
                hash_config(run, 1),
                hash_config(run, 2),
                hash_config(config.override(run, ["optimizer.eps=1e-7"]), 1),
            }
        )
        == 3
    )


def test_the_hash_of_a_variant_depends_on_its_base():
    """The base gives the first weights and the measure, even of what the variant changes."""
    weighted = ("flow.loss_weighting=x0", "model.masking=off")
    ours = make_suite(
        variants={"base": (), "blind": ("data.caption_dropout=1",), "weighted": weighted}
    )
    theirs = replace(
        ours,
        scales={
            name: replace(scale, run=config.override(scale.run, weighted[:1]))
            for name, scale in ours.scales.items()
        },
    )
    assert ours.variant_config("cpu", "weighted") == theirs.variant_config("cpu", "weighted")
    assert hash_variant(ours, "cpu", "weighted") != hash_variant(theirs, "cpu", "weighted")


def test_any_change_of_the_package_changes_the_code_version(tmp_path, monkeypatch):
    """Committed or not, in a file that git does not track, and without git."""
    assert len(get_code_version()) >= 5
    monkeypatch.setattr(results_module, "ROOT", tmp_path)
    file = tmp_path / "radiance" / "one.py"
    file.parent.mkdir()
    names = []

    def git(*command):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y", *command],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    for text in ("1", "2"):
        file.write_text(text)
        names.append(get_code_version())  # without a repository
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    names.append(get_code_version())
    file.write_text("3")
    names.append(get_code_version())
    for text in ("4", "5"):
        file.with_name("two.py").write_text(text)
        names.append(get_code_version())
    assert len(set(names)) == len(names) == 6
    assert names[0].startswith("radiance ")
    assert len(names[2]) == 40
    assert all(name.startswith(names[2] + "+") for name in names[3:])


def test_comparisons_equal_those_worked_out_by_hand():
    comparisons = compare_variants(
        make_suite(), {variant: make_result(variant) for variant in LOSSES}
    )
    # Differences 0.2, 0.22, 0.21 from a base of 1: mean 0.21, standard error 0.01/√3, and
    # t(0.975, 2) = 4.302653.
    assert comparisons["worse"].difference == pytest.approx(
        (0.21, 0.21 - 4.302653 * 0.01 / 3**0.5, 0.21 + 4.302653 * 0.01 / 3**0.5)
    )
    # For t = 36.373 with two degrees of freedom, p = 1 − t/√(t² + 2); the smallest of two is
    # doubled. The control is not part of the family.
    t = 0.21 / (0.01 / 3**0.5)
    assert comparisons["worse"].p == pytest.approx(2 * (1 - t / (t**2 + 2) ** 0.5), rel=1e-6)
    assert comparisons["worse"].verdict == "worse"
    assert comparisons["near"].verdict == "equal within the margin"
    assert comparisons["blind"].verdict == "worse"
    assert comparisons["near"].p == pytest.approx(1)
    # Differences 1, 1 and 1.05: mean 3.05/3 and standard deviation 0.05/√3. Not multiplied.
    t = 3.05 / 3 / (0.05 / 3)
    assert comparisons["blind"].p == pytest.approx(1 - t / (t**2 + 2) ** 0.5, rel=1e-6)
    assert comparisons["worse"].relative_steps is None  # it ends above the base
    # 3.003 falls to 1.001 in ten steps, and never to 1; 3.297 falls to 1.099: below 1.1 after
    # 20 − 10 · 0.001 / 2.198.
    assert comparisons["near"].relative_steps is None
    assert first_step_below([(10, 3.297), (20, 1.099)], 1.1) == pytest.approx(
        20 - 10 * 0.001 / 2.198
    )
    assert first_step_below([(10, 3.0)], 3.0) == 10
    assert first_step_below([(10, 3.0)], 2.9) is None


def test_power_and_equality_equal_those_worked_out_by_hand():
    results = {variant: make_result(variant) for variant in LOSSES}
    comparison = compare_variants(make_suite(), results)["worse"]
    # A standard deviation of 0.01 over three seeds: t(0.975, 2) = 4.302653, t(0.8, 2) = 1.060660.
    assert comparison.detectable == pytest.approx((4.302653 + 1.060660) * 0.01 / 3**0.5, rel=1e-6)
    # ±0.01 takes t(0.975, n − 1) ≤ √n: 2.570582 > √6 at 6 seeds, and 2.446912 < √7 at 7.
    assert comparison.needed_seeds == 7
    # Two one-sided tests at 5 % use t(0.95, 2) = 2.919986, and the interval t(0.975, 2): with
    # a standard deviation of 0.005 the first is inside ±0.01, the second is not.
    fractions = np.array([-0.005, 0.0, 0.005])
    assert decide_verdict(make_suite(), fractions, 1.0) == "equal within the margin"
    assert decide_verdict(make_suite(), 1.2 * fractions, 1.0) == "undecided"


def test_a_failed_precondition_and_the_smoke_scale_give_no_verdict():
    precondition = Precondition("position@1", 0.8)
    scales = {
        name: replace(scale, num_samples=4, precondition=precondition)
        for name, scale in make_suite().scales.items()
    }
    results = {variant: make_result(variant) for variant in ("base", "worse", "blind")}
    for low, sentence in ((0.79, "FAILS, so there are no verdicts"), (0.8, "holds")):
        positions = {"position@1": {0: 0.9, 1: low, 2: 0.95}}
        placed = {
            variant: replace(result, metrics=result.metrics | positions)
            for variant, result in results.items()
        }
        text = format_suite_report(make_suite(scales=scales), placed)
        assert f"with every seed: {sentence} ({low:.3f} … 0.950)." in text
        verdict = compare_variants(make_suite(scales=scales), placed)["worse"].verdict
        assert verdict == ("worse" if low == 0.8 else "none")
    smoke = {
        variant: replace(result, key=replace(result.key, scale="smoke"))
        for variant, result in results.items()
    }
    suite = make_suite(scales={"smoke": make_suite().scales["cpu"]})
    assert compare_variants(suite, smoke)["worse"].verdict == "none"
    assert "So there are no verdicts." in format_suite_report(suite, smoke)


def test_the_gate_says_how_many_seeds_are_needed():
    results = {variant: make_result(variant) for variant in ("base", "worse")}
    scale = replace(make_suite().scales["cpu"], num_seeds=6, gate=Gate(("worse", "near"), 0.01))
    suite = make_suite(scales={"cpu": scale})
    text = re.sub(" +", " ", format_gate_report(suite, "cpu", results))
    # Scatter 1 %; half widths of 6 and 7 seeds: 2.570582 / √6 and 2.446912 / √7 times that.
    assert "| worse | +21.0% | 1.0% | 1.0% | 7 | no |" in text
    assert "Not run yet: near." in text
    assert "| validation_loss | 0.9 | 1.1 |" in text
    assert "| loss, other | 1.8 | 2.2 |" in text
    enough = make_suite(scales={"cpu": replace(scale, num_seeds=7)})
    assert "| 7 | yes |" in re.sub(" +", " ", format_gate_report(enough, "cpu", results))
    diverged = replace(results["worse"], metrics={"validation_loss": {0: np.nan, 1: 1.0, 2: 1.0}})
    with pytest.raises(config.ConfigError, match="worse diverged in the gate of toy"):
        format_gate_report(suite, "cpu", results | {"worse": diverged})
    with pytest.raises(config.ConfigError, match="no result of its base"):
        format_gate_report(suite, "cpu", {"worse": results["worse"]})
    with pytest.raises(config.ConfigError, match="has no gate at scale cpu"):
        format_gate_report(make_suite(), "cpu", results)
    with pytest.raises(config.ConfigError, match="its gate 'strickt' is not among"):
        make_suite(scales={"cpu": replace(scale, gate=Gate(("strickt",), 0.01))})


def test_the_metric_decides_what_is_better():
    results = {variant: make_result(variant) for variant in ("base", "worse", "blind")}
    scored_results = {
        variant: replace(
            result, metrics=result.metrics | {"exact@1": result.metrics["validation_loss"]}
        )
        for variant, result in results.items()
    }
    scales = {name: replace(scale, num_samples=4) for name, scale in make_suite().scales.items()}
    assert (
        compare_variants(make_suite(metric="exact@1", scales=scales), scored_results)[
            "worse"
        ].verdict
        == "better"
    )
    with pytest.raises(config.ConfigError, match="base"):
        compare_variants(make_suite(), {"worse": make_result("worse")})
    with pytest.raises(config.ConfigError, match="0 with every seed"):
        compare_variants(
            make_suite(),
            {
                "base": replace(
                    make_result("base"), metrics={"validation_loss": dict.fromkeys((0, 1, 2), 0.0)}
                )
            },
        )


def test_holm_correction_equals_that_worked_out_by_hand():
    assert correct_holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert correct_holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_the_report_and_the_figure_show_every_variant():
    results = {variant: make_result(variant) for variant in ("base", "worse", "blind")}
    text = re.sub(" +", " ", format_suite_report(make_suite(), results))
    assert "| worse | `model.masking=off` |" in text
    assert "+21.0% (+18.5% … +23.5%)" in text
    assert "| worse | 12.35k | 2G | 61 | not reached |" in text
    assert "Not run yet: near." in text
    assert "The control blind is significantly worse than the base." in text
    assert "No precondition." in text
    assert "2.287 (×2.00)" not in text
    assert "(×2.00)" in text
    text_of_near = format_suite_report(
        make_suite(controls=("near", "worse")),
        {variant: make_result(variant) for variant in ("base", "near")},
    )
    assert "The control near is not significantly worse than the base." in text_of_near
    assert "The control worse has not been run." in text_of_near
    assert "| variant | 0 … 0.5 | 0.5 … 1 |" in text
    assert "| worse | 1.210 | 1.500 |" in text
    figure = draw_figure(make_suite(), results)
    assert figure.count('id="interval') == 2
    assert "<svg" in figure
    assert "nan" not in figure


def test_scores_of_images_are_compared_by_seed():
    """The interval is that of the differences, −0.1 to −0.3, and not that of the scores."""
    scores = {"base": (0.9, 0.5, 0.1), "near": (0.8, 0.3, -0.2), "blind": (0.1, np.nan, 0.1)}
    results = {
        variant: replace(
            make_result(variant),
            metrics=make_result(variant).metrics
            | {"f1@1": dict(enumerate(values)), "f1_chance@1": dict.fromkeys(range(3), 0.0)},
        )
        for variant, values in scores.items()
    }
    text = re.sub(" +", " ", format_suite_report(make_suite(), results))
    section = text.split("Differences from the base, paired by seed.")[1]
    half_width = 4.3027 * 0.1 / 3**0.5  # Student's quantile with two degrees of freedom
    assert f"| near | -0.200 ({-0.2 - half_width:+.3f} … {-0.2 + half_width:+.3f}) |" in section
    assert "| blind | not finite |" in section
    assert "chance" not in section.split("\n\n")[1]


def test_a_diverged_variant_does_not_affect_the_others():
    """Holm's correction and the figure leave it out."""
    diverged = make_result("near")
    diverged = replace(
        diverged,
        metrics={"validation_loss": diverged.metrics["validation_loss"] | {1: float("nan")}},
        cost=diverged.cost | {"skipped_steps": 7},
    )
    results = {
        "base": make_result("base"),
        "worse": make_result("worse"),
        "near": diverged,
        "blind": make_result("blind"),
    }
    comparisons, without = (
        compare_variants(make_suite(), results),
        compare_variants(
            make_suite(),
            {variant: other for variant, other in results.items() if variant != "near"},
        ),
    )
    assert comparisons["near"].verdict == "diverged with 1 of 3 seeds"
    assert comparisons["worse"] == without["worse"]
    text = re.sub(" +", " ", format_suite_report(make_suite(), results))
    assert "| not finite | | | | | diverged with 1 of 3 seeds |" in text
    assert "not finite: near 7." in text
    assert draw_figure(make_suite(), results).count('id="interval') == 2
    with pytest.raises(config.ConfigError, match="base base has diverged"):
        compare_variants(make_suite(), results | {"base": diverged})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(base="none"), "base"),
        (dict(controls=("base",)), "neither a control"),
        (dict(controls=("bas",)), "its control 'bas' is not among"),
        (dict(scales={}), "has scales none: name at least one of smoke"),
        (dict(metric="loss"), "there is no metric 'loss'"),
        (dict(variants={"base": ("model.masking=off",), "blind": ()}), "must change nothing"),
        (dict(variants={"base": (), "blind": ("optimizer.block_rotation=1,1",)}), "block_rotation"),
        (dict(variants={"base": (), "blind": ("optimizer.lr_schedule=cosine",)}), "constant"),
        (
            dict(
                variants={
                    "base": (),
                    "blind": ("model.masking=off",),
                    "twin": ("model.masking=off",),
                }
            ),
            "the same",
        ),
        (dict(variants={"base": (), "blind": ("model.maskin=off",)}), "masking"),
        (
            dict(variants={"base": (), "blind": ("data.shapes.caption_lengths=full",)}),
            "change only batch_size, caption_dropout",
        ),
        (dict(variants={"base": (), "blind": ("train.seed=5",)}), "the same seeds"),
        (
            dict(
                variants={
                    "base": (),
                    "blind": ("distill.kind=guidance", "distill.guidance_target=image"),
                }
            ),
            "no teacher",
        ),
        (dict(metric="exact@1"), "num_samples=0"),
        (dict(margin=0.0), "margin"),
    ],
)
def test_an_invalid_suite_is_refused(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        make_suite(**changes)


def test_invalid_evaluation_conditions_are_left_out():
    suite = make_suite(
        scales={
            name: replace(scale, conditions={"hidden": ("model.masking=strict",)})
            for name, scale in make_suite().scales.items()
        }
    )
    run = suite.variant_config("cpu", "base")
    learned = config.override(run, ["model.padding=learned"])
    assert suite.condition_configs("cpu", run)["hidden"].model.masking == "strict"
    assert suite.condition_configs("cpu", learned) == {}
    assert np.all([suite.variants_at(scale) == suite.variants for scale in suite.scales])
