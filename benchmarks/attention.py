"""Attention under lengths, forward and backward: every backend of `radiance` that the device has, beside PyTorch's kernels.

    python -m benchmarks.attention --tokens 1024 4608 --heads 24 --head-dim 128 --dtype bfloat16
    python -m benchmarks.attention --tokens 304 4144 --hidden-tokens 7       # images of 256² and 1024² with the text cut

All compute on the same numbers and hide the last tokens of each row. The error is the largest difference to float32 with exact
products, by the largest value there; with the backward pass that of the output and the three gradients, whichever is worst.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, networks
from benchmarks.measure import Contender, Limits, Report
from radiance.model.attention import attention, select_backend

PRODUCTS = {
    "forward": 2,
    "forward and backward": 7,
}  # of n × n × k a head; the backward pass makes its scores once more
BACKENDS = {
    "cpu": ("xla", "chunked"),
    "gpu": ("cudnn", "xla", "chunked"),
    "tpu": ("splash", "xla", "chunked"),
}
TORCH = {
    "cpu": ("default",),
    "gpu": ("default", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "tpu": (),
}


class Inputs(NamedTuple):
    """Float32 [b, n, h, k], and int32 [b]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    weights: np.ndarray  # the gradient of the output; 0 in hidden rows, which nobody reads
    lengths: np.ndarray


def main(arguments: Sequence[str] | None = None) -> Report:
    small = jax.default_backend() == "cpu"
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4608], help="default: %(default)s"
    )
    parser.add_argument(
        "--hidden-tokens",
        type=int,
        default=471,
        help="at the end of each row; default: %(default)s",
    )
    parser.add_argument("--batch", type=int, default=1 if small else 2, help="default: %(default)s")
    parser.add_argument(
        "--heads", type=int, default=12 if small else 24, help="default: %(default)s"
    )
    parser.add_argument(
        "--head-dim", type=int, default=64 if small else 128, help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype", default="float32" if small else "bfloat16", choices=["float32", "bfloat16"]
    )
    options = parser.parse_args(arguments)

    report = Report("attention", arguments)
    limits = report.limits(options.dtype)
    for tokens in options.tokens:
        inputs = make_inputs(
            (options.batch, tokens, options.heads, options.head_dim), tokens - options.hidden_tokens
        )
        with jax.default_matmul_precision("highest"):
            exact = [host(x) for x in radiance(inputs, "float32", True, "chunked")()]
        for part in PRODUCTS:
            compare(report, inputs, exact, part, options, limits)
            measure.forget()
    if options.record:
        report.record()
    return report


def make_inputs(shape: tuple[int, ...], length: int) -> Inputs:
    draw = np.random.default_rng(0)
    q, k, v, weights = (draw.standard_normal(shape, np.float32) for _ in range(4))
    weights[:, length:] = 0
    return Inputs(q, k, v, weights, np.full(shape[0], length, np.int32))


def compare(
    report: Report,
    inputs: Inputs,
    exact: list[np.ndarray],
    part: str,
    options: argparse.Namespace,
    limits: Limits,
):
    b, n, h, size = inputs.q.shape
    work, backward = PRODUCTS[part] * 2 * b * h * n**2 * size, part != "forward"
    found: dict[str, Sequence[Any]] = {}  # by row, what its last call gave

    def row(name: str, make: Callable, backend: str, peer: bool = True) -> Contender:
        def keeping():
            call = make(inputs, options.dtype, backward, backend)
            return lambda: found.update({name: call()})

        return Contender(name, keeping, work, peer)

    platform = jax.default_backend()
    first = select_backend(platform, inputs.q.shape, jnp.dtype(options.dtype))
    backends = sorted(BACKENDS[platform], key=lambda name: name != first)
    # One that needs more memory than there is becomes a row too, but the one that is chosen must run.
    rows = [row(f"radiance, {name}", radiance, name, peer=name != first) for name in backends]
    rows += [row(f"PyTorch, {name}", pytorch, name) for name in TORCH[platform]]
    results = measure.race(rows, options.repeats)
    report.say(f"### {part}, {n} tokens, {b}×{h} heads of {size}, {options.dtype}")
    report.compare(
        results,
        limits,
        {
            "error": lambda result: (
                f"{error(found[result.contender.name], exact, inputs.lengths[0]):.1e}"
            )
        },
    )


def error(found: Sequence[Any], exact: Sequence[np.ndarray], length: int) -> float:
    """Of visible rows, which are the same for all arrays: the others find what nobody reads, and their gradients are 0."""
    pairs = [(host(x)[:, :length], y[:, :length]) for x, y in zip(found, exact)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32) if isinstance(x, jax.Array) else x.float().cpu().numpy()


# --- what is timed: (output, and the gradients of queries, keys and values), all [b, n, h, k] -------------------------


def radiance(
    inputs: Inputs, dtype: str, backward: bool, backend: str
) -> Callable[[], Sequence[jax.Array]]:
    q, k, v, weights = (jnp.asarray(x, dtype) for x in inputs[:4])
    attend = partial(attention, kv_len=jnp.asarray(inputs.lengths), backend=backend)

    @jax.jit
    def run(q, k, v, weights):
        if not backward:
            return (attend(q, k, v),)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(weights)

    return lambda: jax.block_until_ready(run(q, k, v, weights))


def pytorch(
    inputs: Inputs, dtype: str, backward: bool, backend: str
) -> Callable[[], Sequence[Any]]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Heads before tokens, as its kernels want them; in memory they lie as a projection leaves them.
    q, k, v, weights = (networks.to_torch(x, dtype).transpose(1, 2) for x in inputs[:4])
    mask = (
        torch.arange(q.shape[2], device=q.device)
        < networks.to_torch(inputs.lengths)[:, None, None, None]
    )
    for x in (q, k, v):
        x.requires_grad_(backward)

    def run():
        with nullcontext() if backend == "default" else sdpa_kernel(SDPBackend[backend]):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            gradients = torch.autograd.grad(out, (q, k, v), weights) if backward else ()
        measure.synchronize()
        return [x.detach().transpose(1, 2) for x in (out, *gradients)]

    return run


if __name__ == "__main__":
    main()
