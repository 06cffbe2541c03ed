"""Set up a process before JAX starts: compiler flags, absent devices and the compilation cache."""

import ctypes
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from radiance.config.data import CACHE_DIR
from radiance.distributed.hardware import DEVICE_ALIASES

# Overlap communication with computation, and gather weights one block at a time (a block of the 9.5
# B model has up to 453 MB).
GPU_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_all_gather_combine_threshold_bytes=536870912",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=536870912",
    "--xla_gpu_all_reduce_combine_threshold_bytes=536870912",
    "--xla_gpu_enable_while_loop_double_buffering=true",
)
# The autotuner, which needs a GPU, chooses between cuBLAS and Triton. Without it, all products
# would be Triton's, and some of them fail to compile.
GPU_PLAN_FLAGS = ("--xla_gpu_enable_triton_gemm=false",)
TPU_FLAGS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_scoped_vmem_limit_kib=65536",  # room for the blocks of splash attention
)
# Kernels of a CPU's program contain no large products, which libraries compute. They are about as
# fast with little of LLVM's optimization and the older code generator, and compile in half of the
# time: benchmarks/RESULTS.md. Only jaxlib 0.10 has that generator, and an unknown flag would end
# the process. Programs for accelerators are optimized as usual, also by `plan`.
HAS_OLDER_GENERATOR = version("jaxlib").startswith("0.10.")
CPU_FLAGS = (
    "--xla_backend_optimization_level=1",
    *(("--xla_cpu_use_fusion_emitters=false",) if HAS_OLDER_GENERATOR else ()),
)
ACCELERATOR_PLAN_FLAGS = ("--xla_backend_optimization_level=3",)
# NVIDIA's driver, and the devices of AMD's GPUs, of TPUs up to v4, and of later TPUs.
NVIDIA_DRIVER = "/proc/driver/nvidia"
ACCELERATOR_PATHS = (NVIDIA_DRIVER, "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
# Concurrent collectives may start in another order in each process or fake device, which is a
# deadlock.
MULTI_CPU_FLAGS = ("--xla_cpu_enable_concurrency_optimized_scheduler=false",)
# Without a TPU, libtpu must not query a metadata server, complain that there is no TPU, or lock it.
LIBTPU_OFFLINE_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA logs an error when a compilation takes minutes, which large models need. Its other errors are
# exceptions too.
SILENT_LOG_LEVEL = "3"
COMPILATION_CACHE_DIR = f"{CACHE_DIR}/xla"

# glibc's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, with values that keep freed memory.
MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1}


def prepare_environment(multi_process: bool = False):
    """Set the environment variables of this process that the user has not set.

    JAX reads them when it starts, so this comes first.

    Args:
        multi_process: Whether this process is one of several that compute together.
    """
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(COMPILATION_CACHE_DIR).expanduser())
    )
    if not multi_process:  # where errors of the network are the only trace of a lost host
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", SILENT_LOG_LEVEL)
    _add_flags("LIBTPU_INIT_ARGS", TPU_FLAGS)  # only libtpu reads them
    if Path(NVIDIA_DRIVER).exists():
        _add_flags("XLA_FLAGS", GPU_FLAGS)
    if not any(Path(path).exists() for path in ACCELERATOR_PATHS):
        _add_flags("XLA_FLAGS", CPU_FLAGS)
    if multi_process or "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        _add_flags("XLA_FLAGS", MULTI_CPU_FLAGS)


def prepare_plan_environment(device: str, num_devices: int):
    """Set the environment variables of a process that compiles for absent devices.

    This comes before `prepare_environment`.

    Args:
        device: A name of `planning.topologies.TARGET_NAMES`.
        num_devices: Number of absent devices.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Programs for absent devices cannot be loaded from the cache.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    for name, value in LIBTPU_OFFLINE_ENV.items():
        os.environ.setdefault(name, value)
    if num_devices > 1:
        _add_flags("XLA_FLAGS", [f"--xla_force_host_platform_device_count={num_devices}"])
    if device in DEVICE_ALIASES:
        _add_flags("XLA_FLAGS", ACCELERATOR_PLAN_FLAGS)
    if DEVICE_ALIASES.get(device, "").startswith("NVIDIA"):
        _add_flags("XLA_FLAGS", (*GPU_FLAGS, *GPU_PLAN_FLAGS))


def retain_freed_memory():
    """Let this process keep the memory that it frees, if glibc is its allocator.

    On CPUs, XLA allocates a program's temporaries at every call. Without this, a training step
    spends a quarter of its time in page faults (measured: 480,000 per step of a model of 135 M
    parameters).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


def _add_flags(variable: str, flags: Sequence[str]):
    """Append flags that the variable does not have yet."""
    current = os.environ.get(variable, "")
    new_flags = [flag for flag in flags if flag.partition("=")[0] not in current]
    os.environ[variable] = " ".join([*current.split(), *new_flags])
