"""Processor time to compile a training step on a CPU, and to run it, by the compiler's settings.

    python -m benchmarks.optimization_levels

Settings are LLVM's optimization level and XLA's code generator, of which jaxlib 0.10 has two. The
step is that of the quickstart. Processor time is that of all cores; it changes little beside other
work. No cache is read. Where there is no GPU, `radiance` sets level 1 and the older generator.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.measure import Report
from radiance import config
from radiance.config.experiments import load_module
from radiance.distributed.environment import HAS_OLDER_GENERATOR
from radiance.training.step import init_state, make_train_step

HEADER = ("level", "generator", "compiling, CPU s", "step, CPU ms, lowest", "median")


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.make_parser(__doc__)
    parser.add_argument("--levels", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=9, help="timed steps; default: %(default)s")
    options = parser.parse_args(arguments)
    run = load_module("experiments/quickstart.py").config()
    batch, state = make_random_batch(run), jax.jit(partial(init_state, run))()
    lowered = jax.jit(make_train_step(run)).lower(state, batch)
    report, rows = Report("optimization_levels", arguments), []
    generators = ("newer", "older") if HAS_OLDER_GENERATOR else ("newer",)
    for level, generator in itertools.product(options.levels, generators):
        compiler_options = {"xla_backend_optimization_level": level}
        if HAS_OLDER_GENERATOR:
            compiler_options["xla_cpu_use_fusion_emitters"] = generator == "newer"
        start = time.process_time()
        step = lowered.compile(compiler_options=compiler_options)
        seconds = time.process_time() - start
        times = [1e3 * time_processors(partial(step, state, batch)) for _ in range(options.steps)]
        step_times = (f"{min(times):.0f}", f"{statistics.median(times):.0f}")
        rows.append([f"{level}", generator, f"{seconds:.1f}", *step_times])
        print(*rows[-1], flush=True)
    report.write(measure.format_table(HEADER, rows))
    if options.record:
        report.record()
    return report


def make_random_batch(run: config.Config) -> dict[str, np.ndarray]:
    """Return a random batch with short captions."""
    rng, b, resolution = np.random.default_rng(0), run.data.batch_size, run.data.resolution
    text_shape = (b, run.text.max_length, run.model.text_dim)
    return {
        "image": rng.standard_normal((b, resolution, resolution, 3), np.float32),
        "text": rng.standard_normal(text_shape, np.float32),
        "lengths": np.full(b, run.text.max_length // 2, np.int32),
        "weight": np.ones(b, np.float32),
    }


def time_processors(call: Callable[[], Any]) -> float:
    """Return the processor seconds of a call."""
    start = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - start


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
