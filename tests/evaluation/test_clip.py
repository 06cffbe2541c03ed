"""The CLIP score of a toy CLIP model with random weights, step by step."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from radiance.base.errors import CheckpointError, DataError
from radiance.base.images import to_image
from radiance.evaluation.clip import ClipScorer
from tests.helpers.mutations import mutate_header, mutate_json

WORDS = ["red", "green", "square", "circle", "a"]
CAPTIONS = ["a red square", "green circle", "a green square", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    path = tmp_path_factory.mktemp("clip")
    letters = sorted(set("".join(WORDS)))
    vocabulary = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path, model_max_length=24)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    end = vocabulary.index("<|endoftext|>")
    text = dict(
        sizes,
        vocab_size=len(vocabulary),
        max_position_embeddings=24,
        eos_token_id=end,
        bos_token_id=end - 1,
        pad_token_id=end,
    )
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text,
            vision_config=dict(sizes, image_size=16, patch_size=8),
            projection_dim=8,
        )
    )
    torch.manual_seed(18)  # cosines of both signs
    for parameter in model.parameters():  # with the default scale, all embeddings are nearly equal
        parameter.data = 0.5 * torch.randn_like(parameter) + 0.5 * (parameter.ndim == 1)
    model.save_pretrained(path)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images():
    """Portrait images from dark to bright, with some values out of range."""
    noise = np.random.default_rng(3).normal(0, 0.5, (4, 40, 24, 3))
    return (noise + np.linspace(-1, 1, 4)[:, None, None, None]).astype(np.float32)


@pytest.mark.reference
def test_scores_agree_with_a_computation_step_by_step(folder, images):
    import torch

    clip = ClipScorer(folder)
    scores, expected = clip(images, CAPTIONS), []
    for pixels, caption in zip(images, CAPTIONS):
        small = to_image(pixels).resize((16, 26), Image.Resampling.BICUBIC).crop((0, 5, 16, 21))
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        values = torch.tensor((np.asarray(small) / 255 - mean) / std, dtype=torch.float32).permute(
            2, 0, 1
        )[None]
        ids = torch.tensor([clip.processor.tokenizer(caption).input_ids])
        with torch.no_grad():
            x = clip.model.visual_projection(clip.model.vision_model(values).pooler_output)[
                0
            ].numpy()
            y = clip.model.text_projection(clip.model.text_model(ids).pooler_output)[0].numpy()
        expected.append(100 * max(x @ y / np.sqrt((x @ x) * (y @ y)), 0))
    assert scores.dtype == np.float32
    assert np.ptp(expected) > 5
    assert min(expected) == 0
    np.testing.assert_allclose(scores, expected, atol=0.01)


@pytest.mark.reference
def test_long_captions_are_truncated_and_counts_must_agree(folder, images):
    clip = ClipScorer(folder)
    assert clip(images[:1], ["a red square " * 50]).shape == (1,)
    with pytest.raises(DataError, match="4 images and 3 captions"):
        clip(images, CAPTIONS[:3])


@pytest.mark.reference
def test_the_same_weights_have_the_same_identity(folder):
    assert ClipScorer(folder).identity == ClipScorer(folder).identity


@pytest.mark.reference
def test_other_folders_are_errors(folder, tmp_path):
    with pytest.raises(CheckpointError, match="contains no safetensors"):
        ClipScorer(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no complete CLIP model for transformers"):
        ClipScorer(tmp_path)
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    with pytest.raises(CheckpointError, match=r"its weights lack visual_projection\.weight"):
        ClipScorer(tmp_path)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"radiance\[reference\]"):
        ClipScorer(tmp_path)


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_read_or_rejected(name, folder, tmp_path):
    """RADIANCE_FUZZ=20000 tries a hundred inputs for each file instead of ten."""
    copy = shutil.copytree(folder, tmp_path / "clip")
    content = (copy / name).read_bytes()
    change = mutate_header if name == "model.safetensors" else mutate_json
    rng = np.random.default_rng(len(name))
    for i in range(int(os.environ.get("RADIANCE_FUZZ", "2000")) // 200):
        (copy / name).write_bytes(change(content, len(content), rng))
        try:
            ClipScorer(copy)
            message = ""
        except CheckpointError as error:
            message = str(error)
        assert "\n" not in message, f"input {i}"
