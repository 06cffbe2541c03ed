"""Finding a model by what the user calls it: a run directory, or a checkpoint file with the files that belong to it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.distributed.sharding import host_shardings, make_mesh, make_shardings
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import Params, make_abstract_params
from radiance.pipeline import LatentDecoder, Pipeline, encode_prompts
from radiance.text.factory import make_encoder
from radiance.training.checkpoints import Checkpoints
from radiance.training.initialization import identify_weights, load_base_params
from radiance.training.lora import to_lora_weights
from radiance.training.run_directory import RunDirectory, is_run_directory
from radiance.weights import autoencoder as autoencoder_files
from radiance.weights import lora as lora_files
from radiance.weights.checkpoint import (
    LOSS_KEY,
    Checkpoint,
    checkpoint_from_params,
    open_checkpoint,
)
from radiance.weights.lora_adapters import apply_loras
from radiance.weights.safetensors import write_safetensors

# What our own exports carry, so that they are sampled as the run was: settings that the weights do not tell.
RUN_METADATA_KEY = "radiance.run"
T5_MAX_LENGTH = 512  # tokens; what the published models were trained with


def load(
    model: str | Path,
    weights: str | None = None,
    *,
    text_encoder: str = "",
    tokenizer: str = "",
    autoencoder: str = "",
    loras: Sequence[tuple[str, float]] = (),
    preset: str | None = None,
    changes: Sequence[str] = (),
    weight_format: str | None = None,
    dtype: str = "bfloat16",
    mesh: config.Mesh | None = None,
    run: config.Config | None = None,
    **model_overrides: Any,
) -> Pipeline:
    """The pipeline of a run directory at its newest checkpoint, or of a checkpoint file.

    weights: of a run: params, ema, ema=DECAY or width=WIDTH; its own choice when None. text_encoder, tokenizer: T5's files; a run's own when
    empty. autoencoder: the file that latent models (Chroma1-Base, -HD, -Flash) need. loras: files and strengths. preset: settings
    by name (`config.PRESETS`); when None a run's own, or those that suit the file. changes: of the settings, such as "guidance=2".
    store: q8_0, int8 or float8_e4m3fn keeps the blocks' matrices small in memory, none does not; when None as the file has
    them.
    dtype: of a file's weights and of the computation. known: fields of the model that a file does not tell, such as
    text_ids="sequential". mesh: of this host's devices, over which the model and the images are spread; one device when None. run: settings in
    place of a run directory's own, or of those that suit a file.

    Raises ConfigError or CheckpointError, in one sentence and before the weights are read, when something is missing or unfit.
    """
    if is_run_directory(model):
        run = run or RunDirectory(Path(model)).read_config()
        _reject_model_overrides(model, model_overrides)
    else:
        checkpoint = open_checkpoint(model, run and run.model, **model_overrides)
        run = run or make_sampling_config(checkpoint, dtype)
    if preset is not None:
        preset_settings = config.get_preset(preset)
        run = replace(
            run,
            sample=replace(preset_settings.sample, weights=run.sample.weights),
            data=replace(run.data, resolution=preset_settings.resolution, extra_resolutions=(), bucket_step=0),
        )
    if weights:
        changes = [*changes, f"weights={weights}"]
    run = replace(run, sample=config.override(run.sample, changes))
    if text_encoder:
        run = replace(
            run,
            text=replace(run.text, encoder="t5", file=text_encoder, tokenizer=tokenizer, cache=""),
        )
    elif tokenizer:
        raise config.ConfigError(
            f"--tokenizer {tokenizer} is of a text encoder: give --text-encoder FILE too."
        )
    _check_loadable(run, model, autoencoder)
    decoder = (
        LatentDecoder(*autoencoder_files.read_autoencoder(autoencoder), run.compute.dtype)
        if autoencoder
        else None
    )
    if decoder and 4 * decoder.architecture.latent_channels != run.model.channels:
        raise config.ConfigError(
            f"{model} paints latents of {run.model.channels // 4} channels, and {autoencoder} has {decoder.architecture.latent_channels}: give FLUX's."
        )
    adapters = [(lora_files.read_lora(path, run.model), strength) for path, strength in loras]
    device_mesh = None if mesh is None else make_mesh(mesh, jax.local_devices())
    make_param_shardings = (
        None if device_mesh is None else partial(make_shardings, mesh=device_mesh)
    )
    encoder = make_encoder(run.text, run.model.text_dim, make_param_shardings)

    param_shardings = make_param_shardings and make_param_shardings(make_abstract_params(run.model))
    if is_run_directory(model) and run.lora.rank:
        check_base_identity(RunDirectory(Path(model)), run)
        run_lora = trained_lora(model, run)
        base_run = (
            run
            if weight_format is None
            else replace(run, lora=replace(run.lora, weight_format=weight_format))
        )
        params, origin, adapters = (
            load_base_params(base_run, param_shardings),
            run_lora.origin,
            [(run_lora, 1.0), *adapters],
        )
    elif is_run_directory(model):
        quantization = weight_format not in (None, "none")
        params, origin = restore_run_weights(
            model,
            run,
            host_shardings(make_abstract_params(run.model)) if quantization else param_shardings,
        )
        if quantization:
            params = checkpoint_from_params(run.model, params, origin).load_params(
                weight_format=weight_format, shardings=param_shardings
            )
    else:
        quantization = (
            "file" if weight_format is None else None if weight_format == "none" else weight_format
        )
        params, origin = (
            checkpoint.load_params(dtype, quantization, param_shardings),
            checkpoint.origin,
        )
    if adapters:
        params = apply_loras(params, run.model, adapters)
    origin += "".join(f" + {strength:g} × {path}" for path, strength in loras)
    return Pipeline(run, params, origin, encoder, decoder, device_mesh)


def trained_lora(model: str | Path, run: config.Config) -> lora_files.LoraWeights:
    """What a LoRA run has trained, at its newest checkpoint."""
    return to_lora_weights(run, *restore_run_weights(model, run))


def restore_run_weights(
    model: str | Path, run: config.Config, param_shardings: Params | None = None
) -> tuple[Params, str]:
    """Weights of a run's newest checkpoint (of a LoRA run, what it adds), on one device or as `places` says, and what they are called."""
    checkpoints = Checkpoints(RunDirectory(Path(model)).checkpoint_dir)
    if checkpoints.latest_step is None:
        raise config.ConfigError(
            f"{model} has no checkpoint yet: train it for at least train.checkpoint_every steps."
        )
    weights_name = run.sample.weights
    return checkpoints.restore_params(
        checkpoints.latest_step, run, weights_name, param_shardings
    ), f"{run.name} step {checkpoints.latest_step} {weights_name}"


def open_model(model: str | Path, weights: str | None = None, **model_overrides: Any) -> Checkpoint:
    """The checkpoint of a run, with what its exports say of it, or of a file."""
    if not is_run_directory(model):
        if weights:
            raise config.ConfigError(
                f"{model} is a file and has one kind of weights: --weights is for run directories."
            )
        return open_checkpoint(model, **model_overrides)
    run_directory = RunDirectory(Path(model))
    run = run_directory.read_config()
    _reject_model_overrides(model, model_overrides)
    validated_weights = run.sample.weights
    if weights:
        run = replace(run, sample=replace(run.sample, weights=weights))
    export_settings = {
        "text": config.to_dict(replace(run.text, file="", tokenizer="", cache="")),
        "sample": config.to_dict(replace(run.sample, weights="params")),
        "resolution": run.data.resolution,
        "noise_scale": run.flow.noise_scale,
    }
    loss = run_directory.last_validation_loss()
    loss_metadata = (
        {LOSS_KEY: f"{loss:.6g}"}
        if loss is not None and run.sample.weights == validated_weights
        else {}
    )
    metadata = {RUN_METADATA_KEY: json.dumps(export_settings), **loss_metadata}
    if run.lora.rank:
        check_base_identity(run_directory, run)
        base = (
            open_model(run.init)
            if is_run_directory(run.init)
            else open_checkpoint(run.init, run.model)
        )
        return replace(lora_files.merge_lora(base, trained_lora(model, run)), metadata=metadata)
    return checkpoint_from_params(
        run.model,
        *restore_run_weights(model, run, host_shardings(make_abstract_params(run.model))),
        metadata,
    )


def check_base_identity(run_directory: RunDirectory, run: config.Config):
    """Raises ConfigError when a LoRA run's base is no longer the one that it was trained on."""
    trained_identity, current_identity = (
        run_directory.read_base_identity(),
        identify_weights(run.init, run),
    )
    if trained_identity not in (None, current_identity):
        raise config.ConfigError(
            f"{run_directory.path} was trained on another {run.init} ({trained_identity}; now it is {current_identity}): bring that back."
        )


def make_sampling_config(checkpoint: Checkpoint, dtype: str) -> config.Config:
    """Settings to sample a checkpoint file with: those of the run it comes from, or those that suit the published model."""
    compute = config.Compute(dtype=dtype)
    model = checkpoint.model
    if RUN_METADATA_KEY not in checkpoint.metadata:
        preset = config.get_preset(config.find_preset_name(model))
        text = config.Text(encoder="t5", max_length=T5_MAX_LENGTH)
        return config.Config(
            model=model,
            compute=compute,
            text=text,
            sample=preset.sample,
            data=config.Data(resolution=preset.resolution),
            optimizer=config.Optimizer(),
        )
    try:
        settings = json.loads(checkpoint.metadata[RUN_METADATA_KEY])
        return config.Config(
            model=model,
            compute=compute,
            text=config.from_dict(config.Text, settings["text"]),
            sample=config.from_dict(config.Sample, settings["sample"]),
            data=config.Data(resolution=settings["resolution"]),
            flow=config.Flow(noise_scale=settings["noise_scale"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.origin} does not say in its metadata how it is sampled, as our exports do ({RUN_METADATA_KEY}: {error}): export it again."
        ) from None


def _reject_model_overrides(model: str | Path, model_overrides: dict[str, Any]):
    if model_overrides:
        raise config.ConfigError(
            f"{model} is a run directory and knows its {' and '.join(model_overrides)}: these flags are for files that do not say it."
        )


def _check_loadable(run: config.Config, model: str | Path, autoencoder: str):
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"{model} reads a pooled CLIP vector (FLUX), which no encoder here gives: it can be converted, not sampled."
        )
    if run.text.encoder == "t5" and not run.text.file and not run.text.cache:
        raise config.ConfigError(
            f"{model} needs its text encoder: give --text-encoder FILE, or text.file=FILE where settings are changed (T5 v1.1; safetensors or GGUF)."
        )
    if run.model.patch == 1 and not autoencoder:
        raise config.ConfigError(
            f"{model} paints latents: give --autoencoder FILE, FLUX's autoencoder."
        )
    if run.model.patch > 1 and autoencoder:
        raise config.ConfigError(
            f"{model} paints pixels and needs no autoencoder: leave --autoencoder out."
        )


def make_prompts_writer(run: config.Config) -> Callable[[Path], None]:
    """What writes `prompts.safetensors` into the folder of an exported PyTorch model: the run's sample prompts, encoded, and how to paint them."""
    prompts = list(run.train.sample_prompts or ("",))
    encoder = make_encoder(run.text, run.model.text_dim)
    positive, negative = encode_prompts(encoder, prompts, run.sample, run.model.masking)
    tensors = {"text": positive.text.astype(np.float32), "lengths": positive.lengths}
    tensors |= {
        "negative_text": negative.text.astype(np.float32),
        "negative_lengths": negative.lengths,
    }
    times = make_time_schedule(run.sample, (run.data.resolution // run.model.patch) ** 2)
    settings = config.to_dict(run.sample) | {
        "resolution": run.data.resolution,
        "noise_scale": run.flow.noise_scale,
        "times": times.tolist(),
    }
    shapes, dtypes = (
        {name: getattr(x, attribute) for name, x in tensors.items()}
        for attribute in ("shape", "dtype")
    )
    metadata = {"prompts": json.dumps(prompts), "sample": json.dumps(settings)}
    return lambda folder: write_safetensors(
        folder / "prompts.safetensors", shapes, dtypes, tensors.__getitem__, metadata
    )
