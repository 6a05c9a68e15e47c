"""Bytes that a compiled program needs, from the compiler and for the device it was compiled for."""

import jax


def compiled_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device that a compiled program needs, as its compiler states them.

    Returns:
      arguments, outputs, temporary; outputs that take over an argument's memory are in both. peak: the most at any one time.
      On a CPU, whose compiler leaves temporaries out of its peak, it is the sum.
    """
    sizes = compiled.memory_analysis()
    found = dict(arguments=sizes.argument_size_in_bytes, outputs=sizes.output_size_in_bytes, temporary=sizes.temp_size_in_bytes)
    everything = sum(found.values()) - sizes.alias_size_in_bytes
    device = next(iter(jax.tree.leaves(compiled.input_shardings)[0].device_set))
    return found | {"peak": everything if device.platform == "cpu" else sizes.peak_memory_in_bytes}


def shortfall(needed: dict[str, int], device: jax.Device) -> str | None:
    """What a compiled program needs beyond what the device has; None where it fits, and on devices that do not say."""
    limit = (memory_stats(device) or {}).get("bytes_limit", 0)
    if not limit or needed["peak"] <= limit:
        return None
    need, have = (f"{count / 2**30:.1f}" for count in (needed["peak"], limit))
    return f"needs {need} GiB on each {device.device_kind} and it has {have}"


def memory_stats(device: jax.Device) -> dict[str, int] | None:
    """`device.memory_stats()`; None for a device that is only planned for."""
    try:
        return device.memory_stats()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
