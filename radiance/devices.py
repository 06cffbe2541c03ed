"""What known accelerators can do, from their makers' data sheets."""

from typing import NamedTuple


class Device(NamedTuple):
    flops: float  # bfloat16 matrix products a second, dense
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes a second
    links: float  # to other devices of its kind, bytes a second, one way


# By what `jax.Device.device_kind` says.
DEVICES = {
    "NVIDIA A100": Device(312e12, 80e9, 2.0e12, 300e9),
    "NVIDIA H100": Device(989e12, 80e9, 3.35e12, 450e9),
    "NVIDIA H200": Device(989e12, 141e9, 4.8e12, 450e9),
    "NVIDIA B200": Device(2250e12, 180e9, 8.0e12, 900e9),
    "TPU v4": Device(275e12, 32e9, 1.2e12, 150e9),
    "TPU v5 lite": Device(197e12, 16e9, 0.82e12, 100e9),  # v5e
    "TPU v5p": Device(459e12, 95e9, 2.76e12, 300e9),
    "TPU v6 lite": Device(918e12, 32e9, 1.64e12, 200e9),  # v6e
}


def device_named(kind: str) -> Device | None:
    """The device whose name `kind` begins with."""
    return next((device for name, device in DEVICES.items() if kind.startswith(name)), None)
