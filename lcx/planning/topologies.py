"""Meshes of TPUs that are not here: XLA compiles for them from a description, so what a pod needs is known on a laptop."""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from lcx.mesh import make_mesh
from lcx.registry import UserError, unknown

# v4 and v5p: the two cores of a chip are one device.
MEGACORE = dict(chip_config_name="megacore")
# A full pod of v5e or v6e closes into a torus; without `wrap` the compiler sees a mesh with edges.
TORUS = dict(chip_config_name="default", chips_per_host_bounds=(2, 2, 1), num_slices=1, wrap=(True, True, False))

# Slices by shape, with what the compiler has to be told about them.
SHAPES: dict[str, dict[str, Any]] = {
    **{f"{kind}:{shape}": {} for kind in ("v5e", "v6e") for shape in ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16")},
    **{f"{kind}:16x16": TORUS for kind in ("v5e", "v6e")},
    **{
        f"{kind}:{shape}": MEGACORE for kind in ("v4", "v5p") for shape in ("2x2x1", "2x2x2", "2x2x4", "4x4x4", "8x8x8", "8x8x16")
    },
}
# Slices by the number their vendor sells them under: chips of v5e and v6e, cores (two a chip) of v4 and v5p.
PRODUCTS = {
    **{f"{kind}-8": f"{kind}:2x4" for kind in ("v5e", "v6e")},
    **{f"{kind}-64": f"{kind}:8x8" for kind in ("v5e", "v6e")},
    **{f"{kind}-256": f"{kind}:16x16" for kind in ("v5e", "v6e")},
    **{f"{kind}-128": f"{kind}:4x4x4" for kind in ("v4", "v5p")},
    **{f"{kind}-1024": f"{kind}:8x8x8" for kind in ("v4", "v5p")},
    **{f"{kind}-2048": f"{kind}:8x8x16" for kind in ("v4", "v5p")},
}


def topology_mesh(target: str, data: int = 1, fsdp: int = 1, seq: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the devices of a target, to compile for; nothing can run on it.

    Args:
      target: a name from `SHAPES` or `PRODUCTS`, such as v5e:2x4, v5e-256 or v5p:2x2x2.
      data, fsdp, seq, tensor: axis sizes, whose product is the target's device count; one of them may be -1.

    Raises:
      UserError: an unknown target, libtpu is not installed, or the sizes do not fit the target.
    """
    if target not in SHAPES and target not in PRODUCTS:
        raise unknown("target", target, [*SHAPES, *PRODUCTS])
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"target={target!r} needs libtpu, which compiles without a TPU: pip install 'lcx[plan]'")
    # Read when libtpu is loaded: do not ask Google Cloud what machine this is, and let others compile beside us.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(name, value)
    shape = PRODUCTS.get(target, target)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=shape, **SHAPES[shape]).devices
    return make_mesh(data, fsdp, seq, tensor, devices=devices)
