"""The test suite; without the hub, whether there is a network or not."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
