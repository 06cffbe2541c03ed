"""Describe a LoRA file without its model."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from radiance.base.errors import CheckpointError
from radiance.weights.lora_names import UNSUPPORTED_KINDS, find_foreign_part, parse_name
from radiance.weights.lora_settings import read_settings
from radiance.weights.tensors import Tensors

# The kind of a change, by the tensors that it is made of; the first match counts.
KINDS = {
    "DoRA": ("magnitude", "output_magnitude"),
    "LoRA": ("down", "up"),
    "LoHa": ("hada_w1_a", "hada_w2_a"),
    "LoKr": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"),
    "complete values": ("diff", "set", "bias_diff", "bias_set", "bias_up"),
}
# Tensors whose first axis is the rank.
RANK_ROLES = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def describe_lora(file: Tensors) -> list[str]:
    """Return lines about the modules, ranks and settings of a LoRA file."""
    roles_by_module: dict[str, set[str]] = defaultdict(set)
    ranks: set[int] = set()
    foreign: Counter[str] = Counter()
    for key, shape in file.shapes.items():
        name, part = parse_name(key), find_foreign_part(key)
        if part is not None or name is None:
            foreign[part or "unknown tensors"] += 1
            continue
        roles_by_module[name.module].add(name.role)
        if name.role in RANK_ROLES and shape:
            ranks.add(shape[0])
    kinds = Counter(map(_find_kind, roles_by_module.values()))
    lines = [f"modules: {_format_counts(kinds)}; ranks: {_format_ranks(ranks)}"]
    if foreign:
        lines.append(f"for other networks: {_format_counts(foreign)}")
    try:
        settings = read_settings(file)
    except CheckpointError as error:
        return [*lines, str(error)]
    if settings.alpha is not None:
        lines.append(f"alpha of modules without a tensor of it: {settings.alpha:g}")
    return lines


def _find_kind(roles: set[str]) -> str:
    """Return the kind of a module's change."""
    unsupported = next(
        (UNSUPPORTED_KINDS[x] for x in roles if x in UNSUPPORTED_KINDS), "incomplete"
    )
    return next((kind for kind, names in KINDS.items() if roles & set(names)), unsupported)


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"


def _format_ranks(ranks: Iterable[int]) -> str:
    values = sorted(ranks)
    if len(values) > 4:
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values)) or "none"
