"""Damage files at random, most of it where their structure is."""

import json
import struct

import numpy as np

# Numbers that break careless parsers.
ODD_NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    31,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
ODD_WORDS = [
    b"-1",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"99999999999999999999",
    b"[[[[[[",
    b'"F4"',
    b'"Q8_0"',
    b'"BF16"',
    b"NaN",
    b"\\ud800",
    b"\x00",
    b"\xff\xfe",
    b'"data_offsets":[0,0]',
    b'"shape":[0]',
    b'"shape":[4294967296,4294967296]',
]
ODD_VALUES = [
    None,
    True,
    -1,
    1.5,
    1e300,
    float("nan"),
    "",
    "x",
    "\u2581",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"": None},
    [-1, 0.5],
    ["a", 0.0],
    "Unigram",
    "BPE",
]


def mutate(data: bytes, header_size: int, rng: np.random.Generator) -> bytes:
    """Make one to four changes, most of them in the header, where the structure is."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(
            rng.integers(
                0, max(min(header_size, len(out)), 1) if rng.random() < 0.9 else max(len(out), 1)
            )
        )
        match rng.integers(0, 8):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << int(rng.integers(0, 8))
            case 1 if out:
                out[min(at, len(out) - 1)] = int(rng.integers(0, 256))
            case 2:
                out[at : at + 8] = struct.pack("<Q", ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))])
            case 3:
                out[at : at + 4] = struct.pack(
                    "<I", ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))] % 2**32
                )
            case 4:
                del out[at:]
            case 5:
                del out[at : at + int(rng.integers(1, 64))]
            case 6:
                other = int(rng.integers(0, max(len(out), 1)))
                out[at:at] = out[other : other + int(rng.integers(1, 64))]
            case _:
                word = ODD_WORDS[rng.integers(len(ODD_WORDS))]
                out[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
    return bytes(out)


def mutate_header(data: bytes, _: int, rng: np.random.Generator) -> bytes:
    """Change names, shapes, offsets and types in a header that stays JSON of the right length."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__")
    for _ in range(rng.integers(1, 4)):
        name = list(header)[rng.integers(len(header))]
        entry = header[name]
        if name == "__metadata__" or rng.random() < 0.2:
            match rng.integers(0, 4):
                case 0:
                    header.pop(name)
                case 1:
                    header[name[: int(rng.integers(0, len(name)))] + "x"] = header.pop(name)
                case 2:
                    header["__metadata__"] = {
                        key: mutate(text.encode(), len(text), rng).decode("latin-1")
                        for key, text in (metadata or {"key": "value"}).items()
                    }
                case _:
                    header["__metadata__"] = [None, 3, {"a": 1}, {"a": None}][rng.integers(4)]
            if not header:
                header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
            continue
        match rng.integers(0, 4):
            case 0:
                entry["dtype"] = [
                    "F4",
                    "F8_E8M0",
                    "I64",
                    "U16",
                    "C64",
                    "BOOL",
                    "F8_E4M3",
                    "",
                    3,
                    None,
                ][rng.integers(10)]
            case 1:
                shape = list(entry["shape"]) if isinstance(entry.get("shape"), list) else []
                entry["shape"] = [
                    [],
                    shape[::-1],
                    [*shape, 1],
                    shape[:-1],
                    [0],
                    [ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]],
                    [1] * 70,
                ][rng.integers(7)]
            case 2:
                entry["data_offsets"] = [
                    ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))],
                    ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))],
                ]
            case _:
                entry.pop(list(entry)[rng.integers(len(entry))], None) if entry else None
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_json(data: bytes, header_size: int, rng: np.random.Generator) -> bytes:
    """Change or remove values of JSON; in a third of the cases change bytes."""
    if rng.random() < 0.3:
        return mutate(data, header_size, rng)
    tree = json.loads(data)
    for _ in range(rng.integers(1, 4)):
        node = tree
        while isinstance(node, (dict, list)) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = keys[rng.integers(len(keys))]
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
                match rng.integers(0, 4):
                    case 0:
                        del node[key]
                    case 1:
                        node[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
                    case 2 if isinstance(node, list):
                        node[key : key + 1] = 2 * [node[key]]
                    case _:
                        node[key] = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
                break
            node = node[key]
    return json.dumps(tree).encode()
