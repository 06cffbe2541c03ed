"""Golden files: weights, inputs and the published implementation's outputs in one safetensors file, compared with ours.

A user's check of an installation, a device or an attention backend; and our tests'.

One evaluation of the network agrees to a few units in the last place. Six guided steps of an x0 model with random weights are
another matter: they are so ill-conditioned that one unit in the last place of the noise moves the picture by 1e-4, and the
stored reference, itself computed in float32, is as far from the exact (float64) result. So beside every error stands how far
rounding alone moves that output, measured on the spot, and of a sampled picture no more than that is asked.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.model.transformer import Transformer, bind
from radiance.sampling import Condition, sample
from radiance.weights import native
from radiance.weights.detect import canonical_names, detect
from radiance.weights.files import CheckpointError, Tensors, open_tensors

TOLERANCE = 2e-5  # of the largest value of the reference
ROUNDINGS = 4  # errors may exceed the effect of one rounding of the input, for there are many more roundings on the way
CEILING = 1e-3  # but a device that rounds coarsely is not excused by that
PREFIX = "params."


class Agreement(NamedTuple):
    file: str
    output: str
    error: float  # max |difference| / max |reference|
    rounding: float  # the same measure, between runs whose inputs differ by one unit in the last place

    @property
    def tolerance(self) -> float:
        """2e-5 for one evaluation; for sampled pictures what rounding alone does, where that is more."""
        return min(max(TOLERANCE, ROUNDINGS * self.rounding), CEILING) if self.output == "sampled" else TOLERANCE

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance


def verify(path: str | Path, compute: config.Compute | None = None) -> list[Agreement]:
    """Compares every output in the file, in float32 unless `compute` says otherwise. Raises CheckpointError for another kind of file."""
    file = open_tensors(path)
    if "config" not in file.metadata or "velocity" not in file.shapes:
        raise CheckpointError(f"{path} is not a golden file: it has no config in its metadata or no velocity to compare with.")
    sizes = json.loads(file.metadata["config"])
    shapes = {name.removeprefix(PREFIX): shape for name, shape in file.shapes.items() if name.startswith(PREFIX)}
    shapes = {name: shapes[key] for name, key in canonical_names(shapes).items()}
    model = detect(shapes, None, path, **_known(sizes))
    params = native.from_native(model, shapes, lambda name: file[PREFIX + name], path)
    compute = compute or config.Compute(dtype="float32")

    run = jax.jit(lambda params, image: _outputs(file, sizes, bind(model, compute, params), image))
    image = _image(file, sizes)
    outputs, *moved = [run(params, image * factor) for factor in (1, *_roundings(image.shape))]
    results = []
    for name, ours in outputs.items():
        ours, reference = np.asarray(ours, np.float64), file[name]
        largest = np.abs(reference).max()
        error = np.abs(ours - reference).max() / largest
        rounding = max(np.abs(ours - np.asarray(other[name])).max() for other in moved) / largest
        results.append(Agreement(Path(path).name, name, float(error) if np.isfinite(error) else float("inf"), float(rounding)))
    return results


def _roundings(shape: tuple[int, ...], draws: int = 3) -> list[np.ndarray]:
    """Factors that move every value by one unit in the last place, up or down."""
    signs = np.random.RandomState(0).choice([-1, 1], size=(draws, *shape))
    return list((1 + signs * np.finfo(np.float32).eps / 2).astype(np.float32))


def _image(file: Tensors, sizes: dict) -> np.ndarray:
    """The noisy picture, channels last; packed latents are pictures with patch 1."""
    if "tokens" in file.shapes:
        return file["tokens"].reshape(len(file["tokens"]), *sizes["grid"], -1)
    return file["image"].transpose(0, 2, 3, 1)


def _known(sizes: dict) -> dict:
    """What the shapes cannot tell."""
    known = dict(rope_axes=tuple(sizes["axes_dim"]), rope_theta=float(sizes["theta"]))
    if sizes.get("effective_patch_size"):
        known["patch"] = sizes["effective_patch_size"]
    if sizes.get("sequential_text_ids"):
        known["text_ids"] = "sequential"
    if sizes.get("use_x0"):
        known["prediction"] = "x0"
    return known


def _condition(file: Tensors, prefix: str = "") -> Condition:
    text = file[f"{prefix}text"]
    mask = file[f"{prefix}text_mask"] if f"{prefix}text_mask" in file.shapes else np.ones(text.shape[:2], int)
    pooled = jnp.asarray(file["vector"]) if "vector" in file.shapes else None
    return Condition(jnp.asarray(text), jnp.asarray(mask.sum(axis=1), jnp.int32), pooled)


def _outputs(file: Tensors, sizes: dict, model: Transformer, image: jax.Array) -> dict[str, jax.Array]:
    """Ours, in the file's layout."""

    def as_stored(x):
        return x.reshape(file["velocity"].shape) if "tokens" in file.shapes else x.transpose(0, 3, 1, 2)

    positive = _condition(file)
    guidance = jnp.asarray(file["guidance"]) if "guidance" in file.shapes else None
    velocity = model(image, positive.text, positive.lengths, jnp.asarray(file["timestep"]), guidance, positive.pooled)
    outputs = {"velocity": as_stored(velocity)}
    if "sampled" in file.shapes:
        times = file["schedule"]
        settings = config.Sample(solver="euler", steps=len(times) - 1, guidance=3.5, unguided_steps=2)
        outputs["sampled"] = as_stored(sample(model, image, times, settings, positive, _condition(file, "neg_")))
    return outputs
