"""A long run needs no more descriptors, threads and memory than a short one.

RADIANCE_SAVES is the number of checkpoints; there are seven steps between them.
"""

import gc
import os
import resource
import threading
from pathlib import Path

import psutil
import pytest

from radiance.training.inputs import prepare
from radiance.training.loop import fit
from tests.helpers.toy_runs import PLAIN, toy_run

SAVES = int(os.environ.get("RADIANCE_SAVES", 30))
STEPS_PER_SAVE = 7
WARMUP_SAVES = 10  # until caches and pools of threads have their size

pytestmark = pytest.mark.slow


def count_resources() -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "threads": threading.active_count(),
        "memory": process.memory_info().rss,
    }


def test_checkpoints_leak_nothing(tmp_path, data_directory):
    num_steps = SAVES * STEPS_PER_SAVE
    run = toy_run(
        tmp_path,
        data_directory,
        f"train.steps={num_steps}",
        f"train.checkpoint_every={STEPS_PER_SAVE}",
        f"train.snapshot_every={10 * STEPS_PER_SAVE}",
        "train.log_every=7",
        "train.validate_every=99999",
        "train.sample_every=99999",
        "optimizer.ema_widths=0.1",
        **PLAIN,
    )
    counts = []

    def record() -> bool:
        if len(counts) % STEPS_PER_SAVE:
            counts.append(counts[-1])
        else:
            counts.append(count_resources())
        return False

    assert fit(prepare([run]), record)[0] == num_steps
    print(counts[0], counts[WARMUP_SAVES * STEPS_PER_SAVE], counts[-1], sep="\n")
    early, late = counts[WARMUP_SAVES * STEPS_PER_SAVE], counts[-1]
    # A leak of one for each save would exceed these bounds.
    assert late["descriptors"] - early["descriptors"] < (SAVES - WARMUP_SAVES) / 2
    assert late["threads"] - early["threads"] < (SAVES - WARMUP_SAVES) / 2
    assert late["memory"] - early["memory"] < 64 * 2**20 + 2**19 * SAVES


def test_few_descriptors_suffice(tmp_path, data_directory):
    """A limit that 3 descriptors for each checkpoint would exceed."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    run = toy_run(
        tmp_path,
        data_directory,
        f"train.steps={SAVES}",
        "train.checkpoint_every=1",
        "train.validate_every=99999",
        "train.sample_every=99999",
        **PLAIN,
    )
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 100, limit[1]))
    try:
        assert fit(prepare([run]))[0] == SAVES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
