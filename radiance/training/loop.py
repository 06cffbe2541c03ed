"""The trainer: read it from top to bottom.

A run directory is a run: the same command goes on where it stopped, bit for bit as if it had not.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from radiance import config
from radiance.base.files import require_space
from radiance.base.trees import count_params
from radiance.data.batches import Batches, make_validation_batches
from radiance.data.datasets import describe_source, open_source
from radiance.data.source import Source
from radiance.distributed.hardware import find_device_spec
from radiance.distributed.sharding import (
    host_rows,
    make_mesh,
    make_shardings,
    put_batch,
    put_global,
)
from radiance.flow.distillation import Teacher
from radiance.model.flops import training_flops
from radiance.model.transformer import Params, make_abstract_params
from radiance.pipeline import Pipeline, encode_prompts
from radiance.text.encoder import TextEncoder
from radiance.text.factory import make_encoder
from radiance.training import trajectories
from radiance.training.checkpoints import Checkpoints, Snapshots, find_latest_complete_step
from radiance.training.checks import check_finite, check_run
from radiance.training.coordination import (
    check_hosts_agree,
    exit_if_host_fails,
    handle_signals,
    is_any_host_stopping,
)
from radiance.training.initialization import (
    check_pretrained_params,
    diagnose_loss,
    find_reference_loss,
    identify_weights,
    initialize_state,
    load_base_params,
    load_frozen_params,
)
from radiance.training.optimizer import make_lr_schedule
from radiance.training.progress import Progress, StepProfiler
from radiance.training.run_directory import MetricWriter, NullMetricWriter, RunDirectory
from radiance.training.step import compute_validation_losses, init_state, make_train_step
from radiance.training.tracking import Loggers
from radiance.training.validation import (
    choose_prompts,
    compute_mean_losses,
    sample_gallery,
    select_params,
    validate_with_config,
)


def train(run: config.Config) -> int:
    """Trains `run` in its directory and returns the step it reached: fewer than `train.steps` when SIGTERM or Ctrl-C came.

    Raises ConfigError, DataError, TextError, CheckpointError or OutputError before any work when something does not fit, and TrainingError
    when the loss stays non-finite.
    """
    # 1. What is asked, and with what. Everything that can be wrong is found here, and nothing is written but a teacher's trajectories, last.
    mesh = make_mesh(run.mesh)
    check_run(run, mesh)
    # Text is encoded by each host for its own rows, whenever they are wanted: on its own devices.
    own = make_mesh(config.Mesh(data=1, fsdp=-1), jax.local_devices())
    encoder = make_encoder(run.text, run.model.text_dim, partial(make_shardings, mesh=own))
    sources = {split: open_source(run.data, split) for split in ("train", "validation")}
    data = {split: describe_source(source, run.data, split) for split, source in sources.items()}
    data["text"] = {"encoder": run.text.encoder, "identity": encoder.identity}
    if run.lora.rank:
        data["base"] = {"identity": identify_weights(run.init, run)}
    if run.distill.needs_teacher:
        check_pretrained_params(run.teacher, run)
        data["teacher"] = {"identity": identify_weights(run.teacher, run)}
    if run.distill.kind == "trajectories":
        made = trajectories.describe_trajectories(
            run, sources, encoder, identify_weights(run.teacher, run)
        )
        made = trajectories.resolve_segments(trajectories.trajectory_folder(run), made)
        data["trajectories"] = made._asdict()
    check_hosts_agree(data)
    directory = RunDirectory(run.run_dir)
    directory.check_resumable(run, data)
    prompts = run.train.sample_prompts or choose_prompts(run, sources["validation"], encoder)
    encoder(
        [*prompts, run.sample.negative_prompt, run.distill.sample.negative_prompt]
    )  # none is over the limit
    # Of weights that are taken now: a run that goes on needs them no more, and they may be gone.
    fresh = find_latest_complete_step(directory.checkpoint_dir) is None
    known = find_reference_loss(run) if fresh and run.init and run.distill.kind == "none" else None
    like = jax.eval_shape(partial(init_state, run))
    require_space(
        directory.checkpoint_dir, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    )
    if run.distill.kind == "trajectories":
        data["trajectories"] = trajectories.generate_missing_trajectories(
            run, made, sources, partial(_load_trajectory_teacher, run, encoder, own)
        )._asdict()
    batches, validation = _make_batches(run, sources, encoder, mesh)

    # 2. The state: this run's newest checkpoint, else the weights of `init`, else fresh ones; born on its devices.
    places = make_shardings(like, mesh)
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places
    )
    first_host = jax.process_index() == 0
    if first_host:
        directory.remove_partial_files()
    checkpoints = Checkpoints(directory.checkpoint_dir, run.train.max_to_keep)
    first, state, origin = initialize_state(run, checkpoints, like, places)
    base = (
        load_base_params(run, make_shardings(make_abstract_params(run.model), mesh))
        if run.lora.rank
        else None
    )
    teacher = _make_teacher(run, encoder, mesh, base)
    if first_host:
        directory.write_metadata(run, data, first)
    count = count_params(like.params)
    print(
        f"{directory.path}: {count / 1e6:.1f} M parameters, {len(sources['train'])} images, {mesh.size} device(s), {origin}.",
        flush=True,
    )
    unpainted = (
        first > 0
        and _is_due(run, first, run.train.sample_every)
        and not directory.sample_path(first).is_file()
    )
    unpainted = bool(multihost_utils.broadcast_one_to_all(np.array(unpainted)))
    if first >= run.train.steps and not unpainted:
        checkpoints.close()
        return first

    # 3. The steps.
    step = jax.jit(
        make_train_step(run),
        in_shardings=(places, None, None, None, None),
        out_shardings=(places, None),
        donate_argnums=0,
    )
    validate = partial(jax.jit(partial(compute_validation_losses, run)), teacher=teacher)
    rate = make_lr_schedule(run.optimizer, run.train.steps)
    told = (
        first - first % run.train.log_every
    )  # the last row of metrics there is: the next one counts from here
    number = saved = first
    facts: dict[str, float] = {}
    before, waited, tally = None, 0.0, _BatchStatistics()
    with (
        jax.set_mesh(mesh),
        handle_signals() as stopping,
        closing(batches.start(told)) as feed,
        closing(checkpoints),
        closing(
            MetricWriter(directory, first, Loggers(run, first))
            if first_host
            else NullMetricWriter()
        ) as journal,
        closing(Progress(first, run.train.steps, run.data.batch_size)) as progress,
        closing(
            StepProfiler(directory.path / "profile", first, run.train.profile_steps)
        ) as profile,
        closing(Snapshots(directory.average_dir, progress.print_line))
        if run.optimizer.ema_widths
        else nullcontext() as snapshots,
        exit_if_host_fails(checkpoints),
    ):
        if first == 0 and run.init:
            bins = compute_mean_losses(validate, select_params(run, state, base), validation, mesh)
            journal.write_metrics(
                0,
                {
                    "validation_loss": float(bins.mean()),
                    "validation_bins": [float(x) for x in bins],
                },
            )
            uncut = partial(
                make_validation_batches,
                sources["validation"],
                run.data,
                encoder,
                run.train.validation_images,
                "off",
            )
            other = partial(
                validate_with_config,
                params=select_params(run, state, base),
                batches=uncut,
                mesh=mesh,
            )
            progress.print_line(diagnose_loss(run, known, bins, other))
        if unpainted:  # by a kill between the checkpoint and its images
            sample_gallery(run, encoder, prompts, select_params(run, state, base), first, journal)
        for _ in range(told, min(first, run.train.steps - 1)):
            tally.add(next(feed))
        while number < run.train.steps and not is_any_host_stopping(
            stopping, number, run.train.log_every
        ):
            began = time.monotonic()
            profile.before_step(number)
            batch = next(feed)
            waited += time.monotonic() - began
            tally.add(batch)
            state, metrics = step(
                state, put_batch(batch, mesh, run.data.batch_size), base, None, teacher
            )
            number += 1
            # Read one step late, so that the device always has the next step to do.
            if before is not None:
                check_finite(run, before, number - 1, checkpoints)
            before = metrics
            if number == first + 1:
                jax.block_until_ready(metrics)
                progress.reset_rate(number)

            if _is_due(run, number, run.train.log_every):
                skipped = int(metrics["skipped_steps"])
                facts = {
                    "loss": float(metrics["loss"]),
                    "gradient_norm": float(metrics["gradient_norm"]),
                }
                norms = {part: float(norm) for part, norm in metrics["gradient_norms"].items()}
                row = facts | {
                    "gradient_norms": norms,
                    "learning_rate": float(rate(number - 1 - skipped)),
                    "skipped_steps": skipped,
                }
                row |= {"captions_cut": tally.cut, "images_skipped": tally.skipped}
                row |= {
                    "images_per_second": progress.images_per_second,
                    "input_wait_seconds": waited,
                }
                row |= _compute_throughput(
                    run, progress.images_per_second / mesh.size, tally.shapes
                )
                journal.write_metrics(number, row)
                waited, tally = 0.0, _BatchStatistics()
            progress.update(number, facts)
            if _is_due(run, number, run.train.validate_every):
                bins = compute_mean_losses(
                    validate, select_params(run, state, base), validation, mesh
                )
                journal.write_metrics(
                    number,
                    {
                        "validation_loss": float(bins.mean()),
                        "validation_bins": [float(x) for x in bins],
                    },
                )
                progress.print_line(f"step {number}: validation loss {bins.mean():.4f}")
            if snapshots and _is_due(
                run, number, run.train.snapshot_every
            ):  # before the checkpoint: no start does this step again after it
                checkpoints.wait_and_report(
                    progress.print_line
                )  # two that write at once would wait for each other over several hosts
                snapshots.save(state)
            if _is_due(run, number, run.train.checkpoint_every):
                check_finite(run, metrics, number, checkpoints)
                checkpoints.save(state, progress.print_line)
                saved = number
            if _is_due(
                run, number, run.train.sample_every
            ):  # after the checkpoint: an image is not worth a step
                sample_gallery(
                    run, encoder, prompts, select_params(run, state, base), number, journal
                )
        if number > saved:
            checkpoints.save(state, progress.print_line)
    return number


def _make_batches(
    run: config.Config, sources: Mapping[str, Source], encoder: TextEncoder, mesh: jax.sharding.Mesh
) -> tuple[Batches | trajectories.TrajectoryBatches, list]:
    """The batches of this host, and those for validation."""
    rows, masking = host_rows(mesh, run.data.batch_size), run.model.masking
    if run.distill.kind == "trajectories":
        ways = trajectories.open_trajectories(run)
        batches = trajectories.TrajectoryBatches(
            ways["train"], run.data, encoder, run.train.seed, run.train.steps, masking, rows
        )
        return batches, trajectories.make_fixed_trajectory_batches(
            ways["validation"], encoder, masking, run.data.batch_size
        )
    batches = Batches(
        sources["train"], run.data, encoder, run.train.seed, run.train.steps, masking, rows
    )
    return batches, make_validation_batches(
        sources["validation"], run.data, encoder, run.train.validation_images, masking
    )


def _load_trajectory_teacher(
    run: config.Config, encoder: TextEncoder, mesh: jax.sharding.Mesh
) -> Pipeline:
    """The teacher that paints trajectories; only when what the student starts from is there too, for painting takes long."""
    if run.init and not run.lora.rank:
        check_pretrained_params(run.init, run)
    return Pipeline(run, _load_teacher_params(run, mesh), encoder=encoder, mesh=mesh)


def _load_teacher_params(run: config.Config, mesh: jax.sharding.Mesh) -> Params:
    return load_frozen_params(
        run.teacher,
        run,
        run.compute.dtype,
        shardings=make_shardings(make_abstract_params(run.model), mesh),
    )


def _make_teacher(
    run: config.Config, encoder: TextEncoder, mesh: jax.sharding.Mesh, base: Params | None
) -> Teacher | None:
    """What every step is given of a teacher, in the precision of the computation. A LoRA's own base is one already."""
    if not run.distill.has_guided_targets:
        return None
    params = (
        base
        if run.is_base_teacher
        else _load_teacher_params(run, mesh)
        if run.distill.needs_teacher
        else None
    )
    _, negative = encode_prompts(encoder, [], run.distill.sample, run.model.masking)
    return Teacher(params, put_global(negative, mesh))


def _is_due(run: config.Config, step: int, every: int) -> bool:
    """Whether what is done so often, and at the end, is done after that step."""
    return step % every == 0 or step == run.train.steps


class _BatchStatistics:
    """What the batches since the last row of metrics had."""

    def __init__(self):
        self.cut = self.skipped = 0  # captions and images
        self.shapes: list[
            tuple[int, int, int]
        ] = []  # height, width and text tokens of an image, step by step

    def add(self, batch: dict[str, np.ndarray]):
        self.cut += int(batch.pop("cut"))
        self.skipped += int(batch.pop("skipped"))
        self.shapes.append((*batch["image"].shape[-3:-1], batch["text"].shape[1]))


def _compute_throughput(
    run: config.Config, images_per_second: float, shapes: Sequence[tuple[int, int, int]]
) -> dict[str, float]:
    """Operations a second of each device, and their share of what it can do, where that is known. Nothing where a teacher
    works in every step, which is not counted.

    rate: images a second of each. shapes: height, width and text tokens of an image, step by step.
    """
    if run.distill.has_guided_targets:
        return {}
    flops = images_per_second * np.mean(
        [training_flops(run.model, *shape, run.lora.rank > 0) for shape in shapes]
    )
    device = find_device_spec(jax.devices()[0].device_kind)
    return {"tflops_per_device": flops / 1e12} | (
        {"mfu": flops / device.flops_per_second} if device else {}
    )
