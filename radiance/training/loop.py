"""The trainer: read it from top to bottom.

A run directory is a run: the same command goes on where it stopped, bit for bit as if it had not.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from radiance import config
from radiance.data.captions import first_caption
from radiance.data.datasets import Source, describe, open_source
from radiance.data.pipeline import Batches, fixed_batches
from radiance.devices import device_named
from radiance.model.flops import training_flops
from radiance.model.transformer import Params, abstract
from radiance.pictures import contact_sheet
from radiance.pipeline import Pipeline, encode
from radiance.sampling import times_of
from radiance.sharding import check_even, gathered, host_rows, make_mesh, put_batch, put_whole, shardings
from radiance.text.encoders import Encoder, make_encoder
from radiance.training import trajectories
from radiance.training.checkpoints import Checkpoints, Snapshots, chosen_average, standing
from radiance.training.directory import Journal, RunDirectory, Silence
from radiance.training.distillation import Teacher
from radiance.training.optimizer import join, learning_rate, split_frozen
from radiance.training.progress import Profile, Progress
from radiance.training.start import check_weights, identity_of, known_loss, load_base, load_still, start, verdict
from radiance.training.step import Metrics, State, complete, init_state, make_step, validation_losses
from radiance.training.tracking import Trackers, require_trackers
from radiance.weights.files import require_space

PROMPTS = 16  # pictures of a gallery, where the config names no prompts


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def train(run: config.Config) -> int:
    """Trains `run` in its directory and returns the step it reached: fewer than `train.steps` when SIGTERM or Ctrl-C came.

    Raises ConfigError, DataError, TextError or CheckpointError before any work when something does not fit, and TrainingError
    when the loss stays non-finite.
    """
    # 1. What is asked, and with what. Everything that can be wrong is found here, and nothing is written but a teacher's trajectories, last.
    mesh = make_mesh(run.mesh)
    _check(run, mesh)
    # Text is encoded by each host for its own rows, whenever they are wanted: on its own devices.
    own = make_mesh(config.Mesh(data=1, fsdp=-1), jax.local_devices())
    encoder = make_encoder(run.text, run.model.text_dim, partial(shardings, mesh=own))
    sources = {split: open_source(run.data, split) for split in ("train", "validation")}
    data = {split: describe(source, run.data, split) for split, source in sources.items()}
    data["text"] = {"encoder": run.text.encoder, "identity": encoder.identity}
    if run.lora.rank:
        data["base"] = {"identity": identity_of(run.init, run)}
    if run.distill.needs_teacher:
        check_weights(run.teacher, run)
        data["teacher"] = {"identity": identity_of(run.teacher, run)}
    if run.distill.kind == "trajectories":
        made = trajectories.painted(run, sources, encoder, identity_of(run.teacher, run))
        made = trajectories.as_there(trajectories.folder_of(run), made)
        data["trajectories"] = made._asdict()
    _check_alike(data)
    directory = RunDirectory(run.directory)
    directory.check(run, data)
    prompts = run.train.sample_prompts or _captions(run, sources["validation"], encoder)
    encoder([*prompts, run.sample.negative, run.distill.sample.negative])  # none is over the limit
    # Of weights that are taken now: a run that goes on needs them no more, and they may be gone.
    fresh = standing(directory.checkpoints) is None
    known = known_loss(run) if fresh and run.init and run.distill.kind == "none" else None
    like = jax.eval_shape(partial(init_state, run))
    require_space(directory.checkpoints, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like)))
    if run.distill.kind == "trajectories":
        data["trajectories"] = trajectories.paint_missing(run, made, sources, partial(_painter, run, encoder, own))._asdict()
    batches, validation = _feeds(run, sources, encoder, mesh)

    # 2. The state: this run's newest checkpoint, else the weights of `init`, else fresh ones; born on its devices.
    places = shardings(like, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places)
    first_host = jax.process_index() == 0
    if first_host:
        directory.clean()
    checkpoints = Checkpoints(directory.checkpoints, run.train.keep, run.train.keep_every)
    first, state, origin = start(run, checkpoints, like, places)
    base = load_base(run, shardings(abstract(run.model), mesh)) if run.lora.rank else None
    teacher = _teacher(run, encoder, mesh, base)
    if first_host:
        directory.record(run, data, first)
    count = sum(x.size for x in jax.tree.leaves(like.params))
    print(
        f"{directory.path}: {count / 1e6:.1f} M parameters, {len(sources['train'])} pictures, {mesh.size} device(s), {origin}.", flush=True
    )
    unpainted = first > 0 and _due(run, first, run.train.sample_every) and not directory.sample(first).is_file()
    unpainted = bool(multihost_utils.broadcast_one_to_all(np.array(unpainted)))
    if first >= run.train.steps and not unpainted:
        checkpoints.close()
        return first

    # 3. The steps.
    step = jax.jit(make_step(run), in_shardings=(places, None, None, None, None), out_shardings=(places, None), donate_argnums=0)
    validate = partial(jax.jit(partial(validation_losses, run)), teacher=teacher)
    rate = learning_rate(run.optimizer, run.train.steps)
    told = first - first % run.train.log_every  # the last row of metrics there is: the next one counts from here
    number = saved = first
    facts: dict[str, float] = {}
    before, waited, tally = None, 0.0, _Tally()
    with (
        jax.set_mesh(mesh),
        _signals() as stopping,
        closing(batches.start(told)) as feed,
        closing(checkpoints),
        closing(Journal(directory, first, Trackers(run, first)) if first_host else Silence()) as journal,
        closing(Progress(first, run.train.steps, run.data.batch)) as progress,
        closing(Profile(directory.path / "profile", first, run.train.profile_steps)) as profile,
        closing(Snapshots(directory.averages, progress.say)) if run.optimizer.ema_widths else nullcontext() as snapshots,
        _with_all_hosts(checkpoints),
    ):
        if first == 0 and run.init:
            bins = mean_losses(validate, weights_of(run, state, base), validation, mesh)
            journal.write(0, {"validation_loss": float(bins.mean()), "validation_bins": [float(x) for x in bins]})
            uncut = partial(fixed_batches, sources["validation"], run.data, encoder, run.train.validate_pictures, "off")
            other = partial(_validate_otherwise, params=weights_of(run, state, base), batches=uncut, mesh=mesh)
            progress.say(verdict(run, known, bins, other))
        if unpainted:  # by a kill between the checkpoint and its pictures
            _gallery(run, encoder, prompts, weights_of(run, state, base), first, journal)
        for _ in range(told, min(first, run.train.steps - 1)):
            tally.add(next(feed))
        while number < run.train.steps and not _anywhere(stopping, number, run.train.log_every):
            began = time.monotonic()
            profile.before_step(number)
            batch = next(feed)
            waited += time.monotonic() - began
            tally.add(batch)
            state, metrics = step(state, put_batch(batch, mesh, run.data.batch), base, None, teacher)
            number += 1
            # Read one step late, so that the device always has the next step to do.
            if before is not None:
                _check_finite(run, before, number - 1, checkpoints)
            before = metrics
            if number == first + 1:
                jax.block_until_ready(metrics)
                progress.first_step_done(number)

            if _due(run, number, run.train.log_every):
                skipped = int(metrics["skipped"])
                facts = {"loss": float(metrics["loss"]), "gradient_norm": float(metrics["gradient_norm"])}
                norms = {part: float(norm) for part, norm in metrics["gradient_norms"].items()}
                row = facts | {"gradient_norms": norms, "learning_rate": float(rate(number - 1 - skipped)), "skipped": skipped}
                row |= {"captions_cut": tally.cut, "pictures_skipped": tally.skipped}
                row |= {"pictures_per_second": progress.rate, "input_wait_seconds": waited}
                row |= _speed(run, progress.rate / mesh.size, tally.shapes)
                journal.write(number, row)
                waited, tally = 0.0, _Tally()
            progress.update(number, facts)
            if _due(run, number, run.train.validate_every):
                bins = mean_losses(validate, weights_of(run, state, base), validation, mesh)
                journal.write(number, {"validation_loss": float(bins.mean()), "validation_bins": [float(x) for x in bins]})
                progress.say(f"step {number}: validation loss {bins.mean():.4f}")
            if snapshots and _due(run, number, run.train.snapshot_every):  # before the checkpoint: no start does this step again after it
                checkpoints.settle(progress.say)  # two that write at once would wait for each other over several hosts
                snapshots.save(state)
            if _due(run, number, run.train.checkpoint_every):
                _check_finite(run, metrics, number, checkpoints)
                checkpoints.save(state, progress.say)
                saved = number
            if _due(run, number, run.train.sample_every):  # after the checkpoint: a picture is not worth a step
                _gallery(run, encoder, prompts, weights_of(run, state, base), number, journal)
        if number > saved:
            checkpoints.save(state, progress.say)
    return number


def _feeds(
    run: config.Config, sources: Mapping[str, Source], encoder: Encoder, mesh: jax.sharding.Mesh
) -> tuple[Batches | trajectories.TrajectoryBatches, list]:
    """The batches of this host, and those for validation."""
    rows, masking = host_rows(mesh, run.data.batch), run.model.masking
    if run.distill.kind == "trajectories":
        ways = trajectories.of_run(run)
        batches = trajectories.TrajectoryBatches(ways["train"], run.data, encoder, run.train.seed, run.train.steps, masking, rows)
        return batches, trajectories.fixed_trajectories(ways["validation"], encoder, masking, run.data.batch)
    batches = Batches(sources["train"], run.data, encoder, run.train.seed, run.train.steps, masking, rows)
    return batches, fixed_batches(sources["validation"], run.data, encoder, run.train.validate_pictures, masking)


def _painter(run: config.Config, encoder: Encoder, mesh: jax.sharding.Mesh) -> Pipeline:
    """The teacher that paints trajectories; only when what the student starts from is there too, for painting takes long."""
    if run.init and not run.lora.rank:
        check_weights(run.init, run)
    return Pipeline(run, _weights_of_teacher(run, mesh), encoder=encoder, mesh=mesh)


def _weights_of_teacher(run: config.Config, mesh: jax.sharding.Mesh) -> Params:
    return load_still(run.teacher, run, run.compute.dtype, places=shardings(abstract(run.model), mesh))


def _teacher(run: config.Config, encoder: Encoder, mesh: jax.sharding.Mesh, base: Params | None) -> Teacher | None:
    """What every step is given of a teacher, in the precision of the computation. A LoRA's own base is one already."""
    if not run.distill.in_every_step:
        return None
    params = base if run.base_teaches else _weights_of_teacher(run, mesh) if run.distill.needs_teacher else None
    _, negative = encode(encoder, [], run.distill.sample, run.model.masking)
    return Teacher(params, put_whole(negative, mesh))


def _due(run: config.Config, number: int, every: int) -> bool:
    """Whether what is done so often, and at the end, is done after that step."""
    return number % every == 0 or number == run.train.steps


class _Tally:
    """What the batches since the last row of metrics had."""

    def __init__(self):
        self.cut = self.skipped = 0  # captions and pictures
        self.shapes: list[tuple[int, int, int]] = []  # height, width and text tokens of a picture, step by step

    def add(self, batch: dict[str, np.ndarray]):
        self.cut += int(batch.pop("cut"))
        self.skipped += int(batch.pop("skipped"))
        self.shapes.append((*batch["image"].shape[-3:-1], batch["text"].shape[1]))


def _speed(run: config.Config, rate: float, shapes: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Operations a second of each device, and their share of what it can do, where that is known. Nothing where a teacher
    works in every step, which is not counted.

    rate: pictures a second of each. shapes: height, width and text tokens of a picture, step by step.
    """
    if run.distill.in_every_step:
        return {}
    flops = rate * np.mean([training_flops(run.model, *shape, run.lora.rank > 0) for shape in shapes])
    device = device_named(jax.devices()[0].device_kind)
    return {"tflops_per_device": flops / 1e12} | ({"mfu": flops / device.flops} if device else {})


def _anywhere(stopping: threading.Event, number: int, every: int) -> bool:
    """Whether any host was asked to stop. Hosts agree on it now and then, so that all stop after the same step."""
    if jax.process_count() == 1:
        return stopping.is_set()
    return number % every == 0 and bool(multihost_utils.process_allgather(np.array(stopping.is_set())).any())


@contextmanager
def _with_all_hosts(checkpoints: Checkpoints) -> Iterator[None]:
    """Ends this process at once when another host is gone: without it nothing can be computed or saved, and what waits for it, as JAX does
    at an ordinary end, would wait for minutes."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, TrainingError):  # which all hosts raise
            raise
        latest = checkpoints.standing
        print(
            f"radiance: another host is gone, or this one cannot go on ({str(error).splitlines()[0][:300]}): start all hosts again with the same "
            f"command, which goes on from {'the beginning' if latest is None else f'step {latest}'}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _check_alike(data: Mapping[str, Any]):
    """Raises ConfigError where hosts see other data than the first: each would have an order of its own."""
    if jax.process_count() == 1:
        return
    ours = np.stack([np.frombuffer(hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest(), np.uint8) for part in data.values()])
    of_all = multihost_utils.process_allgather(ours)  # [hosts, parts, bytes]
    if other := [name for i, name in enumerate(data) if (of_all[:, i] != of_all[0, i]).any()]:
        raise config.ConfigError(
            f"The hosts do not see the same data ({', '.join(other)}): look at data.path on each, and remove data.directory where it is stale."
        )


def _check(run: config.Config, mesh: jax.sharding.Mesh):
    require_trackers(run.train.track)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * run.optimizer.accumulate
    if run.data.batch % parts:
        raise config.ConfigError(
            f"data.batch={run.data.batch} does not divide into {parts} parts (mesh data × fsdp × optimizer.accumulate): change one of them."
        )
    if run.mesh.uneven == "refuse":
        check_even(abstract(run.model), mesh)
    if run.model.channels != 3 and run.distill.kind != "trajectories":
        raise config.ConfigError(
            f"model.channels={run.model.channels}, but {run.data.source} has pictures of 3 channels: train a pixel model."
        )
    chosen_average(run.sample.weights, run.optimizer.averages)  # raises for a width that is made of snapshots after the run
    for sample in (run.sample, run.distill.sample):
        times_of(sample, (run.data.side // run.model.patch) ** 2)  # raises when the schedule cannot be
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"model.pooled_dim={run.model.pooled_dim}, but the {run.text.encoder} encoder gives no pooled vector: set it to 0."
        )


def weights_of(run: config.Config, state: State, base: Params | None) -> Params:
    """The weights that the run samples and is validated with."""
    decay = chosen_average(run.sample.weights, state.ema)
    params = state.params if decay is None else join(state.ema[decay], split_frozen(state.params, run.optimizer.frozen)[1])
    return complete(run, params, base)


def _check_finite(run: config.Config, metrics: Metrics, step: int, checkpoints: Checkpoints):
    if int(metrics["skipped_in_row"]) < run.train.skip_limit:
        return
    latest = checkpoints.latest
    raise TrainingError(
        f"The loss or its gradient was not finite in the {run.train.skip_limit} steps up to {step}: lower optimizer.learning_rate or look at the "
        f"data. {'No checkpoint was written.' if latest is None else f'The checkpoint of step {latest} is good.'}"
    )


def mean_losses(validate: Callable, params: Params, batches: Iterable[dict[str, np.ndarray]], mesh: jax.sharding.Mesh) -> np.ndarray:
    """Mean loss in every time bin. validate: `validation_losses` of a run, compiled."""
    total, weight = 0.0, 0.0
    for seed, batch in enumerate(batches):
        losses = gathered(validate(params, put_whole(batch, mesh), jnp.int32(seed)))
        total, weight = total + batch["weight"] @ losses, weight + batch["weight"].sum()
    return total / weight


def _validate_otherwise(run: config.Config, *, params: Params, batches: Callable[[], list], mesh: jax.sharding.Mesh) -> np.ndarray:
    """The same under another config, which may show what the run's own masking hides: `batches` makes them with all of their text."""
    return mean_losses(jax.jit(partial(validation_losses, run)), params, batches(), mesh)


def _captions(run: config.Config, source: Source, encoder: Encoder) -> tuple[str, ...]:
    """Prompts for the pictures on the way: the first captions that are not over the encoder's limit."""
    captions = (first_caption(source, i, run.data) for i in range(len(source)))
    return tuple(islice((caption for caption in captions if encoder.count(caption) <= encoder.limit), PROMPTS)) or ("",)


def _gallery(run: config.Config, encoder: Encoder, prompts: Sequence[str], params: Params, step: int, journal: Journal | Silence):
    """The same prompts and seeds, painted as the model learns. Latents are no pictures yet."""
    if run.model.channels != 3:
        return
    pictures = list(Pipeline(run, params, encoder=encoder).paint(prompts))
    sheet = contact_sheet([p.image for p in pictures], columns=min(len(pictures), 10))
    journal.paint(step, sheet, prompts, {"seeds": list(range(len(prompts))), "settings": config.to_dict(run.sample)})


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Inside, SIGTERM and Ctrl-C ask for a clean stop after the step at hand; a second one stops at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}

    def restore(*_):
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def stop(*_):
        stopping.set()
        restore()

    for kind in before:
        signal.signal(kind, stop)
    try:
        yield stopping
    finally:
        restore()
