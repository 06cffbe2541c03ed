"""What is compared: our network in JAX and in PyTorch with the same weights, and diffusers' Chroma with a trunk of the same sizes."""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contender, race, synchronize, torch_device
from radiance import config
from radiance.model.flops import forward_flops
from radiance.model.paths import is_always_float32, is_block_matrix
from radiance.model.quantized import Q8_0_BLOCK, QuantizedKernel
from radiance.model.transformer import Params, bind_model, make_abstract_params, visible_lengths
from radiance.text.encoder import LENGTH_STEP, round_up_length
from radiance.weights import diffusers, native

PERIOD = 1_000_003  # a prime, so that no matrix has two equal rows
TOLERANCE = 1e-4  # between the two engines in float32, of the largest velocity
LATENT_CHANNELS = 64  # of diffusers' Chroma
WAYS = ("eager", "compiled")


@dataclass(frozen=True)
class Task:
    """Images of `run.data.side` pixels, `run.data.batch` at a time, with prompts of `tokens` tokens out of `run.text.length`."""

    run: config.Config
    tokens: int

    @property
    def model(self) -> config.Model:
        return self.run.model

    @property
    def dtype(self) -> str:
        return self.run.compute.dtype

    @property
    def limit(self) -> int:
        return self.run.text.max_length

    def cut(self, step: int = LENGTH_STEP) -> int:
        """Text tokens in `radiance`: as many as can be seen, rounded up to a multiple of `step`."""
        seen = visible_lengths(np.array([self.tokens]), self.limit, self.model.masking)
        return round_up_length(int(seen.max()), self.limit, step)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        side = self.run.data.resolution
        return self.run.data.batch_size, side, side, self.model.channels

    @property
    def image_tokens(self) -> int:
        return (self.run.data.resolution // self.model.patch) ** 2

    @cached_property
    def image(self) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(self.shape, np.float32)

    def text(self, words: int, lengths: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Embeddings of `words` tokens and the lengths; the same numbers whatever is cut off."""
        whole = np.random.default_rng(1).standard_normal(
            (self.limit, self.model.text_dim), np.float32
        )
        rows = jnp.broadcast_to(
            jnp.asarray(whole[:words], self.dtype), (len(lengths), words, self.model.text_dim)
        )
        return rows, jnp.asarray(lengths, jnp.int32)

    def flops(self, words: int, evaluations: int, modulations: int) -> float:
        """Of evaluations of one image by a network that makes its modulation so many times."""
        side = self.run.data.resolution
        rest = forward_flops(
            replace(self.model, modulation="none", pooled_dim=0, guidance_embed=False),
            side,
            side,
            words,
        )
        return evaluations * rest + modulations * (
            forward_flops(self.model, side, side, words) - rest
        )

    @property
    def description(self) -> str:
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(make_abstract_params(self.model)))
        batch, side, *_ = self.shape
        return (
            f"{count / 1e6:.0f} M parameters, {batch} of {side}×{side} ({self.image_tokens} tokens), {self.dtype}, "
            f"prompts of {self.tokens} of {self.limit} tokens."
        )


def add_arguments(
    parser: argparse.ArgumentParser,
    peers: Sequence[str],
    gpu_model: str,
    gpu_side: int,
    gpu_batch: int,
):
    """What to compute; the defaults suit the device that is found."""
    small = jax.default_backend() == "cpu"
    parser.add_argument(
        "--model", default="small" if small else gpu_model, choices=sorted(config.MODELS)
    )
    parser.add_argument(
        "--side",
        type=int,
        default=256 if small else gpu_side,
        help="of the images, in pixels; default: %(default)s",
    )
    parser.add_argument(
        "--batch", type=int, default=1 if small else gpu_batch, help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype", default="float32" if small else "bfloat16", choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--text-limit",
        type=int,
        default=512,
        help="tokens that PyTorch pads texts to; default: %(default)s",
    )
    parser.add_argument("--prompt-tokens", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--peers", nargs="*", default=peers, choices=peers, help="none: ours alone; default: all"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=WAYS,
        choices=WAYS,
        help="of running a PyTorch module; default: both",
    )
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of the config, before the flags, such as model.single_blocks=8",
    )


def task_of(options: argparse.Namespace) -> Task:
    run = config.Config(
        name="benchmark",
        model=config.Model.from_name(options.model),
        compute=config.Compute(dtype=options.dtype),
        text=config.Text(max_length=options.text_limit),
        optimizer=config.Optimizer(ema_decays=()),  # which PyTorch's does not keep either
        sample=config.Sample(weights="params"),
    )
    # The side must fit to the patch, which may change too.
    changes = [
        f"data.resolution={options.side}",
        f"data.batch_size={options.batch}",
        *options.changes,
    ]
    return Task(config.override(run, changes), options.prompt_tokens)


# --- weights ----------------------------------------------------------------------------------------------------------


def random_params(model: config.Model, dtype: str) -> Params:
    """Every leaf with noise of 0.02, norms around 1, in the types that a checkpoint is read in: fresh weights would paint nothing,
    and nothing could be compared.

    The same numbers over and over: drawing ten billion would take longer than what is measured.
    """
    noise = 0.02 * jax.random.normal(jax.random.key(0), (PERIOD,))

    def leaf(path, x):
        name = path_name(path)
        values = jnp.tile(noise + name.endswith("scale"), -(-x.size // PERIOD))[: x.size].reshape(
            x.shape
        )
        return values.astype(jnp.float32 if is_always_float32(name) else dtype)

    return jax.tree_util.tree_map_with_path(leaf, make_abstract_params(model))


def path_name(path: Sequence[Any]) -> str:
    return "/".join(key.key for key in path)


def stored_small(params: Params, store: str) -> Params:
    """The blocks' matrices as `store` keeps them, of random values: only their bytes and products are measured."""

    def leaf(path, x):
        name = path_name(path)
        if not is_block_matrix(name):
            return x
        blocks, inputs = (
            len(x),
            math.prod(x.shape[1:3]) if name.endswith("attention/proj/kernel") else x.shape[1],
        )
        shape = (blocks, inputs, x.size // (blocks * inputs))
        values = (jnp.arange(x.size) % 251 - 125).astype(
            jnp.float8_e4m3fn if store == "float8_e4m3fn" else jnp.int8
        )
        groups, kind = (inputs // Q8_0_BLOCK, jnp.float16) if store == "q8_0" else (1, jnp.float32)
        return QuantizedKernel(
            values.reshape(shape), jnp.full((blocks, groups, shape[2]), 3e-4, kind), x.shape[1:]
        )

    return jax.tree_util.tree_map_with_path(leaf, params)


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def to_torch(x: Any, dtype: str = "float32") -> Any:
    """A copy on PyTorch's device; images must be turned to channels first."""
    import torch

    array = np.asarray(x)
    if np.issubdtype(array.dtype, np.integer):
        return torch.tensor(array, device=torch_device())
    return torch.tensor(
        array.astype(np.float32), device=torch_device(), dtype=getattr(torch, dtype)
    )


def torch_module(model: config.Model, params: Params, dtype: str) -> Any:
    """Our PyTorch module with `params`, in the types that its own `load` gives."""
    import torch

    from radiance.weights.torch_export import model as torch_model

    with torch.device("meta"):
        module = torch_model.Transformer(config.to_dict(model))
    shapes, tensor = native.params_to_native(model, params)
    kept = {
        name: to_torch(
            tensor(name), "float32" if name.startswith(torch_model.FLOAT32_PREFIXES) else dtype
        )
        for name in shapes
    }
    module.load_state_dict(kept, assign=True)
    return module


def diffusers_module(model: config.Model, dtype: str) -> Any:
    """Diffusers' Chroma with the sizes of `model`, a latent one; weights of its own."""
    import torch
    from diffusers import ChromaTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(torch_device()):
            return ChromaTransformer2DModel.from_config(
                diffusers.make_transformer_config(model)
            ).eval()
    finally:
        torch.set_default_dtype(before)


def latent(task: Task) -> Task:
    """As many tokens through the same trunk, for diffusers: packed latents, without a pixel head."""
    trunk = dict(
        patch=1,
        patch_embed="conv",
        channels=LATENT_CHANNELS,
        head="linear",
        prediction="velocity",
        modulation="approximator",
    )
    run = task.run
    data = replace(run.data, resolution=run.data.resolution // run.model.patch)
    return Task(replace(run, model=replace(run.model, **trunk), data=data), task.tokens)


def running(module: Any, way: str) -> Callable:
    """The module itself, or as fast as `torch.compile` makes it: a program for every shape."""
    import torch

    return module if way == "eager" else torch.compile(module, dynamic=False)


def fastest_attention(
    batch: int, tokens: int, model: config.Model, dtype: str
) -> Callable[[], AbstractContextManager]:
    """On a GPU, under what PyTorch attends with its fastest kernel for a mask of lengths; elsewhere it has one."""
    import torch

    if not torch.cuda.is_available():
        return nullcontext
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(
        batch, model.heads, tokens, model.head_dim, dtype=getattr(torch, dtype), device="cuda"
    )
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device="cuda")
    kernels = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }

    def attend(kernel):
        def call():
            with torch.no_grad(), sdpa_kernel(kernel):
                torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            synchronize()

        return call

    results = race(
        [Contender(name, lambda kernel=kernel: attend(kernel)) for name, kernel in kernels.items()],
        5,
    )
    best = min((r for r in results if r.times), key=lambda r: r.median)
    return lambda: sdpa_kernel([kernels[best.contender.name], SDPBackend.MATH], set_priority=True)


# --- the same numbers -------------------------------------------------------------------------------------------------


def agreement(task: Task, params: Params, make: Callable[[], Any]) -> str:
    """How far the velocities of the two engines differ, ours with the text cut. Raises SystemExit when they do in float32: times of
    different things mean nothing.
    """
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed: there is nothing to compare with."
    batch = len(task.image)
    time = np.linspace(1, 0.5, batch, dtype=np.float32)
    lengths = [task.tokens] * (batch - 1) + [1]
    velocity = jax.jit(lambda p, *inputs: bind_model(task.model, task.run.compute, p)(*inputs))
    ours = np.asarray(velocity(params, task.image, *task.text(task.cut(), lengths), time))
    text, lengths = task.text(task.limit, lengths)
    with torch.no_grad():
        theirs = make()(
            to_torch(task.image.transpose(0, 3, 1, 2)),
            to_torch(text, task.dtype),
            to_torch(lengths),
            to_torch(time),
        )
    theirs = theirs.permute(0, 2, 3, 1).float().cpu().numpy()
    found = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if task.dtype == "float32" and not found <= TOLERANCE:
        raise SystemExit(
            f"Ours and the PyTorch module differ by {found:.1e} of the largest velocity: nothing is timed."
        )
    return f"Ours and the PyTorch module differ by {found:.1e} of the largest velocity on these inputs."
