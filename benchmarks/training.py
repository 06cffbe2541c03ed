"""Time the forward pass and the training step: `radiance` beside our PyTorch module.

    python -m benchmarks.training --model small --resolution 256 --dtype float32 --batch 1
    python -m benchmarks.training --remat none dots full --peers
    python -m benchmarks.training optimizer.{weights,mu,nu}_dtype=bfloat16 \\
        --model chroma1-radiance --batch 1 --remat full --peers

The step is loss, backward pass, clip and AdamW. The second command measures what
rematerialization costs and saves, the third trains the 9.5 B model on one GPU of 141 GB.
Otherwise both keep float32 weights and compute in `--dtype`. PyTorch rows pad texts to the limit,
as trainers there do; rows with cut text show how much of the difference this is. The fraction of
the limit is the MFU against the measured matrix products.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure, networks
from benchmarks.measure import Contender, Limits, Report
from benchmarks.networks import Task
from radiance import config
from radiance.data.batches import MAX_TEXT_LENGTHS
from radiance.model.transformer import REMAT_POLICIES, Params, bind_model
from radiance.text.encoder import LENGTH_STEP
from radiance.training.step import init_state, make_train_step

PARTS = {"forward": 1, "step": 3}  # multiples of the forward pass's matrix products


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.make_parser(__doc__)
    networks.add_arguments(parser, ("torch",), "large", 512, 16)
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: both"
    )
    parser.add_argument(
        "--remat",
        nargs="+",
        default=["none"],
        choices=["none", *REMAT_POLICIES],
        help="policies to compare",
    )
    options = parser.parse_intermixed_args(arguments)
    task = networks.make_task(options)

    report = Report("training", arguments)
    limits = report.measure_limits(task.dtype)
    report.write(f"{options.model}: {task.description} Text is cut to {padded_length(task)}.")
    for part in options.parts:
        compare(report, task, part, limits, options)
        measure.free_memory()
    if options.record:
        report.record()
    return report


def compare(report: Report, task: Task, part: str, limits: Limits, options: argparse.Namespace):
    params = networks.make_random_params(task.model, task.run.optimizer.weights_dtype)
    text_lengths = {"text cut": padded_length(task), "text at the limit": task.max_length}
    peers, columns = (
        [],
        {"images/s": lambda result: f"{task.run.data.batch_size / result.median:.3g}"},
    )
    if "torch" in options.peers:
        module = cache(
            partial(
                networks.make_torch_module, task.model, params, task.run.optimizer.weights_dtype
            )
        )
        report.write(networks.compare_outputs(task, params, module))
        peers = make_torch_contenders(
            task, part, module, text_lengths, options.modes, recompute="none" not in options.remat
        )
    if part == "forward":
        contenders = [
            Contender(
                f"radiance, {label}",
                partial(make_forward_call, task, params, n),
                count_flops(task, part, n),
                False,
            )
            for label, n in text_lengths.items()
        ]
    else:
        steps = StepPrograms(task, params)
        columns |= {
            "GB temporary": steps.memory_column(temporary_bytes),
            "GB in all": steps.memory_column(total_bytes),
        }
        contenders = [
            steps.make_contender(label, text_length, policy)
            for policy in options.remat
            for label, text_length in text_lengths.items()
        ]
    del params  # they become the state of the steps
    report.write(f"### {part}")
    report.compare(measure.time_in_turn(contenders + peers, options.repeats), limits, columns)
    if memory := jax.devices()[0].memory_stats():  # GPUs and TPUs count
        report.write(
            f"Peak of JAX on the device until here: {memory['peak_bytes_in_use'] / 1e9:.3g} GB."
        )


def padded_length(task: Task) -> int:
    """Return the text tokens of a batch of the trainer."""
    return task.padded_length(max(LENGTH_STEP, task.max_length // MAX_TEXT_LENGTHS))


def count_flops(task: Task, part: str, text_length: int) -> float:
    return PARTS[part] * task.run.data.batch_size * task.count_flops(text_length, 1, 1)


# --- radiance ---


def make_forward_call(task: Task, params: Params, text_length: int) -> Callable[[], Any]:
    image, (text, lengths), time = (
        jnp.asarray(task.image),
        make_text(task, text_length),
        jnp.full(len(task.image), 0.5),
    )
    velocity = jax.jit(
        lambda params: bind_model(task.model, task.run.compute, params)(image, text, lengths, time)
    )
    return lambda: velocity(params).block_until_ready()


class StepPrograms:
    """Training steps of several programs on one state: two states may not fit into memory."""

    def __init__(self, task: Task, params: Params):
        self.task, self.state = (
            task,
            jax.jit(partial(init_state, task.run), donate_argnums=0)(params),
        )
        self.memory: dict[str, Any] = {}  # the compiler's analysis by row

    def make_contender(self, label: str, text_length: int, policy: str) -> Contender:
        name = f"radiance, {label}" + (f", remat {policy}" if policy != "none" else "")
        return Contender(
            name,
            partial(self.make_call, name, text_length, policy),
            count_flops(self.task, "step", text_length),
            peer=False,
        )

    def make_call(self, name: str, text_length: int, policy: str) -> Callable[[], Any]:
        task = self.task
        run = replace(task.run, compute=replace(task.run.compute, remat=policy))
        text, lengths = make_text(task, text_length)
        batch = {
            "image": jnp.asarray(task.image),
            "text": text,
            "lengths": lengths,
            "weight": jnp.ones(len(lengths)),
        }
        program = jax.jit(make_train_step(run), donate_argnums=0).lower(self.state, batch).compile()
        self.memory[name] = program.memory_analysis()

        def call():
            self.state, metrics = program(self.state, batch)
            jax.block_until_ready((self.state, metrics))

        return call

    def memory_column(self, size: Callable[[Any], int]) -> Callable[[measure.Result], str]:
        """Return a column with the gigabytes of each program; PyTorch does not report them."""
        return lambda result: (
            f"{size(self.memory[name]) / 1e9:.3g}"
            if (name := result.contender.name) in self.memory
            else ""
        )


def temporary_bytes(memory: Any) -> int:
    return memory.temp_size_in_bytes


def total_bytes(memory: Any) -> int:
    """Return bytes with the state, which is updated in place, and the batch."""
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def make_text(task: Task, text_length: int) -> tuple[jax.Array, jax.Array]:
    return task.make_text(text_length, [task.num_tokens] * len(task.image))


# --- PyTorch ---


def make_torch_contenders(
    task: Task,
    part: str,
    module: Callable[[], Any],
    text_lengths: Mapping[str, int],
    modes: Sequence[str],
    recompute: bool,
) -> list[Contender]:
    optimizer = cache(lambda: make_adamw(task.run.optimizer, module()))
    rows = []
    for mode in modes:
        for label, text_length in reversed(text_lengths.items()):
            if part == "forward":
                make = partial(make_torch_forward, task, module, mode, text_length)
            else:
                make = partial(
                    make_torch_step, task, module, optimizer, mode, text_length, recompute
                )
            rows.append(
                Contender(
                    f"PyTorch module, {mode}, {label}", make, count_flops(task, part, text_length)
                )
            )
    return rows


def make_adamw(settings: config.Optimizer, module: Any) -> Any:
    import torch

    return torch.optim.AdamW(
        module.parameters(),
        settings.learning_rate,
        (settings.beta1, settings.beta2),
        settings.eps,
        settings.weight_decay,
        fused=True,
    )


def make_torch_inputs(task: Task, text_length: int) -> tuple[Any, Any, Any]:
    text, lengths = make_text(task, text_length)
    return (
        networks.to_torch(task.image.transpose(0, 3, 1, 2)),
        networks.to_torch(text, task.dtype),
        networks.to_torch(lengths),
    )


def make_autocast(task: Task) -> Any:
    import torch

    return torch.autocast(
        measure.find_torch_device(), torch.bfloat16, enabled=task.dtype == "bfloat16"
    )


def make_torch_forward(
    task: Task, module: Callable[[], Any], mode: str, text_length: int
) -> Callable[[], Any]:
    import torch

    network, inputs = networks.compile_module(module(), mode), make_torch_inputs(task, text_length)
    time = torch.full((len(task.image),), 0.5, device=inputs[0].device)
    attention = find_attention(task, text_length)

    def call():
        with torch.no_grad(), attention(), make_autocast(task):
            network(*inputs, time)
        measure.synchronize_torch()

    return call


def make_torch_step(
    task: Task,
    module: Callable[[], Any],
    optimizer: Callable[[], Any],
    mode: str,
    text_length: int,
    recompute: bool,
) -> Callable[[], Any]:
    import torch

    network, weights, optimizer = (
        networks.compile_module(module(), mode),
        list(module().parameters()),
        optimizer(),
    )
    module().recompute = recompute
    image, text, lengths = make_torch_inputs(task, text_length)
    attention, x0 = find_attention(task, text_length), task.model.prediction == "x0"

    def call():
        noise, time = torch.randn_like(image), torch.rand(len(image), device=image.device)
        mixed = torch.lerp(image, noise, time[:, None, None, None])
        divisor = time + task.run.flow.min_divisor
        target = (mixed - image) / divisor[:, None, None, None] if x0 else noise - image
        with attention(), make_autocast(task):
            loss = torch.nn.functional.mse_loss(
                network(mixed, text, lengths, time, divisor=divisor), target
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, task.run.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        measure.synchronize_torch()

    return call


def find_attention(task: Task, text_length: int) -> Callable[[], Any]:
    return networks.find_fastest_attention(
        task.run.data.batch_size, task.num_image_tokens + text_length, task.model, task.dtype
    )


if __name__ == "__main__":
    main()
