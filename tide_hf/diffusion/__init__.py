"""The forward process on the host: noise, masks, CompDemo's split, and which positions a network is run on."""

from .batch import Counts, NetworkInputs, NoisedBatch, PackedInputs, Pairs, Record, Written
from .corruption import (
    chunk_loss_weight,
    chunk_member,
    complementary_split,
    complete_chunks,
    diffusion_time,
    mask_positions,
    masked_chunks,
    row_uniforms,
    suffix_loss_weight,
    suffix_masks,
)
from .gaussian import GaussianToDiscrete, gaussian_schedule
from .layout import LayoutSpec, PackedLayout, block_layout, causal_layout
from .noising import Noising

__all__ = [
    "Counts",
    "GaussianToDiscrete",
    "LayoutSpec",
    "NetworkInputs",
    "NoisedBatch",
    "Noising",
    "PackedInputs",
    "PackedLayout",
    "Pairs",
    "Record",
    "Written",
    "block_layout",
    "causal_layout",
    "chunk_loss_weight",
    "chunk_member",
    "complementary_split",
    "complete_chunks",
    "diffusion_time",
    "gaussian_schedule",
    "mask_positions",
    "masked_chunks",
    "row_uniforms",
    "suffix_loss_weight",
    "suffix_masks",
]
