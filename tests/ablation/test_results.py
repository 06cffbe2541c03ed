"""Results of different things are never mixed, and a table's numbers are those worked out by hand."""

import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from radiance import config
from radiance.ablation import results as results_of
from radiance.ablation.report import (
    compare_arms,
    correct_holm,
    draw_figure,
    first_step_below,
    format_suite_report,
)
from radiance.ablation.results import (
    Result,
    ResultFolder,
    ResultKey,
    check_comparable,
    get_code_version,
    hash_config,
    read_result,
)
from radiance.ablation.suite import Scale, Suite
from radiance.ablation.trial import hash_arm

KEY = ResultKey("toy", "base", "cpu", (0, 1, 2), "c0ffee", "h-base", "data")
LOSSES = {
    "base": (1.0, 1.1, 0.9),
    "worse": (1.2, 1.32, 1.11),
    "near": (1.001, 1.099, 0.9),
    "blind": (2.0, 2.1, 1.95),
}


def result(arm: str, **key) -> Result:
    losses = dict(enumerate(LOSSES[arm]))
    curve = [(10, {seed: 3 * loss for seed, loss in losses.items()}), (20, losses)]
    cost = {"parameters": 12345, "flops": 2e9, "seconds": 61.0, "skipped_steps": 0}
    metrics, views = (
        {"validation_loss": losses},
        {"other": {seed: 2 * loss for seed, loss in losses.items()}},
    )
    bins = [
        losses,
        {
            seed: loss * (1.5 if arm == "worse" else 1)
            for seed, loss in dict(enumerate(LOSSES["base"])).items()
        },
    ]
    key = replace(KEY, arm=arm, config=f"h-{arm}", **key)
    return Result(
        key,
        {"learning_rate_factor": 1.0, "average": "0.9", "losses": {}},
        metrics,
        views,
        bins,
        curve,
        cost,
        {"devices": ["cpu"]},
    )


def suite(**changes) -> Suite:
    arms = {
        "base": (),
        "worse": ("model.masking=off",),
        "near": ("model.masking=strict",),
        "blind": ("data.caption_dropout=1",),
    }
    shapes = config.Shapes(caption_lengths="short", max_tokens=20)
    data = config.Data(source="shapes", shapes=shapes)
    run = config.Config(data=data, train=config.Train(steps=20))
    scales = {"cpu": Scale(run, num_images=8, num_seeds=3), "gpu": Scale(run), "pod": Scale(run)}
    made = dict(
        name="toy",
        question="?",
        metric="validation_loss",
        base="base",
        control="blind",
        margin=0.01,
        arms=arms,
        scales=scales,
    )
    return Suite(**made | changes)


def test_a_result_comes_back_as_it_was(tmp_path):
    results = ResultFolder(tmp_path)
    results.write(result("worse"))
    assert (
        results.find(result("worse").key) == result("worse") == read_result(tmp_path / "worse.json")
    )
    assert results.find(result("near").key) is None


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
def test_results_of_other_things_are_refused(tmp_path, other):
    results = ResultFolder(tmp_path)
    results.write(result("base"))
    for arm in ("base", "near"):  # beside it, and in its place
        with pytest.raises(config.ConfigError, match=next(iter(other))):
            results.write(result(arm, **other))
    assert results.find(KEY) == result("base")
    assert len(list(tmp_path.iterdir())) == 1


def test_an_arm_of_another_config_is_refused(tmp_path):
    results, base = ResultFolder(tmp_path), result("base")
    results.write(base)
    changed = replace(KEY, config="another")
    with pytest.raises(config.ConfigError, match="config"):
        results.find(changed)
    with pytest.raises(config.ConfigError, match="another config"):
        results.read_all({"base": "another"})
    assert results.read_all({"base": "h-base", "near": "h-near"}) == {"base": base}
    check_comparable(
        KEY, replace(KEY, arm="near", config="another"), tmp_path
    )  # arms differ in their configs
    assert changed.name != KEY.name  # nor do checkpoints meet
    (tmp_path / "near.json").write_text("[]")
    with pytest.raises(config.ConfigError, match="not the result"):
        results.find(KEY)


def test_hashes_see_every_setting():
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


def test_an_arm_hangs_on_its_base_too():
    """Whose first weights it shares, and by whose measure it is validated; here in a setting that the arm changes itself."""
    weighed = ("flow.loss_weighting=x0", "model.masking=off")
    ours = suite(arms={"base": (), "blind": ("data.caption_dropout=1",), "weighed": weighed})
    theirs = replace(
        ours,
        scales={
            name: replace(scale, run=config.override(scale.run, weighed[:1]))
            for name, scale in ours.scales.items()
        },
    )
    assert ours.arm_config("cpu", "weighed") == theirs.arm_config("cpu", "weighed")
    assert hash_arm(ours, "cpu", "weighed") != hash_arm(theirs, "cpu", "weighed")


def test_the_code_of_a_result_has_a_name(tmp_path, monkeypatch):
    """Which any change of the package changes: committed, not committed, in a file that git does not know, and without git."""
    assert len(get_code_version()) >= 5
    monkeypatch.setattr(results_of, "ROOT", tmp_path)
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


def test_a_table_by_hand():
    found = compare_arms(suite(), {arm: result(arm) for arm in LOSSES})
    # Differences 0.2, 0.22, 0.21 around a base of 1: mean 0.21, standard error 0.01/√3, and t(0.975, 2) = 4.302653.
    assert found["worse"].difference == pytest.approx(
        (0.21, 0.21 - 4.302653 * 0.01 / 3**0.5, 0.21 + 4.302653 * 0.01 / 3**0.5)
    )
    # Of t = 36.373 with two degrees of freedom, p = 1 − t/√(t² + 2); the least of two: twice that. The control is no part of the family.
    t = 0.21 / (0.01 / 3**0.5)
    assert found["worse"].p == pytest.approx(2 * (1 - t / (t**2 + 2) ** 0.5), rel=1e-6)
    assert found["worse"].verdict == "worse"
    assert found["near"].verdict == "equal within the margin"
    assert found["blind"].verdict == "worse"
    assert found["near"].p == pytest.approx(1)
    assert found["blind"].p < 0.01
    assert found["worse"].relative_steps is None  # it ends above the base
    # 3.003 falls to 1.001 in ten steps, and to 1 never; 3.297 to 1.099: below 1.1 after 20 - 10 · 0.001 / 2.198.
    assert found["near"].relative_steps is None
    assert first_step_below([(10, 3.297), (20, 1.099)], 1.1) == pytest.approx(
        20 - 10 * 0.001 / 2.198
    )
    assert first_step_below([(10, 3.0)], 3.0) == 10
    assert first_step_below([(10, 3.0)], 2.9) is None


def test_better_is_what_the_metric_says():
    results = {arm: result(arm) for arm in ("base", "worse", "blind")}
    painted = {
        arm: replace(one, metrics=one.metrics | {"exact": one.metrics["validation_loss"]})
        for arm, one in results.items()
    }
    scales = {name: replace(scale, num_samples=4) for name, scale in suite().scales.items()}
    assert compare_arms(suite(metric="exact", scales=scales), painted)["worse"].verdict == "better"
    with pytest.raises(config.ConfigError, match="base"):
        compare_arms(suite(), {"worse": result("worse")})
    with pytest.raises(config.ConfigError, match="0 with every seed"):
        compare_arms(
            suite(),
            {
                "base": replace(
                    result("base"), metrics={"validation_loss": dict.fromkeys((0, 1, 2), 0.0)}
                )
            },
        )


def test_holm_by_hand():
    assert correct_holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert correct_holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_the_page_and_the_figure_say_it():
    results = {arm: result(arm) for arm in ("base", "worse", "blind")}
    text = re.sub(" +", " ", format_suite_report(suite(), results))
    assert "| worse | `model.masking=off` |" in text
    assert "+21.0% (+18.5% … +23.5%)" in text
    assert "| 12.35k | 2G | 61 |" in text
    assert "Not run yet: near." in text
    assert "differs significantly from the base" in text
    assert "2.287 (×2.00)" not in text
    assert "(×2.00)" in text
    assert "undecided or equal carry no information" in format_suite_report(
        suite(control="near"), {arm: result(arm) for arm in ("base", "near")}
    )
    assert "| arm | 0 … 0.5 | 0.5 … 1 |" in text
    assert "| worse | 1.210 | 1.500 |" in text
    drawn = draw_figure(suite(), results)
    assert drawn.count('id="interval') == 2
    assert "<svg" in drawn
    assert "nan" not in drawn


def test_an_arm_that_diverges_spoils_itself_alone():
    """It is no part of Holm's family, and has no place in the figure."""
    lost = result("near")
    lost = replace(
        lost,
        metrics={"validation_loss": lost.metrics["validation_loss"] | {1: float("nan")}},
        cost=lost.cost | {"skipped_steps": 7},
    )
    results = {
        "base": result("base"),
        "worse": result("worse"),
        "near": lost,
        "blind": result("blind"),
    }
    found, without = (
        compare_arms(suite(), results),
        compare_arms(suite(), {arm: one for arm, one in results.items() if arm != "near"}),
    )
    assert found["near"].verdict == "diverged with 1 of 3 seeds"
    assert found["worse"] == without["worse"]
    text = re.sub(" +", " ", format_suite_report(suite(), results))
    assert "| not finite |  |  | diverged with 1 of 3 seeds |" in text
    assert "not finite: near 7." in text
    assert draw_figure(suite(), results).count('id="interval') == 2
    with pytest.raises(config.ConfigError, match="base base has diverged"):
        compare_arms(suite(), results | {"base": lost})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(base="none"), "base"),
        (dict(control="base"), "same arm"),
        (dict(arms={"base": ("model.masking=off",), "blind": ()}), "must change nothing"),
        (dict(arms={"base": (), "blind": ("optimizer.block_rotation=1,1",)}), "rotate"),
        (dict(arms={"base": (), "blind": ("optimizer.lr_schedule=cosine",)}), "constant"),
        (
            dict(
                arms={"base": (), "blind": ("model.masking=off",), "twin": ("model.masking=off",)}
            ),
            "the same",
        ),
        (dict(arms={"base": (), "blind": ("model.maskin=off",)}), "masking"),
        (
            dict(arms={"base": (), "blind": ("data.shapes.caption_lengths=full",)}),
            "change only batch_size and caption_dropout",
        ),
        (dict(arms={"base": (), "blind": ("train.seed=5",)}), "the same seeds"),
        (
            dict(
                arms={
                    "base": (),
                    "blind": ("distill.kind=guidance", "distill.guidance_target=image"),
                }
            ),
            "no teacher",
        ),
        (dict(metric="exact"), "num_samples=0"),
        (dict(margin=0.0), "margin"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(changes, said):
    with pytest.raises(config.ConfigError, match=said):
        suite(**changes)


def test_views_that_cannot_be_are_left_out():
    made = suite(
        scales={
            name: replace(scale, conditions={"hidden": ("model.masking=strict",)})
            for name, scale in suite().scales.items()
        }
    )
    run = made.arm_config("cpu", "base")
    learned = config.override(run, ["model.padding=learned"])
    assert made.condition_configs("cpu", run)["hidden"].model.masking == "strict"
    assert made.condition_configs("cpu", learned) == {}
    assert np.all([made.arms_at(scale) == made.arms for scale in made.scales])
