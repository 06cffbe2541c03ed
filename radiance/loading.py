"""Load a model by its address: a run directory, or a checkpoint file with its companions."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.distributed.sharding import host_shardings, make_mesh, make_shardings
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import Params, make_abstract_params
from radiance.pipeline import LatentDecoder, Pipeline
from radiance.text.factory import make_encoder
from radiance.text.prompts import encode_prompts
from radiance.training.checkpoint_reader import CheckpointReader
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
from radiance.weights.lora_adapters import apply_loras, can_stay_unmerged
from radiance.weights.lora_reading import read_lora
from radiance.weights.safetensors import write_safetensors

# Key of the settings that our exports contain, so that they are sampled as the run was.
RUN_METADATA_KEY = "radiance.run"

Loras = list[tuple[lora_files.LoraWeights, float]]  # with their strengths


# --- pipelines ------------------------------------------------------------------------------------


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
    product_dtype: str | None = None,
    mesh: config.Mesh | None = None,
    run: config.Config | None = None,
    **model_overrides: Any,
) -> Pipeline:
    """Load the pipeline of a run directory at its newest checkpoint, or of a checkpoint file.

    Args:
        model: A run directory or a checkpoint file.
        weights: Weights of a run: params, ema, ema=DECAY or width=WIDTH; `sample.weights` when
            None.
        text_encoder: Weights of T5; those of the run when empty.
        tokenizer: Tokenizer of `text_encoder`; the one beside it when empty.
        autoencoder: The autoencoder file that latent models need (Chroma1-Base, -HD and -Flash).
        loras: LoRA files and their strengths.
        preset: Name of recommended settings (`config.PRESETS`); when None the settings of the run,
            or those that suit the file.
        changes: Changes of `run.sample`, such as "guidance_scale=2".
        weight_format: Quantization of the blocks' matrices in memory (`config.WEIGHT_FORMATS`) or
            "none"; the one of the file when None.
        dtype: Type of a file's weights and of the computation.
        product_dtype: `compute.product_dtype`: "compute" or "float8"; that of the run when None.
        mesh: Mesh of this host's devices, over which the model and the images are sharded; one
            device when None.
        run: Settings in place of those of the run directory, or of those that suit the file.
        **model_overrides: Fields of the model that a file does not contain, such as
            text_ids="sequential".

    Returns:
        The pipeline.

    Raises:
        ConfigError: When a file or an option is missing or does not fit the model.
        CheckpointError: When a file is damaged or is not a model. Both are raised before the
            weights are read.
    """
    source = _open_source(model, run, dtype, model_overrides)
    run = _resolve_settings(source.run, weights, preset, changes)
    if product_dtype is not None:
        run = config.override(run, [f"compute.product_dtype={product_dtype}"])
    run = replace(run, text=_resolve_text(run.text, text_encoder, tokenizer))
    _check_loadable(run, model, autoencoder)
    decoder = _load_decoder(autoencoder, run, model) if autoencoder else None
    adapters, merged_loras = _read_loras(loras, run.model)

    device_mesh = None if mesh is None else make_mesh(mesh, jax.local_devices())
    make_param_shardings, shardings = None, None
    if device_mesh is not None:
        make_param_shardings = partial(make_shardings, mesh=device_mesh)
        shardings = make_param_shardings(make_abstract_params(run.model))
    encoder = make_encoder(run.text, run.model.text_dim, make_param_shardings)
    if merged_loras:
        source = source.to_file_model(run).merge_loras(merged_loras)
    loaded = source.load_params(run, weight_format, shardings)
    params, adapters = loaded.params, [*loaded.adapters, *adapters]
    if adapters:
        params = apply_loras(params, run.model, adapters)
    origin = loaded.origin + "".join(f" + {strength:g} × {path}" for path, strength in loras)
    return Pipeline(run, params, origin, encoder, decoder, device_mesh)


@dataclass(frozen=True)
class _LoadedParams:
    """Parameters, the name of their origin, and the LoRAs that belong to them."""

    params: Params
    origin: str
    adapters: Loras


@runtime_checkable
class _ModelSource(Protocol):
    """A run directory or a file."""

    @property
    def run(self) -> config.Config:
        """Settings of the model and of sampling."""
        ...

    def load_params(
        self, run: config.Config, weight_format: str | None, shardings: Params | None
    ) -> _LoadedParams:
        """Load the parameters of `run.model`, quantized and sharded."""
        ...

    def to_file_model(self, run: config.Config) -> "_FileModel":
        """Return the weights as a checkpoint that LoRAs can be merged into."""
        ...


@dataclass(frozen=True)
class _RunModel:
    """A run directory."""

    path: str | Path
    run: config.Config

    def load_params(
        self, run: config.Config, weight_format: str | None, shardings: Params | None
    ) -> _LoadedParams:
        """Load the newest checkpoint, and the base model if it is a LoRA run."""
        if run.lora.rank:
            check_base_identity(RunDirectory(Path(self.path)), run)
            run_lora = load_trained_lora(self.path, run)
            if weight_format is not None:
                run = config.override(run, [f"lora.weight_format={weight_format}"])
            return _LoadedParams(
                load_base_params(run, shardings), run_lora.origin, [(run_lora, 1.0)]
            )
        if weight_format in (None, "none"):
            return _LoadedParams(*restore_run_weights(self.path, run, shardings), [])
        # Quantization starts from weights in the memory of the host.
        abstract_params = make_abstract_params(run.model)
        params, origin = restore_run_weights(self.path, run, host_shardings(abstract_params))
        checkpoint = checkpoint_from_params(run.model, params, origin)
        params = checkpoint.load_params(weight_format=weight_format, shardings=shardings)
        return _LoadedParams(params, origin, [])

    def to_file_model(self, run: config.Config) -> "_FileModel":
        """Return the newest checkpoint as a file; a LoRA run has its adapters merged."""
        dtype = run.lora.dtype if run.lora.rank else "float32"
        return _FileModel(_open_run(self.path, run.sample.weights), run, dtype)


@dataclass(frozen=True)
class _FileModel:
    """A checkpoint file."""

    checkpoint: Checkpoint
    run: config.Config
    dtype: str

    def load_params(
        self, run: config.Config, weight_format: str | None, shardings: Params | None
    ) -> _LoadedParams:
        """Load the weights of the file."""
        quantization = {None: "file", "none": None}.get(weight_format, weight_format)
        params = self.checkpoint.load_params(self.dtype, quantization, shardings)
        return _LoadedParams(params, self.checkpoint.origin, [])

    def to_file_model(self, run: config.Config) -> "_FileModel":
        """Return the file itself."""
        return self

    def merge_loras(self, loras: Loras) -> "_FileModel":
        """Return the file with LoRAs merged into its weights."""
        checkpoint = self.checkpoint
        for lora, strength in loras:
            checkpoint = lora_files.merge_lora(checkpoint, lora, strength)
        return replace(self, checkpoint=replace(checkpoint, origin=self.checkpoint.origin))


def _open_source(
    model: str | Path, run: config.Config | None, dtype: str, model_overrides: dict[str, Any]
) -> _ModelSource:
    """Open a run directory or a file, with its settings unless `run` is given."""
    if is_run_directory(model):
        run = run or RunDirectory(Path(model)).read_config()
        _reject_model_overrides(model, model_overrides)
        return _RunModel(model, run)
    checkpoint = open_checkpoint(model, run and run.model, **model_overrides)
    return _FileModel(checkpoint, run or make_file_config(checkpoint, dtype), dtype)


def _resolve_settings(
    run: config.Config, weights: str | None, preset: str | None, changes: Sequence[str]
) -> config.Config:
    """Apply a preset, changes of sampling, and the choice of weights."""
    if preset is not None:
        settings = config.get_preset(preset)
        run = replace(
            run,
            sample=replace(settings.sample, weights=run.sample.weights),
            data=replace(
                run.data, resolution=settings.resolution, extra_resolutions=(), bucket_step=0
            ),
        )
    if weights:
        changes = [*changes, f"weights={weights}"]
    return replace(run, sample=config.override(run.sample, changes))


def _resolve_text(text: config.Text, text_encoder: str, tokenizer: str) -> config.Text:
    """Replace the text encoder by the given files."""
    if text_encoder:
        return replace(text, encoder="t5", file=text_encoder, tokenizer=tokenizer, cache="")
    if tokenizer:
        raise config.ConfigError(
            f"--tokenizer {tokenizer} belongs to a text encoder: give --text-encoder FILE too."
        )
    return text


def _load_decoder(path: str, run: config.Config, model: str | Path) -> LatentDecoder:
    """Load an autoencoder that fits the model."""
    decoder = LatentDecoder(*autoencoder_files.read_autoencoder(path), run.compute.dtype)
    latent_channels = decoder.architecture.latent_channels
    if 4 * latent_channels != run.model.channels:
        raise config.ConfigError(
            f"{model} generates latents of {run.model.channels // 4} channels, and {path} has "
            f"{latent_channels}: give FLUX's autoencoder."
        )
    return decoder


def _read_loras(loras: Sequence[tuple[str, float]], model: config.Model) -> tuple[Loras, Loras]:
    """Return the LoRAs that are kept beside the weights, and those that are merged into them."""
    adapters, merged_loras = [], []
    for path, strength in loras:
        lora = read_lora(path, model)
        for note in lora.notes:
            print(note, file=sys.stderr, flush=True)
        (adapters if can_stay_unmerged(lora) else merged_loras).append((lora, strength))
    return adapters, merged_loras


def _reject_model_overrides(model: str | Path, model_overrides: dict[str, Any]):
    if model_overrides:
        raise config.ConfigError(
            f"{model} is a run directory, which contains its {' and '.join(model_overrides)}: "
            "these options are for files that do not."
        )


def _check_loadable(run: config.Config, model: str | Path, autoencoder: str):
    """Raise ConfigError if a file that sampling needs is missing or superfluous."""
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"{model} needs a pooled CLIP vector (FLUX), which no encoder here computes: it can be "
            "converted, not sampled."
        )
    missing = []
    if run.text.encoder == "t5" and not run.text.file and not run.text.cache:
        missing.append(
            "its text encoder, T5 v1.1 as safetensors or GGUF (give --text-encoder FILE, or "
            "text.file=FILE where settings are changed)"
        )
    if run.model.patch == 1 and not autoencoder:
        missing.append("FLUX's autoencoder for its latents (give --autoencoder FILE)")
    if missing:
        raise config.ConfigError(f"{model} needs {' and '.join(missing)}.")
    if run.model.patch > 1 and autoencoder:
        raise config.ConfigError(
            f"{model} generates pixels and needs no autoencoder: do not give --autoencoder."
        )


# --- weights of runs and files --------------------------------------------------------------------


def load_trained_lora(model: str | Path, run: config.Config) -> lora_files.LoraWeights:
    """Load the LoRA of a run at its newest checkpoint."""
    return to_lora_weights(run, *restore_run_weights(model, run))


def restore_run_weights(
    model: str | Path, run: config.Config, param_shardings: Params | None = None
) -> tuple[Params, str]:
    """Restore the weights of a run's newest checkpoint.

    Args:
        model: The run directory.
        run: Its settings; `run.sample.weights` selects the weights or an average.
        param_shardings: Shardings of the parameters; one device when None.

    Returns:
        The parameters, which are the adapters in a LoRA run, and a name for them.

    Raises:
        ConfigError: When there is no checkpoint.
    """
    checkpoints = CheckpointReader(RunDirectory(Path(model)).checkpoint_dir)
    weights = run.sample.weights
    newest = checkpoints.read_newest(
        lambda step: checkpoints.restore_params(step, run, weights, param_shardings)
    )
    if newest is None:
        raise config.ConfigError(
            f"{model} has no checkpoint yet: train it for at least train.checkpoint_every steps."
        )
    step, params = newest
    return params, f"{run.name} step {step} {weights}"


def open_model(model: str | Path, weights: str | None = None, **model_overrides: Any) -> Checkpoint:
    """Open the weights of a run, with the metadata of its exports, or of a file.

    Args:
        model: A run directory or a checkpoint file.
        weights: Weights of a run: params, ema, ema=DECAY or width=WIDTH; `sample.weights` when
            None.
        **model_overrides: Fields of the model that a file does not contain.
    """
    if is_run_directory(model):
        _reject_model_overrides(model, model_overrides)
        return _open_run(model, weights)
    if weights:
        raise config.ConfigError(
            f"{model} is a file and has one kind of weights: --weights is for run directories."
        )
    return open_checkpoint(model, **model_overrides)


def _open_run(model: str | Path, weights: str | None) -> Checkpoint:
    """Open the weights of a run; the LoRA of a LoRA run is merged."""
    run_directory = RunDirectory(Path(model))
    trained_run = run_directory.read_config()
    run = trained_run
    if weights:
        run = replace(run, sample=replace(run.sample, weights=weights))
    metadata = _make_export_metadata(run)
    loss = run_directory.read_last_validation_loss()
    if loss is not None and run.sample.weights == trained_run.sample.weights:
        metadata[LOSS_KEY] = f"{loss:.6g}"
    if run.lora.rank:
        check_base_identity(run_directory, run)
        if is_run_directory(run.init):
            base = open_model(run.init)
        else:
            base = open_checkpoint(run.init, run.model)
        merged = lora_files.merge_lora(base, load_trained_lora(model, run))
        return replace(merged, metadata=metadata)
    shardings = host_shardings(make_abstract_params(run.model))
    return checkpoint_from_params(run.model, *restore_run_weights(model, run, shardings), metadata)


def check_base_identity(run_directory: RunDirectory, run: config.Config):
    """Raise ConfigError if the base of a LoRA run has changed since its training."""
    trained_identity = run_directory.read_base_identity()
    current_identity = identify_weights(run.init, run)
    if trained_identity not in (None, current_identity):
        raise config.ConfigError(
            f"{run_directory.path} was trained on another {run.init} ({trained_identity}; now it "
            f"is {current_identity}): restore that file."
        )


# --- settings of exports --------------------------------------------------------------------------


def _make_export_metadata(run: config.Config) -> dict[str, str]:
    """Return the settings of sampling that an export contains."""
    settings = {
        "text": config.to_dict(replace(run.text, file="", tokenizer="", cache="")),
        "sample": config.to_dict(replace(run.sample, weights="params")),
        "resolution": run.data.resolution,
        "noise_scale": run.flow.noise_scale,
    }
    return {RUN_METADATA_KEY: json.dumps(settings)}


def make_file_config(checkpoint: Checkpoint, dtype: str) -> config.Config:
    """Return the settings to sample a checkpoint file with.

    They are those of the run that exported it, or those that suit the published model.

    Args:
        checkpoint: The file.
        dtype: Type of the computation.

    Raises:
        CheckpointError: When the settings in its metadata are damaged.
    """
    compute, model = config.from_dict(config.Compute, {"dtype": dtype}), checkpoint.model
    if RUN_METADATA_KEY not in checkpoint.metadata:
        return config.make_sampling_config(model, compute=compute)
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
            f"The metadata of {checkpoint.origin} does not contain the settings of sampling that "
            f"our exports have ({RUN_METADATA_KEY}: {error}): export the model again."
        ) from None


def make_prompts_writer(run: config.Config) -> Callable[[Path], None]:
    """Return a function that writes `prompts.safetensors` into the folder of an exported model.

    The file contains the run's sample prompts, encoded, and the settings to sample them with.
    """
    prompts = list(run.train.sample_prompts or ("",))
    encoder = make_encoder(run.text, run.model.text_dim)
    positive, negative = encode_prompts(encoder, prompts, run.sample, run.model.masking)
    tensors = {
        "text": positive.text.astype(np.float32),
        "lengths": positive.lengths,
        "negative_text": negative.text.astype(np.float32),
        "negative_lengths": negative.lengths,
    }
    times = make_time_schedule(run.sample, (run.data.resolution // run.model.patch) ** 2)
    settings = config.to_dict(run.sample) | {
        "resolution": run.data.resolution,
        "noise_scale": run.flow.noise_scale,
        "times": times.tolist(),
    }
    metadata = {"prompts": json.dumps(prompts), "sample": json.dumps(settings)}
    shapes = {name: x.shape for name, x in tensors.items()}
    dtypes = {name: x.dtype for name, x in tensors.items()}

    def write_prompts(folder: Path):
        path = folder / "prompts.safetensors"
        write_safetensors(path, shapes, dtypes, tensors.__getitem__, metadata)

    return write_prompts
