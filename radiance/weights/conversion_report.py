"""Report a conversion: what was written of each part of the network, and what rounding changed."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from radiance import config
from radiance.base.tables import format_table
from radiance.weights.rounding import WrittenTensor

# The parts of a network in reports, by patterns of native names; the first match counts.
PART_PATTERNS = (
    ("markers", r"__"),
    (
        "modulation",
        r"distilled_guidance_layer|time_in|guidance_in|vector_in|.*_mod\.|.*\.modulation|"
        r"final_layer\.(adaLN|offset)|shared_modulation",
    ),
    ("text blocks", r"text_blocks"),
    ("double blocks", r"double_blocks"),
    ("single blocks", r"single_blocks"),
    ("NeRF head", r"nerf_"),
    ("output layer", r"final_layer"),
    ("input", r""),
)


def find_network_part(name: str) -> str:
    """Return the part of the network that a native tensor belongs to."""
    return next(part for part, pattern in PART_PATTERNS if re.match(pattern, name))


@dataclass
class ConversionRow:
    """The tensors of one part of the network that were converted from one type to another."""

    part: str
    source_dtype: str
    target_dtype: str
    num_tensors: int = 0
    num_params: int = 0
    num_bytes: int = 0
    sum_squares: float = 0.0
    sum_squared_errors: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root mean square of the rounding errors, relative to that of the values."""
        if not self.sum_squares:
            return 0.0
        return float(np.sqrt(self.sum_squared_errors / self.sum_squares))


@dataclass
class ConversionReport:
    """The table of a conversion; printing it shows one row for each part and type."""

    path: Path
    model: config.Model
    rows: dict[tuple[str, str, str], ConversionRow] = field(default_factory=dict)

    def add(self, tensor: WrittenTensor, source_dtype: str, target_dtype: str, num_params: int):
        """Count a tensor.

        Args:
            tensor: The tensor as written.
            source_dtype: Type in which it was stored.
            target_dtype: Type in which it is written.
            num_params: Its number of values, before they were encoded.
        """
        key = (find_network_part(tensor.name), source_dtype, target_dtype)
        row = self.rows.setdefault(key, ConversionRow(*key))
        row.num_tensors += 1
        row.num_params += num_params
        row.num_bytes += tensor.values.nbytes
        row.num_bytes += 0 if tensor.scales is None else tensor.scales.nbytes
        row.sum_squares += tensor.sum_squares
        row.sum_squared_errors += tensor.sum_squared_errors

    def __str__(self) -> str:
        cells = [("part", "from", "to", "tensors", "parameters", "size", "rms error")]
        for row in self.rows.values():
            cells.append(
                (
                    row.part,
                    row.source_dtype,
                    row.target_dtype,
                    f"{row.num_tensors}",
                    f"{row.num_params:,}",
                    f"{row.num_bytes / 1e6:,.3f} MB",
                    f"{row.relative_error:.1e}" if row.relative_error else "exact",
                )
            )
        return format_table(cells, num_text_columns=3)
