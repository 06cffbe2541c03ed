"""Toy models of a few thousand parameters, weights that are not zero, and inputs."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.model import autoencoder
from radiance.model.transformer import Params, bind_model, make_abstract_params

FLOAT32 = config.Compute(dtype="float32")

# Every option of the network occurs at least once.
VARIANTS = {
    "one_pad": dict(),
    "strict": dict(masking="strict", head="nerf_linear"),
    "registers": dict(registers=2, modulation="none"),
    "sequential": dict(text_ids="sequential", prediction="x0"),
    "conv_half": dict(patch_embed="conv_half", prediction="x0", modulation="shared", pooled_dim=5),
    "linear": dict(head="linear"),
    "per_block": dict(modulation="per_block", pooled_dim=5, guidance_embed=True),
    "flux": dict(
        modulation="per_block", pooled_dim=5, head="linear", patch=1, channels=8, masking="off"
    ),
    "no_doubles": dict(double_blocks=0, modulation="shared", head="linear", mlp_ratio=2.5),
    "bottleneck": dict(
        patch_embed="bottleneck",
        bottleneck=5,
        prediction="x0",
        head="linear",
        text_refiner_blocks=1,
    ),
    "learned": dict(
        padding="learned",
        masking="off",
        text_refiner_blocks=2,
        text_ids="sequential",
        modulation="none",
        head="linear",
    ),
    "learned_pad": dict(padding="learned", registers=1, text_refiner_blocks=1, head="linear"),
    "refiner": dict(
        text_refiner_blocks=2,
        masking="strict",
        text_ids="sequential",
        modulation="none",
        patch_embed="bottleneck",
    ),
    "no_singles": dict(
        single_blocks=0,
        modulation="none",
        head="linear",
        masking="strict",
        registers=1,
        text_ids="sequential",
    ),
}


def toy_model(**changes) -> config.Model:
    sizes = dict(
        hidden=48, heads=2, double_blocks=2, single_blocks=3, rope_axes=(4, 10, 10), text_dim=32,
        approximator_hidden=40, patch=4, nerf_hidden=8, nerf_mlp_ratio=2, nerf_depth=2,
        nerf_freqs=3,
    )  # fmt: skip
    return config.Model(**(sizes | changes))


@lru_cache
def toy_params(model: config.Model, seed: int = 0) -> Params:
    """Sample parameters with a standard deviation of 0.1, and norms around 1.

    With initial weights all gates are zero, and the blocks would not be tested. They are sampled on
    the host, because `init_params` compiles for seconds per model.
    """
    rng = np.random.default_rng(seed)

    def sample_leaf(path, shape):
        noise = 0.1 * rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(noise + 1 if path[-1].key == "scale" else noise)

    return jax.tree_util.tree_map_with_path(sample_leaf, make_abstract_params(model))


def toy_inputs(
    model: config.Model,
    lengths: tuple[int, ...] = (1, 3, 6),
    words: int = 6,
    rows: int = 2,
    columns: int = 3,
    seed: int = 1,
) -> dict[str, np.ndarray | None]:
    """Sample a model's arguments: images of rows × columns patches, text with random padding."""
    rng, b = np.random.default_rng(seed), len(lengths)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    return dict(
        image=normal(b, rows * model.patch, columns * model.patch, model.channels),
        text=normal(b, words, model.text_dim),
        lengths=np.array(lengths, np.int32),
        time=np.linspace(0.9, 0.3, b, dtype=np.float32),
        guidance=np.linspace(0, 3.5, b, dtype=np.float32)
        if model.guidance_embed or model.modulation == "approximator"
        else None,
        pooled=normal(b, model.pooled_dim) if model.pooled_dim else None,
    )


def rows_of(inputs: dict, index) -> dict:
    return {name: None if x is None else x[index] for name, x in inputs.items()}


@partial(jax.jit, static_argnames=("model", "compute"))
def apply(
    model: config.Model, params: Params, inputs: dict, compute: config.Compute = FLOAT32
) -> jax.Array:
    return bind_model(model, compute, params)(**inputs)


@partial(jax.jit, static_argnames=("model", "compute"))
def gradients(
    model: config.Model,
    params: Params,
    inputs: dict,
    weights: jax.Array,
    compute: config.Compute = FLOAT32,
):
    """Compute Σ weights·velocity, and its gradient to (parameters, image, text)."""

    def loss(params, image, text):
        return jnp.vdot(
            weights, bind_model(model, compute, params)(**(inputs | dict(image=image, text=text)))
        )

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, inputs["image"], inputs["text"])


@lru_cache
def noisy_autoencoder(sizes: autoencoder.Autoencoder, seed: int = 0) -> Params:
    """Sample kernels that keep the variance, norms around 1, and biases."""
    rng = np.random.default_rng(seed)

    def sample_leaf(path, x):
        noise, kind = rng.standard_normal(x.shape, np.float32), path[-1].key
        return (
            noise / np.sqrt(np.prod(x.shape[:-1]), dtype=np.float32)
            if kind == "kernel"
            else 0.1 * noise + (kind == "scale")
        )

    return jax.tree_util.tree_map_with_path(
        sample_leaf, autoencoder.make_abstract_autoencoder(sizes)
    )
