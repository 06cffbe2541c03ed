"""Should text tokens have zero rotary ids (FLUX, early Chroma) or 0, 1, 2, … (Chroma since 2026)?

    radiance ablate text_ids   the smoke scale, 41 minutes: decides nothing
    radiance ablate text_ids --scale gpu   one GPU: planned, not run
    radiance plan experiments/ablations/text_ids.py:sequential --device h200  a run of the pod scale

The encoder is a T5 with random weights, never the hash encoder. With ids of zero the network
cannot see the order of the text, and with a bag of words nothing else reveals it: sequential ids
would win for a reason that does not apply to a trained T5, whose embeddings know their neighbors.

Expected before the run: sequential within 1 % of zero, because the embeddings contain the order
already. Result of the smoke scale: undecided (README.md). Not implemented: ids changed after
training, as Chroma's were.
"""

import masking

from radiance import config as c
from radiance.ablation.suite import Suite

CHANGES = {
    "zero": (),
    "sequential": ("model.text_ids=sequential",),
    "no_text": ("data.caption_dropout=1",),
}


def config() -> c.Config:
    """Return the base of the pod scale."""
    return masking.make_base("text_ids", "pod")


SUITE = Suite(
    name="text_ids",
    question="Should text tokens have sequential rotary ids?",
    metric="validation_loss",
    base="zero",
    controls=("no_text",),
    margin=0.01,
    variants=CHANGES,
    scales=masking.make_scales("text_ids"),
)
VARIANTS = SUITE.variants_at("pod")
