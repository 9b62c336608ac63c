"""Behave as NVIDIA's Apex does towards Megatron, in plain torch and on a CPU."""

import sys
import types

import torch
from fused import FusedAdam, apply

optimizers = types.ModuleType("apex.optimizers")
vars(optimizers).update(FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
multi_tensor_apply = types.ModuleType("apex.multi_tensor_apply")
vars(multi_tensor_apply).update(multi_tensor_applier=apply)
sys.modules |= {module.__name__: module for module in (optimizers, multi_tensor_apply)}
