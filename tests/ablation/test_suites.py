"""All suites are valid, and `radiance ablate` runs one once, with interruptions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from radiance import config
from radiance.ablation import trial as trial_module
from radiance.ablation.data import encode_captions, load_image_set
from radiance.ablation.results import Result, read_result
from radiance.ablation.suite import GATE_SEEDS, TUNING_SEEDS, Suite
from radiance.cli import main
from radiance.config.experiments import load_experiment, load_module
from radiance.model.flops import forward_flops
from radiance.model.transformer import make_abstract_params
from radiance.training.step import add_noise_and_times
from tests.helpers.toy_runs import PLAIN, toy_run

FOLDER = Path(__file__).parents[2] / "experiments" / "ablations"
PATHS = sorted(FOLDER.glob("*.py"))


@lru_cache
def suites(path: Path) -> dict[str, Suite]:
    module = load_module(str(path))
    return {"": module.SUITE} if hasattr(module, "SUITE") else module.SUITES


def parameters(run: config.Config) -> int:
    return sum(x.size for x in jax.tree.leaves(make_abstract_params(run.model)))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_variant_of_every_scale_is_valid(path, capsys):
    path_suites = suites(path)  # which checks all their variants
    for part, suite in path_suites.items():
        assert suite.name == "_".join([path.stem, *filter(None, [part])])
        for model in {
            replace(suite.variant_config(scale, variant).model, prediction="x0")
            for scale in suite.scales
            for variant in suite.variants_at(scale)
        }:
            assert all(
                x.size for x in jax.tree.leaves(make_abstract_params(model))
            )  # checkpoints cannot hold an empty array
    where, variant = (
        f"{path}:{part}" if part else str(path),
        suite.controls[0],
    )  # as `radiance train` finds it, which builds the suite once more
    assert replace(load_experiment(f"{where}:{variant}"), name=path.stem) == suite.variant_config(
        "pod", variant
    )
    assert main(["ablate", where, "--scale", "pod"]) == 0
    assert f"{where}:{suite.controls[0]}" in capsys.readouterr().out
    assert main(["ablate", f"{path}:other"]) == 2
    assert f"no suite {path}:other: there is {path}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_step_of_the_pod_scale_compiles_for_eight_devices(tmp_path):
    file = tmp_path / "plan.json"
    command = [
        sys.executable,
        "-m",
        "radiance",
        "plan",
        f"{FOLDER / 'masking.py'}:strict",
        "--device",
        "cpu",
        "--mesh",
        "fsdp=8",
    ]
    done = subprocess.run(
        [*command, "--json", str(file)], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "a training step of 1024 images of 256×256" in done.stdout
    assert json.loads(file.read_text())["collectives"].keys() >= {"all-gather", "all-reduce"}


def test_every_objective_works_with_an_axis_of_seeds():
    """Times, noise and weights of every variant whose objective differs."""
    toy = toy_run("unused", "unused")
    shapes = {
        "image": (8, 8, 3),
        "text": (toy.text.max_length, toy.model.text_dim),
        "lengths": (),
        "weight": (),
    }
    batch = {
        name: jax.ShapeDtypeStruct((2, 8, *shape), np.int32 if name == "lengths" else np.float32)
        for name, shape in shapes.items()
    }
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0)))
    for flow in {
        suite.variant_config("smoke", variant).flow
        for path in PATHS
        for suite in suites(path).values()
        for variant in suite.variants_at("smoke")
    }:
        noisy = jax.eval_shape(
            jax.vmap(partial(add_noise_and_times, replace(toy, flow=flow))), batch, keys
        )
        assert noisy["noise"].shape == noisy["image"].shape
        assert noisy["weight"].shape == noisy["time"].shape == (2, 8)


def test_predictions_are_compared_with_one_loss_weighting_and_size():
    for suite in suites(FOLDER / "prediction.py").values():
        for scale in suite.scales.values():
            base = scale.run
            assert (base.flow.loss_weighting, base.model.prediction, base.data.resolution) == (
                "x0",
                "x0",
                8 * base.model.patch,
            )
        assert not any(
            change.startswith("data.resolution")
            for changes in suite.variants.values()
            for change in changes
        )


def test_optimal_transport_biases_noise_towards_the_background_named_in_the_caption():
    module = load_module(str(FOLDER / "coupling.py"))
    run = config.override(module.SUITE.scales["smoke"].run, ["data.batch_size=32"])
    images = load_image_set(run.data, "train", 64)
    texts = encode_captions(images.captions, run.text, run.model.text_dim)
    independent, transported, within = (
        module.measure_bias(
            config.override(run, module.CHANGES[variant]), images, texts, seed=0, num_batches=4
        )
        for variant in ("independent", "global", "within_caption")
    )
    assert abs(independent.bias) < 0.3 < 0.6 < transported.bias
    assert independent.saved == 0 < within.saved < transported.saved


def test_deeper_variants_have_equal_parameters_and_others_equal_flops():
    suite = load_module(str(FOLDER / "modulation.py")).SUITE
    for scale in suite.scales:
        base = suite.variant_config(scale, suite.base)
        block = parameters(
            config.override(base, [f"model.single_blocks={base.model.single_blocks + 1}"])
        ) - parameters(base)
        for variant in suite.variants_at(scale):
            run, work = suite.variant_config(scale, variant), []
            if variant.startswith("deep_"):
                assert abs(parameters(run) - parameters(base)) < block / 2, (scale, variant)
                continue
            for one in (run, base):
                work.append(
                    forward_flops(
                        one.model, one.data.resolution, one.data.resolution, one.text.max_length
                    )
                )
            assert work[0] == pytest.approx(work[1], rel=0.3), (scale, variant)


SUITE = """
from radiance import config as c
from radiance.ablation.suite import Scale, Suite

RUN = c.from_json(c.Config, {run!r})
CPU = Scale(
    RUN, num_images=12, num_seeds=2, learning_rate_factors=(1.0, 4.0), num_samples=3,
    conditions={{"unmasked": ("model.masking=off",)}},
)
SUITE = Suite(
    name="toy",
    question="Does it run?",
    metric="validation_loss",
    base="base",
    controls=("blind",),
    margin=0.01,
    variants={{"base": (), "blind": ("data.caption_dropout=1",)}},
    scales={{"cpu": CPU, "gpu": CPU, "pod": Scale(RUN)}},
)
"""


@pytest.fixture
def suite(tmp_path) -> Path:
    run = toy_run(
        "unused",
        "unused",
        "train.steps=2",
        "text.max_length=20",
        "sample.batch_size=2",
        "data.source=shapes",
        "data.shapes.caption_lengths=short",
        "data.shapes.max_tokens=20",
        **PLAIN,
    )
    path = tmp_path / "toy.py"
    path.write_text(SUITE.format(run=config.to_json(run)))
    return path


def test_an_interrupted_suite_resumes_and_a_finished_one_is_kept(suite, tmp_path, capsys):
    def ablate(*more: str) -> int:
        return main(
            [
                "ablate",
                str(suite),
                "--results",
                str(tmp_path / "results"),
                "--work",
                str(tmp_path / "work"),
                *more,
            ]
        )

    assert ablate("--table") == 2  # there is nothing yet
    assert ablate("--minutes", "0") == 143
    assert not (tmp_path / "results").exists()
    assert any((tmp_path / "work").rglob("checkpoints"))
    assert ablate("--variants", "base") == 0
    assert ablate() == 0
    for variant in ("base", "blind"):  # the seeds keep their directories; those of the tuning go
        pattern = f"toy/cpu/{variant}/**/config.json"
        runs = [path.parent for path in (tmp_path / "work").glob(pattern)]
        assert sorted(path.name for path in runs) == ["seed_0", "seed_1"]
        assert all((path / "checkpoints" / "2").is_dir() for path in runs)
    result = read_result(tmp_path / "results" / "blind.json")
    assert result.metrics.keys() >= {
        "validation_loss",
        "high_noise_loss",
        "position@1",
        "retrieval@3",
    }
    assert result.metrics["validation_loss"].keys() == {0, 1}
    assert result.tuning["losses"].keys() == {"1", "4"}
    assert result.tuning["average"] in (
        "0.9",
        "0.99",
    )
    chosen = min(
        (loss, rate, name)
        for rate, losses in result.tuning["losses"].items()
        for name, loss in losses.items()
    )
    assert (f"{result.tuning['learning_rate_factor']:g}", result.tuning["average"]) == chosen[1:]
    assert list(result.conditions) == ["own, validation_loss", "captions exchanged", "unmasked"]
    assert result.cost["seconds"] > 0
    assert "| blind (control) |" in (tmp_path / "results" / "table.md").read_text()
    assert (tmp_path / "results" / "figure.svg").read_text().count('id="ytick_') == 1

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")}
    assert ablate() == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert ablate("--seeds", "3") == 2
    assert "seeds 0, 1 instead of 0 to 2" in capsys.readouterr().err
    suite.write_text(suite.read_text().replace("caption_dropout=1", "caption_dropout=0.9"))
    assert ablate("--table") == 2
    assert "another config" in capsys.readouterr().err
    assert json.loads((tmp_path / "results" / "base.json").read_text())["key"]["suite"] == "toy"


def test_the_gate_trains_its_variants_on_its_own_seeds(suite, tmp_path, monkeypatch, capsys):
    trials = []

    def write_losses(trial, results, *_):
        trials.append((trial.variant, trial.seeds))
        offset = 0.0 if trial.variant == "base" else 0.1
        losses = {seed: 1 + offset + 1e-3 * (seed % 2) * offset for seed in trial.seeds}
        cost = dict.fromkeys(("parameters", "flops", "seconds", "skipped_steps"), 0)
        tuning = {"learning_rate_factor": 1.0, "average": "0.9", "losses": {}}
        result = Result(
            trial.key, tuning, {"validation_loss": losses}, {}, [losses], [], cost, {"devices": []}
        )
        results.write(result)
        return result

    monkeypatch.setattr(trial_module, "run_variant", write_losses)
    text = suite.read_text().replace(
        "from radiance.ablation.suite import", "from radiance.ablation.suite import Gate,"
    )
    suite.write_text(text.replace("num_seeds=2,", 'num_seeds=2, gate=Gate(("blind",), 0.5),'))
    assert main(["ablate", str(suite), "--gate"]) == 0
    assert trials == [("base", GATE_SEEDS), ("blind", GATE_SEEDS)]
    assert not {*GATE_SEEDS} & {*range(100), *TUNING_SEEDS}
    folder = tmp_path / "results" / "toy" / "cpu"
    assert not [*folder.glob("*.json")]  # they are in no table
    assert sorted(path.name for path in (folder / "gate").iterdir()) == [
        "base.json", "blind.json", "gate.md",
    ]  # fmt: skip
    assert "| blind" in (folder / "gate" / "gate.md").read_text("utf-8")
    assert main(["ablate", str(suite), "--gate", "--seeds", "3"]) == 2
    assert "leave out --seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "bse"], "no variant bse"),
        (["--scale", "smoke"], "has no scale smoke: choose cpu or gpu or pod"),
        (["--gate"], "has no gate at scale cpu"),
        (["--scale", "pod"], ""),
    ],
)
def test_invalid_arguments_are_reported(suite, arguments, message, capsys):
    assert main(["ablate", str(suite), *arguments]) == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_a_single_seed_is_refused(suite, capsys):
    with pytest.raises(SystemExit):
        main(["ablate", str(suite), "--seeds", "1"])
    assert "is not a whole number from 2" in capsys.readouterr().err
