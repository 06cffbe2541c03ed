"""A toy T5 under Hugging Face's names, and a tokenizer that trains in a moment."""

import io
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from radiance.text.t5 import T5

TOY = T5(vocabulary=200, hidden=32, layers=3, heads=4, head_dim=6, mlp_hidden=40)
CAPTIONS = [
    "a photo of a red cat sitting on a mat",
    "the quick brown fox jumps over the lazy dog",
    "two cats and three dogs, playing in the park!",
    "un café à Paris, l'été",
    "ein Haus mit Garten. 42 images 3.14",
]


def torch_tensors(t5: T5 = TOY, seed: int = 0, spread: float = 1.0) -> dict[str, np.ndarray]:
    """Sample weights as T5 initializes them, times `spread`, with other norms and biases."""
    draw, inner = np.random.default_rng(seed), t5.heads * t5.head_dim

    def normal(scale, *shape):
        return (scale * draw.standard_normal(shape)).astype(np.float32)

    tensors = {
        "shared.weight": normal(1, t5.vocabulary, t5.hidden),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": normal(
            1, t5.buckets, t5.heads
        ),
        "encoder.final_layer_norm.weight": 1 + normal(0.3, t5.hidden),
    }
    for i in range(t5.layers):
        block = f"encoder.block.{i}.layer"
        tensors |= {
            f"{block}.0.layer_norm.weight": 1 + normal(0.3, t5.hidden),
            f"{block}.1.layer_norm.weight": 1 + normal(0.3, t5.hidden),
            f"{block}.0.SelfAttention.q.weight": normal(
                spread * (t5.hidden * t5.head_dim) ** -0.5, inner, t5.hidden
            ),
            f"{block}.0.SelfAttention.k.weight": normal(spread * t5.hidden**-0.5, inner, t5.hidden),
            f"{block}.0.SelfAttention.v.weight": normal(spread * t5.hidden**-0.5, inner, t5.hidden),
            f"{block}.0.SelfAttention.o.weight": normal(spread * inner**-0.5, t5.hidden, inner),
            f"{block}.1.DenseReluDense.wi_0.weight": normal(
                spread * t5.hidden**-0.5, t5.mlp_hidden, t5.hidden
            ),
            f"{block}.1.DenseReluDense.wi_1.weight": normal(
                spread * t5.hidden**-0.5, t5.mlp_hidden, t5.hidden
            ),
            f"{block}.1.DenseReluDense.wo.weight": normal(
                spread * t5.mlp_hidden**-0.5, t5.hidden, t5.mlp_hidden
            ),
        }
    return tensors


def train_tokenizer(path: Path, captions: list[str] = CAPTIONS) -> Path:
    """Train a SentencePiece model with T5's special ids."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 20),
        model_writer=model,
        vocab_size=180,
        model_type="unigram",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def toy_folder(folder: Path, t5: T5 = TOY, seed: int = 0) -> Path:
    """Write weights and tokenizer to a folder in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(torch_tensors(t5, seed), folder / "model.safetensors")
    train_tokenizer(folder / "spiece.model")
    return folder
