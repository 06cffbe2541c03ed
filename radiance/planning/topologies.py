"""Devices that are not there, described so that programs can be compiled for them.

For TPUs the compiler is the TPU's own, which the package libtpu brings to any machine; for NVIDIA GPUs it is theirs, from JAX's CUDA
plugin, which needs no GPU either. Without the plugin programs are compiled for fake CPU devices, and what that distorts is said.
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
# Slices of TPUs by their chips: flat (v5e, v6e) and deep (v4, v5p, v7x).
SLICES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
SLICES_3D = {
    1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip


class CompilationTarget(NamedTuple):
    """What a step is compiled for."""

    hardware: Sequence[Any]  # of jax.sharding.Mesh; only described, but for the CPU's
    attention: str  # compute.attention where the run leaves it to the device
    compiler: str  # in words
    exact: bool  # whether the compiler is the device's own


def make_target(device: str, run: config.Config) -> CompilationTarget:
    """The devices of the mesh of `run`."""
    mesh_sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    if device not in TARGET_NAMES:
        raise config.ConfigError(
            f"There is no device {device!r}{suggest_name(device, TARGET_NAMES) or '.'} The names are {', '.join(TARGET_NAMES)}."
        )
    if -1 in mesh_sizes:
        raise config.ConfigError(
            "A mesh with -1 does not say how many devices there are: give --mesh fsdp=8, for instance."
        )
    num_devices, device_kind = math.prod(mesh_sizes), hardware.DEVICE_ALIASES.get(device, "CPU")
    if device_kind.startswith("TPU"):
        return _make_tpu_target(device, num_devices)
    attention = "cudnn" if run.compute.dtype == "bfloat16" else "auto"
    if device != "cpu" and _has_cuda_plugin():
        host_size = min(num_devices, hardware.DEVICE_SPECS[device_kind].link_domain_size)
        if num_devices % host_size:
            raise config.ConfigError(
                f"{num_devices} {device} are no whole hosts of {host_size}: change --mesh."
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
        return CompilationTarget(
            topology.devices, attention, "XLA for NVIDIA GPUs, products by cuBLAS", True
        )
    if num_devices > jax.device_count("cpu"):
        raise config.ConfigError(
            f"A plan for {num_devices} {device} needs as many fake devices, and JAX has started with {jax.device_count('cpu')}: "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} before."
        )
    cpu_devices = jax.devices("cpu")[:num_devices]
    if device == "cpu":
        return CompilationTarget(cpu_devices, "auto", "XLA for this CPU", True)
    cpu_attention = "chunked" if attention == "cudnn" else "auto"
    compiler = f"XLA for CPUs, in place of the {device}'s, which pip install radiance[gpu] brings: its temporaries are too large by up to five times"
    return CompilationTarget(
        cpu_devices,
        cpu_attention,
        compiler + (", attention in pieces in place of cuDNN's" if attention == "cudnn" else ""),
        False,
    )


def _make_tpu_target(device: str, num_devices: int) -> CompilationTarget:
    if importlib.util.find_spec("libtpu") is None:
        raise config.ConfigError(
            "The TPU's compiler is missing: pip install radiance[tpu], or libtpu alone."
        )
    cores_per_chip = 2 if device == "v7x" else 1  # devices of a chip
    slices = SLICES_2D if device in ("v5e", "v6e") else SLICES_3D
    if num_devices % cores_per_chip or num_devices // cores_per_chip not in slices:
        sizes = ", ".join(str(chips * cores_per_chip) for chips in slices)
        raise config.ConfigError(
            f"There is no slice of {num_devices} {device}: a mesh has {sizes} devices."
        )
    topology_name = (
        f"{'tpu7x' if device == 'v7x' else device}:{slices[num_devices // cores_per_chip]}"
    )
    options = (
        {"chip_config_name": "megacore"} if device == "v4" else {}
    )  # its two cores are one device
    return CompilationTarget(
        topologies.get_topology_desc(topology_name, "tpu", **options).devices,
        "splash",
        f"XLA for TPUs (libtpu), {topology_name}",
        True,
    )


def _has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


# Compute capability, multiprocessors, kilobytes of memory of one that its threads share and of it what a block may have, megabytes of L2
# cache: from NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.
GPU_SPECS = {
    "a100": ("8", 108, 164, 163, 40),
    "h100": ("9", 132, 228, 227, 50),
    "h200": ("9", 132, 228, 227, 50),
    "b200": ("10", 148, 228, 227, 126),
}


def _format_gpu_config(name: str) -> str:
    """The description by which XLA compiles for a GPU that is not there (stream_executor.GpuTargetConfigProto)."""
    capability, multiprocessors, shared_kilobytes, block_kilobytes, cache_megabytes = GPU_SPECS[
        name
    ]
    device = hardware.DEVICE_SPECS[hardware.DEVICE_ALIASES[name]]
    feature_extension = "feature_extension: ACCELERATED_FEATURES" if capability != "8" else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability} {feature_extension} }} core_count: {multiprocessors} fpus_per_core: {64 if capability == "8" else 128}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: {shared_kilobytes << 10} shared_memory_per_block: 49152 shared_memory_per_block_optin: {block_kilobytes << 10}
          l2_cache_size: {cache_megabytes << 20} clock_rate_ghz: 1.8
          device_memory_size: {int(device.memory_bytes)} memory_bandwidth: {int(device.memory_bandwidth)}
          device_vendor: "NVIDIA Corporation" name: "{hardware.DEVICE_ALIASES[name]}" device_address_bits: 64
          driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{hardware.DEVICE_ALIASES[name]}"
    """
