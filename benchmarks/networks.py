"""The networks that benchmarks compare: ours in JAX and in PyTorch, and Chroma of diffusers."""

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

from benchmarks.measure import Contender, find_torch_device, synchronize_torch, time_in_turn
from radiance import config
from radiance.model.flops import forward_flops
from radiance.model.paths import is_always_float32, is_block_matrix
from radiance.model.quantized import Q8_0_BLOCK, QuantizedKernel
from radiance.model.transformer import Params, bind_model, make_abstract_params, visible_lengths
from radiance.text.encoder import LENGTH_STEP, round_up_length
from radiance.weights import diffusers, native

NOISE_PERIOD = 1_000_003  # a prime, so that no matrix has two equal rows
TOLERANCE = 1e-4  # difference of both engines in float32, relative to the largest velocity
LATENT_CHANNELS = 64  # of diffusers' Chroma
TORCH_MODES = ("eager", "compiled")


@dataclass(frozen=True)
class Task:
    """Images of a run's resolution, and prompts of `num_tokens` of its `text.max_length`."""

    run: config.Config
    num_tokens: int

    @property
    def model(self) -> config.Model:
        return self.run.model

    @property
    def dtype(self) -> str:
        return self.run.compute.dtype

    @property
    def max_length(self) -> int:
        return self.run.text.max_length

    def padded_length(self, step: int = LENGTH_STEP) -> int:
        """Return the text tokens that `radiance` computes: the visible ones, rounded up."""
        visible = visible_lengths(np.array([self.num_tokens]), self.max_length, self.model.masking)
        return round_up_length(int(visible.max()), self.max_length, step)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        resolution = self.run.data.resolution
        return self.run.data.batch_size, resolution, resolution, self.model.channels

    @property
    def num_image_tokens(self) -> int:
        return (self.run.data.resolution // self.model.patch) ** 2

    @cached_property
    def image(self) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(self.shape, np.float32)

    def make_text(self, text_length: int, lengths: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Return embeddings of `text_length` tokens and the lengths; cutting changes no value."""
        full = np.random.default_rng(1).standard_normal(
            (self.max_length, self.model.text_dim), np.float32
        )
        rows = jnp.broadcast_to(
            jnp.asarray(full[:text_length], self.dtype),
            (len(lengths), text_length, self.model.text_dim),
        )
        return rows, jnp.asarray(lengths, jnp.int32)

    def count_flops(self, text_length: int, evaluations: int, modulations: int) -> float:
        """Count the FLOP of evaluations of one image, and of computing the modulation."""
        resolution = self.run.data.resolution
        rest = forward_flops(
            replace(self.model, modulation="none", pooled_dim=0, guidance_embed=False),
            resolution,
            resolution,
            text_length,
        )
        return evaluations * rest + modulations * (
            forward_flops(self.model, resolution, resolution, text_length) - rest
        )

    @property
    def description(self) -> str:
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(make_abstract_params(self.model)))
        batch, resolution, *_ = self.shape
        return (
            f"{count / 1e6:.0f} M parameters, {batch} of {resolution}×{resolution} "
            f"({self.num_image_tokens} tokens), {self.dtype}, "
            f"prompts of {self.num_tokens} of {self.max_length} tokens."
        )


def add_arguments(
    parser: argparse.ArgumentParser,
    peers: Sequence[str],
    gpu_model: str,
    gpu_resolution: int,
    gpu_batch: int,
):
    """Add arguments of the task; the defaults depend on the device."""
    small = jax.default_backend() == "cpu"
    parser.add_argument(
        "--model", default="small" if small else gpu_model, choices=sorted(config.MODELS)
    )
    parser.add_argument(
        "--resolution",
        type=int,
        default=256 if small else gpu_resolution,
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
        "--peers",
        nargs="*",
        default=peers,
        choices=peers,
        help="without names: only ours; default: all",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=TORCH_MODES,
        choices=TORCH_MODES,
        help="how to run a PyTorch module; default: both",
    )
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="config changes before the flags, such as model.single_blocks=8",
    )


def make_task(options: argparse.Namespace) -> Task:
    run = config.Config(
        name="benchmark",
        model=config.Model.from_name(options.model),
        compute=config.Compute(dtype=options.dtype),
        text=config.Text(max_length=options.text_limit),
        optimizer=config.Optimizer(ema_decays=()),  # PyTorch's trainer keeps none either
        sample=config.Sample(weights="params"),
    )
    # The resolution must fit the patch, which may change too.
    changes = [
        f"data.resolution={options.resolution}",
        f"data.batch_size={options.batch}",
        *options.changes,
    ]
    return Task(config.override(run, changes), options.prompt_tokens)


# --- Weights ---


def make_random_params(model: config.Model, dtype: str) -> Params:
    """Make random parameters in the types that a checkpoint is read in.

    Leaves have noise of 0.02, norms are around 1: fresh weights would predict nothing that could be
    compared. The same values repeat: sampling ten billion would take longer than the measurement.
    """
    noise = 0.02 * jax.random.normal(jax.random.key(0), (NOISE_PERIOD,))

    def leaf(path, x):
        name = path_name(path)
        values = jnp.tile(noise + name.endswith("scale"), -(-x.size // NOISE_PERIOD))[
            : x.size
        ].reshape(x.shape)
        return values.astype(jnp.float32 if is_always_float32(name) else dtype)

    return jax.tree_util.tree_map_with_path(leaf, make_abstract_params(model))


def path_name(path: Sequence[Any]) -> str:
    return "/".join(key.key for key in path)


def quantize_params(params: Params, store: str) -> Params:
    """Quantize the blocks' matrices with arbitrary values: only bytes and products are measured."""

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


def count_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# --- PyTorch ---


def to_torch(x: Any, dtype: str = "float32") -> Any:
    """Copy to PyTorch's device; images must have channels first."""
    import torch

    array = np.asarray(x)
    if np.issubdtype(array.dtype, np.integer):
        return torch.tensor(array, device=find_torch_device())
    return torch.tensor(
        array.astype(np.float32), device=find_torch_device(), dtype=getattr(torch, dtype)
    )


def make_torch_module(model: config.Model, params: Params, dtype: str) -> Any:
    """Make our PyTorch module with `params`, in the types that its own `load` uses."""
    import torch

    from radiance.weights.torch_export import model as torch_model

    with torch.device("meta"):
        module = torch_model.Transformer(config.to_dict(model))
    shapes, tensor = native.params_to_native(model, params)
    state_dict = {
        name: to_torch(
            tensor(name), "float32" if name.startswith(torch_model.FLOAT32_PREFIXES) else dtype
        )
        for name in shapes
    }
    module.load_state_dict(state_dict, assign=True)
    return module


def make_diffusers_module(model: config.Model, dtype: str) -> Any:
    """Make Chroma of diffusers in the size of `model`, a latent one, with its own weights."""
    import torch
    from diffusers import ChromaTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(find_torch_device()):
            return ChromaTransformer2DModel.from_config(
                diffusers.make_transformer_config(model)
            ).eval()
    finally:
        torch.set_default_dtype(before)


def make_latent_task(task: Task) -> Task:
    """Return the task for diffusers: as many tokens of packed latents, without a pixel head."""
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
    return Task(replace(run, model=replace(run.model, **trunk), data=data), task.num_tokens)


def compile_module(module: Any, mode: str) -> Callable:
    """Return the module, or its `torch.compile` version with one program for every shape."""
    import torch

    return module if mode == "eager" else torch.compile(module, dynamic=False)


def find_fastest_attention(
    batch: int, tokens: int, model: config.Model, dtype: str
) -> Callable[[], AbstractContextManager]:
    """Return a context with the fastest attention kernel for a mask of lengths on a GPU."""
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
            synchronize_torch()

        return call

    results = time_in_turn(
        [Contender(name, lambda kernel=kernel: attend(kernel)) for name, kernel in kernels.items()],
        5,
    )
    best = min((r for r in results if r.times), key=lambda r: r.median)
    return lambda: sdpa_kernel([kernels[best.contender.name], SDPBackend.MATH], set_priority=True)


# --- The same numbers ---


def compare_outputs(task: Task, params: Params, make: Callable[[], Any]) -> str:
    """Compare the velocities of both engines, ours with cut text.

    Raises:
        SystemExit: They differ in float32: times of different computations mean nothing.
    """
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed: there is nothing to compare with."
    batch = len(task.image)
    time = np.linspace(1, 0.5, batch, dtype=np.float32)
    lengths = [task.num_tokens] * (batch - 1) + [1]
    velocity = jax.jit(lambda p, *inputs: bind_model(task.model, task.run.compute, p)(*inputs))
    velocity_jax = np.asarray(
        velocity(params, task.image, *task.make_text(task.padded_length(), lengths), time)
    )
    text, lengths = task.make_text(task.max_length, lengths)
    with torch.no_grad():
        velocity_torch = make()(
            to_torch(task.image.transpose(0, 3, 1, 2)),
            to_torch(text, task.dtype),
            to_torch(lengths),
            to_torch(time),
        )
    velocity_torch = velocity_torch.permute(0, 2, 3, 1).float().cpu().numpy()
    difference = float(np.abs(velocity_jax - velocity_torch).max() / np.abs(velocity_torch).max())
    message = f"radiance and the PyTorch module differ by {difference:.1e} of the largest velocity"
    if task.dtype == "float32" and not difference <= TOLERANCE:
        raise SystemExit(f"{message}: nothing is timed.")
    return f"{message} on these inputs."
