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
from radiance.model.transformer import Params, abstract
from radiance.pipeline import Autoencoder, Pipeline, encode
from radiance.sampling import times_of
from radiance.sharding import make_mesh, on_host, shardings
from radiance.text.encoders import make_encoder
from radiance.training.adapters import as_lora
from radiance.training.checkpoints import Checkpoints
from radiance.training.directory import RunDirectory, is_run
from radiance.training.start import identity_of, load_base
from radiance.weights import autoencoder as autoencoder_files
from radiance.weights import lora as lora_files
from radiance.weights.checkpoint import LOSS_KEY, Checkpoint, of_params, open_checkpoint
from radiance.weights.files import CheckpointError, write_safetensors

# What our own exports carry, so that they are sampled as the run was: settings that the weights do not tell.
RUN_KEY = "radiance.run"
T5_LENGTH = 512  # tokens; what the published models were trained with


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
    store: str | None = None,
    dtype: str = "bfloat16",
    mesh: config.Mesh | None = None,
    run: config.Config | None = None,
    **known: Any,
) -> Pipeline:
    """The pipeline of a run directory at its newest checkpoint, or of a checkpoint file.

    weights: of a run: params, ema, ema=DECAY or width=WIDTH; its own choice when None. text_encoder, tokenizer: T5's files; a run's own when
    empty. autoencoder: the file that latent models (Chroma1-Base, -HD, -Flash) need. loras: files and strengths. preset: settings
    by name (`config.PRESETS`); when None a run's own, or those that suit the file. changes: of the settings, such as "guidance=2".
    store: q8_0, int8 or float8_e4m3fn keeps the blocks' matrices small in memory, none does not; when None as the file has
    them.
    dtype: of a file's weights and of the computation. known: fields of the model that a file does not tell, such as
    text_ids="sequential". mesh: of this host's devices, over which the model and the pictures are spread; one device when None. run: settings in
    place of a run directory's own, or of those that suit a file.

    Raises ConfigError or CheckpointError, in one sentence and before the weights are read, when something is missing or unfit.
    """
    if is_run(model):
        run = run or RunDirectory(Path(model)).read_config()
        _not_told(model, known)
    else:
        checkpoint = open_checkpoint(model, run and run.model, **known)
        run = run or run_of(checkpoint, dtype)
    if preset is not None:
        chosen = config.preset(preset)
        run = replace(
            run,
            sample=replace(chosen.sample, weights=run.sample.weights),
            data=replace(run.data, side=chosen.side, other_sides=(), bucket_step=0),
        )
    if weights:
        changes = [*changes, f"weights={weights}"]
    run = replace(run, sample=config.override(run.sample, changes))
    if text_encoder:
        run = replace(run, text=replace(run.text, encoder="t5", file=text_encoder, tokenizer=tokenizer, cache=""))
    elif tokenizer:
        raise config.ConfigError(f"--tokenizer {tokenizer} is of a text encoder: give --text-encoder FILE too.")
    _check(run, model, autoencoder)
    decoder = Autoencoder(*autoencoder_files.read(autoencoder), run.compute.dtype) if autoencoder else None
    if decoder and 4 * decoder.sizes.latent_channels != run.model.channels:
        raise config.ConfigError(
            f"{model} paints latents of {run.model.channels // 4} channels, and {autoencoder} has {decoder.sizes.latent_channels}: give FLUX's."
        )
    adapters = [(lora_files.read(path, run.model), strength) for path, strength in loras]
    devices = None if mesh is None else make_mesh(mesh, jax.local_devices())
    spread = None if devices is None else partial(shardings, mesh=devices)
    encoder = make_encoder(run.text, run.model.text_dim, spread)

    places = spread and spread(abstract(run.model))
    if is_run(model) and run.lora.rank:
        check_base(RunDirectory(Path(model)), run)
        own = trained_lora(model, run)
        base = run if store is None else replace(run, lora=replace(run.lora, store=store))
        params, origin, adapters = load_base(base, places), own.origin, [(own, 1.0), *adapters]
    elif is_run(model):
        small = store not in (None, "none")
        params, origin = restored(model, run, on_host(abstract(run.model)) if small else places)
        if small:
            params = of_params(run.model, params, origin).params(store=store, shardings=places)
    else:
        small = "file" if store is None else None if store == "none" else store
        params, origin = checkpoint.params(dtype, small, places), checkpoint.origin
    if adapters:
        params = lora_files.applied(params, run.model, adapters)
    origin += "".join(f" + {strength:g} × {path}" for path, strength in loras)
    return Pipeline(run, params, origin, encoder, decoder, devices)


def trained_lora(model: str | Path, run: config.Config) -> lora_files.Lora:
    """What a LoRA run has trained, at its newest checkpoint."""
    return as_lora(run, *restored(model, run))


def restored(model: str | Path, run: config.Config, places: Params | None = None) -> tuple[Params, str]:
    """Weights of a run's newest checkpoint (of a LoRA run, what it adds), on one device or as `places` says, and what they are called."""
    checkpoints = Checkpoints(RunDirectory(Path(model)).checkpoints)
    if checkpoints.latest is None:
        raise config.ConfigError(f"{model} has no checkpoint yet: train it for at least train.checkpoint_every steps.")
    which = run.sample.weights
    return checkpoints.restore_weights(checkpoints.latest, run, which, places), f"{run.name} step {checkpoints.latest} {which}"


def opened(model: str | Path, weights: str | None = None, **known: Any) -> Checkpoint:
    """The checkpoint of a run, with what its exports say of it, or of a file."""
    if not is_run(model):
        if weights:
            raise config.ConfigError(f"{model} is a file and has one kind of weights: --weights is for run directories.")
        return open_checkpoint(model, **known)
    directory = RunDirectory(Path(model))
    run = directory.read_config()
    _not_told(model, known)
    validated = run.sample.weights
    if weights:
        run = replace(run, sample=replace(run.sample, weights=weights))
    told = {
        "text": config.to_dict(replace(run.text, file="", tokenizer="", cache="")),
        "sample": config.to_dict(replace(run.sample, weights="params")),
        "side": run.data.side,
        "noise_scale": run.flow.noise_scale,
    }
    loss = directory.plain_loss()
    measured = {LOSS_KEY: f"{loss:.6g}"} if loss is not None and run.sample.weights == validated else {}
    metadata = {RUN_KEY: json.dumps(told), **measured}
    if run.lora.rank:
        check_base(directory, run)
        base = opened(run.init) if is_run(run.init) else open_checkpoint(run.init, run.model)
        return replace(lora_files.merged(base, trained_lora(model, run)), metadata=metadata)
    return of_params(run.model, *restored(model, run, on_host(abstract(run.model))), metadata)


def check_base(directory: RunDirectory, run: config.Config):
    """Raises ConfigError when a LoRA run's base is no longer the one that it was trained on."""
    trained_on, there = directory.base_identity(), identity_of(run.init, run)
    if trained_on not in (None, there):
        raise config.ConfigError(f"{directory.path} was trained on another {run.init} ({trained_on}; now it is {there}): bring that back.")


def run_of(checkpoint: Checkpoint, dtype: str) -> config.Config:
    """Settings to sample a checkpoint file with: those of the run it comes from, or those that suit the published model."""
    compute = config.Compute(dtype=dtype)
    model = checkpoint.model
    if RUN_KEY not in checkpoint.metadata:
        suited = config.preset(config.preset_for(model))
        text = config.Text(encoder="t5", length=T5_LENGTH)
        return config.Config(
            model=model, compute=compute, text=text, sample=suited.sample, data=config.Data(side=suited.side), optimizer=config.Optimizer()
        )
    try:
        told = json.loads(checkpoint.metadata[RUN_KEY])
        return config.Config(
            model=model,
            compute=compute,
            text=config.from_dict(config.Text, told["text"]),
            sample=config.from_dict(config.Sample, told["sample"]),
            data=config.Data(side=told["side"]),
            flow=config.Flow(noise_scale=told["noise_scale"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.origin} does not say in its metadata how it is sampled, as our exports do ({RUN_KEY}: {error}): export it again."
        ) from None


def _not_told(model: str | Path, known: dict[str, Any]):
    if known:
        raise config.ConfigError(
            f"{model} is a run directory and knows its {' and '.join(known)}: these flags are for files that do not say it."
        )


def _check(run: config.Config, model: str | Path, autoencoder: str):
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"{model} reads a pooled CLIP vector (FLUX), which no encoder here gives: it can be converted, not sampled."
        )
    if run.text.encoder == "t5" and not run.text.file and not run.text.cache:
        raise config.ConfigError(
            f"{model} needs its text encoder: give --text-encoder FILE, or text.file=FILE where settings are changed (T5 v1.1; safetensors or GGUF)."
        )
    if run.model.patch == 1 and not autoencoder:
        raise config.ConfigError(f"{model} paints latents: give --autoencoder FILE, FLUX's autoencoder.")
    if run.model.patch > 1 and autoencoder:
        raise config.ConfigError(f"{model} paints pixels and needs no autoencoder: leave --autoencoder out.")


def encoded_prompts(run: config.Config) -> Callable[[Path], None]:
    """What writes `prompts.safetensors` into the folder of an exported PyTorch model: the run's sample prompts, encoded, and how to paint them."""
    prompts = list(run.train.sample_prompts or ("",))
    encoder = make_encoder(run.text, run.model.text_dim)
    positive, negative = encode(encoder, prompts, run.sample, run.model.masking)
    tensors = {"text": positive.text.astype(np.float32), "lengths": positive.lengths}
    tensors |= {"negative_text": negative.text.astype(np.float32), "negative_lengths": negative.lengths}
    times = times_of(run.sample, (run.data.side // run.model.patch) ** 2)
    settings = config.to_dict(run.sample) | {"side": run.data.side, "noise_scale": run.flow.noise_scale, "times": times.tolist()}
    shapes, dtypes = ({name: getattr(x, what) for name, x in tensors.items()} for what in ("shape", "dtype"))
    metadata = {"prompts": json.dumps(prompts), "sample": json.dumps(settings)}
    return lambda folder: write_safetensors(folder / "prompts.safetensors", shapes, dtypes, tensors.__getitem__, metadata)
