"""Hash values that identify data, text and code."""

import hashlib

import numpy as np


def hash_parts(*parts: object) -> str:
    """Return a hash (128 bits, hexadecimal) of arrays and other values.

    Args:
        *parts: Arrays are hashed by their type, shape and content, other values by their `repr`.
    """
    return _hash_bytes(repr(tuple(map(_describe_part, parts))).encode())


def _describe_part(part: object) -> object:
    if isinstance(part, np.ndarray):
        return str(part.dtype), part.shape, _hash_bytes(part.tobytes())
    return part


def _hash_bytes(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
