"""Accelerator data sheets: peak FLOPs, memory and bandwidth."""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of a device.

    flops: dense bfloat16 FLOPs per second. memory: bytes, as reported by CUDA or the TPU compiler (slightly less than
    in the data sheet). bandwidth: memory bandwidth in bytes per second. link: one-way interconnect bandwidth within a
    slice or node in bytes per second.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# TPUs: cloud.google.com/tpu/docs, where ICI bandwidth is bidirectional (v4: one-way); a TPU7x chip is two devices.
# NVIDIA: the data sheets on nvidia.com. FLOPs are half of the values "with sparsity", links half of the bidirectional
# bandwidth of NVLink or PCIe. A T4 has no bfloat16: the value is for float16.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1228e9, 300e9),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 400e9),
    "tpu7x": Chip(1153e12, 94.75 * GIB, 3690e9, 300e9),
    "t4": Chip(65e12, 14.75 * GIB, 320e9, 16e9),
    "a10": Chip(125e12, 21.99 * GIB, 600e9, 32e9),
    "a10g": Chip(70e12, 21.99 * GIB, 600e9, 32e9),
    "a100-40gb": Chip(312e12, 39.42 * GIB, 1555e9, 300e9),
    "a100": Chip(312e12, 79.18 * GIB, 2039e9, 300e9),
    "a100-80gb-pcie": Chip(312e12, 79.18 * GIB, 1935e9, 300e9),
    "l4": Chip(121e12, 22.04 * GIB, 300e9, 32e9),
    "l40s": Chip(362e12, 44.39 * GIB, 864e9, 32e9),
    "h100": Chip(989e12, 79.10 * GIB, 3352e9, 450e9),
    "h100-pcie": Chip(756e12, 79.11 * GIB, 2039e9, 300e9),
    "h100-nvl": Chip(835e12, 93.10 * GIB, 3938e9, 300e9),
    "h200": Chip(989e12, 139.81 * GIB, 4800e9, 450e9),
    "h200-nvl": Chip(835e12, 139.81 * GIB, 4800e9, 450e9),
    "gh200": Chip(989e12, 94.50 * GIB, 4000e9, 450e9),
    "gh200-144gb": Chip(989e12, 144e9, 4900e9, 450e9),
    "b200": Chip(2250e12, 178.36 * GIB, 7700e9, 900e9),
    "gb200": Chip(2500e12, 184.31 * GIB, 8000e9, 900e9),
}

# Patterns of the complete `device.device_kind`, in lower case and without the vendor. Other devices, such as MIG
# slices, have no data sheet here.
_DEVICE_KINDS = {
    "v4": r"tpu v4",
    "v5e": r"tpu v5 ?lite|tpu v5e",
    "v5p": r"tpu v5p?",
    "v6e": r"tpu v6 ?lite|tpu v6e",
    "tpu7x": r"tpu ?v?7x?",
    "t4": r"t4",
    "a10": r"a10",
    "a10g": r"a10g",
    "a100-40gb": r"a100-(sxm4|pcie)-40gb",
    "a100": r"a100-sxm4-80gb",
    "a100-80gb-pcie": r"a100 80gb pcie|a100-pcie-80gb",
    "l4": r"l4",
    "l40s": r"l40s",
    "h100": r"h100 80gb hbm3|h100 sxm5?",
    "h100-pcie": r"h100 pcie|h100 80gb hbm2e",
    "h100-nvl": r"h100 nvl",
    "h200": r"h200( 141gb hbm3e)?",
    "h200-nvl": r"h200 nvl",
    "gh200": r"gh200 (480|120)gb|gh200 96gb? hbm3",
    "gh200-144gb": r"gh200 144gb? hbm3e",
    "b200": r"b200",
    "gb200": r"gb200",
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the Chip of a `device.device_kind`, or None if it is unknown."""
    name = re.sub(r"^(nvidia|tesla) ", "", device_kind.strip().lower())
    return next((CHIPS[kind] for kind, names in _DEVICE_KINDS.items() if re.fullmatch(names, name)), None)
