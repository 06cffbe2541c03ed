"""What 8 fake devices compute, for test_mesh.py: `python on_a_mesh.py OUT.npz`, with 8 devices in XLA_FLAGS."""

import sys
from functools import partial

import jax
import numpy as np

from radiance import config
from radiance.distributed.sharding import make_mesh, make_shardings, put_batch
from radiance.pipeline import Pipeline
from radiance.training.step import init_state, make_train_step
from radiance.weights.checkpoint import checkpoint_from_params
from tests.helpers.toy_runs import toy_run

MESHES = {
    "8x1x1": config.Mesh(8, 1, 1),
    "1x8x1": config.Mesh(1, 8, 1),
    "2x2x2": config.Mesh(2, 2, 2),
}
SIZES = dict(hidden=64, heads=2, rope_axes=(4, 14, 14))
STEPS = 3
# How matrices are kept, and images painted at once: every mesh divides 8, and none 3.
CASES = [(None, 8), (None, 3), ("q8_0", 3)]


def batches():
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": draw.standard_normal((8, 8, 8, 3), np.float32),
            "text": draw.standard_normal((8, 8, 16), np.float32),
            "lengths": draw.integers(1, 9, 8, np.int32),
            "weight": np.ones(8, np.float32),
        }


def trained(run: config.Config, mesh: jax.sharding.Mesh | None) -> tuple[np.ndarray, dict]:
    """Losses of a few steps, and the weights after them."""
    fresh, pure = partial(init_state, run), make_train_step(run)
    if mesh is None:
        state, step, put = jax.jit(fresh)(), jax.jit(pure), lambda batch: batch
    else:
        places = make_shardings(jax.eval_shape(fresh), mesh)
        state = jax.jit(fresh, out_shardings=places)()
        step, put = (
            jax.jit(pure, in_shardings=(places, None), out_shardings=(places, None)),
            partial(put_batch, mesh=mesh, batch_size=8),
        )
        spread = [
            x for x in jax.tree.leaves(state.params) if x.addressable_shards[0].data.size < x.size
        ]
        assert bool(spread) == (mesh.shape["fsdp"] * mesh.shape["tensor"] > 1)
    losses = []
    for batch in batches():
        state, metrics = step(state, put(batch))
        losses.append(float(metrics["loss"]))
    if mesh is not None:
        assert step._cache_size() == 1  # nothing was compiled again
        jax.tree.map(
            lambda x, place: (
                None if x.sharding.is_equivalent_to(place, x.ndim) else sys.exit(f"{x.sharding}")
            ),
            state,
            places,
        )
    return np.array(losses), jax.device_get(state.params)


def main(out: str):
    run = toy_run(
        ".",
        ".",
        "optimizer.learning_rate=1e-2",
        "text.max_length=8",
        "sample.batch_size=3",
        **SIZES,
    )
    found = {}
    for name, settings in {"one": None, **MESHES}.items():
        mesh = None if settings is None else make_mesh(settings)
        with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
            losses, params = trained(run, mesh)
        found[f"{name}/losses"] = losses
        found |= {f"{name}/params/{i}": x for i, x in enumerate(jax.tree.leaves(params))}
        weights = found.setdefault("weights", params)  # the same on every mesh
        for store, batch in CASES if name in ("one", "2x2x2") else CASES[:1]:
            places = None if mesh is None else make_shardings(weights, mesh)
            kept = checkpoint_from_params(run.model, weights, "toy").load_params(
                weight_format=store, shardings=places
            )
            pipeline = Pipeline(
                config.override(run, [f"sample.batch_size={batch}"]), kept, mesh=mesh
            )
            found[f"{name}/{store}/{batch}"] = np.stack(
                [np.asarray(p.image) for p in pipeline([f"the digit {i}" for i in range(9)])]
            )
    np.savez(out, **{key: x for key, x in found.items() if key != "weights"})


if __name__ == "__main__":
    main(sys.argv[1])
