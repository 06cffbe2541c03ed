"""Compute, memory and links of known accelerators: from data sheets, and as measured."""

from typing import NamedTuple


class DeviceSpec(NamedTuple):
    """The peak performance of one JAX device.

    Attributes:
        flops_per_second: Dense matrix products in bfloat16.
        memory_bytes: Size of the memory.
        memory_bandwidth: Bytes per second to or from the memory.
        link_bandwidth: Bytes per second, one way, to devices in reach of the links.
        link_domain_size: Devices that the links connect: a host of GPUs, a slice of TPUs.
        network_bandwidth: Bytes per second, one way, to other devices: of a GPU's own network card.
        float32_flops_per_second: Float32 outside of the matrix units, a multiply-add counted as
            two; 0 where the maker does not publish it.
        float8_flops_per_second: Dense matrix products in float8; 0 where XLA has none.
    """

    flops_per_second: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    link_domain_size: int = 8
    network_bandwidth: float = 0.0
    float32_flops_per_second: float = 0.0
    float8_flops_per_second: float = 0.0


class SustainedRates(NamedTuple):
    """What a device reaches in long runs of one operation.

    Attributes:
        product_flops_per_second: Dense matrix products in bfloat16.
        memory_bandwidth: Bytes per second, read and written.
    """

    product_flops_per_second: float
    memory_bandwidth: float


# By `jax.Device.device_kind`; a name comes before its prefixes. NVIDIA: data sheets of the SXM
# modules and DGX systems (one network card of 200 or 400 Gbit/s per GPU). Google:
# cloud.google.com/tpu/docs (links: half of the bidirectional bandwidth). A TPU 7x is two devices,
# each with half of its numbers.
DEVICE_SPECS = {
    "NVIDIA A100": DeviceSpec(312e12, 80e9, 2.0e12, 300e9, 8, 25e9, 19.5e12),
    "NVIDIA H100": DeviceSpec(989e12, 80e9, 3.35e12, 450e9, 8, 50e9, 67e12, 1979e12),
    "NVIDIA H200": DeviceSpec(989e12, 141e9, 4.8e12, 450e9, 8, 50e9, 67e12, 1979e12),
    "NVIDIA B200": DeviceSpec(2250e12, 180e9, 8.0e12, 900e9, 8, 50e9, 80e12, 4500e12),
    "TPU v4": DeviceSpec(275e12, 32e9, 1.2e12, 150e9, 4096),
    "TPU v5 lite": DeviceSpec(197e12, 16e9, 0.82e12, 100e9, 256),  # v5e
    "TPU v5": DeviceSpec(459e12, 95e9, 2.76e12, 300e9, 8960),  # v5p: TPU v5 or TPU v5p
    "TPU v6 lite": DeviceSpec(918e12, 32e9, 1.64e12, 200e9, 256),  # v6e
    "TPU7x": DeviceSpec(1153.5e12, 96e9, 3.69e12, 300e9, 9216),
}
# Measured by others on one H200 in November 2026 with PyTorch 2.11 and CUDA 13 (no program of this
# project has run on it): a product of two 8192×8192
# matrices of random bfloat16 numbers (769 to 798 TFLOP/s in several runs of ten; zeros are faster),
# and a copy of 4.3 GB within its memory.
SUSTAINED_RATES = {"NVIDIA H200": SustainedRates(790e12, 4.3e12)}
# Names of devices in commands.
DEVICE_ALIASES = {
    "a100": "NVIDIA A100",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "v7x": "TPU7x",
}


def find_device_spec(kind: str) -> DeviceSpec | None:
    """Return the device whose name is a prefix of `kind`, or None."""
    return next((spec for name, spec in DEVICE_SPECS.items() if kind.startswith(name)), None)
