"""Import and export through the command line: bit-exact, complete, loadable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemodiff_train.cli import main
from tests import small


@pytest.mark.parametrize("family", ["qwen3", "ministral3"])
def test_export_after_import_is_bit_exact(tmp_path: Path, family: str) -> None:
    source, imported, back = (str(tmp_path / name) for name in ("source", "imported", "back"))
    getattr(small, family)(tmp_path / "source", bos_token_id=None)
    assert main(["convert", "import", source, imported]) == 0
    assert main(["convert", "export", imported, back]) == 0

    before, after = load_file(f"{source}/model.safetensors"), load_file(f"{back}/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    for file in ("config.json", "generation_config.json"):
        theirs, ours = (json.loads(Path(folder, file).read_text()) for folder in (source, back))
        assert {**theirs, "transformers_version": 0} == {**ours, "transformers_version": 0}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(back)("the quick brown fox 42")["input_ids"]])
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, back)]
    assert torch.equal(*logits)
    assert not list(tmp_path.glob(".*partial"))
