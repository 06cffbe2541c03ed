"""One arm, from its config to its result: tuned, trained, measured and kept."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from radiance import config
from radiance.ablation.measures import adherence
from radiance.ablation.results import Key, Result, Results, hashed
from radiance.ablation.runner import Trained, losses_of, train, weights
from radiance.ablation.shown import Shown, Texts, digest, encoded, pictures
from radiance.ablation.suite import TUNING, Scale, Suite
from radiance.model.flops import training_flops
from radiance.model.transformer import abstract
from radiance.training.directory import environment
from radiance.weights.files import replacing


class Trial(NamedTuple):
    """An arm of a suite at a scale, to be run on some seeds by the code of a commit."""

    suite: Suite
    scale: str
    arm: str
    seeds: tuple[int, ...]
    commit: str

    @property
    def size(self) -> Scale:
        return self.suite.scales[self.scale]

    @property
    def base(self) -> config.Config:
        return self.suite.run(self.scale, self.suite.base)

    @property
    def run(self) -> config.Config:
        return self.suite.run(self.scale, self.arm)

    @property
    def config_hash(self) -> str:
        return config_hash(self.suite, self.scale, self.arm)

    @property
    def key(self) -> Key:
        """Renders the pictures to know them."""
        parts = [self.shown("train"), self.shown("validation")]
        # Of the base's text: that of an arm follows from its config.
        texts = [encoded(parts[1].captions, self.base.text, self.base.model.text_dim)]
        return Key(self.suite.name, self.arm, self.scale, self.seeds, self.commit, self.config_hash, digest(parts, texts))

    def shown(self, split: str, count: int | None = None) -> Shown:
        held = self.base.train.validate_pictures if count is None else count
        return pictures(split, self.size.pictures if split == "train" else held, self.base.data.side, self.size.law)

    def texts(self, shown: Shown, run: config.Config | None = None) -> Texts:
        run = run or self.run
        return encoded(shown.captions, run.text, run.model.text_dim)


def config_hash(suite: Suite, scale: str, arm: str) -> str:
    """Of all that an arm's result follows from but the code, the data and the seeds: of the base its first weights and how losses are measured."""
    size = suite.scales[scale]
    return hashed(
        suite.run(scale, arm), hashed(suite.run(scale, suite.base)), size.rates, size.painted, size.pictures, size.law, size.views
    )


def run_arm(trial: Trial, results: Results, work: Path, stop: Callable[[], bool] = lambda: False) -> Result | None:
    """The result of an arm, which is read where it is there already; None when `stop` said so first.

    Raises ConfigError when `results` holds results of something else.
    """
    key = trial.key
    if found := results.find(key):
        return found
    folder = Path(work) / trial.suite.name / trial.scale / trial.arm / key.name
    tuned = _tuned(trial, folder, stop)
    if tuned is None:
        return None
    run = _at_rate(trial.run, tuned["rate"])
    trained = _train(trial, run, trial.seeds, folder / "run", stop)
    if trained is None:
        return None
    result = _measured(trial, key, run, trained, tuned)
    results.write(result)
    shutil.rmtree(folder)
    return result


def _train(trial: Trial, run: config.Config, seeds: Sequence[int], folder: Path, stop: Callable[[], bool]) -> Trained | None:
    shown, held = trial.shown("train"), trial.shown("validation")
    return train(run, trial.base, seeds, shown, trial.texts(shown), (held, trial.texts(held)), folder, stop)


def _at_rate(run: config.Config, factor: float) -> config.Config:
    return replace(run, optimizer=replace(run.optimizer, learning_rate=factor * run.optimizer.learning_rate))


def _tuned(trial: Trial, folder: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Factor of the learning rate and average with the least validation loss on the seeds of TUNING; 1 and the first average where the scale
    tunes nothing."""
    averages = trial.run.optimizer.averages
    if not trial.size.rates:
        return {"rate": 1.0, "average": averages[0], "losses": {}}
    found: dict[str, dict[str, float]] = {}
    held = trial.shown("validation")
    for rate in trial.size.rates:
        told = folder / f"rate_{rate:g}.json"
        if not told.is_file():
            run = _at_rate(trial.run, rate)
            trained = _train(trial, run, TUNING, folder / f"rate_{rate:g}", stop)
            if trained is None:
                return None
            losses = {
                name: float(losses_of(run, trial.base, weights(run, trained.state, name), held, trial.texts(held)).mean())
                for name in averages
            }
            with replacing(told) as part:
                part.write_text(json.dumps(losses) + "\n")
        found[f"{rate:g}"] = json.loads(told.read_text())
    choices = {(rate, name): loss for rate, losses in found.items() for name, loss in losses.items() if math.isfinite(loss)}
    if not choices:
        raise config.ConfigError(f"No learning rate trains arm {trial.arm} of {trial.suite.name}: lower its rates.")
    rate, average = min(choices, key=choices.__getitem__)
    return {"rate": float(rate), "average": average, "losses": found}


def _measured(trial: Trial, key: Key, run: config.Config, trained: Trained, tuned: dict[str, Any]) -> Result:
    seeds, held = trial.seeds, trial.shown("validation")
    params = weights(run, trained.state, tuned["average"])

    def losses(run: config.Config) -> np.ndarray:
        return losses_of(run, trial.base, params, held, trial.texts(held, run))

    binned = losses(run)
    metrics = {"validation_loss": by_seed(seeds, binned.mean(axis=1))}
    if trial.size.painted:
        asked = trial.shown("validation", trial.size.painted)
        read = adherence(run, params, seeds, asked, trial.texts(asked))
        metrics |= read | {"exact": read["exact@1"]}
    side = run.data.side
    cost = {
        "parameters": sum(x.size for x in jax.tree.leaves(abstract(run.model))),
        "flops": training_flops(run.model, side, side, run.text.length),
        "seconds": trained.seconds,
        "skipped": int(np.sum(trained.state.skipped)),
    }
    views = {view: by_seed(seeds, losses(viewed).mean(axis=1)) for view, viewed in trial.suite.viewed(trial.scale, run).items()}
    bins = [by_seed(seeds, values) for values in binned.T]
    curve = [(step, by_seed(seeds, values)) for step, values in trained.curve]
    return Result(key, tuned, metrics, views, bins, curve, cost, environment())


def by_seed(seeds: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    return {seed: float(value) for seed, value in zip(seeds, values, strict=True)}
