"""What devices can do, as published: for utilisation figures."""

import jax

# Peak dense bf16 FLOP/s of one device, by a part of JAX's device_kind; the first that matches counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}
# Bytes a second of the memory of one device.
PEAK_BYTES = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "B200": 8.0e12,
    "A100-SXM4-40GB": 1.555e12,
    "A100-PCIE-40GB": 1.555e12,
    "A100": 2.04e12,
    "TPU v6": 1.64e12,
    "TPU v5p": 2.765e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5": 2.765e12,
    "TPU v4": 1.228e12,
}
# Exponentials a second: 16 a clock and multiprocessor (CUDA programming guide, "Arithmetic instructions"), at the highest clock.
PEAK_EXPONENTIALS = {
    "H200": 16 * 132 * 1.98e9,
    "H100": 16 * 132 * 1.98e9,
    "A100": 16 * 108 * 1.41e9,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where no figure is known (CPUs), so that no utilisation is reported."""
    return figure(PEAK_FLOPS, device.device_kind)


def figure(table: dict[str, float], device_kind: str) -> float | None:
    """What a table of this module says about a device; None where it says nothing."""
    return next((peak for part, peak in table.items() if part in device_kind), None)
