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
from radiance.sections import ConfigError
from radiance.weights.files import replacing

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Key:
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
    key: Key
    tuned: dict[str, Any]  # learning rate and average, and the losses by which they were chosen
    metrics: dict[str, dict[int, float]]  # by name and seed
    views: dict[str, dict[int, float]]  # validation loss by view and seed
    bins: list[dict[int, float]]  # validation loss by seed, in equal bins of time
    curve: list[tuple[int, dict[int, float]]]  # validation loss as training went
    cost: dict[str, float]  # parameters, flops (of training on one picture), seconds (of all seeds together)
    environment: dict[str, Any]


def hashed(run: config.Config, *more: Any) -> str:
    """Of what differs from the defaults, so that an option which the project gets later leaves the results it has."""
    told = {key: value for key, (_, value) in config.differences(config.Config(), run).items()}
    return hashlib.blake2b(repr((sorted(told.items()), more)).encode(), digest_size=16).hexdigest()


def code() -> str:
    """The last commit that changed the package, with a hash of what is not committed; without a checkout the version, with one of all files."""
    try:
        commit = _git("log", "-1", "--format=%H", "--", "radiance")
        changed = _git("diff", "HEAD", "--", "radiance")
        others = [ROOT / name for name in _git("ls-files", "--others", "--exclude-standard", "--", "radiance").splitlines()]
    except (OSError, subprocess.SubprocessError):
        commit = ""
    if not commit:
        commit, changed, others = f"radiance {version('radiance')}", "", sorted((ROOT / "radiance").rglob("*.py"))
    if not changed and not others:
        return commit
    contents = [changed.encode(), *(path.read_bytes() for path in others)]
    return f"{commit}+{hashlib.blake2b(b'|'.join(contents), digest_size=6).hexdigest()}"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


class Results:
    """Those of a suite at a scale, in a folder: ARM.json."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, arm: str) -> Path:
        return self.folder / f"{arm}.json"

    def find(self, key: Key) -> Result | None:
        """The result of an arm. Raises ConfigError when the folder has one of something else, of this arm or of another."""
        for path in sorted(self.folder.glob("*.json")):
            check_like(key, read(path).key, path)
        path = self.path(key.arm)
        return read(path) if path.is_file() else None

    def write(self, result: Result):
        self.find(result.key)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(result.key.arm)) as part:
            part.write_text(json.dumps(asdict(result), indent=1) + "\n")

    def all(self, hashes: Mapping[str, str]) -> dict[str, Result]:
        """Those there are of arms with these hashes of their configs, in their order. Raises ConfigError when they cannot stand in one table, or
        an arm has changed since."""
        found = {arm: read(self.path(arm)) for arm in hashes if self.path(arm).is_file()}
        for arm, result in found.items():
            check_like(next(iter(found.values())).key, result.key, self.path(arm))
            if result.key.config != hashes[arm]:
                raise ConfigError(
                    f"{self.path(arm)} is of another config than the arm has now: run it again in another folder (--results)."
                )
        return found


def read(path: Path) -> Result:
    """Raises ConfigError for a file that is no result."""
    try:
        told = json.loads(path.read_text())
        told["key"] = Key(**told["key"] | {"seeds": tuple(told["key"]["seeds"])})
        for name in ("metrics", "views"):
            told[name] = {metric: _by_seed(values) for metric, values in told[name].items()}
        told["curve"] = [(step, _by_seed(values)) for step, values in told["curve"]]
        told["bins"] = [_by_seed(values) for values in told["bins"]]
        return Result(**told)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no result of an arm ({error!r}): remove it.") from None


def _by_seed(values: Mapping[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}


def check_like(ours: Key, theirs: Key, path: Path):
    """Raises ConfigError where two results cannot stand in one table; configs are compared between results of one arm alone."""
    names = ["suite", "scale", "seeds", "commit", "data"] + (["config"] if ours.arm == theirs.arm else [])
    if other := [name for name in names if getattr(ours, name) != getattr(theirs, name)]:
        told = ", ".join(f"{name} {short(getattr(theirs, name))} and not {short(getattr(ours, name))}" for name in other)
        raise ConfigError(f"{path} is a result of something else ({told}): move it away, or give another folder (--results).")


def short(value: str | Sequence[int]) -> str:
    """A hash by its beginning, with what is behind a plus; seeds."""
    if not isinstance(value, str):
        return ",".join(map(str, value))
    committed, plus, more = value.partition("+")
    return committed[:20] + plus + more
