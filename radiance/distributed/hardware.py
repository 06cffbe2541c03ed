"""What known accelerators can do, from their makers' data sheets."""

from typing import NamedTuple


class DeviceSpec(NamedTuple):
    flops_per_second: float  # bfloat16 matrix products a second, dense
    memory_bytes: float  # bytes
    memory_bandwidth: float  # of the memory, bytes a second
    link_bandwidth: (
        float  # to other devices of its kind within reach of them, bytes a second, one way
    )
    link_domain_size: int = 8  # devices that the links join: a host of GPUs, a slice of TPUs
    network_bandwidth: float = 0.0  # to devices beyond, bytes a second, one way: of a GPU its host's network card, of a TPU its part of the host's


# By what `jax.Device.device_kind` says; a name that begins like another stands before it. NVIDIA's from the data sheets of the SXM modules and of the DGX systems (one card of 200 or
# 400 Gbit/s a GPU); Google's from cloud.google.com/tpu/docs (links: half of the two-way number). A TPU 7x is two devices, each with half of it.
DEVICE_SPECS = {
    "NVIDIA A100": DeviceSpec(312e12, 80e9, 2.0e12, 300e9, 8, 25e9),
    "NVIDIA H100": DeviceSpec(989e12, 80e9, 3.35e12, 450e9, 8, 50e9),
    "NVIDIA H200": DeviceSpec(989e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    "NVIDIA B200": DeviceSpec(2250e12, 180e9, 8.0e12, 900e9, 8, 50e9),
    "TPU v4": DeviceSpec(275e12, 32e9, 1.2e12, 150e9, 4096),
    "TPU v5 lite": DeviceSpec(197e12, 16e9, 0.82e12, 100e9, 256),  # v5e
    "TPU v5": DeviceSpec(459e12, 95e9, 2.76e12, 300e9, 8960),  # v5p, which says TPU v5 or TPU v5p
    "TPU v6 lite": DeviceSpec(918e12, 32e9, 1.64e12, 200e9, 256),  # v6e
    "TPU7x": DeviceSpec(1153.5e12, 96e9, 3.69e12, 300e9, 9216),
}
# By what users call them.
DEVICE_ALIASES = {
    "a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200", "b200": "NVIDIA B200",
    "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v7x": "TPU7x",
}  # fmt: skip


def find_device_spec(kind: str) -> DeviceSpec | None:
    """The device whose name `kind` begins with."""
    return next((spec for name, spec in DEVICE_SPECS.items() if kind.startswith(name)), None)
