"""Extract a LoRA from the difference of two checkpoints."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.model.paths import is_block_matrix
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.detect import MARKERS
from radiance.weights.lora import LoraWeights
from radiance.weights.lora_changes import LoraPair
from radiance.weights.tensors import DTYPES, cast_array

# Changes of the approximator harm trained models; the pixel embedder works in float32 on pixels.
EXCLUDED_FROM_EXTRACTION = ("distilled_guidance_layer.", "nerf_image_embedder.")


class ExtractionResult(NamedTuple):
    """An extracted LoRA and the part of the difference that it holds."""

    lora: LoraWeights
    explained_fractions: Mapping[str, float]  # of the squared difference, by module
    total_explained_fraction: float  # of all these modules together
    remaining_changes: Mapping[str, float]  # |tuned − base| / |base| of changed tensors left out


class _LowRankApproximation(NamedTuple):
    """A pair and two sums of squares: that of its product, and that of the difference."""

    pair: LoraPair
    explained_square: float
    total_square: float


def extract_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    rank: int,
    select_module: Callable[[str], bool] | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
) -> ExtractionResult:
    """Return the LoRA of a rank that is nearest to tuned − base, matrix by matrix.

    The truncated singular value decomposition gives the nearest matrix (Eckart and Young, 1936).

    Args:
        base: The checkpoint before fine-tuning.
        tuned: The checkpoint after fine-tuning, of the same model.
        rank: At least 1; smaller matrices get their full rank.
        select_module: Returns whether a native module is in the LoRA; None selects the matrices of
            the blocks. The approximator and the pixel embedder are never in it.
        on_progress: Called with the number of parameters compared since the last call.

    Returns:
        The LoRA, and how much of the difference it holds.

    Raises:
        CheckpointError: The models differ, the rank is less than 1, or no selected matrix differs.
    """
    _check_extraction(base, tuned, rank)
    shapes = native.native_layout(base.model)[0]
    selected_names = _select_tensors(base.model, select_module)
    approximations: dict[str, _LowRankApproximation] = {}
    remaining_changes: dict[str, float] = {}
    for name, shape in shapes.items():
        if name in MARKERS:
            continue
        base_values = base.get_tensor(name).astype(np.float32)
        difference = cast_array(
            tuned.get_tensor(name).astype(np.float32) - base_values, DTYPES["float32"], name
        )
        if difference.any() and name in selected_names:
            approximations[name.removesuffix(".weight")] = _approximate_difference(
                difference.reshape(shape[0], -1), rank
            )
        elif difference.any():
            base_norm = max(np.linalg.norm(base_values), np.finfo(np.float32).tiny)
            remaining_changes[name] = float(np.linalg.norm(difference) / base_norm)
        on_progress(difference.size)
    if not approximations:
        raise CheckpointError(
            f"{base.origin} and {tuned.origin} do not differ in the selected matrices: "
            "there is nothing to extract."
        )
    pairs = {module: result.pair for module, result in approximations.items()}
    lora = LoraWeights(base.model, pairs, f"{tuned.origin} - {base.origin}")
    return ExtractionResult(lora, *_explained_fractions(approximations), remaining_changes)


def _explained_fractions(
    approximations: Mapping[str, _LowRankApproximation],
) -> tuple[dict[str, float], float]:
    """Return the explained fraction of the squared difference, by module and in total."""
    fractions = {
        module: result.explained_square / result.total_square
        for module, result in approximations.items()
    }
    squares = [(result.explained_square, result.total_square) for result in approximations.values()]
    explained, total = np.sum(squares, axis=0)
    return fractions, float(explained / total)


def _check_extraction(base: Checkpoint, tuned: Checkpoint, rank: int) -> None:
    """Raise CheckpointError if the models differ or the rank is less than 1."""
    if differing_settings := config.differences(base.model, tuned.model, "model."):
        description = ", ".join(
            f"{key} is {base_value!r} and {tuned_value!r}"
            for key, (base_value, tuned_value) in differing_settings.items()
        )
        raise CheckpointError(
            f"{base.origin} and {tuned.origin} hold different models ({description}): "
            "choose two checkpoints of one model."
        )
    if rank < 1:
        raise CheckpointError(f"A LoRA of rank {rank} does not exist: choose a rank of at least 1.")


def _select_tensors(
    model: config.Model, select_module: Callable[[str], bool] | None
) -> frozenset[str]:
    """Return the names of the native weights that may be in the LoRA."""
    shapes, sources = native.native_layout(model)

    def is_selected(name: str) -> bool:
        if not name.endswith(".weight") or len(shapes[name]) < 2:
            return False
        if name.startswith(EXCLUDED_FROM_EXTRACTION):
            return False
        if select_module is None:
            return is_block_matrix(sources[name].rule.slices[0].path)
        return select_module(name.removesuffix(".weight"))

    return frozenset(filter(is_selected, shapes))


def _approximate_difference(
    difference: Float32[np.ndarray, "out in"], rank: int
) -> _LowRankApproximation:
    """Return the pair of a rank whose product is nearest to `difference`.

    The singular vectors of the shorter side are the eigenvectors of the Gram matrix, in float64,
    and the other factor is the projection on them. So the product is exact at full rank, and
    nothing is divided by small singular values.
    """
    if len(difference) < difference.shape[1]:
        (up, down, _), *squares = _approximate_difference(difference.T, rank)
        return _LowRankApproximation(LoraPair(down.T, up.T), *squares)
    matrix = difference.astype(np.float64)
    singular_vectors = np.linalg.eigh(matrix.T @ matrix)[1][:, : -rank - 1 : -1]
    projection = matrix @ singular_vectors
    squared_norms = np.square(projection).sum(axis=0)
    # Both factors get the root of the singular value, because half precision has few exponents.
    root_singular_values = np.where(squared_norms > 0, squared_norms, 1) ** 0.25
    pair = LoraPair(
        (singular_vectors * root_singular_values).T.astype(np.float32),
        (projection / root_singular_values).astype(np.float32),
    )
    return _LowRankApproximation(pair, float(squared_norms.sum()), float(np.square(matrix).sum()))
