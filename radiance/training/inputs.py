"""Everything that a training needs, found and checked before any work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from radiance import config
from radiance.base.files import require_space
from radiance.base.trees import count_bytes
from radiance.data.batches import Batch, Batches, CaptionBatches, make_validation_batches
from radiance.data.datasets import describe_source, open_splits
from radiance.data.source import Source
from radiance.distributed.sharding import host_rows, make_mesh, make_shardings
from radiance.model.transformer import Params
from radiance.text.encoder import TextEncoder
from radiance.text.factory import make_encoder
from radiance.training import trajectories
from radiance.training.checks import check_inputs_given, check_run
from radiance.training.coordination import check_hosts_agree
from radiance.training.initialization import (
    check_pretrained_params,
    identify_weights,
    load_trajectory_teacher,
)
from radiance.training.loss_diagnosis import ReferenceLoss, find_reference_loss
from radiance.training.resumption import Changes, check_resumable
from radiance.training.run_directory import RunDirectory, find_latest_complete_step
from radiance.training.seeds import InitParams, check_seeds, init_states
from radiance.training.step import TrainState
from radiance.training.trajectory_batches import (
    TrajectoryBatches,
    make_fixed_trajectory_batches,
)
from radiance.training.validation import choose_prompts


@runtime_checkable
class BatchSource(Protocol):
    """Batches of one seed."""

    def start(self, step: int) -> Any:
        """Return an iterator over the batches from `step` on, which has a method `close`."""


@dataclass(frozen=True)
class DataFeed:
    """Data, first weights and validation of an ablation, in place of those of the trainer."""

    make_batches: Callable[[config.Config], BatchSource]  # of one seed
    validate: Callable[[Params], np.ndarray]  # losses [seeds, bins] of stacked weights
    init_params: InitParams
    num_images: int
    metadata: Mapping[str, Any]  # recorded in data.json


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a training: of one run, or of several that differ only in their seed and name."""

    runs: tuple[config.Config, ...]  # one for each seed
    directories: tuple[RunDirectory, ...]
    changes: tuple[Changes, ...]  # that the user has allowed, of each run
    mesh: jax.sharding.Mesh
    encoder: TextEncoder
    sources: Mapping[str, Source]  # train and, unless none is held out, validation
    data: Mapping[str, Any]  # identities of data, text encoder, base and teacher, for data.json
    num_images: int
    prompts: tuple[str, ...]  # of the samples during training
    abstract_state: TrainState  # shapes and shardings, stacked for several seeds
    reference_loss: ReferenceLoss | None  # that the weights of `init` had before
    batches: tuple[BatchSource, ...]  # of each seed
    validation_batches: Sequence[Batch]  # none without a validation split
    feed: DataFeed | None

    @property
    def run(self) -> config.Config:
        """The settings that all runs share; name and seed are those of the first."""
        return self.runs[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each run."""
        return tuple(run.train.seed for run in self.runs)

    @property
    def has_validation(self) -> bool:
        """Whether there are images for a validation loss."""
        return bool(self.feed or self.validation_batches)


def prepare(
    runs: Sequence[config.Config],
    feed: DataFeed | None = None,
    allowed_changes: Sequence[str] = (),
) -> RunInputs:
    """Return the inputs of a training; write nothing but missing trajectories of a teacher.

    Args:
        runs: One run, or several that differ only in `name` and `train.seed`.
        feed: Data, first weights and validation of an ablation; those of the config if None.
        allowed_changes: What may differ when the runs resume; see `check_resumable`.

    Raises:
        ConfigError: A setting, a directory or the hosts do not fit.
        DataError: Images cannot be used.
        TextError: A prompt is too long.
        CheckpointError: Weights cannot be read.
        OutputError: A directory cannot be written.
    """
    run = runs[0]
    if not feed:
        check_inputs_given(run)
    mesh = make_mesh(run.mesh)
    check_seeds(runs)
    check_run(run, mesh)
    # Each host encodes the text of its own rows on its own devices.
    host_mesh = make_mesh(config.Mesh(data=1, fsdp=-1), jax.local_devices())
    encoder = make_encoder(run.text, run.model.text_dim, partial(make_shardings, mesh=host_mesh))
    sources = open_splits(run.data)
    if run.distill.kind == "trajectories" and "validation" not in sources:
        raise config.ConfigError(
            "distill.kind=trajectories needs captions for validation: set "
            "data.validation_fraction=0.05."
        )

    data = _describe_data(run, sources, encoder) | (dict(feed.metadata) if feed else {})
    check_hosts_agree(data)
    directories = tuple(RunDirectory(run.run_dir) for run in runs)
    changes = tuple(
        check_resumable(directory, seed_run, data, allowed_changes)
        for directory, seed_run in zip(directories, runs)
    )

    caption_source = sources.get("validation", sources["train"])
    prompts = run.train.sample_prompts or choose_prompts(run, caption_source, encoder)
    # Raises TextError for a prompt over the limit.
    encoder([*prompts, run.sample.negative_prompt, run.distill.sample.negative_prompt])

    # Only a fresh run needs the weights of `init`, which may be gone when it is resumed.
    is_fresh = any(find_latest_complete_step(d.checkpoint_dir) is None for d in directories)
    has_reference = is_fresh and run.init and run.distill.kind == "none"
    reference_loss = find_reference_loss(run) if has_reference else None
    abstract_state = _make_abstract_state(run, len(runs), mesh)
    require_space(directories[0].checkpoint_dir, count_bytes(abstract_state))

    if run.distill.kind == "trajectories":
        _generate_trajectories(run, sources, encoder, host_mesh, data)
    return RunInputs(
        runs=tuple(runs),
        directories=directories,
        changes=changes,
        mesh=mesh,
        encoder=encoder,
        sources=sources,
        data=data,
        num_images=feed.num_images if feed else len(sources["train"]),
        prompts=tuple(prompts),
        abstract_state=abstract_state,
        reference_loss=reference_loss,
        batches=tuple(
            feed.make_batches(run) if feed else _make_batches(run, sources, encoder, mesh)
            for run in runs
        ),
        validation_batches=() if feed else _make_validation_batches(run, sources, encoder),
        feed=feed,
    )


def _describe_data(
    run: config.Config, sources: dict[str, Source], encoder: TextEncoder
) -> dict[str, Any]:
    """Identify everything that a resumed run must find unchanged."""
    data = {split: describe_source(source, run.data, split) for split, source in sources.items()}
    data["text"] = {"encoder": run.text.encoder, "identity": encoder.identity}
    if run.lora.rank:
        data["base"] = {"identity": identify_weights(run.init, run)}
    if run.distill.needs_teacher:
        check_pretrained_params(run.teacher, run)
        data["teacher"] = {"identity": identify_weights(run.teacher, run)}
    if run.distill.kind == "trajectories":
        metadata = trajectories.describe_trajectories(
            run, sources, encoder, identify_weights(run.teacher, run)
        )
        folder = trajectories.trajectory_folder(run)
        data["trajectories"] = trajectories.resolve_segments(folder, metadata)._asdict()
    return data


def _generate_trajectories(
    run: config.Config,
    sources: dict[str, Source],
    encoder: TextEncoder,
    mesh: jax.sharding.Mesh,
    data: dict[str, Any],
):
    """Generate the missing trajectories, and record the segments that they have."""
    metadata = trajectories.TrajectoryMetadata(**data["trajectories"])
    data["trajectories"] = trajectories.generate_missing_trajectories(
        run, metadata, sources, partial(load_trajectory_teacher, run, encoder, mesh)
    )._asdict()


def _make_abstract_state(run: config.Config, num_seeds: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Return shapes and shardings of the state."""
    shapes = jax.eval_shape(partial(init_states, run, range(num_seeds)))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        make_shardings(shapes, mesh),
    )


def _make_batches(
    run: config.Config, sources: Mapping[str, Source], encoder: TextEncoder, mesh: jax.sharding.Mesh
) -> BatchSource:
    """Return the training batches of this host."""
    rows = host_rows(mesh, run.data.batch_size)
    settings = (run.data, encoder, run.train.seed, run.train.steps, run.model.masking, rows)
    if run.distill.kind == "trajectories":
        return TrajectoryBatches(trajectories.open_trajectories(run)["train"], *settings)
    if not run.distill.reads_images:
        return CaptionBatches(sources["train"], *settings)
    return Batches(sources["train"], *settings)


def _make_validation_batches(
    run: config.Config, sources: Mapping[str, Source], encoder: TextEncoder
) -> list[Batch]:
    """Return the validation batches, which every host has completely."""
    masking = run.model.masking
    if run.distill.kind == "trajectories":
        return make_fixed_trajectory_batches(
            trajectories.open_trajectories(run)["validation"],
            encoder,
            masking,
            run.data.batch_size,
        )
    if "validation" not in sources or not run.distill.reads_images:
        return []
    return make_validation_batches(
        sources["validation"], run.data, encoder, run.train.validation_images, masking
    )
