"""Name the leaves of parameter trees by their paths."""


def leaf_path(keys: tuple) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys)
