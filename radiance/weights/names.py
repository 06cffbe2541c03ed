"""Remove what tools add to names of tensors: prefixes, and wrappers of modules."""

from collections.abc import Iterable

from radiance.base.errors import CheckpointError

# Modules that wrap another one: torch.compile, FSDP, recomputation, data parallelism.
WRAPPERS = frozenset(
    (
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "module",
    )
)


def strip_prefix(keys: Iterable[str], signatures: Iterable[str], origin: object) -> dict[str, str]:
    """Return the key in a file for every name of a model.

    The prefix is what precedes a signature, whatever it is; tensors without it belong to other
    models. A file without a signature keeps its names.

    Args:
        keys: The keys of a file.
        signatures: Names of tensors of which every such model has one.
        origin: The file that errors name.

    Raises:
        CheckpointError: If the file contains several models, or two keys have one name.
    """
    keys = list(keys)
    found_prefixes = (_find_prefix(key, name) for key in keys for name in signatures)
    prefixes = {prefix for prefix in found_prefixes if prefix is not None}
    if len(prefixes) > 1:
        text = ", ".join(repr(prefix) for prefix in sorted(prefixes)[:5])
        raise CheckpointError(
            f"{origin} contains more than one model, with the prefixes {text}: use a file with one."
        )
    prefix = prefixes.pop() if prefixes else ""
    keys_by_name: dict[str, str] = {}
    for key in keys:
        if not key.startswith(prefix):
            continue
        name = _strip_wrappers(key.removeprefix(prefix))
        if name in keys_by_name:
            raise CheckpointError(
                f"{origin} has {keys_by_name[name]} and {key}, which are both {name}, so it "
                f"contains more than one model: use a file with one."
            )
        keys_by_name[name] = key
    return keys_by_name


def _strip_wrappers(name: str) -> str:
    """Return a name without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _find_prefix(key: str, signature: str) -> str | None:
    """Return what precedes a signature in a key, or None if the key does not end with it."""
    parts = key.split(".")
    begin = len(parts)
    for expected_part in reversed(signature.split(".")):
        begin -= 1
        while begin >= 0 and parts[begin] in WRAPPERS:
            begin -= 1
        if begin < 0 or parts[begin] != expected_part:
            return None
    return "".join(f"{part}." for part in parts[:begin])
