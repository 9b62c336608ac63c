"""SmolLM2-135M-Instruct, a published model, where ``tools/real_model`` has fetched it."""

from pathlib import Path

import pytest

from nemodiff_train.cli import main
from tests import jobs, small
from tools.support.ranks import RankPool

MODEL = Path(__file__).parents[1] / "runs" / "models" / "smollm2"

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="tools/real_model has not been run")


@pytest.mark.parametrize(("pipeline", "name"), [(2, "pipeline parallel"), (1, "data parallel")])
def test_ar_logits_on_two_ranks_are_those_of_transformers(
    ranks: RankPool, tmp_path: Path, pipeline: int, name: str
) -> None:
    found = ranks.call(name, 2, jobs.ar_logits, logs=tmp_path, source=str(MODEL), tensor=1, pipeline=pipeline)
    assert found["difference"] < 1e-4


def test_in_and_out_is_bit_exact_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "import", str(MODEL), "imported"]) == 0
    assert main(["convert", "verify", str(MODEL), "imported"]) == 0
    assert "Transformers and Megatron in fp32" in capsys.readouterr().out
    assert main(["convert", "export", "imported", "back"]) == 0
    assert small.same(small.weights(MODEL), small.weights(tmp_path / "back"))
