"""Describe devices that are not present, so that programs can be compiled for them.

For TPUs the compiler is the TPU's own, which the package libtpu brings to any machine. For NVIDIA
GPUs it is XLA's, from JAX's CUDA plugin, which needs no GPU either. Without the plugin, programs
are compiled for fake CPU devices, and the plan says how that distorts its numbers.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from radiance import config
from radiance.base.settings import suggest_name
from radiance.distributed import hardware

TARGET_NAMES = (*hardware.DEVICE_ALIASES, "cpu")
# Topologies of TPU slices by number of chips: 2D for v5e and v6e, 3D for v4, v5p and v7x.
SLICES_2D = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
SLICES_3D = {
    1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
    256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip


class CompilationTarget(NamedTuple):
    """Devices to compile for, and the compiler."""

    devices: Sequence[Any]  # for jax.sharding.Mesh; only the CPU's can also run programs
    attention: str  # the backend that compute.attention=auto means there
    compiler: str  # description for users
    exact: bool  # whether the compiler is the device's own


class GpuSpec(NamedTuple):
    """The properties of a GPU that XLA compiles for."""

    compute_capability: int  # major version
    multiprocessors: int
    shared_kilobytes: int  # per multiprocessor
    block_kilobytes: int  # of those, what one block of threads can use
    cache_megabytes: int  # L2


# From NVIDIA's data sheets and the table of compute capabilities in the CUDA programming guide.
GPU_SPECS = {
    "a100": GpuSpec(8, 108, 164, 163, 40),
    "h100": GpuSpec(9, 132, 228, 227, 50),
    "h200": GpuSpec(9, 132, 228, 227, 50),
    "b200": GpuSpec(10, 148, 228, 227, 126),
}


def make_target(device: str, run: config.Config) -> CompilationTarget:
    """Return the devices of a run's mesh.

    Args:
        device: A name of `TARGET_NAMES`.
        run: Settings, with a mesh of fixed sizes.

    Raises:
        ConfigError: There is no such device, no slice or host of that size, or its compiler is
            missing.
    """
    mesh_sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    if device not in TARGET_NAMES:
        raise config.ConfigError(
            f"There is no device {device!r}{suggest_name(device, TARGET_NAMES) or '.'} "
            f"The names are {', '.join(TARGET_NAMES)}."
        )
    if -1 in mesh_sizes:
        raise config.ConfigError(
            "A mesh with -1 does not say how many devices there are: give --mesh fsdp=8, for "
            "instance."
        )
    num_devices = math.prod(mesh_sizes)
    if hardware.DEVICE_ALIASES.get(device, "").startswith("TPU"):
        return _make_tpu_target(device, num_devices)
    attention = "cudnn" if run.compute.dtype == "bfloat16" else "auto"
    if device != "cpu" and _has_cuda_plugin():
        return _make_gpu_target(device, num_devices, attention)
    return _make_cpu_target(device, num_devices, attention)


def _make_tpu_target(device: str, num_devices: int) -> CompilationTarget:
    if importlib.util.find_spec("libtpu") is None:
        raise config.ConfigError(
            "The TPU's compiler is missing: pip install radiance[tpu], or libtpu alone."
        )
    devices_per_chip = 2 if device == "v7x" else 1
    slices = SLICES_2D if device in ("v5e", "v6e") else SLICES_3D
    if num_devices % devices_per_chip or num_devices // devices_per_chip not in slices:
        sizes = ", ".join(str(chips * devices_per_chip) for chips in slices)
        raise config.ConfigError(
            f"There is no slice of {num_devices} {device}: a mesh has {sizes} devices."
        )
    chip_name = "tpu7x" if device == "v7x" else device
    topology_name = f"{chip_name}:{slices[num_devices // devices_per_chip]}"
    # The two cores of a v4 chip are one device.
    options = {"chip_config_name": "megacore"} if device == "v4" else {}
    return CompilationTarget(
        topologies.get_topology_desc(topology_name, "tpu", **options).devices,
        "splash",
        f"XLA for TPUs (libtpu), {topology_name}",
        exact=True,
    )


def _make_gpu_target(device: str, num_devices: int, attention: str) -> CompilationTarget:
    device_spec = hardware.DEVICE_SPECS[hardware.DEVICE_ALIASES[device]]
    host_size = min(num_devices, device_spec.link_domain_size)
    if num_devices % host_size:
        raise config.ConfigError(
            f"{num_devices} {device} do not fill hosts of {host_size}: change --mesh."
        )
    try:
        topology = topologies.get_topology_desc(
            device,
            "cuda",
            topology=f"1x{num_devices // host_size}x{host_size}",
            target_config=_format_gpu_config(device),
        )
    except NotImplementedError:
        raise config.ConfigError(
            "JAX could not use its CUDA plugin here: set JAX_PLATFORMS=cpu before it starts."
        ) from None
    compiler = "XLA for NVIDIA GPUs, products by cuBLAS"
    return CompilationTarget(topology.devices, attention, compiler, exact=True)


def _make_cpu_target(device: str, num_devices: int, attention: str) -> CompilationTarget:
    """Return CPU devices, which may stand in for GPUs."""
    num_cpu_devices = jax.device_count("cpu")
    if num_devices > num_cpu_devices:
        raise config.ConfigError(
            f"A plan for {num_devices} {device} needs as many fake devices, and JAX has started "
            f"with {num_cpu_devices}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} before."
        )
    cpu_devices = jax.devices("cpu")[:num_devices]
    if device == "cpu":
        return CompilationTarget(cpu_devices, "auto", "XLA for this CPU", exact=True)
    compiler = (
        f"XLA for CPUs instead of that for the {device}, which pip install radiance[gpu] brings: "
        "its temporaries are too large by up to five times"
    )
    if attention == "cudnn":
        compiler += ", chunked attention instead of cuDNN's"
        return CompilationTarget(cpu_devices, "chunked", compiler, exact=False)
    return CompilationTarget(cpu_devices, "auto", compiler, exact=False)


def _has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _format_gpu_config(name: str) -> str:
    """Return a GPU as a stream_executor.GpuTargetConfigProto, which XLA compiles for."""
    gpu = GPU_SPECS[name]
    kind = hardware.DEVICE_ALIASES[name]
    device = hardware.DEVICE_SPECS[kind]
    is_ampere = gpu.compute_capability == 8
    feature_extension = "" if is_ampere else "feature_extension: ACCELERATED_FEATURES"
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.compute_capability} {feature_extension} }}
          core_count: {gpu.multiprocessors} fpus_per_core: {64 if is_ampere else 128}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: {gpu.shared_kilobytes << 10}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.block_kilobytes << 10}
          l2_cache_size: {gpu.cache_megabytes << 20} clock_rate_ghz: 1.8
          device_memory_size: {int(device.memory_bytes)}
          memory_bandwidth: {int(device.memory_bandwidth)}
          device_vendor: "NVIDIA Corporation" name: "{kind}"
          device_address_bits: 64
          driver_version: "12.8.0" runtime_version: "12.8.0"
          compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{kind}"
    """
