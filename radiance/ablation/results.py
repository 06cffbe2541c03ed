"""What came of an arm: one JSON file, with all that says what it is a result of. Results of different things are never mixed."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from radiance import config
from radiance.base.errors import ConfigError
from radiance.base.files import replace_atomically

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ResultKey:
    """What a result is a result of."""

    suite: str
    arm: str
    scale: str
    seeds: tuple[int, ...]
    commit: str  # of the code, see `code`
    config: str  # hash of the arm's config and of how it is tuned
    data: str  # hash of what it was shown

    @property
    def name(self) -> str:
        """Of the folder that its pieces work in."""
        return hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Result:
    key: ResultKey
    tuning: dict[str, Any]  # learning rate and average, and the losses by which they were chosen
    metrics: dict[str, dict[int, float]]  # by name and seed
    conditions: dict[str, dict[int, float]]  # validation loss by view and seed
    bins: list[dict[int, float]]  # validation loss by seed, in equal bins of time
    curve: list[tuple[int, dict[int, float]]]  # validation loss as training went
    cost: dict[
        str, float
    ]  # parameters, flops (of training on one picture), seconds (of all seeds together)
    environment: dict[str, Any]


def hash_config(run: config.Config, *extra: Any) -> str:
    """Of what differs from the defaults, so that an option which the project gets later leaves the results it has."""
    changes = {key: value for key, (_, value) in config.differences(config.Config(), run).items()}
    return hashlib.blake2b(
        repr((sorted(changes.items()), extra)).encode(), digest_size=16
    ).hexdigest()


def get_code_version() -> str:
    """The last commit that changed the package, with a hash of what is not committed; without a checkout the version, with one of all files."""
    try:
        commit = _run_git("log", "-1", "--format=%H", "--", "radiance")
        diff = _run_git("diff", "HEAD", "--", "radiance")
        untracked_files = [
            ROOT / name
            for name in _run_git(
                "ls-files", "--others", "--exclude-standard", "--", "radiance"
            ).splitlines()
        ]
    except (OSError, subprocess.SubprocessError):
        commit = ""
    if not commit:
        commit, diff, untracked_files = (
            f"radiance {version('radiance')}",
            "",
            sorted((ROOT / "radiance").rglob("*.py")),
        )
    if not diff and not untracked_files:
        return commit
    contents = [diff.encode(), *(path.read_bytes() for path in untracked_files)]
    return f"{commit}+{hashlib.blake2b(b'|'.join(contents), digest_size=6).hexdigest()}"


def _run_git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


class ResultFolder:
    """Those of a suite at a scale, in a folder: ARM.json."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, arm: str) -> Path:
        return self.folder / f"{arm}.json"

    def find(self, key: ResultKey) -> Result | None:
        """The result of an arm. Raises ConfigError when the folder has one of something else, of this arm or of another."""
        for path in sorted(self.folder.glob("*.json")):
            check_comparable(key, read_result(path).key, path)
        path = self.path(key.arm)
        return read_result(path) if path.is_file() else None

    def write(self, result: Result):
        self.find(result.key)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.path(result.key.arm)) as partial_path:
            partial_path.write_text(json.dumps(asdict(result), indent=1) + "\n")

    def read_all(self, hashes: Mapping[str, str]) -> dict[str, Result]:
        """Those there are of arms with these hashes of their configs, in their order. Raises ConfigError when they cannot stand in one table, or
        an arm has changed since.
        """
        results = {arm: read_result(self.path(arm)) for arm in hashes if self.path(arm).is_file()}
        for arm, result in results.items():
            check_comparable(next(iter(results.values())).key, result.key, self.path(arm))
            if result.key.config != hashes[arm]:
                raise ConfigError(
                    f"{self.path(arm)} is of another config than the arm has now: run it again in another folder (--results)."
                )
        return results


def read_result(path: Path) -> Result:
    """Raises ConfigError for a file that is no result."""
    try:
        result_fields = json.loads(path.read_text())
        result_fields["key"] = ResultKey(
            **result_fields["key"] | {"seeds": tuple(result_fields["key"]["seeds"])}
        )
        for name in ("metrics", "views"):
            result_fields[name] = {
                metric: _parse_seeds(values) for metric, values in result_fields[name].items()
            }
        result_fields["curve"] = [
            (step, _parse_seeds(values)) for step, values in result_fields["curve"]
        ]
        result_fields["bins"] = [_parse_seeds(values) for values in result_fields["bins"]]
        return Result(**result_fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no result of an arm ({error!r}): remove it.") from None


def _parse_seeds(values: Mapping[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}


def check_comparable(key: ResultKey, other_key: ResultKey, path: Path):
    """Raises ConfigError where two results cannot stand in one table; configs are compared between results of one arm alone."""
    names = ["suite", "scale", "seeds", "commit", "data"] + (
        ["config"] if key.arm == other_key.arm else []
    )
    if mismatches := [name for name in names if getattr(key, name) != getattr(other_key, name)]:
        mismatch_text = ", ".join(
            f"{name} {abbreviate(getattr(other_key, name))} and not {abbreviate(getattr(key, name))}"
            for name in mismatches
        )
        raise ConfigError(
            f"{path} is a result of something else ({mismatch_text}): move it away, or give another folder (--results)."
        )


def abbreviate(value: str | Sequence[int]) -> str:
    """A hash by its beginning, with what is behind a plus; seeds."""
    if not isinstance(value, str):
        return ",".join(map(str, value))
    commit, separator, suffix = value.partition("+")
    return commit[:20] + separator + suffix
