"""What one GPU can do, from the maker's data sheets, and how much of it training is assumed to reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight."""

    flops: float
    """Dense bf16 operations a second."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second between the GPU and its memory."""
    link: float
    """Bytes a second that it can send to the other GPUs of its node."""
    network: float = 50e9
    """Bytes a second that it can send to another node: one adapter of 400 Gbit/s a GPU."""


GPUS = {
    "h100": Gpu(flops=989e12, memory=80e9, bandwidth=3.35e12, link=450e9),
    "h200": Gpu(flops=989e12, memory=141e9, bandwidth=4.8e12, link=450e9),
    "b200": Gpu(flops=2250e12, memory=180e9, bandwidth=8e12, link=900e9),
}

NODE = 8
"""GPUs that NVLink connects."""

# Assumptions, not measurements: large matrix products and sparse attention rarely come closer to the peak, ring
# collectives to the link, and CUDA, NCCL and fragmentation take the rest of the memory.
MATRIX, ATTENTION, COLLECTIVE, USABLE = 0.6, 0.4, 0.7, 0.9
