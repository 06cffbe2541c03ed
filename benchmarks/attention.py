"""Time attention with lengths, forward and backward: `radiance` beside PyTorch's kernels.

    python -m benchmarks.attention --tokens 1024 4608 --heads 24 --head-dim 128 --dtype bfloat16
    python -m benchmarks.attention --tokens 304 4144 --hidden-tokens 7    (256² and 1024², cut text)

All compute on the same values. The first row of a batch hides its last N tokens, the second its
last 2 N, and so on. The error is the largest difference from float32 with exact products, relative
to the largest value there; with the backward pass, the worst of the output and the three gradients.
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

NUM_PRODUCTS = {
    "forward": 2,
    "forward and backward": 7,
}  # of n × n × k per head; the backward pass computes its scores again
BACKENDS = {
    "cpu": ("xla", "chunked"),
    "gpu": ("cudnn", "xla", "chunked"),
    "tpu": ("splash", "xla", "chunked"),
}
TORCH_BACKENDS = {
    "cpu": ("default",),
    "gpu": ("default", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "tpu": (),
}


class Inputs(NamedTuple):
    """Float32 [b, n, h, k], and int32 [b]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    weights: np.ndarray  # gradient of the output; 0 in hidden rows
    lengths: np.ndarray


def main(arguments: Sequence[str] | None = None) -> Report:
    small = jax.default_backend() == "cpu"
    parser = measure.make_parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4608], help="default: %(default)s"
    )
    parser.add_argument(
        "--hidden-tokens",
        type=int,
        default=471,
        help="N, at the end of the first row; default: %(default)s",
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
    limits = report.measure_limits(options.dtype)
    for tokens in options.tokens:
        inputs = make_inputs(
            (options.batch, tokens, options.heads, options.head_dim), options.hidden_tokens
        )
        with jax.default_matmul_precision("highest"):
            exact = [to_numpy(x) for x in make_radiance_call(inputs, "float32", True, "chunked")()]
        for part in NUM_PRODUCTS:
            compare(report, inputs, exact, part, options, limits)
            measure.free_memory()
    if options.record:
        report.record()
    return report


def make_inputs(shape: tuple[int, ...], num_hidden: int) -> Inputs:
    rng = np.random.default_rng(0)
    q, k, v, weights = (rng.standard_normal(shape, np.float32) for _ in range(4))
    lengths = np.maximum(shape[1] - num_hidden * np.arange(1, shape[0] + 1), 1).astype(np.int32)
    weights[np.arange(shape[1]) >= lengths[:, None]] = 0
    return Inputs(q, k, v, weights, lengths)


def compare(
    report: Report,
    inputs: Inputs,
    exact: list[np.ndarray],
    part: str,
    options: argparse.Namespace,
    limits: Limits,
):
    b, n, h, size = inputs.q.shape
    work, backward = NUM_PRODUCTS[part] * 2 * b * h * n**2 * size, part != "forward"
    outputs: dict[str, Sequence[Any]] = {}  # results of the last call by row

    def row(name: str, make: Callable, backend: str, peer: bool = True) -> Contender:
        def make_recording_call():
            call = make(inputs, options.dtype, backward, backend)
            return lambda: outputs.update({name: call()})

        return Contender(name, make_recording_call, work, peer)

    platform = jax.default_backend()
    first = select_backend(platform, inputs.q.shape, jnp.dtype(options.dtype))
    backends = sorted(BACKENDS[platform], key=lambda name: name != first)
    # A backend that runs out of memory becomes a row too; the selected one must run.
    rows = [
        row(f"radiance, {name}", make_radiance_call, name, peer=name != first) for name in backends
    ]
    rows += [row(f"PyTorch, {name}", make_torch_call, name) for name in TORCH_BACKENDS[platform]]
    results = measure.time_in_turn(rows, options.repeats)
    report.write(f"### {part}, {n} tokens, {b}×{h} heads of {size}, {options.dtype}")
    report.compare(
        results,
        limits,
        {
            "error": lambda result: (
                f"{compute_error(outputs[result.contender.name], exact, inputs.lengths):.1e}"
            )
        },
    )


def compute_error(
    outputs: Sequence[Any], exact: Sequence[np.ndarray], lengths: np.ndarray
) -> float:
    """Return the largest relative error of visible tokens; hidden ones are never read."""
    visible = np.arange(exact[0].shape[1]) < lengths[:, None]
    pairs = [(to_numpy(x)[visible], y[visible]) for x, y in zip(outputs, exact)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32) if isinstance(x, jax.Array) else x.float().cpu().numpy()


# --- What is timed: (output, and the gradients of queries, keys and values), all [b, n, h, k] ---


def make_radiance_call(
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


def make_torch_call(
    inputs: Inputs, dtype: str, backward: bool, backend: str
) -> Callable[[], Sequence[Any]]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Heads before tokens, as the kernels expect; in memory as a projection returns them.
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
        measure.synchronize_torch()
        return [x.detach().transpose(1, 2) for x in (out, *gradients)]

    return run


if __name__ == "__main__":
    main()
