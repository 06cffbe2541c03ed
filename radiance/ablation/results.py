"""Results of variants: JSON files with everything that identifies them, so that none are mixed."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from radiance import config
from radiance.base.errors import ConfigError, OutputError
from radiance.base.files import replace_atomically
from radiance.base.json_files import are_numbers, is_number, read_json

ROOT = Path(__file__).parents[2]
MAX_REASON_LENGTH = 200  # characters


@dataclass(frozen=True)
class ResultKey:
    """Everything that identifies a result."""

    suite: str
    variant: str
    scale: str
    seeds: tuple[int, ...]
    commit: str  # of the code, see `get_code_version`
    config: str  # hash of the configs of variant and base, and of the scale, see `hash_variant`
    data: str  # hash of images, captions and text encoder

    @property
    def name(self) -> str:
        """Name of the folder of its run directories."""
        return hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Result:
    """The result of a variant.

    Attributes:
        key: What it is a result of.
        tuning: Learning-rate factor and average, and the losses by which they were chosen.
        metrics: Values by metric and seed.
        conditions: Losses by evaluation condition and seed. The first is the variant's own, with
            the name of the loss.
        bins: Validation losses by seed in equal bins of time.
        curve: Validation losses by seed during training, with their step.
        cost: Parameters, FLOPs of training on an image, seconds of all seeds together, and skipped
            steps of all seeds.
        environment: Versions and devices.
    """

    key: ResultKey
    tuning: dict[str, Any]
    metrics: dict[str, dict[int, float]]
    conditions: dict[str, dict[int, float]]
    bins: list[dict[int, float]]
    curve: list[tuple[int, dict[int, float]]]
    cost: dict[str, float]
    environment: dict[str, Any]


def hash_config(run: config.Config, *extra: Any) -> str:
    """Return a hash of the settings that differ from the defaults, and of `extra`.

    A setting that the project gets later does not change the hashes of existing results.
    """
    changes = {key: value for key, (_, value) in config.differences(config.Config(), run).items()}
    return hashlib.blake2b(
        repr((sorted(changes.items()), extra)).encode(), digest_size=16
    ).hexdigest()


def get_code_version() -> str:
    """Return the last commit that changed the package, and a hash of uncommitted changes.

    Without a checkout, return the version of the package and a hash of its files.
    """
    try:
        commit = _run_git("log", "-1", "--format=%H", "--", "radiance")
    except (OSError, subprocess.SubprocessError):
        commit = ""
    if not commit:
        files = sorted((ROOT / "radiance").rglob("*.py"))
        return _append_hash(f"radiance {version('radiance')}", [f.read_bytes() for f in files])
    diff = _run_git("diff", "HEAD", "--", "radiance")
    untracked = _run_git("ls-files", "--others", "--exclude-standard", "--", "radiance")
    if not diff and not untracked:
        return commit
    files = [ROOT / name for name in untracked.splitlines()]
    return _append_hash(commit, [diff.encode(), *(f.read_bytes() for f in files)])


def _append_hash(name: str, contents: Sequence[bytes]) -> str:
    """Return a name with a hash of contents after a plus."""
    return f"{name}+{hashlib.blake2b(b'|'.join(contents), digest_size=6).hexdigest()}"


def _run_git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


class ResultFolder:
    """The results of a suite at a scale.

    Args:
        folder: Folder of the files VARIANT.json.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, variant: str) -> Path:
        """Return the file of a variant."""
        return self.folder / f"{variant}.json"

    def find(self, key: ResultKey) -> Result | None:
        """Return the result of a variant, or None.

        Raises:
            ConfigError: The folder holds results of something else, of this variant or another.
        """
        for path in sorted(self.folder.glob("*.json")):
            check_comparable(key, read_result(path).key, path)
        path = self.path(key.variant)
        return read_result(path) if path.is_file() else None

    def write(self, result: Result):
        """Write a result. Raise ConfigError if the folder holds results of something else."""
        self.find(result.key)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.path(result.key.variant)) as partial_path:
            partial_path.write_text(json.dumps(asdict(result), indent=1) + "\n")

    def read_all(self, hashes: Mapping[str, str]) -> dict[str, Result]:
        """Return the results that exist, by variant.

        Args:
            hashes: Hash of the config of each variant, in the order of the results.

        Raises:
            ConfigError: The results are not comparable, or a variant has changed since.
        """
        results = {
            variant: read_result(self.path(variant))
            for variant in hashes
            if self.path(variant).is_file()
        }
        for variant, result in results.items():
            check_comparable(next(iter(results.values())).key, result.key, self.path(variant))
            if result.key.config != hashes[variant]:
                raise ConfigError(
                    f"{self.path(variant)} is a result of another config than the variant has now: "
                    "run the variant again with another folder (--results)."
                )
        return results


def read_result(path: Path) -> Result:
    """Return the result in a file. Raise OutputError if it is damaged."""
    remedy = "move it away, and run the variant again"
    fields = read_json(path, dict, remedy)
    try:
        _check_fields(fields)
        return Result(
            **fields
            | {
                "key": ResultKey(**fields["key"] | {"seeds": tuple(fields["key"]["seeds"])}),
                "metrics": _parse_seeds_by_name(fields["metrics"]),
                "conditions": _parse_seeds_by_name(fields["conditions"]),
                "bins": [_parse_seeds(values) for values in fields["bins"]],
                "curve": [(step, _parse_seeds(values)) for step, values in fields["curve"]],
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)[:MAX_REASON_LENGTH]
        raise OutputError(f"{path} is not the result of a variant ({reason}): {remedy}.") from None


def _check_fields(fields: dict[str, Any]):
    """Raise ValueError if a value of a result has another type than its report needs."""
    key, tuning, environment = (fields[name] for name in ("key", "tuning", "environment"))
    values_by_seed = [
        *fields["metrics"].values(),
        *fields["conditions"].values(),
        *fields["bins"],
        *(values for _, values in fields["curve"]),
    ]
    seeds = {str(seed) for seed in key["seeds"]}
    checks = {
        "names": fields.keys() == {field.name for field in dataclass_fields(Result)},
        "key": all(isinstance(x, str) for name, x in key.items() if name != "seeds")
        and key.keys() == {field.name for field in dataclass_fields(ResultKey)}
        and all(type(seed) is int for seed in key["seeds"]),
        "seeds": all(
            isinstance(values, dict) and values.keys() == seeds and are_numbers(values)
            for values in values_by_seed
        ),
        "curve": all(type(step) is int for step, _ in fields["curve"]),
        "cost": isinstance(fields["cost"], dict)
        and are_numbers(fields["cost"])
        and {"parameters", "flops", "seconds", "skipped_steps"} <= fields["cost"].keys(),
        "tuning": is_number(tuning["learning_rate_factor"])
        and isinstance(tuning["average"], str)
        and isinstance(tuning["losses"], dict),
        "environment": isinstance(environment, dict)
        and all(isinstance(device, str) for device in environment["devices"]),
    }
    for name, is_valid in checks.items():
        if not is_valid:
            raise ValueError(f"its {name} has other values")


def _parse_seeds_by_name(values: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    return {name: _parse_seeds(seed_values) for name, seed_values in values.items()}


def _parse_seeds(values: Mapping[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}


def check_comparable(key: ResultKey, other_key: ResultKey, path: Path):
    """Raise ConfigError if two results are not comparable.

    Args:
        key: Identity of a result.
        other_key: Identity of the result in `path`. Its config must be equal for the same variant.
        path: File of the other result, for the message.
    """
    names = ["suite", "scale", "seeds", "commit", "data"] + (
        ["config"] if key.variant == other_key.variant else []
    )
    if mismatches := [name for name in names if getattr(key, name) != getattr(other_key, name)]:
        mismatch_text = ", ".join(
            f"{name} {abbreviate(getattr(other_key, name))} instead of "
            f"{abbreviate(getattr(key, name))}"
            for name in mismatches
        )
        raise ConfigError(
            f"{path} is a result of something else ({mismatch_text}): move it away, or choose "
            "another folder (--results)."
        )


def abbreviate(value: str | Sequence[int]) -> str:
    """Return a short form of a commit, with its part after a plus, or of seeds."""
    if not isinstance(value, str):
        is_range = len(value) > 2 and list(value) == list(range(value[0], value[-1] + 1))
        return f"{value[0]} to {value[-1]}" if is_range else ", ".join(map(str, value))
    commit, separator, suffix = value.partition("+")
    return commit[:20] + separator + suffix
