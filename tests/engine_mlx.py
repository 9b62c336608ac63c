"""Decode with exported directories in mlx-lm and mlx-vlm, on a CPU.

``build/engines/bin/python tests/engine_mlx.py`` answers each line of its input; imports nothing of this project.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_vlm.utils import load_model


def ar(directory: str, prompts: list[list[int]], new: int, text: str) -> dict[str, Any]:
    """Greedy tokens of mlx-lm, and its tokens of a text."""
    model, tokenizer = load(directory)
    model.set_dtype(mx.float32)
    steps = [itertools.islice(generate_step(mx.array(prompt), model), new) for prompt in prompts]
    return {"tokens": [[int(token) for token, _ in step] for step in steps], "text": tokenizer.encode(text)}


def diffusion(directory: str, prompts: list[list[int]], new: int, block: int, threshold: float) -> dict[str, Any]:
    """Tokens of mlx-vlm by mode; and the logits of a draft, with the directory's drafter and without."""
    model = load_model(Path(directory)).language_model
    model.model_path = directory
    never = -1  # a stop token that is none
    found: dict[str, Any] = {"ar": [], "diffusion": [], "linear": []}
    for prompt in prompts:
        ids = mx.array([prompt])
        settings = {"block_length": block, "gen_length": new, "eos_id": never}
        plain = model.ar_generate(ids, max_new_tokens=new, eos_token_id=never)[0]
        found["ar"].append(plain[0, len(prompt) :].tolist())
        found["diffusion"].append(model.generate(ids, threshold=threshold, **settings)[0].tolist())
        found["linear"].append(model.generate(ids, linear_speculative=True, **settings)[0].tolist())
    found["drafter"] = model._linear_spec_lora_loaded
    found["drafts"] = [draft(model, prompts[0], block, enabled) for enabled in (False, True)]
    return found


def draft(model: Any, prompt: list[int], block: int, enabled: bool) -> list[list[float]]:
    """Logits [block, vocabulary] of a draft after a prompt: its last token is known, the others are masks."""
    cache = model.make_cache()
    model.model(mx.array([prompt[:-1]]), cache=cache, use_cache=True, use_causal_mask=True)
    tokens = mx.array([prompt[-1:] + [model.config.mask_token_id] * (block - 1)])
    model.set_linear_spec_lora_enabled(enabled)
    hidden = model.model(tokens, cache=cache, use_cache=False, use_causal_mask=False)
    model.set_linear_spec_lora_enabled(False)
    return model._project_hidden(hidden)[0].tolist()


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    run = {"ar": ar, "diffusion": diffusion}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for line in sys.stdin:
        kind, job = json.loads(line)
        print(json.dumps(run[kind](**job)), file=answers, flush=True)
