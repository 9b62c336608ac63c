"""Peak figures of GPUs from their data sheets, and the fraction of them that training is assumed to reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight."""

    flops: float
    """Dense bf16 operations per second."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second between the GPU and its memory."""
    link: float
    """Bytes per second that it sends to the other GPUs of its node."""
    network: float = 50e9
    """Bytes per second that it sends to another node: one adapter of 400 Gbit/s per GPU."""


GPUS = {
    "h100": Gpu(flops=989e12, memory=80e9, bandwidth=3.35e12, link=450e9),
    "h200": Gpu(flops=989e12, memory=141e9, bandwidth=4.8e12, link=450e9),
    "b200": Gpu(flops=2250e12, memory=180e9, bandwidth=8e12, link=900e9),
}


def gpu_named(name: str) -> Gpu | None:
    """Return the figures of a GPU by the name that its driver gives it, for example "NVIDIA H100 80GB HBM3"."""
    return next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)


NODE = 8
"""Number of GPUs that NVLink connects."""

# Assumptions: large matrix products rarely come closer to the peak, ring collectives to the link, and CUDA, NCCL and
# fragmentation take the rest of the memory.  That of attention is fitted to what others have published of the same
# models (tools/bench/plan_time); none is a measurement of this package.
MATRIX_EFFICIENCY, ATTENTION_EFFICIENCY, COLLECTIVE_EFFICIENCY, USABLE_MEMORY = 0.6, 0.5, 0.7, 0.9
