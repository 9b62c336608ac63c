"""Decode greedily with exported directories in whichever Transformers is installed, and tokenize a text.

``python tests/engine_transformers.py`` answers each line of its input; imports nothing of this project.
"""

import json
import os
import sys
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def ar(directory: str, prompts: list[list[int]], new: int, text: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        tokens.append(out[0, len(prompt) :].tolist())
    return {"tokens": tokens, "text": AutoTokenizer.from_pretrained(directory)(text)["input_ids"]}


def config(directory: str) -> dict[str, Any]:
    found = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    return {"class": type(found).__name__, "rope_theta": found.rope_theta, "architectures": found.architectures}


def tokenizer(directory: str, text: str) -> dict[str, Any]:
    found = AutoTokenizer.from_pretrained(directory)
    return {"text": found(text)["input_ids"], "mask": found.mask_token_id}


def version() -> str:
    return transformers.__version__


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = {"ar": ar, "config": config, "tokenizer": tokenizer, "version": version}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for line in sys.stdin:
        kind, job = json.loads(line)
        print(json.dumps(run[kind](**job)), file=answers, flush=True)
