"""Train and sample on meshes of 8 fake devices: `python -m tests.helpers.mesh_process OUT.npz`.

test_multi_device.py runs this with 8 devices in XLA_FLAGS.
"""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from radiance import config
from radiance.distributed.sharding import make_mesh, make_shardings, put_batch
from radiance.pipeline import Pipeline
from radiance.training.step import TrainState, init_state, make_train_step
from radiance.weights.checkpoint import checkpoint_from_params
from tests.helpers.toy_runs import toy_run

MESHES = {
    "8x1x1": config.Mesh(8, 1, 1),
    "1x8x1": config.Mesh(1, 8, 1),
    "2x2x2": config.Mesh(2, 2, 2),
}
SIZES = dict(hidden=64, heads=2, rope_axes=(4, 14, 14))
NUM_STEPS = 3
# Weight format and batch size: every mesh divides 8 rows, and none divides 3.
SAMPLING_CASES = [(None, 8), (None, 3), ("q8_0", 3)]


def make_batches() -> Iterator[dict[str, np.ndarray]]:
    """Yield the same random batches for every mesh."""
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        yield {
            "image": rng.standard_normal((8, 8, 8, 3), np.float32),
            "text": rng.standard_normal((8, 8, 16), np.float32),
            "lengths": rng.integers(1, 9, 8, np.int32),
            "weight": np.ones(8, np.float32),
        }


def train(
    run: config.Config, mesh: jax.sharding.Mesh | None, initial: TrainState
) -> tuple[np.ndarray, dict]:
    """Return the losses of a few steps, and the weights after them."""
    init, step = partial(init_state, run), make_train_step(run)
    losses = []
    if mesh is None:
        state, compiled_step = initial, jax.jit(step)
        for batch in make_batches():
            state, metrics = compiled_step(state, batch)
            losses.append(float(metrics["loss"]))
        return np.array(losses), jax.device_get(state.params)
    shardings = make_shardings(jax.eval_shape(init), mesh)
    if mesh.shape["tensor"] > 1:  # initial values do not depend on the mesh either
        state = jax.jit(init, out_shardings=shardings)()
    else:
        state = jax.device_put(initial, shardings)
    compiled_step = jax.jit(step, in_shardings=(shardings, None), out_shardings=(shardings, None))
    is_sharded = any(
        x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(state.params)
    )
    assert is_sharded == (mesh.shape["fsdp"] * mesh.shape["tensor"] > 1)
    for batch in make_batches():
        state, metrics = compiled_step(state, put_batch(batch, mesh, batch_size=8))
        losses.append(float(metrics["loss"]))
    assert compiled_step._cache_size() == 1, "The step was compiled again."
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), x.sharding
    return np.array(losses), jax.device_get(state.params)


def sample(
    run: config.Config,
    weights: dict,
    mesh: jax.sharding.Mesh | None,
    weight_format: str | None,
    batch_size: int,
) -> np.ndarray:
    """Return the pixels of nine images."""
    shardings = None if mesh is None else make_shardings(weights, mesh)
    params = checkpoint_from_params(run.model, weights, "toy").load_params(
        weight_format=weight_format, shardings=shardings
    )
    run = config.override(run, [f"sample.batch_size={batch_size}"])
    images = Pipeline(run, params, mesh=mesh)([f"the digit {i}" for i in range(9)])
    return np.stack([np.asarray(output.image) for output in images])


def main(out: str):
    """Write the results of all meshes and of one device to a file."""
    run = toy_run(
        ".",
        ".",
        "optimizer.learning_rate=1e-2",
        "optimizer.ema_decays=0.9",
        "text.max_length=8",
        "sample.batch_size=3",
        **SIZES,
    )
    results, weights = {}, None
    initial = jax.device_get(jax.jit(partial(init_state, run))())
    for name, settings in {"one": None, **MESHES}.items():
        mesh = None if settings is None else make_mesh(settings)
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0])
            )
            losses, params = train(run, mesh, initial)
        results[f"{name}/losses"] = losses
        results |= {f"{name}/params/{i}": x for i, x in enumerate(jax.tree.leaves(params))}
        weights = weights or params  # the same on every mesh
        cases = SAMPLING_CASES if name in ("one", "2x2x2") else SAMPLING_CASES[:1]
        for weight_format, batch_size in cases:
            images = sample(run, weights, mesh, weight_format, batch_size)
            results[f"{name}/{weight_format}/{batch_size}"] = images
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
