"""Import Megatron-Core's indexed data set without its warnings; that takes seconds, so import this late."""

import logging
import warnings

with warnings.catch_warnings():
    # About Transformer Engine, Apex and CUDA, none of which these files need.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

# Opening a file logs on rank 0 alone, and warns where there are no ranks.
warnings.filterwarnings("ignore", "Could not determine rank")

__all__ = ["IndexedDataset", "IndexedDatasetBuilder"]
