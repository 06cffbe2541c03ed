"""The settings of a LoRA that its tensors do not hold: alpha and the like in headers and files.

PEFT keeps them in `adapter_config.json` beside the tensors, diffusers as JSON under
`lora_adapter_metadata` in the header, kohya's scripts as `ss_network_alpha` there.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radiance.base.errors import CheckpointError
from radiance.weights.lora_names import strip_prefixes
from radiance.weights.tensors import Tensors

PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model"  # without suffix
JSON_KEYS = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
RANK_KEYS = ("r", "network_dim", "ss_network_dim")
MODEL_PREFIXES = ("transformer.", "unet.", "diffusion_model.")  # of keys; others are text encoders
SUPPORTED_PEFT_TYPES = ("LORA", "LOHA", "LOKR")
# Initializations of PEFT that change the base weights too.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
MAX_CONFIG_BYTES = 1 << 22
LITERAL_PATTERN = re.compile(r"\^?[\w.]*\$?")
# Expressions that cannot take long: words, dots, alternatives, few repetitions, no repeated group.
CHEAP_REGEX = re.compile(r"(?:[\w.^$|]|\\d|\[0-9\]|\((?!\?)|\)(?![*+])|(?<=[\w.\]])[*+])+")
MAX_REPETITIONS = 2
MAX_REGEXES = 100


@dataclass(frozen=True)
class NumbersByModule:
    """Numbers by patterns of module names, as PEFT matches them: the first that fits counts."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    regexes: Sequence[str] = ()  # the patterns that are more than a name or the end of one

    def find(self, module: str, default: float | None) -> float | None:
        """Return the number of a module."""
        parts = module.split(".")
        ends = {".".join(parts[i:]) for i in range(len(parts))}
        names = ends | {f"{end}$" for end in ends} | {f"^{module}", f"^{module}$"}
        matches = names & self.numbers.keys()
        matches |= {x for x in self.regexes if re.match(rf"(.*\.)?({x})$", module)}
        if not matches:
            return default
        if len(matches) == 1:
            return self.numbers[matches.pop()]
        return next(number for pattern, number in self.numbers.items() if pattern in matches)


@dataclass(frozen=True)
class LoraSettings:
    """Alpha and rank of a LoRA's modules, as far as they are outside the tensors."""

    alpha: float | None = None
    rank: float | None = None  # of LoKr whose factors are complete
    use_rslora: bool = False
    alphas: NumbersByModule = field(default_factory=NumbersByModule)
    ranks: NumbersByModule = field(default_factory=NumbersByModule)

    def compute_scale(self, module: str, rank: int | None, alpha: float | None) -> float:
        """Return the factor of a module's change.

        Args:
            module: Name of the module in the file, without prefixes.
            rank: Rank of its factors; None if they are complete matrices.
            alpha: The alpha that the file holds as a tensor, if any. It takes precedence, and
                includes the root of rsLoRA.
        """
        if alpha is not None:
            return 1.0 if rank is None else alpha / rank
        alpha = self.alphas.find(module, self.alpha)
        divisor = rank or self.ranks.find(module, self.rank)
        if alpha is None or not divisor:
            return 1.0
        return alpha / (math.sqrt(divisor) if self.use_rslora else divisor)


def read_settings(file: Tensors) -> LoraSettings:
    """Read the settings of an open LoRA file from its header and from PEFT's file beside it.

    Raises:
        CheckpointError: The settings are damaged, or of a LoRA that is not supported.
    """
    values: dict[str, Any] = dict(file.metadata)
    for key in JSON_KEYS:
        if key in file.metadata:
            values |= _parse_json(file.metadata[key], f"{key} in the header of {file.path}")
    config_path = file.path.parent / PEFT_CONFIG_NAME
    if _belongs_to(config_path, file.path):
        values |= _parse_json(_read_text(config_path), str(config_path))
    values = _select_model_values(values)
    _check_supported(values, file.path)
    return LoraSettings(
        alpha=_first_number(values, ALPHA_KEYS, file.path),
        rank=_first_number(values, RANK_KEYS, file.path),
        use_rslora=_parse_flag(values, "use_rslora", file.path),
        alphas=_parse_patterns(values, "alpha_pattern", file.path),
        ranks=_parse_patterns(values, "rank_pattern", file.path),
    )


def _belongs_to(config_path: Path, weights_path: Path) -> bool:
    """Return True if PEFT's file describes the weights beside it."""
    if not config_path.is_file():
        return False
    is_peft_name = weights_path.name.startswith(PEFT_WEIGHTS_NAME)
    return is_peft_name or len(list(weights_path.parent.glob("*.safetensors"))) == 1


def _read_text(path: Path) -> str:
    """Return the text of a small file."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{path} is larger than the {MAX_CONFIG_BYTES >> 20} MB that settings of a LoRA need: "
            "download it again."
        )
    return path.read_text(encoding="utf-8", errors="replace")


def _parse_json(text: str, source: str) -> dict[str, Any]:
    """Return the object that a JSON text holds."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{source} is not a JSON object with the settings of a LoRA: download the file again."
        )
    return values


def _select_model_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the network; those of text encoders have other prefixes."""
    selected = dict(values)
    for key, value in values.items():
        for prefix in MODEL_PREFIXES:
            if key.startswith(prefix):
                selected[key.removeprefix(prefix)] = value
    return selected


def _check_supported(values: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the settings are those of an adapter that cannot be read."""
    peft_type = str(values.get("peft_type") or "LORA").upper().rpartition(".")[2]
    if peft_type not in SUPPORTED_PEFT_TYPES:
        raise CheckpointError(
            f"{path} is an adapter of the kind {peft_type[:20]}, which is not supported: merge it "
            "with the tool that trained it."
        )
    init = str(values.get("init_lora_weights") or "").lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{path} was trained with init_lora_weights={init[:20]}, which changes the base too: "
            "save it with path_initial_model_for_weight_conversion, which makes it a LoRA."
        )


def _parse_number(value: Any, key: str, path: Path) -> float:
    """Return a number, which headers hold as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    is_rank = key in (*RANK_KEYS, "rank_pattern")
    if not math.isfinite(number) or (is_rank and number <= 0):
        kind = "positive" if is_rank else "finite"
        raise CheckpointError(
            f"{path} comes with {key}={str(value)[:40]!r}, which is not a {kind} number: "
            "correct the setting, or download the LoRA again."
        )
    return number


def _first_number(values: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> float | None:
    """Return the first of several settings that is there; trainers write None for unset ones."""
    for key in keys:
        if values.get(key) not in (None, "", "None"):
            return _parse_number(values[key], key, path)
    return None


def _parse_flag(values: Mapping[str, Any], key: str, path: Path) -> bool:
    """Return a setting that is true or false, which headers hold as text."""
    value = values.get(key)
    text = str(value).lower()
    if text in ("none", "false", "0", ""):
        return False
    if text in ("true", "1"):
        return True
    raise CheckpointError(
        f"{path} comes with {key}={text[:40]!r}, which is neither true nor false: correct "
        "the setting, or download the LoRA again."
    )


def _parse_patterns(values: Mapping[str, Any], key: str, path: Path) -> NumbersByModule:
    """Return the numbers that a setting gives by patterns of module names."""
    patterns = values.get(key) or {}
    if isinstance(patterns, str):
        patterns = _parse_json(patterns, f"{key} of {path}")
    if not isinstance(patterns, dict):
        raise CheckpointError(
            f"{path} comes with {key}={str(patterns)[:40]!r}, which gives no number by module: "
            "correct the setting, or download the LoRA again."
        )
    numbers = {
        _strip_pattern(pattern): _parse_number(value, key, path)
        for pattern, value in patterns.items()
    }
    regexes = tuple(pattern for pattern in numbers if not LITERAL_PATTERN.fullmatch(pattern))
    if len(regexes) > MAX_REGEXES or not all(map(_is_cheap_regex, regexes)):
        raise CheckpointError(
            f"{path} comes with {key} for {regexes[0][:80]!r}, a regular expression that is not "
            "supported or one of too many: name the modules one by one there."
        )
    return NumbersByModule(numbers, regexes)


def _strip_pattern(pattern: str) -> str:
    """Return a pattern without the prefixes that names of modules lose too."""
    anchor = "^" if pattern.startswith("^") else ""
    return anchor + strip_prefixes(pattern.removeprefix("^").replace("\\.", "."))


def _is_cheap_regex(pattern: str) -> bool:
    """Return True if a regular expression is valid and matches names in a short time."""
    num_repetitions = pattern.count("*") + pattern.count("+")
    if not CHEAP_REGEX.fullmatch(pattern) or num_repetitions > MAX_REPETITIONS:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
