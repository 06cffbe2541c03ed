"""Initial weights: the newest checkpoint of a run, else the weights of `init`, else random ones."""

from collections.abc import Sequence
from pathlib import Path

import jax

from radiance import config
from radiance.base.trees import flatten_tree
from radiance.distributed.sharding import host_shardings, make_shardings, put_global
from radiance.flow.distillation import Teacher
from radiance.model.paths import is_always_float32
from radiance.model.transformer import Params, make_abstract_params
from radiance.pipeline import Pipeline
from radiance.text.encoder import TextEncoder
from radiance.text.prompts import encode_prompts
from radiance.training.checkpoint_reader import CheckpointReader
from radiance.training.checkpoints import Checkpoints
from radiance.training.run_directory import RunDirectory, is_run_directory
from radiance.training.seed_checkpoints import SeedCheckpoints
from radiance.training.seeds import InitParams
from radiance.training.shared_programs import share_init
from radiance.training.step import TrainState
from radiance.weights import checkpoint
from radiance.weights.opening import open_tensors


def initialize_state(
    run: config.Config,
    seeds: Sequence[int],
    checkpoints: Checkpoints | SeedCheckpoints,
    abstract_state: TrainState,
    mesh: jax.sharding.Mesh,
    init_params: InitParams | None = None,
) -> tuple[int, TrainState, str]:
    """Return the step and state to start from, and a phrase that says where they come from.

    Args:
        run: Config of the runs.
        seeds: Seed of each run; the state is stacked for several.
        checkpoints: Checkpoints of the runs.
        abstract_state: Shapes and shardings of the state.
        mesh: Mesh of the shardings.
        init_params: Random initial weights from a key, in place of those of the model.
    """
    newest = checkpoints.restore_newest(abstract_state)
    if newest is not None:
        step, state = newest
        return step, state, f"resumed from step {step}"
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    init = share_init(run, tuple(seeds), init_params)
    init_fresh_state = jax.jit(init, out_shardings=shardings)
    if not run.init:
        return 0, init_fresh_state(), "from scratch"
    if run.lora.rank:
        return 0, init_fresh_state(), f"a LoRA of rank {run.lora.rank} for {run.init}"
    param_shardings = make_shardings(make_abstract_params(run.model), mesh)
    params = load_pretrained_params(run.init, run, param_shardings)
    return 0, init_fresh_state(params), f"from the weights of {run.init}"


def load_pretrained_params(
    path: str, run: config.Config, shardings: Params | None = None
) -> Params:
    """Return weights to start from: those of a file, or the averaged ones of a run directory.

    Args:
        path: Checkpoint file or run directory of the same model.
        run: Config of the run that starts from them.
        shardings: Shardings of the weights; the first device if None.
    """
    if not is_run_directory(path):
        return checkpoint.read_checkpoint(path, run.model, shardings)[1]
    source_run, checkpoints, _ = _open_source_run(path, run)
    weights = source_run.sample.weights
    newest = checkpoints.read_newest(
        lambda step: checkpoints.restore_params(step, source_run, weights, shardings)
    )
    assert newest is not None  # checked by `_open_source_run`
    return newest[1]


def load_base_params(run: config.Config, shardings: Params | None = None) -> Params:
    """Return the weights that a LoRA run adds to, in the format of `run.lora`."""
    weight_format = None if run.lora.weight_format == "none" else run.lora.weight_format
    return load_frozen_params(run.init, run, run.lora.dtype, weight_format, shardings)


def load_frozen_params(
    path: str,
    run: config.Config,
    dtype: str,
    weight_format: str | None = None,
    shardings: Params | None = None,
) -> Params:
    """Return weights that are not trained, in as little memory as the arguments allow.

    Args:
        path: Checkpoint file or run directory of the same model.
        run: Config of the run that uses them.
        dtype: Type of the weights, except of those that must stay in float32.
        weight_format: Format of quantized weights; None for `dtype`.
        shardings: Shardings of the weights; the first device if None.
    """
    if not is_run_directory(path):
        return checkpoint.open_checkpoint(path, run.model).load_params(
            dtype, weight_format, shardings
        )
    if weight_format:
        host_params = load_pretrained_params(
            path, run, host_shardings(make_abstract_params(run.model))
        )
        source = checkpoint.checkpoint_from_params(run.model, host_params, path)
        return source.load_params(dtype, weight_format, shardings)
    params = load_pretrained_params(path, run, shardings)
    leaves = [
        x if is_always_float32(path) else x.astype(dtype)
        for path, x in flatten_tree(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def check_pretrained_params(path: str, run: config.Config):
    """Raise the errors of `load_pretrained_params` that can be found without reading weights."""
    if is_run_directory(path):
        _open_source_run(path, run)
    else:
        checkpoint.open_checkpoint(path, run.model)


def identify_weights(path: str, run: config.Config) -> str:
    """Return an identity of the weights of a file or run directory.

    A LoRA run resumes only with its own base, and a distilled run only with its own teacher.
    """
    if not is_run_directory(path):
        return open_tensors(path).fingerprint()
    source_run, _, step = _open_source_run(path, run)
    losses = [
        row["loss"]
        for row in RunDirectory(Path(path)).read_metrics()
        if "loss" in row and row["step"] <= step
    ]
    # All digits of the loss distinguish another run of the same name.
    loss_text = f" loss {losses[-1]}" if losses else ""
    return f"{source_run.name} step {step}{loss_text} {source_run.sample.weights}"


def _open_source_run(path: str, run: config.Config) -> tuple[config.Config, CheckpointReader, int]:
    """Return config, checkpoints and newest step of a run directory to start from.

    Raises:
        ConfigError: It does not fit, or has no checkpoint.
    """
    run_dir = RunDirectory(Path(path))
    source_run = run_dir.read_config()
    if changes := config.differences(source_run.model, run.model, "model."):
        changes_text = ", ".join(
            f"{key} is {old!r} in the run and {new!r} here" for key, (old, new) in changes.items()
        )
        raise config.ConfigError(
            f"{path} is a run of another model ({changes_text}): make the models equal."
        )
    if source_run.lora.rank:
        raise config.ConfigError(
            f"{path} is a LoRA run without weights of its own: merge it with "
            f"`radiance convert {path} FILE` and give that file."
        )
    checkpoints = CheckpointReader(run_dir.checkpoint_dir)
    latest_step = checkpoints.latest_complete_step
    if latest_step is None:
        raise config.ConfigError(f"{path} has no checkpoint yet: train it first.")
    return source_run, checkpoints, latest_step


# --- teachers ---------------------------------------------------------------------------------


def load_trajectory_teacher(
    run: config.Config, encoder: TextEncoder, mesh: jax.sharding.Mesh
) -> Pipeline:
    """Return the pipeline of the teacher that generates trajectories.

    The weights of `init` are checked first, because generation takes long.
    """
    if run.init and not run.lora.rank:
        check_pretrained_params(run.init, run)
    return Pipeline(run, _load_teacher_params(run, mesh), encoder=encoder, mesh=mesh)


def make_teacher(
    run: config.Config, encoder: TextEncoder, mesh: jax.sharding.Mesh, base: Params | None
) -> Teacher | None:
    """Return the teacher that every step uses, or None. A LoRA's base serves without a copy."""
    if not run.distill.has_guided_targets:
        return None
    if run.is_base_teacher:
        params = base
    else:
        params = _load_teacher_params(run, mesh) if run.distill.needs_teacher else None
    _, negative = encode_prompts(encoder, [], run.distill.sample, run.model.masking)
    return Teacher(params, put_global(negative, mesh))


def _load_teacher_params(run: config.Config, mesh: jax.sharding.Mesh) -> Params:
    """Return the teacher's weights in the type of the computation."""
    shardings = make_shardings(make_abstract_params(run.model), mesh)
    return load_frozen_params(run.teacher, run, run.compute.dtype, shardings=shardings)
