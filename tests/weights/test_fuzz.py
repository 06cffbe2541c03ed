"""Readers either read damaged and hostile files or reject them in one sentence, in little memory.

    RADIANCE_FUZZ=100000 python -m pytest tests/weights/test_fuzz.py

tests that many inputs instead of two thousand; the first inputs of each target are the same.
RADIANCE_FUZZ_SEED=1 makes other inputs. RADIANCE_FUZZ_KEEP=FOLDER saves an input that breaks a
reader.
"""

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
from radiance.evaluation.features import PixelExtractor, load_or_extract_features
from radiance.model import autoencoder
from radiance.text import t5_weights
from radiance.text.embedding_cache import CachedEncoder, encode_captions
from radiance.text.hash_encoder import HashEncoder
from radiance.text.t5_encoder import T5Encoder
from radiance.text.tokenizers import open_tokenizer
from radiance.weights import autoencoder as autoencoder_files
from radiance.weights import lora, lora_reading
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.inspect import inspect_file
from radiance.weights.opening import open_tensors
from tests.helpers.memory import needs_peak, peak_bytes, reset_peak
from tests.helpers.mutations import mutate, mutate_header, mutate_json
from tests.helpers.toy_files import KNOWN, LATENT, PIXELS, published
from tests.helpers.toy_files import save as save_model
from tests.helpers.toy_models import noisy_autoencoder
from tests.helpers.toy_quantized import write_int8
from tests.helpers.toy_t5 import TOY, torch_tensors, train_tokenizer

NUM_INPUTS = int(os.environ.get("RADIANCE_FUZZ", "2000"))
SEED = [int(x) for x in os.environ.get("RADIANCE_FUZZ_SEED", "").split()]
EXPECTED_ERRORS = (CheckpointError, config.ConfigError, TextError)
MAX_SECONDS = 5.0  # for one input; more is a hang
FEATURES, IMAGES = PixelExtractor(4), np.zeros((2, 8, 8, 3), np.float32)
# Damage that readers recover from, instead of rejecting the file.
RECOVERED = ("features", "inspect notes")
MAX_MEMORY = 600_000_000  # bytes that a reader may add to the peak of the process


def read_values(file):
    """Read all values."""
    for name in file.shapes:
        file[name]


def read_model(path: Path):
    opened = open_checkpoint(path, **KNOWN)
    for name in opened.shapes:
        opened.get_tensor(name)


def read_quantized(path: Path):
    """Read a model and keep its quantized matrices as stored."""
    opened = open_checkpoint(path, **KNOWN)
    opened.load_params("bfloat16", "file")


def read_lora(path: Path):
    lora_reading.read_lora(path, LATENT)


def read_lora_folder(path: Path):
    read_lora(path.parent)


PEFT_CONFIG = json.dumps(
    {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "use_rslora": True}
    | {"rank_pattern": {}, "alpha_pattern": {"proj": 4, ".*qkv": 8.5, r"^a\.\d+": 1}}
).encode()


def lora_kinds() -> bytes:
    """Return a LoRA file with changes of all kinds, and settings in its header."""
    x = np.ones((8, 8), np.float32)
    block = "double_blocks.0.img_attn"
    tensors = {
        f"lycoris_{block.replace('.', '_')}_qkv.lokr_w1": np.ones((24, 8), np.float32),
        f"lycoris_{block.replace('.', '_')}_qkv.lokr_w2": x,
        f"{block}.proj.hada_w1_a": np.ones((64, 2), np.float32),
        f"{block}.proj.hada_w1_b": np.ones((2, 64), np.float32),
        f"{block}.proj.hada_w2_a": np.ones((64, 2), np.float32),
        f"{block}.proj.hada_w2_b": np.ones((2, 64), np.float32),
        f"{block}.proj.dora_scale": np.ones((64, 1), np.float32),
        f"{block}.proj.diff_b": np.ones(64, np.float32),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": x.reshape(1, 64),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": x.reshape(64, 1),
        "text_encoder.q.lora_A.weight": x,
    }
    metadata = {"lora_adapter_metadata": PEFT_CONFIG.decode(), "ss_network_alpha": "4"}
    return save(tensors, metadata)


def read_t5(path: Path):
    weights = t5_weights.T5Weights(path)
    weights.fingerprint()
    for key in weights.file_keys.values():
        weights.file[key]


def read_text_encoder(path: Path):
    read_t5(path)
    T5Encoder(path).tokenizer("a red cat")


def read_features(path: Path):
    """Read cached features, which are extracted again if the cache is damaged."""
    features = load_or_extract_features(
        path.parent, FEATURES, "images", 2, [np.zeros((2, 8, 8, 3))]
    )
    assert features.shape == (2, 48)


def read_cache(path: Path):
    encoder = CachedEncoder(path.parent, "hash", 8)
    encoder.encode(["", "a red cat", "two dogs"])


def read_tokenizer(path: Path):
    tokenizer = open_tokenizer(path)
    for text in ("", "a red cat", "two  \u732b \U0001f408</s><extra_id_3>", "x" * 300):
        assert all(0 <= i < tokenizer.vocab_size for i in tokenizer(text))


def tokenizer_json(spiece: Path) -> bytes:
    """Return a tokenizer as Hugging Face writes it."""
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


def write_notes(folder: Path, home: str) -> bytes:
    """Return a file of int8 matrices with rotated inputs, and their descriptions."""
    description = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    path = write_int8(folder / f"{home}.safetensors", description, home, 16)
    return path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """Return (name and content of a valid file, size of its header, its reader) by target."""
    folder = tmp_path_factory.mktemp("valid")

    def header(data: bytes) -> int:
        return 8 + struct.unpack("<Q", data[:8])[0]

    targets = {}
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
    diffusers_file = (folder / "diffusers" / "diffusion_pytorch_model.safetensors").read_bytes()
    names = {
        row.torch_name.format(i=i): row.gguf_name.format(i=i)
        for row in t5_weights.T5_RULES
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

    targets["tensors"] = (
        "x.safetensors",
        small,
        len(small),
        lambda path: read_values(open_tensors(path)),
    )
    targets["native"] = ("x.safetensors", native, header(native), read_model)
    targets["header"] = ("x.safetensors", native, 0, read_model)
    targets["bare header"] = ("x.safetensors", bare, 0, read_model)
    targets["diffusers"] = ("x.safetensors", diffusers_file, 0, read_model)
    targets["inspect"] = ("x.safetensors", native, header(native), inspect_file)
    targets["gguf"] = ("x.gguf", quantized, 20_000, read_model)
    targets["t5 gguf"] = ("x.gguf", (folder / "plain.gguf").read_bytes(), 4_000, read_t5)
    targets["index"] = (
        "x.safetensors.index.json",
        index,
        len(index),
        lambda path: read_values(open_tensors(path)),
    )
    targets["lora"] = ("x.safetensors", (folder / "lora.safetensors").read_bytes(), 600, read_lora)
    targets["t5"] = ("x.safetensors", save(torch_tensors()), 0, read_t5)
    targets["autoencoder"] = ("x.safetensors", ae, 0, autoencoder_files.read_autoencoder)
    targets["cache"] = ("00000-x.safetensors", shard, len(shard), read_cache)
    targets["manifest"] = ("manifest.json", manifest, len(manifest), read_cache)
    targets["tokenizer"] = (
        "spiece.model",
        tokenizer,
        len(tokenizer),
        lambda path: open_tokenizer(path)("a red cat"),
    )
    targets["lora header"] = (
        "x.safetensors",
        (folder / "lora.safetensors").read_bytes(),
        0,
        read_lora,
    )
    targets["lora kinds"] = ("x.safetensors", lora_kinds(), 0, read_lora)
    targets["adapter_config.json"] = ("adapter_config.json", PEFT_CONFIG, 0, read_lora_folder)
    targets["tokenizer.json"] = (
        "tokenizer.json",
        tokenizer_json(folder / "spiece.model"),
        3_000,
        read_tokenizer,
    )
    diffusers_config = (folder / "diffusers" / "config.json").read_bytes()
    targets["config.json"] = (
        "config.json",
        diffusers_config,
        len(diffusers_config),
        lambda path: open_checkpoint(path.parent),
    )
    targets["int8"] = (
        "x.safetensors",
        (folder / "int8.safetensors").read_bytes(),
        0,
        read_quantized,
    )
    targets["notes"] = ("x.safetensors", write_notes(folder, "header"), 0, read_quantized)
    notes = write_notes(folder, "tensor")
    targets["note tensors"] = ("x.safetensors", notes, len(notes), read_quantized)
    targets["inspect notes"] = ("x.safetensors", notes, 0, inspect_file)
    spiece = np.frombuffer(tokenizer, np.uint8)
    encoder = save(torch_tensors() | {"spiece_model": spiece})
    targets["t5 with tokenizer"] = ("model.safetensors", encoder, 0, read_text_encoder)
    load_or_extract_features(folder / "features", FEATURES, "images", 2, [IMAGES])
    features = next((folder / "features").iterdir())
    targets["features"] = (features.name, features.read_bytes(), 400, read_features)
    beside = {
        "index": {"small.safetensors": small},
        "cache": {"manifest.json": manifest},
        "manifest": {"00000-x.safetensors": shard},
        "config.json": {"diffusion_pytorch_model.safetensors": diffusers_file},
        "adapter_config.json": {
            "adapter_model.safetensors": (folder / "lora.safetensors").read_bytes()
        },
    }
    return targets | {"beside": beside}


CHANGES = dict.fromkeys(
    (
        *("header", "bare header", "diffusers", "t5", "autoencoder", "lora header", "int8"),
        *("notes", "inspect notes", "t5 with tokenizer"),
    ),
    mutate_header,
)
CHANGES["lora kinds"] = mutate_header
CHANGES |= dict.fromkeys(("tokenizer.json", "config.json", "adapter_config.json"), mutate_json)
TARGETS = [
    "tensors",
    "native",
    "header",
    "bare header",
    "diffusers",
    "inspect",
    "gguf",
    "t5 gguf",
    "index",
    "lora",
    "t5",
    "autoencoder",
    "cache",
    "manifest",
    "tokenizer",
    "lora header",
    "lora kinds",
    "adapter_config.json",
    "tokenizer.json",
    "config.json",
    "int8",
    "notes",
    "note tensors",
    "inspect notes",
    "t5 with tokenizer",
    "features",
]


@pytest.mark.slow
@needs_peak
@pytest.mark.parametrize("target", TARGETS)
def test_readers_read_or_reject_damaged_files(target, files, tmp_path):
    name, valid_content, header_size, read = files[target]
    for other_name, content in files["beside"].get(target, {}).items():
        (tmp_path / other_name).write_bytes(content)
    path = tmp_path / name
    path.write_bytes(valid_content)
    read(path)
    change = CHANGES.get(target, mutate)
    rng = np.random.default_rng([TARGETS.index(target), *SEED])
    reset_peak()
    before, num_rejected = peak_bytes(), 0
    for i in range(NUM_INPUTS // len(TARGETS)):
        data = change(valid_content, header_size, rng)
        path.write_bytes(data)
        start_time = time.monotonic()
        message = None
        try:
            read(path)
        except EXPECTED_ERRORS as error:
            message = str(error)
        except BaseException:
            failing_input = (
                Path(os.environ.get("RADIANCE_FUZZ_KEEP", tmp_path))
                / f"{target.replace(' ', '_')}-{i}-{name}"
            )
            failing_input.write_bytes(data)
            raise
        assert time.monotonic() - start_time < MAX_SECONDS, f"input {i}"
        if message is not None:
            num_rejected += 1
            assert "\n" not in message, f"input {i}"
            assert len(message) > 20, f"input {i}"
    if target not in RECOVERED:  # the mutations reach the structure
        assert num_rejected > NUM_INPUTS // len(TARGETS) // 10
    assert peak_bytes() - before < MAX_MEMORY
