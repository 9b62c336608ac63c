"""Decode greedily with exported directories in whichever Transformers is installed, and tokenize a text.

``python tests/engine_transformers.py JOBS RESULTS``; imports nothing of this project.
"""

import json
import sys
from pathlib import Path
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = {"ar": ar, "config": config, "tokenizer": tokenizer}
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run[kind](**job) for name, (kind, job) in jobs.items()}
    Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, **results}))
