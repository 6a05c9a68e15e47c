"""What devices can do: published dense bf16 peaks, for utilisation figures."""

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


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where no figure is known (CPUs), so that no utilisation is reported."""
    for part, peak in PEAK_FLOPS.items():
        if part in device.device_kind:
            return peak
    return None
