"""One shape where the caption asks for it: the smallest model whose pictures an exact reader can judge, and the teacher of others."""

from radiance import config as c


def config() -> c.Config:
    return c.Config(
        name="one_shape",
        model=c.Model(
            patch=8, hidden=128, heads=4, rope_axes=(8, 12, 12), double_blocks=2, single_blocks=4, mlp_ratio=3, text_dim=64,
            approximator_hidden=64, approximator_depth=2, head="linear", prediction="x0",
        ),
        compute=c.Compute(dtype="float32"),
        text=c.Text(encoder="hash", length=20),
        data=c.Data(source="shapes", shapes=c.Shapes(law="short", limit=20, objects=1), side=32, batch=64, caption_dropout=0.1, threads=1),
        flow=c.Flow(time_law="parabola"),
        optimizer=c.Optimizer(kind="muon", learning_rate=2e-3, warmup_steps=50, decay="cosine", ema=(0.99,)),
        train=c.Train(steps=4000, log_every=50, validate_every=500, sample_every=1000, checkpoint_every=500),
        sample=c.Sample(solver="euler", steps=30, guidance=2.0, batch=64),
    )  # fmt: skip


ARMS = {"adamw": ["optimizer.kind=adamw"]}
