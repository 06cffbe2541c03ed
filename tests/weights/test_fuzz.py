"""Damaged and hostile files: every reader either reads them or says in one sentence why not, in little memory.

RADIANCE_FUZZ=100000 python -m pytest tests/weights/test_fuzz.py    runs that many inputs in all instead of two thousand; the first
of each target are the same. RADIANCE_FUZZ_SEED=1 draws others, and RADIANCE_FUZZ_KEEP=FOLDER keeps an input that breaks a reader.
"""

import gc
import json
import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save
from sentencepiece import SentencePieceProcessor

from radiance import config
from radiance.base.errors import CheckpointError, TextError
from radiance.model import autoencoder
from radiance.text import t5
from radiance.text.embedding_cache import CachedEncoder, encode_captions
from radiance.text.hash_encoder import HashEncoder
from radiance.text.tokenizers import open_tokenizer
from radiance.weights import autoencoder as autoencoder_files
from radiance.weights import lora
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.detect import MODEL_KEY
from radiance.weights.inspect import inspect_file
from radiance.weights.opening import open_tensors
from tests.helpers.toy_files import KNOWN, LATENT, PIXELS, published
from tests.helpers.toy_files import save as save_model
from tests.helpers.toy_models import noisy_autoencoder
from tests.helpers.toy_t5 import TOY, torch_tensors, train_tokenizer

INPUTS = int(os.environ.get("RADIANCE_FUZZ", "2000"))
SEED = [int(x) for x in os.environ.get("RADIANCE_FUZZ_SEED", "").split()]
EXPECTED = (CheckpointError, config.ConfigError, TextError)
LONGEST = 5.0  # seconds for one input: a hang, not a speed
MEMORY = 600_000_000  # bytes that a reader may add to the process's peak

# Numbers that make parsers stumble.
ODD = [
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
WORDS = [
    b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"true", b"99999999999999999999", b"[[[[[[", b'"F4"', b'"Q8_0"', b'"BF16"', b"NaN",
    b"\\ud800", b"\x00", b"\xff\xfe", b'"data_offsets":[0,0]', b'"shape":[0]', b'"shape":[4294967296,4294967296]',
]  # fmt: skip
VALUES = [
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


def mutate(data: bytes, head: int, draw: np.random.Generator) -> bytes:
    """One to four changes, most of them in the first `head` bytes, where the structure is."""
    out = bytearray(data)
    for _ in range(draw.integers(1, 5)):
        at = int(
            draw.integers(
                0, max(min(head, len(out)), 1) if draw.random() < 0.9 else max(len(out), 1)
            )
        )
        match draw.integers(0, 8):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << int(draw.integers(0, 8))
            case 1 if out:
                out[min(at, len(out) - 1)] = int(draw.integers(0, 256))
            case 2:
                out[at : at + 8] = struct.pack("<Q", ODD[draw.integers(len(ODD))])
            case 3:
                out[at : at + 4] = struct.pack("<I", ODD[draw.integers(len(ODD))] % 2**32)
            case 4:
                del out[at:]
            case 5:
                del out[at : at + int(draw.integers(1, 64))]
            case 6:
                other = int(draw.integers(0, max(len(out), 1)))
                out[at:at] = out[other : other + int(draw.integers(1, 64))]
            case _:
                word = WORDS[draw.integers(len(WORDS))]
                out[at : at + (len(word) if draw.random() < 0.5 else 0)] = word
    return bytes(out)


def mutate_header(data: bytes, _: int, draw: np.random.Generator) -> bytes:
    """A safetensors file whose header stays JSON of the right length, with other names, shapes, offsets and types."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw.integers(1, 4)):
        name = list(header)[draw.integers(len(header))]
        entry = header[name]
        if name == "__metadata__" or draw.random() < 0.2:
            match draw.integers(0, 4):
                case 0:
                    header.pop(name)
                case 1:
                    header[name[: int(draw.integers(0, len(name)))] + "x"] = header.pop(name)
                case 2:
                    header["__metadata__"] = {
                        MODEL_KEY: mutate(
                            json.dumps(config.to_dict(PIXELS)).encode(), 400, draw
                        ).decode("latin-1")
                    }
                case _:
                    header["__metadata__"] = [None, 3, {"a": 1}, {"a": None}][draw.integers(4)]
            if not header:
                header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
            continue
        match draw.integers(0, 4):
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
                ][draw.integers(10)]
            case 1:
                shape = list(entry["shape"]) if isinstance(entry.get("shape"), list) else []
                entry["shape"] = [
                    [],
                    shape[::-1],
                    [*shape, 1],
                    shape[:-1],
                    [0],
                    [ODD[draw.integers(len(ODD))]],
                    [1] * 70,
                ][draw.integers(7)]
            case 2:
                entry["data_offsets"] = [ODD[draw.integers(len(ODD))], ODD[draw.integers(len(ODD))]]
            case _:
                entry.pop(list(entry)[draw.integers(len(entry))], None) if entry else None
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_json(data: bytes, head: int, draw: np.random.Generator) -> bytes:
    """JSON in which some values are others, or not there; a third of the time no JSON, perhaps."""
    if draw.random() < 0.3:
        return mutate(data, head, draw)
    tree = json.loads(data)
    for _ in range(draw.integers(1, 4)):
        node = tree
        while isinstance(node, (dict, list)) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = keys[draw.integers(len(keys))]
            if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.3:
                match draw.integers(0, 4):
                    case 0:
                        del node[key]
                    case 1:
                        node[key] = VALUES[draw.integers(len(VALUES))]
                    case 2 if isinstance(node, list):
                        node[key : key + 1] = 2 * [node[key]]
                    case _:
                        node[key] = ODD[draw.integers(len(ODD))]
                break
            node = node[key]
    return json.dumps(tree).encode()


def everything(file):
    """All values."""
    for name in file.shapes:
        file[name]


def read_model(path: Path):
    opened = open_checkpoint(path, **KNOWN)
    for name in opened.shapes:
        opened.get_tensor(name)


def read_small(path: Path):
    """What stays as it is in memory."""
    opened = open_checkpoint(path, **KNOWN)
    opened.load_params("bfloat16", "file")


def read_lora(path: Path):
    lora.read_lora(path, LATENT)


def read_t5(path: Path):
    weights = t5.T5Weights(path)
    weights.fingerprint()
    for key in weights.file_keys.values():
        weights.file[key]


def read_cache(path: Path):
    encoder = CachedEncoder(path.parent, "hash", 8)
    encoder.encode(["", "a red cat", "two dogs"])


def read_tokenizer(path: Path):
    tokenizer = open_tokenizer(path)
    for text in ("", "a red cat", "two  \u732b \U0001f408</s><extra_id_3>", "x" * 300):
        assert all(0 <= i < tokenizer.vocab_size for i in tokenizer(text))


def tokenizer_json(spiece: Path) -> bytes:
    """The same model as Hugging Face writes it."""
    model = SentencePieceProcessor(model_file=str(spiece))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False)
    )
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="always", split=True
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(
        ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(99, -1, -1))]
    )
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """Target → (a good file's name and content, bytes of its structure, the reader)."""
    folder = tmp_path_factory.mktemp("good")

    def header(data: bytes) -> int:
        return 8 + struct.unpack("<Q", data[:8])[0]

    found = {}
    native = save_model(folder / "native.safetensors", published(PIXELS), PIXELS).read_bytes()
    bare = save_model(folder / "bare.safetensors", published(LATENT)).read_bytes()
    convert_checkpoint(
        open_checkpoint(folder / "native.safetensors"), folder / "q8.gguf", "gguf", "q8_0"
    )
    quantized = (folder / "q8.gguf").read_bytes()
    convert_checkpoint(
        open_checkpoint(folder / "bare.safetensors", **KNOWN), folder / "diffusers", "diffusers"
    )
    convert_checkpoint(
        open_checkpoint(folder / "native.safetensors"), folder / "int8.safetensors", dtype="int8"
    )
    theirs = (folder / "diffusers" / "diffusion_pytorch_model.safetensors").read_bytes()
    names = {
        row.torch_name.format(i=i): row.gguf_name.format(i=i)
        for row in t5.T5_RULES
        for i in range(TOY.layers)
    }
    writer = gguf.GGUFWriter(folder / "plain.gguf", "t5")
    writer.add_array("tokens", ["a", "b"] * 40)
    writer.add_custom_alignment(64)
    for name, x in torch_tensors().items():
        writer.add_tensor(names[name], x)
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    pair = {
        "double_blocks.0.img_attn.qkv": lora.LoraPair(
            np.ones((2, 64), np.float32), np.ones((192, 2), np.float32)
        )
    }
    lora.write_lora(folder / "lora.safetensors", lora.LoraWeights(LATENT, pair), "peft")
    sizes = autoencoder.Autoencoder(
        latent_channels=2, width=4, multipliers=(1, 2), blocks=1, groups=2
    )
    autoencoder_files.write_autoencoder(folder / "ae.safetensors", sizes, noisy_autoencoder(sizes))
    ae = (folder / "ae.safetensors").read_bytes()
    encode_captions(["a red cat", "two dogs"], HashEncoder(8, 8), folder / "cache")
    shard = next((folder / "cache").glob("*.safetensors")).read_bytes()
    manifest = (folder / "cache" / "manifest.json").read_bytes()
    small = save(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float16)},
        {"k": "v"},
    )
    index = json.dumps(
        {"weight_map": {"a": "small.safetensors", "b": "small.safetensors"}}
    ).encode()
    tokenizer = train_tokenizer(folder / "spiece.model").read_bytes()

    found["tensors"] = (
        "x.safetensors",
        small,
        len(small),
        lambda path: everything(open_tensors(path)),
    )
    found["native"] = ("x.safetensors", native, header(native), read_model)
    found["header"] = ("x.safetensors", native, 0, read_model)
    found["bare header"] = ("x.safetensors", bare, 0, read_model)
    found["diffusers"] = ("x.safetensors", theirs, 0, read_model)
    found["inspect"] = ("x.safetensors", native, header(native), inspect_file)
    found["gguf"] = ("x.gguf", quantized, 20_000, read_model)
    found["t5 gguf"] = ("x.gguf", (folder / "plain.gguf").read_bytes(), 4_000, read_t5)
    found["index"] = (
        "x.safetensors.index.json",
        index,
        len(index),
        lambda path: everything(open_tensors(path)),
    )
    found["lora"] = ("x.safetensors", (folder / "lora.safetensors").read_bytes(), 600, read_lora)
    found["t5"] = ("x.safetensors", save(torch_tensors()), 0, read_t5)
    found["autoencoder"] = ("x.safetensors", ae, 0, autoencoder_files.read_autoencoder)
    found["cache"] = ("00000-x.safetensors", shard, len(shard), read_cache)
    found["manifest"] = ("manifest.json", manifest, len(manifest), read_cache)
    found["tokenizer"] = (
        "spiece.model",
        tokenizer,
        len(tokenizer),
        lambda path: open_tokenizer(path)("a red cat"),
    )
    found["lora header"] = (
        "x.safetensors",
        (folder / "lora.safetensors").read_bytes(),
        0,
        read_lora,
    )
    found["tokenizer.json"] = (
        "tokenizer.json",
        tokenizer_json(folder / "spiece.model"),
        3_000,
        read_tokenizer,
    )
    their_config = (folder / "diffusers" / "config.json").read_bytes()
    found["config.json"] = (
        "config.json",
        their_config,
        len(their_config),
        lambda path: open_checkpoint(path.parent),
    )
    found["int8"] = ("x.safetensors", (folder / "int8.safetensors").read_bytes(), 0, read_small)
    beside = {
        "index": {"small.safetensors": small}, "cache": {"manifest.json": manifest}, "manifest": {"00000-x.safetensors": shard},
        "config.json": {"diffusion_pytorch_model.safetensors": theirs},
    }  # fmt: skip
    return found | {"beside": beside}


CHANGES = dict.fromkeys(
    ("header", "bare header", "diffusers", "t5", "autoencoder", "lora header", "int8"),
    mutate_header,
)
CHANGES |= dict.fromkeys(("tokenizer.json", "config.json"), mutate_json)
TARGETS = [
    "tensors", "native", "header", "bare header", "diffusers", "inspect", "gguf", "t5 gguf", "index", "lora", "t5", "autoencoder", "cache",
    "manifest", "tokenizer", "lora header", "tokenizer.json", "config.json", "int8",
]  # fmt: skip


def peak() -> int:
    """Resident bytes at their highest since `forget_peak`."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def forget_peak():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="the peak of memory is read from Linux' /proc",
)
@pytest.mark.parametrize("target", TARGETS)
def test_readers_of_damaged_files(target, files, tmp_path):
    name, good, head, read = files[target]
    for other, content in files["beside"].get(target, {}).items():
        (tmp_path / other).write_bytes(content)
    path = tmp_path / name
    path.write_bytes(good)
    read(path)  # the file is good
    change = CHANGES.get(target, mutate)
    draw = np.random.default_rng([TARGETS.index(target), *SEED])
    forget_peak()
    before, refused = peak(), 0
    for i in range(INPUTS // len(TARGETS)):
        data = change(good, head, draw)
        path.write_bytes(data)
        began = time.monotonic()
        try:
            read(path)
        except EXPECTED as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) > 20, f"input {i}"
        except BaseException:
            keep = (
                Path(os.environ.get("RADIANCE_FUZZ_KEEP", tmp_path))
                / f"{target.replace(' ', '_')}-{i}-{name}"
            )
            keep.write_bytes(data)
            raise
        assert time.monotonic() - began < LONGEST, f"input {i}"
    assert refused > INPUTS // len(TARGETS) // 10  # the mutations do reach the structure
    assert peak() - before < MEMORY
