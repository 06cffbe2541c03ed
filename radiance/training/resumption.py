"""What may change when a run resumes, and what the user can do about other changes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from radiance import config
from radiance.base.files import require_folder
from radiance.base.settings import suggest_name
from radiance.training.run_directory import RunDirectory, find_latest_complete_step
from radiance.training.step import init_state

# Identities in data.json that belong to the section `data`; others have names of their own.
DATA_NAMES = ("train", "validation", "pool")
FIXED_SECTIONS = ("model", "lora")  # the weights of a checkpoint are those of this network
MAX_VALUE_LENGTH = 40  # characters in a message
Changes = dict[str, tuple[Any, Any]]  # old and new values by name


def check_resumable(
    directory: RunDirectory,
    run: config.Config,
    data: Mapping[str, Any],
    allowed_changes: Sequence[str] = (),
) -> Changes:
    """Check that a directory is new, or holds this run on the same data; change nothing.

    Args:
        directory: The run directory.
        run: Config of the run.
        data: Identities of the data and weights that it uses.
        allowed_changes: Names of settings and sections that may differ; "data" stands for images
            and captions too.

    Returns:
        The differences that `allowed_changes` names.

    Raises:
        ConfigError: The directory holds a run of another config or on other data.
        OutputError: The directory cannot be written, or one of its files is damaged.
    """
    require_folder(directory.path)
    _check_names(allowed_changes, data)
    if not (directory.path / "config.json").is_file():
        if find_latest_complete_step(directory.checkpoint_dir) is not None:
            raise config.ConfigError(
                f"{directory.path} has checkpoints and no config.json: restore that file, or "
                "choose another name=."
            )
        return {}
    old_run = directory.read_config()
    changes = find_changes(old_run, run) | _find_data_changes(directory.read_data(), data)
    refused_changes = {
        name: values
        for name, values in changes.items()
        if not _is_named(name, allowed_changes) or not _can_change(name)
    }
    has_other_state = bool(changes) and _has_other_state(old_run, run)
    if refused_changes or has_other_state:
        description = _describe_changes(refused_changes or changes)
        raise config.ConfigError(
            f"{directory.path} holds another run ({description}): "
            f"{_suggest_remedies(directory, old_run, run, changes, has_other_state)}."
        )
    _check_steps(directory, run)
    return changes


def find_changes(old_run: config.Config, run: config.Config) -> Changes:
    """Return the settings that differ, without those that may always change."""
    keys = config.resumable_settings(config.Config)
    if run.optimizer.lr_schedule != "constant":
        keys -= {"train.steps"}  # on which other schedules depend
    differences = config.differences(_remove_locations(old_run), _remove_locations(run))
    return {key: values for key, values in differences.items() if key not in keys}


def _remove_locations(run: config.Config) -> config.Config:
    """Return a config without the paths of a mixture: hashes identify what they contain."""
    mixture = tuple(replace(source, path="", root="") for source in run.data.mixture)
    return replace(run, data=replace(run.data, mixture=mixture))


def _find_data_changes(old_data: Mapping[str, Any] | None, data: Mapping[str, Any]) -> Changes:
    """Return the parts of the identities that differ; none before the first start."""
    if old_data is None:
        return {}
    changes = {}
    for name in sorted(old_data.keys() | data.keys()):
        old, new = old_data.get(name, {}), data.get(name, {})
        prefix = f"data.{name}" if name in DATA_NAMES else name
        changes |= {
            f"{prefix}.{key}": (old.get(key), new.get(key))
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        }
    return changes


def _check_names(allowed_changes: Sequence[str], data: Mapping[str, Any]):
    """Raise ConfigError for a name that no setting and no identity has."""
    names = _list_names(config.to_dict(config.Config()) | dict(data))
    for name in allowed_changes:
        if name not in names:
            raise config.ConfigError(
                f"--allow-changes {name}: there is no such setting"
                f"{suggest_name(name, names) or '.'}"
            )


def _list_names(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of all sections and settings."""
    names = []
    for name, value in tree.items():
        names.append(prefix + name)
        names += _list_names(value, f"{prefix}{name}.") if isinstance(value, Mapping) else []
    return names


def _is_named(name: str, allowed_changes: Sequence[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in allowed_changes)


def _can_change(name: str) -> bool:
    return name.split(".")[0] not in FIXED_SECTIONS


def _has_other_state(old_run: config.Config, run: config.Config) -> bool:
    """Return whether checkpoints of one config do not fit the other."""

    def list_shapes(run: config.Config) -> list[tuple]:
        state = jax.eval_shape(lambda: init_state(run))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return [(path, x.shape, x.dtype) for path, x in leaves]

    return list_shapes(old_run) != list_shapes(run)


def _describe_changes(changes: Changes) -> str:
    """Return what differs, as text."""
    return ", ".join(
        f"{name} was {_shorten(old)}, now {_shorten(new)}" for name, (old, new) in changes.items()
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}…"


def _suggest_remedies(
    directory: RunDirectory,
    old_run: config.Config,
    run: config.Config,
    changes: Changes,
    has_other_state: bool,
) -> str:
    """Return what the user can do without losing the trained state."""
    remedies = ["undo the change"]
    if old_run.model == run.model and not old_run.lora.rank and not run.lora.rank:
        remedies.append(f"start a new run from its weights with init={directory.path} name=NEW")
    else:
        remedies.append("start a new run with name=NEW")
    if not has_other_state and all(map(_can_change, changes)):
        names = {"data" if name.startswith("data.") else name for name in changes}
        remedies.append(f"continue it knowingly with --allow-changes {','.join(sorted(names))}")
    return ", ".join(remedies[:-1]) + f", or {remedies[-1]}"


def _check_steps(directory: RunDirectory, run: config.Config):
    """Raise ConfigError if the run has more steps already than its config says."""
    step = find_latest_complete_step(directory.checkpoint_dir)
    if step is not None and step > run.train.steps:
        raise config.ConfigError(
            f"{directory.path} has been trained for {step} steps already, and train.steps="
            f"{run.train.steps}: give at least {step}, or another name=."
        )
