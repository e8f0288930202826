"""Published peak rates of accelerator chips, each with its source."""

import dataclasses
import math
import re

from rag_mm.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip; what jax counts as a device is one, so that of a TPU7x it is half of it.

    Attributes:
        flops: dense bfloat16 FLOP/s; a multiply-add counts as two.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second sent over all links together; half of the published number where that
            counts both directions.
        num_dims: dimensions of the torus.
        source: where the numbers are published.
        options: further arguments for the compiler's topology.
        num_parts: devices at each place of the torus.
    """

    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    num_dims: int
    source: str
    options: tuple[tuple[str, str], ...] = ()
    num_parts: int = 1


_DOCS = "https://cloud.google.com/tpu/docs"
CHIPS = {
    # The page gives no link speed; 6 links of 50 GB/s: Jouppi et al. 2023, arXiv 2304.01433.
    "v4": Chip(275e12, 1200e9, 300e9, 3, f"{_DOCS}/v4", (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 819e9, 200e9, 2, f"{_DOCS}/v5e"),
    "v5p": Chip(459e12, 2765e9, 600e9, 3, f"{_DOCS}/v5p"),
    "v6e": Chip(918e12, 1638e9, 400e9, 2, f"{_DOCS}/v6e"),
    # The page's 2307 TFLOP/s, 7380 GB/s and 1200 GB/s (both directions) are of a chip, which is two devices.
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 300e9, 3, f"{_DOCS}/tpu7x", num_parts=2),
}
# Bytes per second that a chip sends between slices: v5e's page gives 6.4 Tbit/s for 256 chips; used for all.
DCN_BANDWIDTH = 6.4e12 / 8 / 256


# Dense bfloat16 FLOP/s by JAX device kind, for a run's MFU; GPUs from NVIDIA's H100 and H200 data sheets
# (SXM, without sparsity).
DEVICE_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}
# Memory bandwidth in bytes per second, from the same sources (HBM3 and HBM3e).
DEVICE_BANDWIDTH = {
    "TPU v4": CHIPS["v4"].hbm_bandwidth,
    "TPU v5 lite": CHIPS["v5e"].hbm_bandwidth,
    "TPU v5": CHIPS["v5p"].hbm_bandwidth,
    "TPU v5p": CHIPS["v5p"].hbm_bandwidth,
    "TPU v6 lite": CHIPS["v6e"].hbm_bandwidth,
    "TPU7x": CHIPS["tpu7x"].hbm_bandwidth,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of chips; `name` is the compiler's name of a slice, such as v5e:16x16."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices, as `Chip` counts them."""
        return math.prod(self.shape) * self.chip.num_parts * self.num_slices


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """Parses a topology such as `v5e:16x16`.

    Raises:
        UserError: an unknown chip, or the wrong number of dimensions for its torus.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None:
        raise UserError(f"--topology={name} is not of the form CHIP:SHAPE, such as v5e:16x16.")
    kind, sides = match.groups()
    if kind not in CHIPS:
        raise UserError(f"There is no chip {kind!r}; there are {', '.join(CHIPS)}.")
    shape = tuple(int(side) for side in sides.split("x"))
    if len(shape) != CHIPS[kind].num_dims or min(shape) < 1:
        raise UserError(
            f"--topology={name} has {len(shape)} dimensions; a torus of {kind} has {CHIPS[kind].num_dims}."
        )
    if num_slices < 1:
        raise UserError(f"--slices is {num_slices}; give at least 1.")
    return Topology(name, CHIPS[kind], shape, num_slices)
