"""Golden files: weights, inputs and the published implementation's outputs in one safetensors file, compared with ours.

A user's check of an installation, a device or an attention backend; and our tests'.

One evaluation of the network agrees to a few units in the last place. Six guided steps of an x0
model with random weights are another matter: they are so ill-conditioned that one unit in the last
place of the noise moves the image by 1e-4, and the stored reference, itself computed in float32, is
as far from the exact (float64) result. So beside every error stands how far rounding alone moves
that output, measured on the spot, and of a sampled image no more than that is asked.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.flow.sampler import TextCondition, sample_from_noise
from radiance.model.transformer import Transformer, bind_model
from radiance.weights import native
from radiance.weights.detect import canonical_names, detect_model
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import Tensors

RELATIVE_TOLERANCE = 2e-5  # of the largest value of the reference
ROUNDING_FACTOR = 4  # errors may exceed the effect of one rounding of the input, for there are many more roundings on the way
MAX_TOLERANCE = 1e-3  # but a device that rounds coarsely is not excused by that
PARAMS_PREFIX = "params."


class OutputComparison(NamedTuple):
    file: str
    output: str
    error: float  # max |difference| / max |reference|
    rounding_error: (
        float  # the same measure, between runs whose inputs differ by one unit in the last place
    )

    @property
    def tolerance(self) -> float:
        """2e-5 for one evaluation; for sampled images what rounding alone does, where that is more."""
        return (
            min(max(RELATIVE_TOLERANCE, ROUNDING_FACTOR * self.rounding_error), MAX_TOLERANCE)
            if self.output == "sampled"
            else RELATIVE_TOLERANCE
        )

    @property
    def is_within_tolerance(self) -> bool:
        return self.error <= self.tolerance


def verify_golden_file(
    path: str | Path, compute: config.Compute | None = None
) -> list[OutputComparison]:
    """Compares every output in the file, in float32 unless `compute` says otherwise. Raises CheckpointError for another kind of file."""
    file = open_tensors(path)
    if "config" not in file.metadata or "velocity" not in file.shapes:
        raise CheckpointError(
            f"{path} is not a golden file: it has no config in its metadata or no velocity to "
            "compare with."
        )
    reference_config = json.loads(file.metadata["config"])
    shapes = {
        name.removeprefix(PARAMS_PREFIX): shape
        for name, shape in file.shapes.items()
        if name.startswith(PARAMS_PREFIX)
    }
    shapes = {name: shapes[key] for name, key in canonical_names(shapes).items()}
    model = detect_model(shapes, None, path, **_reference_settings(reference_config))
    params = native.params_from_native(model, shapes, lambda name: file[PARAMS_PREFIX + name], path)
    compute = compute or config.Compute(dtype="float32")

    compute_outputs = jax.jit(
        lambda params, image: _compute_outputs(
            file, reference_config, bind_model(model, compute, params), image
        )
    )
    image = _read_image(file, reference_config)
    outputs, *perturbed_outputs = [
        compute_outputs(params, image * factor) for factor in (1, *_rounding_factors(image.shape))
    ]
    results = []
    for name, output in outputs.items():
        output, reference = np.asarray(output, np.float64), file[name]
        scale = np.abs(reference).max()
        error = np.abs(output - reference).max() / scale
        rounding_error = (
            max(
                np.abs(output - np.asarray(perturbed[name])).max()
                for perturbed in perturbed_outputs
            )
            / scale
        )
        results.append(
            OutputComparison(
                Path(path).name,
                name,
                float(error) if np.isfinite(error) else float("inf"),
                float(rounding_error),
            )
        )
    return results


def _rounding_factors(shape: tuple[int, ...], num_draws: int = 3) -> list[np.ndarray]:
    """Factors that move every value by one unit in the last place, up or down."""
    signs = np.random.RandomState(0).choice([-1, 1], size=(num_draws, *shape))
    return list((1 + signs * np.finfo(np.float32).eps / 2).astype(np.float32))


def _read_image(file: Tensors, reference_config: dict) -> np.ndarray:
    """The noisy image, channels last; packed latents are images with patch 1."""
    if "tokens" in file.shapes:
        return file["tokens"].reshape(len(file["tokens"]), *reference_config["grid"], -1)
    return file["image"].transpose(0, 2, 3, 1)


def _reference_settings(reference_config: dict) -> dict:
    """What the shapes cannot tell."""
    settings = dict(
        rope_axes=tuple(reference_config["axes_dim"]), rope_theta=float(reference_config["theta"])
    )
    if reference_config.get("effective_patch_size"):
        settings["patch"] = reference_config["effective_patch_size"]
    if reference_config.get("sequential_text_ids"):
        settings["text_ids"] = "sequential"
    if reference_config.get("use_x0"):
        settings["prediction"] = "x0"
    return settings


def _read_condition(file: Tensors, prefix: str = "") -> TextCondition:
    text = file[f"{prefix}text"]
    mask = (
        file[f"{prefix}text_mask"]
        if f"{prefix}text_mask" in file.shapes
        else np.ones(text.shape[:2], int)
    )
    pooled = jnp.asarray(file["vector"]) if "vector" in file.shapes else None
    return TextCondition(jnp.asarray(text), jnp.asarray(mask.sum(axis=1), jnp.int32), pooled)


def _compute_outputs(
    file: Tensors, reference_config: dict, model: Transformer, image: jax.Array
) -> dict[str, jax.Array]:
    """Ours, in the file's layout."""

    def to_file_layout(x):
        return (
            x.reshape(file["velocity"].shape)
            if "tokens" in file.shapes
            else x.transpose(0, 3, 1, 2)
        )

    positive = _read_condition(file)
    guidance = jnp.asarray(file["guidance"]) if "guidance" in file.shapes else None
    velocity = model(
        image,
        positive.text,
        positive.lengths,
        jnp.asarray(file["timestep"]),
        guidance,
        positive.pooled,
    )
    outputs = {"velocity": to_file_layout(velocity)}
    if "sampled" in file.shapes:
        times = file["schedule"]
        settings = config.Sample(
            solver="euler", steps=len(times) - 1, guidance_scale=3.5, unguided_steps=2
        )
        outputs["sampled"] = to_file_layout(
            sample_from_noise(
                model, image, times, settings, positive, _read_condition(file, "neg_")
            )
        )
    return outputs
