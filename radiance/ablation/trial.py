"""One arm, from its config to its result: tuned, trained, measured and kept."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from radiance import config
from radiance.ablation.data import ImageSet, TextSet, encode_captions, hash_parts, render_image_set
from radiance.ablation.metrics import measure_adherence
from radiance.ablation.results import Result, ResultFolder, ResultKey, hash_config
from radiance.ablation.runner import (
    TrainingOutcome,
    measure_validation_losses,
    select_average,
    train_seeds,
)
from radiance.ablation.suite import TUNING_SEEDS, Scale, Suite
from radiance.base.files import replace_atomically
from radiance.base.trees import count_params
from radiance.model.flops import training_flops
from radiance.model.transformer import make_abstract_params
from radiance.training.run_directory import describe_environment


class Trial(NamedTuple):
    """An arm of a suite at a scale, to be run on some seeds by the code of a commit."""

    suite: Suite
    scale: str
    arm: str
    seeds: tuple[int, ...]
    commit: str

    @property
    def scale_settings(self) -> Scale:
        return self.suite.scales[self.scale]

    @property
    def base(self) -> config.Config:
        return self.suite.arm_config(self.scale, self.suite.base)

    @property
    def run(self) -> config.Config:
        return self.suite.arm_config(self.scale, self.arm)

    @property
    def config_hash(self) -> str:
        return hash_arm(self.suite, self.scale, self.arm)

    @property
    def key(self) -> ResultKey:
        """Renders the images to know them."""
        image_sets = [self.load_image_set("train"), self.load_image_set("validation")]
        # Of the base's text: that of an arm follows from its config.
        text_sets = [
            encode_captions(image_sets[1].captions, self.base.text, self.base.model.text_dim)
        ]
        return ResultKey(
            self.suite.name,
            self.arm,
            self.scale,
            self.seeds,
            self.commit,
            self.config_hash,
            hash_parts(image_sets, text_sets),
        )

    def load_image_set(self, split: str, num_images: int | None = None) -> ImageSet:
        num_validation_images = (
            self.base.train.validation_images if num_images is None else num_images
        )
        return render_image_set(
            split,
            self.scale_settings.num_images if split == "train" else num_validation_images,
            self.base.data.resolution,
            self.scale_settings.caption_lengths,
        )

    def encode_texts(self, image_set: ImageSet, run: config.Config | None = None) -> TextSet:
        run = run or self.run
        return encode_captions(image_set.captions, run.text, run.model.text_dim)


def hash_arm(suite: Suite, scale: str, arm: str) -> str:
    """Of all that an arm's result follows from but the code, the data and the seeds: of the base its first weights and how losses are measured."""
    scale_settings = suite.scales[scale]
    return hash_config(
        suite.arm_config(scale, arm),
        hash_config(suite.arm_config(scale, suite.base)),
        scale_settings.learning_rate_factors,
        scale_settings.num_samples,
        scale_settings.num_images,
        scale_settings.caption_lengths,
        scale_settings.conditions,
    )


def run_arm(
    trial: Trial,
    results: ResultFolder,
    work_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """The result of an arm, which is read where it is there already; None when `stop` said so first.

    Raises ConfigError when `results` holds results of something else.
    """
    key = trial.key
    if existing_result := results.find(key):
        return existing_result
    folder = Path(work_dir) / trial.suite.name / trial.scale / trial.arm / key.name
    tuning = _tune(trial, folder, should_stop)
    if tuning is None:
        return None
    run = _with_rate_factor(trial.run, tuning["rate"])
    outcome = _train_arm(trial, run, trial.seeds, folder / "run", should_stop)
    if outcome is None:
        return None
    result = _measure_arm(trial, key, run, outcome, tuning)
    results.write(result)
    shutil.rmtree(folder)
    return result


def _train_arm(
    trial: Trial,
    run: config.Config,
    seeds: Sequence[int],
    folder: Path,
    should_stop: Callable[[], bool],
) -> TrainingOutcome | None:
    image_set, validation_set = trial.load_image_set("train"), trial.load_image_set("validation")
    return train_seeds(
        run,
        trial.base,
        seeds,
        image_set,
        trial.encode_texts(image_set),
        (validation_set, trial.encode_texts(validation_set)),
        folder,
        should_stop,
    )


def _with_rate_factor(run: config.Config, factor: float) -> config.Config:
    return replace(
        run, optimizer=replace(run.optimizer, learning_rate=factor * run.optimizer.learning_rate)
    )


def _tune(trial: Trial, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Factor of the learning rate and average with the least validation loss on the seeds of TUNING; 1 and the first average where the scale
    tunes nothing.
    """
    averages = trial.run.optimizer.ema_names
    if not trial.scale_settings.learning_rate_factors:
        return {"rate": 1.0, "average": averages[0], "losses": {}}
    losses_by_factor: dict[str, dict[str, float]] = {}
    validation_set = trial.load_image_set("validation")
    for factor in trial.scale_settings.learning_rate_factors:
        losses_file = folder / f"rate_{factor:g}.json"
        if not losses_file.is_file():
            run = _with_rate_factor(trial.run, factor)
            outcome = _train_arm(trial, run, TUNING_SEEDS, folder / f"rate_{factor:g}", should_stop)
            if outcome is None:
                return None
            losses = {
                name: float(
                    measure_validation_losses(
                        run,
                        trial.base,
                        select_average(run, outcome.state, name),
                        validation_set,
                        trial.encode_texts(validation_set),
                    ).mean()
                )
                for name in averages
            }
            with replace_atomically(losses_file) as partial_path:
                partial_path.write_text(json.dumps(losses) + "\n")
        losses_by_factor[f"{factor:g}"] = json.loads(losses_file.read_text())
    choices = {
        (factor, name): loss
        for factor, losses in losses_by_factor.items()
        for name, loss in losses.items()
        if math.isfinite(loss)
    }
    if not choices:
        raise config.ConfigError(
            f"No learning rate trains arm {trial.arm} of {trial.suite.name}: lower its rates."
        )
    factor, average = min(choices, key=choices.__getitem__)
    return {"rate": float(factor), "average": average, "losses": losses_by_factor}


def _measure_arm(
    trial: Trial,
    key: ResultKey,
    run: config.Config,
    outcome: TrainingOutcome,
    tuning: dict[str, Any],
) -> Result:
    seeds, validation_set = trial.seeds, trial.load_image_set("validation")
    params = select_average(run, outcome.state, tuning["average"])

    def measure_losses(run: config.Config) -> np.ndarray:
        return measure_validation_losses(
            run, trial.base, params, validation_set, trial.encode_texts(validation_set, run)
        )

    bin_losses = measure_losses(run)
    metrics = {"validation_loss": map_by_seed(seeds, bin_losses.mean(axis=1))}
    if trial.scale_settings.num_samples:
        sample_set = trial.load_image_set("validation", trial.scale_settings.num_samples)
        sample_metrics = measure_adherence(
            run, params, seeds, sample_set, trial.encode_texts(sample_set)
        )
        metrics |= sample_metrics | {"exact": sample_metrics["exact@1"]}
    resolution = run.data.resolution
    cost = {
        "parameters": count_params(make_abstract_params(run.model)),
        "flops": training_flops(run.model, resolution, resolution, run.text.max_length),
        "seconds": outcome.seconds,
        "skipped": int(np.sum(outcome.state.skipped_steps)),
    }
    conditions = {
        condition: map_by_seed(seeds, measure_losses(condition_run).mean(axis=1))
        for condition, condition_run in trial.suite.condition_configs(trial.scale, run).items()
    }
    bins = [map_by_seed(seeds, values) for values in bin_losses.T]
    curve = [(step, map_by_seed(seeds, values)) for step, values in outcome.curve]
    return Result(key, tuning, metrics, conditions, bins, curve, cost, describe_environment())


def map_by_seed(seeds: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    return {seed: float(value) for seed, value in zip(seeds, values, strict=True)}
