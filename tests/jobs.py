"""What the gang runs; see tests/gang.py."""

import json
from pathlib import Path
from typing import Any


def train(output: str, settings: list[str], **arguments: Any) -> dict[str, Any]:
    """Train the small recipe with overrides; returns the steps that ``metrics.jsonl`` holds."""
    from nemodiff_train.training.command import train as run
    from nemodiff_train.training.recipes import _override
    from tests import small

    config = small.recipe(output=output, **arguments)
    run(_override(config, dict(word.split("=", 1) for word in settings)))
    return {"steps": [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]}
