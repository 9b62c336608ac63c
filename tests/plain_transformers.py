"""Decode with exported directories in a process that has PyTorch and Transformers only.

``python tests/plain_transformers.py JOBS RESULTS``; imports nothing of tests/, and so runs in any environment.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ABSENT = ("nemodiff_train", "megatron")
for name in ABSENT:
    sys.modules[name] = None  # type: ignore[assignment]  (an import of it fails)

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def same(a: Any, b: Any) -> bool:
    """Whether two models have the same weights, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def run(job: dict[str, Any]) -> dict[str, Any]:
    directory = job["directory"]
    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    found: dict[str, Any] = {"outputs": []}
    for method, prompt, settings in job["calls"]:
        ids, nfe = getattr(model, method)(torch.tensor([prompt]), **settings)
        assert ids[0, : len(prompt)].tolist() == prompt
        found["outputs"].append([ids[0, len(prompt) :].tolist(), nfe])

    text = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("the quick brown fox 42")["input_ids"]
    ids = torch.tensor([text, text[::-1]])
    family = AutoModelForCausalLM.from_pretrained(job["family"])
    with torch.no_grad():
        ours, theirs = (some(ids, labels=ids) for some in (model, family))
    found["logits"] = torch.equal(ours.logits, theirs.logits)
    found["loss"] = [float(ours.loss), float(theirs.loss)]

    again = f"{directory}-again"
    model.save_pretrained(again)
    found["again"] = same(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True), model)
    half = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.bfloat16)
    found["half"] = same(half, model.to(torch.bfloat16)) and str(half.dtype)
    eager = AutoModel.from_pretrained(directory, trust_remote_code=True, attn_implementation="eager")
    method, prompt, settings = job["calls"][-1]
    if job["harness"]:
        found["harness"], found["family"] = harness(directory), harness(job["family"])
    found["eager"] = getattr(eager, method)(torch.tensor([prompt]), **settings)[0][0, len(prompt) :].tolist()
    return found


def harness(directory: str) -> dict[str, Any]:
    """What a pipeline and lm-evaluation-harness make of a directory, as they load any model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import pipeline

    texts, greedy = (
        ["the quick brown fox", "42 times over the lazy dog, the"],
        {"do_sample": False, "max_gen_toks": 12},
    )
    generator = pipeline("text-generation", model=directory, trust_remote_code=True)
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    written = generator(texts, max_new_tokens=12, do_sample=False, return_full_text=False, batch_size=2)
    model = HFLM(pretrained=directory, trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")
    pairs = [Instance("loglikelihood", {}, (text, " jumps"), 0) for text in texts]
    asked = [Instance("generate_until", {}, (text, {"until": ["\n\n\n"], **greedy}), 0) for text in texts]
    stop = written[0][0]["generated_text"][3:5]  # which comes in the middle
    stopped = [Instance("generate_until", {}, (texts[0], {"until": [stop], **greedy}), 0)]
    tokens = [generator.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    stops = generator.model.generation_config.eos_token_id
    own = [generator.model.generate(ids, max_new_tokens=12, eos_token_id=stops) for ids in tokens]
    own = [ids[0, -12:] if isinstance(ids, torch.Tensor) else ids[0][0, -12:] for ids in own]
    return {
        "class": type(model.model).__name__,
        "own": generator.tokenizer.batch_decode(own, skip_special_tokens=True),
        "pipeline": [row[0]["generated_text"] for row in written],
        "loglikelihood": model.loglikelihood(pairs, disable_tqdm=True),
        "generate_until": model.generate_until(asked, disable_tqdm=True),
        "stopped": [stop, *model.generate_until(stopped, disable_tqdm=True)],
    }


if __name__ == "__main__":
    results = {"importable": [name for name in ABSENT if importable(name)]}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        results[job["directory"]] = run(job)
    results["imported"] = [name for name in sys.modules if name.startswith(ABSENT) and sys.modules[name]]
    Path(sys.argv[2]).write_text(json.dumps(results))
