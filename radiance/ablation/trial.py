"""One variant, from its config to its result: tuned, trained, measured and written."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from radiance import config
from radiance.ablation.data import (
    ImageSet,
    TextSet,
    encode_captions,
    exchange_captions,
    hash_data,
    load_image_set,
)
from radiance.ablation.metrics import measure_samples, measure_validation_losses, summarize_losses
from radiance.ablation.results import Result, ResultFolder, ResultKey, hash_config
from radiance.ablation.runner import TrainingOutcome, train_seeds
from radiance.ablation.suite import TUNING_SEEDS, Scale, Suite
from radiance.base.errors import OutputError
from radiance.base.files import replace_atomically
from radiance.base.json_files import are_numbers, read_json
from radiance.base.locks import LOCK_NAME, hold_lock
from radiance.base.trees import count_params
from radiance.model.flops import training_flops
from radiance.model.transformer import make_abstract_params
from radiance.training.run_directory import describe_environment
from radiance.training.validation import select_average

# The condition of every suite: a network that reads its captions does not stand it.
EXCHANGED_CAPTIONS = "captions exchanged"


class Trial(NamedTuple):
    """A variant of a suite at a scale, on some seeds and with the code of a commit."""

    suite: Suite
    scale: str
    variant: str
    seeds: tuple[int, ...]
    commit: str

    @property
    def scale_settings(self) -> Scale:
        """Settings of the scale."""
        return self.suite.scales[self.scale]

    @property
    def base(self) -> config.Config:
        """Config of the base."""
        return self.suite.variant_config(self.scale, self.suite.base)

    @property
    def run(self) -> config.Config:
        """Config of the variant."""
        return self.suite.variant_config(self.scale, self.variant)

    @property
    def config_hash(self) -> str:
        """Hash of everything that the result depends on but code, data and seeds."""
        return hash_variant(self.suite, self.scale, self.variant)

    @property
    def key(self) -> ResultKey:
        """Identity of the result. The images are loaded for it."""
        image_sets = [self.load_image_set("train"), self.load_image_set("validation")]
        # The text encoder of the base; that of the variant is in its config.
        text_set = encode_captions(image_sets[1].captions, self.base.text, self.base.model.text_dim)
        return ResultKey(
            self.suite.name,
            self.variant,
            self.scale,
            self.seeds,
            self.commit,
            self.config_hash,
            hash_data(image_sets, [text_set]),
        )

    def load_image_set(self, split: str, num_images: int | None = None) -> ImageSet:
        """Return the images of a split: as many as the scale says, or `num_images`."""
        if num_images is None:
            is_train = split == "train"
            num_images = (
                self.scale_settings.num_images if is_train else self.base.train.validation_images
            )
        return load_image_set(self.base.data, split, num_images)

    def encode_texts(self, image_set: ImageSet, run: config.Config | None = None) -> TextSet:
        """Return the captions of images, encoded as in the variant or in `run`."""
        run = run or self.run
        return encode_captions(image_set.captions, run.text, run.model.text_dim)


def hash_variant(suite: Suite, scale: str, variant: str) -> str:
    """Return a hash of everything that a result depends on but code, data and seeds.

    The base is part of it, because it gives the first weights and the measure of losses.
    """
    scale_settings = suite.scales[scale]
    return hash_config(
        suite.variant_config(scale, variant),
        hash_config(suite.variant_config(scale, suite.base)),
        scale_settings.learning_rate_factors,
        scale_settings.num_samples,
        scale_settings.num_images,
        scale_settings.conditions,
    )


def run_variant(
    trial: Trial,
    results: ResultFolder,
    work_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """Return the result of a variant, from disk if it exists; None if `should_stop` ended it.

    The run directories of the seeds stay in WORK/SUITE/SCALE/VARIANT/KEY.

    Args:
        trial: The variant.
        results: Folder of the results of the suite and scale.
        work_dir: Folder of the run directories.
        should_stop: Called after every training step; training is saved when it returns true.

    Raises:
        ConfigError: `results` holds results of something else, or no learning rate trains the
            variant.
        OutputError: Another process trains the variant.
    """
    key = trial.key
    if existing_result := results.find(key):
        return existing_result
    folder = Path(work_dir) / trial.suite.name / trial.scale / trial.variant / key.name
    remedy = "Wait until it ends, train other --variants, or give another --work."
    with hold_lock(folder / LOCK_NAME, str(folder), remedy):
        # The process that held the lock before may have written the result.
        return results.find(key) or _run_missing_variant(trial, key, results, folder, should_stop)


def _run_missing_variant(
    trial: Trial,
    key: ResultKey,
    results: ResultFolder,
    folder: Path,
    should_stop: Callable[[], bool],
) -> Result | None:
    """Tune, train and measure a variant, and write its result."""
    tuning = _tune(trial, folder, should_stop)
    if tuning is None:
        return None
    run = _with_rate_factor(trial.run, tuning["learning_rate_factor"])
    run = _with_average(run, tuning["average"])
    outcome = _train_variant(trial, run, trial.seeds, folder, should_stop)
    if outcome is None:
        return None
    result = _measure_variant(trial, key, run, outcome, tuning)
    results.write(result)
    for path in folder.glob("tuning_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result


def _train_variant(
    trial: Trial,
    run: config.Config,
    seeds: Sequence[int],
    folder: Path,
    should_stop: Callable[[], bool],
) -> TrainingOutcome | None:
    """Train the variant with a config on some seeds."""
    image_set, validation_set = trial.load_image_set("train"), trial.load_image_set("validation")
    return train_seeds(
        run,
        trial.base,
        seeds,
        (image_set, trial.encode_texts(image_set)),
        (validation_set, trial.encode_texts(validation_set)),
        folder,
        should_stop,
    )


def _with_rate_factor(run: config.Config, factor: float) -> config.Config:
    """Return a config with its learning rate multiplied."""
    learning_rate = factor * run.optimizer.learning_rate
    return replace(run, optimizer=replace(run.optimizer, learning_rate=learning_rate))


def _with_average(run: config.Config, name: str) -> config.Config:
    """Return a config that is validated and sampled with an average."""
    weights = name if name.startswith("width=") else f"ema={name}"
    return replace(run, sample=replace(run.sample, weights=weights))


def _tune(trial: Trial, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Choose learning rate and average by the suite's loss on the tuning seeds.

    They are the config's own, and the first average, where the scale tunes nothing.
    """
    averages = trial.run.optimizer.ema_names
    if not trial.scale_settings.learning_rate_factors:
        return {"learning_rate_factor": 1.0, "average": averages[0], "losses": {}}
    losses_by_factor: dict[str, dict[str, float]] = {}
    for factor in trial.scale_settings.learning_rate_factors:
        losses_file = folder / f"tuning_{factor:g}.json"
        if not losses_file.is_file():
            losses = _measure_factor(trial, factor, folder / f"tuning_{factor:g}", should_stop)
            if losses is None:
                return None
            with replace_atomically(losses_file) as partial_path:
                partial_path.write_text(json.dumps(losses) + "\n", "utf-8")
        losses_by_factor[f"{factor:g}"] = _read_losses(losses_file)
    choices = {
        (factor, name): loss
        for factor, losses in losses_by_factor.items()
        for name, loss in losses.items()
        if math.isfinite(loss)
    }
    if not choices:
        raise config.ConfigError(
            f"No learning rate trains variant {trial.variant} of {trial.suite.name}: lower the "
            "suite's learning_rate_factors."
        )
    factor, average = min(choices, key=choices.__getitem__)
    return {"learning_rate_factor": float(factor), "average": average, "losses": losses_by_factor}


def _read_losses(path: Path) -> dict[str, float]:
    """Return the losses of averages that tuning has measured."""
    remedy = "remove it, and the learning rate is measured again"
    losses = read_json(path, dict, remedy)
    if not are_numbers(losses):
        raise OutputError(f"{path} is damaged (it holds other values): {remedy}.")
    return losses


def _measure_factor(
    trial: Trial, factor: float, folder: Path, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Train the tuning seeds with a learning rate; return the mean loss of every average."""
    run = _with_rate_factor(trial.run, factor)
    run = _with_average(run, run.optimizer.ema_names[0])
    outcome = _train_variant(trial, run, TUNING_SEEDS, folder, should_stop)
    if outcome is None:
        return None
    validation_set = trial.load_image_set("validation")
    text_set = trial.encode_texts(validation_set)
    losses = {}
    for name in run.optimizer.ema_names:
        params = select_average(run, outcome.state, name)
        bin_losses = measure_validation_losses(run, trial.base, params, validation_set, text_set)
        losses[name] = float(summarize_losses(bin_losses)[trial.suite.loss_metric].mean())
    return losses


def _measure_variant(
    trial: Trial,
    key: ResultKey,
    run: config.Config,
    outcome: TrainingOutcome,
    tuning: dict[str, Any],
) -> Result:
    """Measure the trained variant."""
    seeds, validation_set = trial.seeds, trial.load_image_set("validation")
    params = select_average(run, outcome.state, tuning["average"])

    def measure_losses(run: config.Config, text_set: TextSet) -> np.ndarray:
        return measure_validation_losses(run, trial.base, params, validation_set, text_set)

    text_set = trial.encode_texts(validation_set)
    bin_losses = measure_losses(run, text_set)
    metrics = {
        name: map_by_seed(seeds, values) for name, values in summarize_losses(bin_losses).items()
    }
    if trial.scale_settings.num_samples:
        sample_set = trial.load_image_set("validation", trial.scale_settings.num_samples)
        metrics |= measure_samples(run, params, seeds, sample_set, trial.encode_texts(sample_set))
    losses_by_condition = {
        name_own_condition(trial.suite): bin_losses,
        EXCHANGED_CAPTIONS: measure_losses(run, exchange_captions(text_set)),
        **{
            condition: measure_losses(other_run, trial.encode_texts(validation_set, other_run))
            for condition, other_run in trial.suite.condition_configs(trial.scale, run).items()
        },
    }
    conditions = {
        condition: map_by_seed(seeds, summarize_losses(losses)[trial.suite.loss_metric])
        for condition, losses in losses_by_condition.items()
    }
    resolution = run.data.resolution
    cost = {
        "parameters": count_params(make_abstract_params(run.model)),
        "flops": training_flops(run.model, resolution, resolution, run.text.max_length),
        "seconds": outcome.seconds,
        "skipped_steps": int(np.sum(outcome.state.skipped_steps)),
    }
    bins = [map_by_seed(seeds, values) for values in bin_losses.T]
    curve = [(step, map_by_seed(seeds, values)) for step, values in outcome.curve]
    return Result(key, tuning, metrics, conditions, bins, curve, cost, describe_environment())


def name_own_condition(suite: Suite) -> str:
    """Return the name of the condition that variants are trained under, with the loss measured."""
    return f"own, {suite.loss_metric}"


def map_by_seed(seeds: Sequence[int], values: Iterable[float]) -> dict[int, float]:
    """Return a value for each seed as a dictionary."""
    return {seed: float(value) for seed, value in zip(seeds, values, strict=True)}
