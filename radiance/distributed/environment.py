"""What is set before JAX starts: compiler flags by back end, devices that are planned for, and where compiled programs are kept."""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from radiance.config.data import CACHE_DIR
from radiance.distributed.hardware import DEVICE_ALIASES

# Hide communication behind computation, and gather weights a block at a time (a block of the 9.5 B model has up to 453 MB).
GPU_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_all_gather_combine_threshold_bytes=536870912",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=536870912",
    "--xla_gpu_all_reduce_combine_threshold_bytes=536870912",
    "--xla_gpu_enable_while_loop_double_buffering=true",
)
TPU_FLAGS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_scoped_vmem_limit_kib=65536",  # room for splash's blocks
)
# Of the collectives that XLA would run side by side each process or fake device may begin with another, and all wait for ever.
MULTI_CPU_FLAGS = ("--xla_cpu_enable_concurrency_optimized_scheduler=false",)
# Without a TPU, libtpu must not ask a cloud's server which one this is, nor complain that there is none, nor lock it.
LIBTPU_OFFLINE_ENV = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
COMPILATION_CACHE_DIR = f"{CACHE_DIR}/xla"


def prepare_environment(multi_process: bool = False):
    """Sets the environment of this process, where the user has not: JAX reads it when it starts, so this comes before.

    several: whether it is one process of several.
    """
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(COMPILATION_CACHE_DIR).expanduser())
    )
    _add_flags("LIBTPU_INIT_ARGS", TPU_FLAGS)  # nobody else reads it
    if Path("/proc/driver/nvidia").exists():
        _add_flags("XLA_FLAGS", GPU_FLAGS)
    if multi_process or "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        _add_flags("XLA_FLAGS", MULTI_CPU_FLAGS)


def prepare_plan_environment(device: str, num_devices: int):
    """Sets the environment of a process that compiles for so many devices which it does not have, before `prepare`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = (
        "false"  # what is compiled for absent devices cannot be read back
    )
    for name, value in LIBTPU_OFFLINE_ENV.items():
        os.environ.setdefault(name, value)
    _add_flags(
        "XLA_FLAGS",
        [f"--xla_force_host_platform_device_count={num_devices}"] if num_devices > 1 else [],
    )
    if DEVICE_ALIASES.get(device, "").startswith("NVIDIA"):
        # The autotuner, which needs the GPU, chooses between cuBLAS and Triton. Without it all products would be Triton's, and some fail.
        _add_flags("XLA_FLAGS", (*GPU_FLAGS, "--xla_gpu_enable_triton_gemm=false"))


# glibc's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD: freed memory stays with the process.
MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1}


def retain_freed_memory():
    """Lets this process keep the memory that it frees, where glibc is its allocator. On CPUs XLA takes a program's temporaries anew at every call, and
    a training step then spends a quarter of its time in page faults (measured: 480,000 a step of a model of 135 M parameters).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in MALLOC_OPTIONS.items() if mallopt else ():
        mallopt(option, value)


def _add_flags(variable: str, flags: Sequence[str]):
    current = os.environ.get(variable, "")
    new_flags = [flag for flag in flags if flag.partition("=")[0] not in current]
    os.environ[variable] = " ".join([*current.split(), *new_flags])
