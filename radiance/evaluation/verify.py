"""Compare our outputs with a published implementation's, from golden files.

A golden file is a safetensors file with weights, inputs and the reference's outputs. It checks an
installation, a device or an attention backend, and our tests use it too.

One network evaluation agrees to a few units in the last place. Six guided steps of an x0 model with
random weights do not: they are so ill-conditioned that one unit in the last place of the noise
moves the image by 1e-4, and the stored reference, computed in float32, is as far from the exact
(float64) result. So every error is reported beside the effect of rounding alone, which is measured
on the spot, and sampled images need only agree that far.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

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
ROUNDING_FACTOR = 4  # tolerated error over the effect of rounding only the input
MAX_TOLERANCE = 1e-3  # limit of the tolerance on devices that round coarsely
PARAMS_PREFIX = "params."


class OutputComparison(NamedTuple):
    """The error of one output of a golden file."""

    file: str
    output: str  # velocity or sampled
    error: float  # max |difference| / max |reference|
    rounding_error: float  # the same between inputs that differ by one unit in the last place

    @property
    def tolerance(self) -> float:
        """2e-5 for one evaluation; for sampled images the effect of rounding, if that is larger."""
        if self.output != "sampled":
            return RELATIVE_TOLERANCE
        tolerance = max(RELATIVE_TOLERANCE, ROUNDING_FACTOR * self.rounding_error)
        return min(tolerance, MAX_TOLERANCE)

    @property
    def is_within_tolerance(self) -> bool:
        """Whether the output agrees with the reference."""
        return self.error <= self.tolerance


def verify_golden_file(
    path: str | Path, compute: config.Compute | None = None
) -> list[OutputComparison]:
    """Compare every output of a golden file with ours.

    Args:
        path: The golden file.
        compute: Settings of the computation; float32 if None.

    Raises:
        CheckpointError: The file is not a golden file.
    """
    file = open_tensors(path)
    if "config" not in file.metadata or "velocity" not in file.shapes:
        raise CheckpointError(
            f"{path} is not a golden file: it has no config in its metadata or no velocity to "
            "compare with."
        )
    reference_config = json.loads(file.metadata["config"])
    file_shapes = {
        name.removeprefix(PARAMS_PREFIX): shape
        for name, shape in file.shapes.items()
        if name.startswith(PARAMS_PREFIX)
    }
    shapes = {name: file_shapes[key] for name, key in canonical_names(file_shapes).items()}
    model = detect_model(shapes, None, path, **_reference_settings(reference_config))
    params = native.params_from_native(model, shapes, lambda name: file[PARAMS_PREFIX + name], path)
    compute = compute or config.Compute(dtype="float32")

    @jax.jit
    def compute_outputs(params, image):
        return _compute_outputs(file, reference_config, bind_model(model, compute, params), image)

    image = _read_image(file, reference_config)
    outputs, *perturbed_outputs = [
        compute_outputs(params, image * factor) for factor in (1, *_rounding_factors(image.shape))
    ]
    return [
        _compare_output(
            Path(path).name,
            name,
            np.asarray(output, np.float64),
            file[name],
            [np.asarray(perturbed[name]) for perturbed in perturbed_outputs],
        )
        for name, output in outputs.items()
    ]


def _compare_output(
    file_name: str,
    name: str,
    output: np.ndarray,
    reference: np.ndarray,
    perturbed_outputs: list[np.ndarray],
) -> OutputComparison:
    scale = np.abs(reference).max()
    error = np.abs(output - reference).max() / scale
    rounding_error = (
        max(np.abs(output - perturbed).max() for perturbed in perturbed_outputs) / scale
    )
    return OutputComparison(
        file_name,
        name,
        float(error) if np.isfinite(error) else float("inf"),
        float(rounding_error),
    )


def _rounding_factors(shape: tuple[int, ...], num_draws: int = 3) -> list[np.ndarray]:
    """Return random factors that move every value by one unit in the last place, up or down."""
    signs = np.random.RandomState(0).choice([-1, 1], size=(num_draws, *shape))
    return list((1 + signs * np.finfo(np.float32).eps / 2).astype(np.float32))


def _read_image(file: Tensors, reference_config: dict[str, Any]) -> np.ndarray:
    """Return the noisy image, channels last; packed latents are images with patch 1."""
    if "tokens" in file.shapes:
        return file["tokens"].reshape(len(file["tokens"]), *reference_config["grid"], -1)
    return file["image"].transpose(0, 2, 3, 1)


def _reference_settings(reference_config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the model that do not follow from tensor shapes."""
    settings: dict[str, Any] = {
        "rope_axes": tuple(reference_config["axes_dim"]),
        "rope_theta": float(reference_config["theta"]),
    }
    if reference_config.get("effective_patch_size"):
        settings["patch"] = reference_config["effective_patch_size"]
    if reference_config.get("sequential_text_ids"):
        settings["text_ids"] = "sequential"
    if reference_config.get("use_x0"):
        settings["prediction"] = "x0"
    return settings


def _read_condition(file: Tensors, prefix: str = "") -> TextCondition:
    text = file[f"{prefix}text"]
    mask = np.ones(text.shape[:2], int)
    if f"{prefix}text_mask" in file.shapes:
        mask = file[f"{prefix}text_mask"]
    pooled = jnp.asarray(file["vector"]) if "vector" in file.shapes else None
    return TextCondition(jnp.asarray(text), jnp.asarray(mask.sum(axis=1), jnp.int32), pooled)


def _compute_outputs(
    file: Tensors, reference_config: dict[str, Any], model: Transformer, image: jax.Array
) -> dict[str, jax.Array]:
    """Return our outputs in the file's layout."""

    def to_file_layout(x: jax.Array) -> jax.Array:
        if "tokens" in file.shapes:
            return x.reshape(file["velocity"].shape)
        return x.transpose(0, 3, 1, 2)

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
        negative = _read_condition(file, "neg_")
        sample = sample_from_noise(model, image, times, settings, positive, negative)
        outputs["sampled"] = to_file_layout(sample)
    return outputs
