"""Should text tokens have places of their own? Zero rotary ids for all (FLUX, Chroma until May 2026) against 0, 1, 2, … (Chroma since).

    radiance ablate experiments/ablations/text_ids.py                          the cpu scale: too small to decide anything
    radiance ablate experiments/ablations/text_ids.py --scale gpu              one GPU; the same command goes on until all is done
    radiance plan experiments/ablations/text_ids.py:sequential --device h200   a run of the pod scale

The encoder is a T5 of random weights, and never the hash. With ids of zero the network cannot tell the order of the text, and with the
hash, a bag of words, nothing else can: it never learns which color is which shape's, and sequential ids win for a reason that no trained
T5 gives, whose rows know their neighbors.

Expected, before the run: sequential within 1 % of zero, for the rows say already what the order would.

Run: the cpu scale, seeds 0 to 2, on 2 CPU cores shared with other work (its seconds say nothing): results/text_ids/cpu/. Sequential ids lie
0.3 % below zero, with an interval from -7.2 to +6.6 %: undecided. The control is told from the base (+26.7 %, from +6.3 to +47.1 %), so that
effects of its size can be seen, and ones of 1 % cannot. 200 steps do not say what longer training would. The other scales have not been run.

Missing, because the code cannot say it yet: ids that are changed after training, as Chroma's were.
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
    """The pod's."""
    return masking.sized("text_ids", "pod")


SUITE = Suite(
    name="text_ids",
    question="Should text tokens have places of their own?",
    metric="validation_loss",
    base="zero",
    control="no_text",
    margin=0.01,
    arms=CHANGES,
    scales=masking.scales("text_ids"),
)
VARIANTS = SUITE.arms_at("pod")
