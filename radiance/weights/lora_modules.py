"""Make the change of one module's weight and bias from the tensors of a LoRA file."""

import math
from collections.abc import Mapping
from typing import NoReturn

import numpy as np
from jaxtyping import Float

from radiance.base.errors import CheckpointError
from radiance.weights.lora_changes import (
    DoraChange,
    Factor,
    FullDifference,
    HadamardChange,
    KroneckerChange,
    LoraPair,
    Replacement,
    WeightChange,
)
from radiance.weights.lora_settings import LoraSettings
from radiance.weights.tensors import Tensors, is_finite

# Roles of DoRA's magnitudes: along the axis that the file's shape gives, or one for each output.
MAGNITUDE_ROLES = {"magnitude", "output_magnitude"}


class MisfitError(CheckpointError):
    """A change of a weight that has another size in the model."""


class ModuleReader:
    """Reads the tensors of one module, and makes changes of them.

    Args:
        file: The LoRA file.
        module: Name of the module in the file.
        keys: Keys of the file by their role in the change (down, up, alpha, …).
        settings: Settings of the file that are not among the tensors.

    Raises:
        CheckpointError: Values are not finite.
    """

    def __init__(self, file: Tensors, module: str, keys: Mapping[str, str], settings: LoraSettings):
        self.file, self.module, self.keys, self.settings = file, module, keys, settings
        self.values = {role: file[key] for role, key in keys.items()}
        for role, key in keys.items():
            if not is_finite(self.values[role]):
                raise CheckpointError(
                    f"{file.path}: {key} holds values that are not finite, so its training failed: "
                    "use another LoRA."
                )

    def make_weight_change(self, shape: tuple[int, ...]) -> WeightChange | None:
        """Return the change of a weight of `shape`; None if only the bias changes."""
        makers = {
            ("down", "up", "mid"): self._make_pair,
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): self._make_hadamard,
            ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"): self._make_kronecker,
            ("diff",): self._make_difference,
            ("set",): self._make_replacement,
        }
        chosen = [make for roles, make in makers.items() if self.keys.keys() & set(roles)]
        if len(chosen) > 1:
            raise CheckpointError(
                f"{self.file.path} changes {self.module} in several ways "
                f"({', '.join(self.keys.values())}): use a file with one LoRA."
            )
        if chosen:
            return self._add_norms(chosen[0](shape), shape)
        has_bias = any(role.startswith("bias_") for role in self.keys)
        if not has_bias or self.keys.keys() & MAGNITUDE_ROLES:
            self._reject_incomplete("matrices")
        return None

    def make_bias_change(self, shape: tuple[int, ...]) -> WeightChange | None:
        """Return the change of a bias; its shape is () if the module has none."""
        changes: list[WeightChange] = []
        for role in ("bias_up", "bias_diff", "bias_set"):
            if role not in self.keys:
                continue
            self._check_size(role, shape)
            if role == "bias_set":
                changes.append(Replacement(self.values[role]))
            elif role == "bias_diff":
                changes.append(FullDifference(self.values[role]))
            else:
                if "down" not in self.keys:
                    self._reject_incomplete("matrices")
                scale = self._compute_scale(len(self.values["down"]))
                changes.append(FullDifference(self.values[role], scale))
        if len(changes) > 1:
            raise CheckpointError(
                f"{self.file.path} changes the bias of {self.module} in several ways: use a "
                "file with one LoRA."
            )
        return changes[0] if changes else None

    def _make_pair(self, shape: tuple[int, ...]) -> LoraPair:
        for role in ("down", "up"):
            if role not in self.keys:
                self._reject_incomplete(f"the {role} matrix")
        down, up = self.values["down"], self.values["up"]
        rank = down.shape[0] if down.ndim else 0
        if "mid" in self.keys:
            return self._make_pair_with_core(shape, rank)
        expected_shapes = {"down": (rank, math.prod(shape[1:])), "up": (shape[0], rank)}
        for role, expected_shape in expected_shapes.items():
            actual_shape = self.values[role].shape
            if rank < 1 or (*actual_shape[:1], math.prod(actual_shape[1:])) != expected_shape:
                has_same_rank = up.ndim > 1 and math.prod(up.shape[1:]) == rank > 0
                error_type = MisfitError if has_same_rank else CheckpointError
                raise error_type(
                    f"{self.file.path}: {self.keys[role]} has shape {list(actual_shape)}, but a "
                    f"LoRA of rank {rank} for weights of {list(shape)} needs "
                    f"{list(expected_shape)}: choose the model that the LoRA was trained for."
                )
        down, up = (
            self._read_float32(role).reshape(expected_shapes[role]) for role in ("down", "up")
        )
        return LoraPair(down, up, self._compute_scale(rank))

    def _make_pair_with_core(self, shape: tuple[int, ...], rank: int) -> LoraPair:
        """Return the pair of LoCon's Tucker decomposition; the core goes into `down`."""
        core = self._read_float32("mid")
        up, down = self._read_matrix("up"), self._read_matrix("down")
        if core.ndim < 2 or core.shape[:2] != (up.shape[1], rank) or rank < 1:
            self._reject_inconsistent("mid")
        down = np.einsum("mnk,nj->mjk", core.reshape(*core.shape[:2], -1), down)
        down = down.reshape(len(down), -1)
        self._check_matrix_shape((len(up), down.shape[1]), shape)
        return LoraPair(down, up, self._compute_scale(rank))

    def _make_hadamard(self, shape: tuple[int, ...]) -> HadamardChange:
        first, second = (
            self._read_product(f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)
        )
        for factor in (first, second):
            self._check_matrix_shape(factor.shape, shape)
        return HadamardChange(first, second, self._compute_scale(first.rank))

    def _make_kronecker(self, shape: tuple[int, ...]) -> KroneckerChange:
        first, second = (
            Factor(self._read_float32(f"lokr_w{i}"))
            if f"lokr_w{i}" in self.keys
            else self._read_product(f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
            for i in (1, 2)
        )
        for i, factor in enumerate((first, second), 1):
            if factor.left.ndim < 2:
                self._reject_inconsistent(f"lokr_w{i}")
        sizes = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
        self._check_matrix_shape(sizes, shape)
        return KroneckerChange(first, second, self._compute_scale(second.rank or first.rank))

    def _make_difference(self, shape: tuple[int, ...]) -> FullDifference:
        self._check_size("diff", shape)
        return FullDifference(self.values["diff"])

    def _make_replacement(self, shape: tuple[int, ...]) -> Replacement:
        self._check_size("set", shape)
        return Replacement(self.values["set"])

    def _add_norms(self, change: WeightChange, shape: tuple[int, ...]) -> WeightChange:
        """Return the change as a DoRA if the module has learned norms."""
        roles = self.keys.keys() & MAGNITUDE_ROLES
        if not roles:
            return change
        role = roles.pop()
        values = self._read_float32(role)
        outputs, inputs = shape[0], shape[1] if len(shape) > 1 else 0
        is_of_inputs = role == "magnitude" and values.shape[:2] == (1, inputs)
        axis = int(is_of_inputs or (values.size != outputs and values.shape == (inputs,)))
        if values.size != shape[axis]:
            raise MisfitError(
                f"{self.file.path}: {self.keys[role]} has shape {list(values.shape)}, and weights "
                f"of {list(shape)} need one norm for each output or input: choose the model that "
                "the LoRA was trained for."
            )
        return DoraChange(change, values.reshape(-1), axis)

    def _compute_scale(self, rank: int | None) -> float:
        """Return alpha / rank, from the tensors or from the settings outside them."""
        alpha = self.values.get("alpha")
        if alpha is not None and alpha.size != 1:
            raise CheckpointError(
                f"{self.file.path}: {self.keys['alpha']} has shape {list(alpha.shape)} and must be "
                "one number: download the file again."
            )
        number = None if alpha is None else float(alpha.reshape(()))
        return self.settings.compute_scale(self.module, rank, number)

    def _read_product(self, left_role: str, right_role: str, core_role: str) -> Factor:
        """Return a matrix that is stored as a product, of Tucker's kind if it has a core."""
        for role in (left_role, right_role):
            if role not in self.keys:
                self._reject_incomplete(role)
        left, right = self._read_matrix(left_role), self._read_matrix(right_role)
        if core_role not in self.keys:
            if left.shape[1] != len(right) or not len(right):
                self._reject_inconsistent(right_role)
            return Factor(left, right)
        core = self._read_float32(core_role)
        if core.ndim != 4 or core.shape[:2] != (len(left), len(right)) or not core.size:
            self._reject_inconsistent(core_role)
        return Factor(left, right, core)

    def _read_float32(self, role: str) -> Float[np.ndarray, "..."]:
        return self.values[role].astype(np.float32)

    def _read_matrix(self, role: str) -> Float[np.ndarray, "rows columns"]:
        """Return a tensor of at least two axes as a matrix."""
        values = self._read_float32(role)
        if values.ndim < 2:
            self._reject_inconsistent(role)
        return values.reshape(len(values), -1) if values.size else values.reshape(len(values), 0)

    def _check_matrix_shape(self, sizes: tuple[int, int], shape: tuple[int, ...]) -> None:
        """Raise an error if a product of matrices has another size than the weight."""
        if len(shape) < 2 or sizes != (shape[0], math.prod(shape[1:])):
            raise MisfitError(
                f"{self.file.path} changes {self.module} of {sizes[0]} × {sizes[1]} weights, "
                f"and this model has {list(shape)} there: choose the model that the LoRA was "
                "trained for."
            )

    def _check_size(self, role: str, shape: tuple[int, ...]) -> None:
        """Raise an error if complete values have another size than the weight."""
        values = self.values[role]
        if values.size != math.prod(shape) or values.shape[:1] != shape[:1]:
            raise MisfitError(
                f"{self.file.path}: {self.keys[role]} has shape {list(values.shape)}, and this "
                f"model has {list(shape) or 'nothing'} there: choose the model that the LoRA was "
                "trained for."
            )

    def _reject_incomplete(self, missing: str) -> NoReturn:
        raise CheckpointError(
            f"{self.file.path} has {' and '.join(self.keys.values())} without {missing} of the "
            "change: download the file again."
        )

    def _reject_inconsistent(self, role: str) -> NoReturn:
        raise CheckpointError(
            f"{self.file.path}: {self.keys[role]} has shape {list(self.values[role].shape)}, which "
            f"does not fit the other tensors of {self.module}: download the file again."
        )
