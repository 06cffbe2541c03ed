"""Hash values that identify data, text and code."""

import hashlib


def hash_parts(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
