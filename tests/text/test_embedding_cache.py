"""The embedding cache: exact contents, hosts, killed jobs, and damaged or foreign files."""

import json
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from radiance.base.errors import CheckpointError, TextError
from radiance.cli import main
from radiance.config import ConfigError, Text
from radiance.data.captions import augment_caption
from radiance.data.datasets import open_source
from radiance.text import embedding_cache
from radiance.text.embedding_cache import CachedEncoder, EncodingCounts, encode_captions
from radiance.text.encoder import TextEmbedding, TextEncoder
from radiance.text.factory import make_encoder
from radiance.text.hash_encoder import HashEncoder
from radiance.text.t5_encoder import T5Encoder
from tests.helpers.toy_runs import output_of, toy_run, written_experiment
from tests.helpers.toy_t5 import CAPTIONS, TOY, toy_folder

MANY = [f"image {i} of {'a very ' * (i % 3)}red square" for i in range(60)]


class Counting(TextEncoder):
    """The hash encoder in bfloat16, which records the texts that it encodes."""

    kind = "hash"

    def __init__(self, dim=8, max_length=12):
        self.inner, self.dim, self.max_length = HashEncoder(dim, max_length), dim, max_length
        self.identity, self.dtype, self.seen = f"counting {dim}", np.dtype(ml_dtypes.bfloat16), []

    def count_tokens(self, text):
        return self.inner.count_tokens(text)

    def encode(self, texts, truncate=False):
        self.seen += texts
        return [
            TextEmbedding(rows.astype(self.dtype), length)
            for rows, length in self.inner.encode(texts, truncate)
        ]


@pytest.fixture
def small(monkeypatch):
    """Make shards and batches of a few captions."""
    monkeypatch.setattr(embedding_cache, "SHARD_BYTES", 1000)
    monkeypatch.setattr(embedding_cache, "ENCODING_BATCH_SIZE", 4)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def assert_same(a, b):
    (x, m), (y, n) = a, b
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(m, n)


# --- writing and reading --------------------------------------------------------------------------


def test_embeddings_are_read_bit_for_bit(tmp_path, small):
    encoder, done = Counting(), []
    assert encode_captions(MANY, encoder, tmp_path, report_progress=done.append) == EncodingCounts(
        61, 0, 0
    )
    assert sum(done) == 61
    assert len(shards(tmp_path)) > 5
    result = CachedEncoder(tmp_path, "hash", 12)
    assert (result.dim, result.max_length, result.identity, result.dtype) == (
        8,
        12,
        encoder.identity,
        encoder.dtype,
    )
    texts = [*MANY[::-1], "", MANY[3]]
    assert_same(result(texts), encoder(texts))
    assert [result.count_tokens(text) for text in texts] == [
        encoder.count_tokens(text) for text in texts
    ]


def test_only_visible_rows_are_stored(tmp_path):
    """These are the real tokens and one padding token."""
    encoder = Counting(max_length=200)
    encode_captions(MANY, encoder, tmp_path)
    (path,) = shards(tmp_path)
    tokens = sum(encoder.count_tokens(text) + 1 for text in ["", *MANY])
    tensors = load_file(path)
    assert tensors["rows"].shape == (tokens, 8)
    assert tensors["rows"].dtype == ml_dtypes.bfloat16
    assert path.stat().st_size < tokens * 16 + 61 * 24 + 1000


def test_embeddings_of_another_kind_of_encoder_are_an_error(tmp_path):
    encode_captions(MANY, HashEncoder(8, 12), tmp_path)
    text = Text(encoder="t5", max_length=12, cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"was made with text.encoder=hash, and it is t5 now"):
        make_encoder(text, 8)


def test_embeddings_of_t5(tmp_path):
    encoder = T5Encoder(toy_folder(tmp_path / "t5"), max_length=48)
    encode_captions(CAPTIONS, encoder, tmp_path / "cache")
    result = CachedEncoder(tmp_path / "cache", "t5", 48)
    (a, n), (b, m) = result(CAPTIONS), encoder(CAPTIONS)
    np.testing.assert_array_equal(n, m)
    # The batch held other captions, so the last bits may differ.
    np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.05)
    assert a.dtype == b.dtype == ml_dtypes.bfloat16


def test_long_captions_are_cut(tmp_path):
    encoder = Counting(max_length=6)
    long, full = "one two three four five six", "one two three four five"
    assert encode_captions([long, full, "one"], encoder, tmp_path) == EncodingCounts(4, 0, 1)
    result = CachedEncoder(tmp_path, "hash", 6)
    assert_same(result([long, full], truncate=True), encoder([long, full], truncate=True))
    assert result.count_tokens(long) == 7
    assert result.count_tokens(full) == 6
    with pytest.raises(TextError) as error:
        result([full, long])
    assert "7 tokens" in sentence(error)
    assert "limit is 6" in str(error.value)


def test_unusual_captions(tmp_path):
    encoder = Counting()
    texts = ["", " ", "a\nb", "红色", "🐱", "half \ud83d", "\x00", "</s>"]
    encode_captions(texts, encoder, tmp_path)
    assert_same(CachedEncoder(tmp_path, "hash", 12)(texts), encoder(texts))


# --- resuming and hosts ---------------------------------------------------------------------------


def test_encoding_resumes(tmp_path, small):
    first, second = Counting(), Counting()
    assert encode_captions(MANY[:20], first, tmp_path) == EncodingCounts(21, 0, 0)
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert encode_captions([*MANY, MANY[0]], second, tmp_path) == EncodingCounts(40, 22, 0)
    assert sorted(second.seen) == sorted(MANY[20:])
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert encode_captions(MANY, second, tmp_path) == EncodingCounts(0, 61, 0)
    assert_same(CachedEncoder(tmp_path, "hash", 12)(MANY), first(MANY))


def test_hosts_divide_the_captions(tmp_path, small):
    """They may run in any order, and their number may change."""
    encoders = [Counting() for _ in range(3)]
    counts = [encode_captions(MANY, encoders[host], tmp_path, host, 3) for host in (2, 0, 1)]
    assert sum(count.num_encoded for count in counts) == 61
    assert all(count.num_cached == 0 for count in counts)
    seen = [set(encoder.seen) for encoder in encoders]
    assert all(seen)
    assert set.union(*seen) == {"", *MANY}
    assert sum(map(len, seen)) == 61
    assert_same(CachedEncoder(tmp_path, "hash", 12)(MANY), Counting()(MANY))
    other = Counting()
    assert sum(encode_captions(MANY, other, tmp_path, host, 2).num_cached for host in (0, 1)) == 61
    assert not other.seen


def test_an_error_loses_at_most_one_shard(tmp_path, small):
    class Failing(Counting):
        def encode(self, texts, truncate=False):
            if len(self.seen) >= 40:
                raise RuntimeError("out of memory")
            return super().encode(texts, truncate)

    with pytest.raises(RuntimeError):
        encode_captions(MANY, Failing(), tmp_path)
    num_stored = sum(len(load_file(path)["counts"]) for path in shards(tmp_path))
    again = Counting()
    assert encode_captions(MANY, again, tmp_path) == EncodingCounts(61 - num_stored, num_stored, 0)
    assert 40 - num_stored <= 1000 / 16 / 4 + 4  # captions of at least 4 rows
    assert_same(CachedEncoder(tmp_path, "hash", 12)(MANY), again(MANY))


@pytest.mark.slow
def test_a_killed_job_leaves_complete_shards(tmp_path):
    """After SIGKILL at any moment the next run encodes the rest."""
    script = f"""
from itertools import count
from radiance.text import embedding_cache
from radiance.text.hash_encoder import HashEncoder
embedding_cache.SHARD_BYTES, embedding_cache.ENCODING_BATCH_SIZE = 200_000, 8
captions = (f"image {{i}} of a red square" for i in count())
embedding_cache.encode_captions(captions, HashEncoder(512, 12), {str(tmp_path)!r})
"""
    num_stored = 0
    for pause in (0.02, 0.1):
        job = subprocess.Popen([sys.executable, "-c", script], env=os.environ)
        while job.poll() is None and len(shards(tmp_path)) < num_stored + 2:
            time.sleep(0.005)
        time.sleep(pause)
        job.kill()
        assert job.wait() == -signal.SIGKILL
        num_stored = len(shards(tmp_path))
        CachedEncoder(tmp_path, "hash", 12)
    (tmp_path / ".00000-0123.safetensors.1.part").write_bytes(
        b"partial"
    )  # as a killed job leaves it
    (tmp_path / ".00001-0123.safetensors.1.part").write_bytes(b"another host's")
    texts, encoder = [f"image {i} of a red square" for i in range(200)], HashEncoder(512, 12)
    counts = encode_captions(texts, encoder, tmp_path)
    assert counts.num_cached > 8
    assert counts.num_encoded + counts.num_cached == 201
    assert [path.name for path in tmp_path.glob(".0*.part")] == [".00001-0123.safetensors.1.part"]
    assert_same(CachedEncoder(tmp_path, "hash", 12)(texts), encoder(texts))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the peak of memory is read from Linux' /proc"
)
def test_memory_is_bounded(tmp_path):
    """200 MB are written in shards of 8 MB, and read."""
    script = f"""
import numpy as np
from radiance.text import embedding_cache
from radiance.text.encoder import TextEmbedding, TextEncoder

class Wide(TextEncoder):
    kind, dim, max_length, identity, dtype = "hash", 4096, 64, "wide", np.dtype(np.float32)
    def count_tokens(self, text):
        return 10
    def encode(self, texts, truncate=False):
        return [TextEmbedding(np.full((11, 4096), len(text), np.float32), 10) for text in texts]

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

embedding_cache.SHARD_BYTES, embedding_cache.ENCODING_BATCH_SIZE = 8_000_000, 16
texts = ["x" * i for i in range(1, 1200)]
before = peak()
embedding_cache.encode_captions(texts, Wide(), {str(tmp_path)!r})
written = peak()
encoder = embedding_cache.CachedEncoder({str(tmp_path)!r}, "hash", 64)
for i in range(0, 1199, 16):
    assert encoder.encode(texts[i : i + 16])[0].rows[5, 7] == i + 1
print(written - before, peak() - before)
"""
    result = output_of(script).split()
    assert sum(path.stat().st_size for path in shards(tmp_path)) > 200e6
    assert all(float(megabytes) < 80 for megabytes in result)


# --- missing texts --------------------------------------------------------------------------------


def test_a_missing_text_is_an_error(tmp_path):
    encode_captions(MANY[:5], Counting(), tmp_path)
    result = CachedEncoder(tmp_path, "hash", 12)
    for ask in (result, result.count_tokens):
        with pytest.raises(TextError) as error:
            ask("a new text") if ask == result.count_tokens else ask([MANY[0], "a new text"])
        assert "'a new text'" in sentence(error)
        assert "radiance encode" in str(error.value)


def test_the_fallback_encodes_missing_texts(tmp_path):
    encode_captions(MANY[:5], Counting(), tmp_path)
    fallback = Counting()
    result = CachedEncoder(tmp_path, "hash", 12, fallback)
    texts = [MANY[9], MANY[0], MANY[9], MANY[4]]
    assert_same(result(texts), Counting()(texts))
    assert fallback.seen == [MANY[9]]
    assert result.count_tokens(MANY[9]) == fallback.count_tokens(MANY[9])
    with pytest.raises(TextError, match="limit is 12"):
        result(["word " * 20])


def test_the_encoder_of_a_config_reads_the_cache(tmp_path):
    """With a cache T5's weights are optional, and loaded for the first missing text."""
    folder, stored = toy_folder(tmp_path / "t5"), str(tmp_path / "cache")
    encode_captions(CAPTIONS, T5Encoder(folder, max_length=48), stored)
    text = Text(encoder="t5", max_length=48, cache=stored)
    alone = make_encoder(text, TOY.hidden)
    assert isinstance(alone, CachedEncoder)
    assert alone.fallback is None
    both = make_encoder(
        Text(encoder="t5", max_length=48, cache=stored, file=str(folder)), TOY.hidden
    )
    assert both.identity == alone.identity == both.fallback.identity
    assert_same(both(CAPTIONS), alone(CAPTIONS))
    assert both.fallback._params is None
    assert both(["a new cat"])[0].shape == (1, 48, TOY.hidden)
    assert both.fallback._params is not None
    with pytest.raises(ConfigError, match=r"model\.text_dim"):
        make_encoder(text, 4096)


# --- errors ---------------------------------------------------------------------------------------


def test_a_cache_of_another_encoder_or_maximum_length_is_an_error(tmp_path):
    encode_captions(MANY[:5], Counting(), tmp_path)
    for encoder, message in (
        (Counting(dim=16), "another text encoder"),
        (Counting(max_length=13), "text.max_length=12, and it is 13"),
    ):
        for use in (
            lambda encoder: CachedEncoder(tmp_path, encoder.kind, encoder.max_length, encoder),
            lambda encoder: encode_captions(MANY, encoder, tmp_path),
            lambda encoder: encode_captions(MANY, encoder, tmp_path, 1, 2),
        ):
            with pytest.raises(ConfigError) as error:
                use(encoder)
            assert message in sentence(error)
            assert str(tmp_path) in str(error.value)
            assert not encoder.seen
    with pytest.raises(ConfigError):
        CachedEncoder(tmp_path, "hash", 11)
    assert len(shards(tmp_path)) == 1


def test_a_shard_of_another_encoder_is_an_error(tmp_path):
    """Hosts may have been started with different files, or a shard may have been copied."""
    encode_captions(MANY[:5], Counting(), tmp_path)
    other = Counting()
    other.identity = "another"
    encode_captions(MANY[:5], other, tmp_path / "other")
    (shard,) = shards(tmp_path / "other")
    shard.rename(tmp_path / "00001-copied.safetensors")
    for use in (
        lambda: CachedEncoder(tmp_path, "hash", 12),
        lambda: encode_captions(MANY, Counting(), tmp_path),
    ):
        with pytest.raises(ConfigError) as error:
            use()
        assert "00001-copied.safetensors was made by another text encoder" in sentence(error)


def truncate_file(path):
    os.truncate(path, path.stat().st_size - 10)


def remove_index(path):
    path.write_bytes(path.read_bytes().replace(b'"counts"', b'"c0unts"'))


def change_token_count(path):
    """Give one caption another number of tokens."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])["counts"]["data_offsets"]
    data[8 + length + begin] += 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        truncate_file,
        remove_index,
        change_token_count,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 99),
    ],
)
def test_a_damaged_shard_is_an_error(tmp_path, damage):
    encode_captions(MANY[:5], Counting(), tmp_path)
    (path,) = shards(tmp_path)
    damage(path)
    for use in (
        lambda: CachedEncoder(tmp_path, "hash", 12),
        lambda: encode_captions(MANY, Counting(), tmp_path),
    ):
        with pytest.raises(CheckpointError) as error:
            use()
        assert str(path) in sentence(error)
        assert "radiance encode" in str(error.value)


def test_a_shard_that_becomes_shorter_is_an_error(tmp_path):
    encode_captions(MANY[:5], Counting(), tmp_path)
    result = CachedEncoder(tmp_path, "hash", 12)
    os.truncate(shards(tmp_path)[0], 400)
    with pytest.raises(CheckpointError, match="became shorter"):
        result(MANY[:5])


def test_a_damaged_manifest_is_an_error(tmp_path):
    with pytest.raises(ConfigError) as error:
        CachedEncoder(tmp_path / "absent", "hash", 12)
    assert "radiance encode" in sentence(error)
    encode_captions(MANY[:5], Counting(), tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["identity"] == Counting().identity
    assert manifest["max_length"] == 12
    for text in (
        "",
        "[]",
        "{",
        json.dumps(manifest | {"max_length": "12"}),
        json.dumps(manifest | {"dtype": "float12"}),
        "{}",
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError) as error:
            CachedEncoder(tmp_path, "hash", 12)
        assert "manifest.json is damaged" in sentence(error)
    path.write_text(json.dumps(manifest | {"format": "radiance text embeddings 9"}))
    with pytest.raises(ConfigError, match="embeddings 9"):
        CachedEncoder(tmp_path, "hash", 12)


def test_values_that_are_not_finite_are_an_error(tmp_path):
    class Broken(Counting):
        def encode(self, texts, truncate=False):
            result = super().encode(texts, truncate)
            result[3].rows[1, 2] = np.nan
            return result

    with pytest.raises(TextError) as error:
        encode_captions(MANY, Broken(), tmp_path)
    assert f"not finite for the caption {MANY[2]!r}" in sentence(error)
    assert not shards(tmp_path)


def test_encode_stores_the_captions_of_the_run(tmp_path, data_directory):
    run = toy_run(tmp_path, data_directory, "data.caption_prefix=oh ", "text.max_length=12")
    assert (
        main(["encode", str(written_experiment(run)), f"text.cache={tmp_path / 'num_stored'}"]) == 0
    )
    source, result = (
        open_source(run.data, "train"),
        CachedEncoder(tmp_path / "num_stored", "hash", 12),
    )
    result(
        [
            augment_caption(source.captions(i), False, run.data, np.random.default_rng(i)) or ""
            for i in range(20)
        ]
    )
    with pytest.raises(TextError):
        result(
            [
                next(
                    caption
                    for caption in source.captions(0)
                    if caption not in run.train.sample_prompts
                )
            ]
        )
