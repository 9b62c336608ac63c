"""Records, metrics and the report: figures recomputed by hand, refusals, a sound page."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.decoding.generation import Cycle
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.evaluation import Evaluation, Run, assemble
from nemodiff_train.evaluation.metrics import acceptance_by_position, summarise, wilson
from nemodiff_train.evaluation.prompts import Prompt, Task
from nemodiff_train.evaluation.records import DecodeRecord, LoggedRecord, read_jsonl
from nemodiff_train.evaluation.scorers import make_scorer
from nemodiff_train.files import usable_directory, write_atomic
from nemodiff_train.report import svg
from nemodiff_train.report.report import print_table, write_report
from nemodiff_train.report.trace import trace
from tests import jobs
from tests.browser import read_page
from tools.support.ranks import RankPool

AR = [
    DecodeRecord(0, [5, 6, 7, 2], {"prefill": 1, "decode": 3}, seconds=0.4, steps=[1, 2, 3, 4]),
    DecodeRecord(1, [8, 2], {"prefill": 1, "decode": 1}, seconds=0.2, steps=[1, 2]),
]
LINEAR = [
    DecodeRecord(
        0,
        [5, 6, 7, 2],
        {"prefill": 1, "draft": 2, "verify": 2},
        cycles=[
            Cycle(0, recovered=True, accept_mask=[False, True, True]),
            Cycle(1, recovered=True, accept_mask=[True, False, True]),
        ],
        seconds=0.2,
        steps=[1, 3, 5, 5],
    ),
    DecodeRecord(
        1,
        [8, 3],
        {"prefill": 1, "draft": 1, "verify": 1},
        [Cycle(1, accept_mask=[True, True, False])],
        seconds=0.1,
        steps=[1, 3],
    ),
]
DIFFUSION = [
    DecodeRecord(0, [5, 6, 9, 2], {"prefill": 1, "denoise": 2, "commit": 1}, seconds=0.25, steps=[0, 2, 1, 2]),
    DecodeRecord(1, [8, 2], {"prefill": 1, "denoise": 1, "commit": 1}, seconds=0.15, steps=[0, 1]),
]
WORDS = {2: "", 3: " 4", 5: "so", 6: " <b>", 7: " 12", 8: "7", 9: " 13"}


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def evaluation(checkpoint: str = "run/<script>alert(1)</script>[red]") -> Evaluation:
    prompts = [Prompt(prompt='5 & 7 = "?" http://x.example/', answer="12"), Prompt(prompt="7?", answer="7")]
    diffusion = Run("diffusion", {"threshold": 0.9}, DIFFUSION)
    runs = [Run("ar", {}, AR), diffusion, Run("linear", {"block": 4}, LINEAR)]
    sweep = [Run("diffusion", {"threshold": 0.5}, DIFFUSION), diffusion]
    task = Task("sums", prompts, make_scorer("numeric"))
    return assemble(checkpoint, task, runs, decode, settings={"seed": 1}, sweep=sweep)


def test_ar_reads_exactly_one_when_all_forwards_count() -> None:
    metrics = summarise(AR, [True, False], {}, AR)
    assert (metrics.tpf_all, metrics.tpf_no_prefill) == (1.0, 6 / 4)
    assert metrics.accuracy == 0.5 and metrics.identical_to_ar == 1.0
    assert metrics.acceptance_length is None and metrics.acceptance_by_position == []
    assert metrics.tokens_per_second == pytest.approx(10) and metrics.forwards_per_second == pytest.approx(10)


def test_linear_figures_by_hand() -> None:
    metrics = summarise(LINEAR, [True, True], {"block": 4}, AR)
    assert metrics.forwards == {"prefill": 2, "draft": 3, "verify": 3}
    assert metrics.tpf_all == 6 / 8 and metrics.tpf_no_prefill == 6 / 6
    assert metrics.acceptance_length == pytest.approx(4 / 3)
    assert metrics.identical_to_ar == 0.5
    counts = [(a.drafts, a.verifier_matches, a.reached, a.accepted) for a in metrics.acceptance_by_position]
    assert counts == [(3, 2, 3, 2), (3, 2, 2, 1), (3, 2, 1, 0)]
    assert [a.conditional for a in metrics.acceptance_by_position] == [2 / 3, 0.5, 0.0]
    assert [a.unconditional for a in metrics.acceptance_by_position] == [2 / 3] * 3


def test_acceptance_at_positions_never_reached_and_of_short_drafts() -> None:
    positions = acceptance_by_position([[False, True], [False]])
    assert [a.drafts for a in positions] == [2, 1]
    assert positions[1].conditional is None and positions[1].unconditional == 1.0


def test_nothing_but_prefill_and_no_clock() -> None:
    metrics = summarise([DecodeRecord(0, [2], {"prefill": 1}, steps=[1])], [False], {})
    assert metrics.tpf_all == 1.0
    assert (metrics.tpf_no_prefill, metrics.tokens_per_second, metrics.identical_to_ar) == (None, None, None)


def test_wilson_interval() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 4) == pytest.approx((0, 0.4899), abs=1e-4) and wilson(4, 4)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forwards": {"prefil": 1}}, "unknown kinds"),
        ({"forwards": {}}, "at least one forward"),
        ({"tokens": []}, "at least one token"),
        ({"cycles": [Cycle(2, bonus=True)]}, "committed 3 tokens"),
        ({"steps": [1]}, "1 steps for 2 tokens"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    sound = {"prompt_index": 0, "tokens": [1, 2], "forwards": {"prefill": 1}, "steps": [1, 1]}
    with pytest.raises(ValueError, match=message):
        DecodeRecord(**{**sound, **fields})


def test_summarise_refuses_what_does_not_match() -> None:
    with pytest.raises(ValueError, match="2 records and 1 scores"):
        summarise(AR, [True], {})
    with pytest.raises(ValueError, match=r"lacks prompts \[1\]"):
        summarise(LINEAR, [True, True], {}, AR[:1])


def test_pieces_keep_characters_whole() -> None:
    letters = [b"a", b"\xc3", b"\xa9", b"b"]
    record = DecodeRecord(0, [0, 1, 2, 3], {"prefill": 1, "decode": 3}, steps=[1, 2, 3, 4])
    found = trace(record, lambda tokens: b"".join(letters[t] for t in tokens).decode(errors="replace"))
    assert [piece.text for piece in found.pieces] == ["a", "é", "b"]


def test_report_figures_follow_from_the_records(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report", evaluation(), decode)
    directory = tmp_path / "new" / "report"
    runs = defaultdict(list)
    for row in read_jsonl(directory / "records.jsonl", LoggedRecord):
        runs[row.mode, json.dumps(row.settings)].append(row)
    assert len(runs) == 4, "the diffusion run shared with the sweep is logged once"
    figures = json.loads((directory / "metrics.json").read_text())
    ar = [row.decoded for row in runs["ar", "{}"]]
    printed = list(figures["modes"].items()) + [(point["mode"], point["metrics"]) for point in figures["sweep"]]
    for mode, metrics in printed:
        rows = runs[mode, json.dumps(metrics["settings"])]
        again = summarise([r.decoded for r in rows], [r.correct for r in rows], rows[0].settings, ar)
        assert again.model_dump(mode="json") == metrics
    assert [point["metrics"]["settings"] for point in figures["sweep"]] == [{"threshold": 0.5}, {"threshold": 0.9}]
    assert "prefill" in figures["rules"]["tpf_all"] and figures["versions"]["torch"]
    assert sorted(path.name for path in directory.iterdir()) == [
        "metrics.json",
        "records.jsonl",
        "report.html",
    ]


def test_page_is_well_formed_escaped_and_loads_nothing(tmp_path: Path) -> None:
    page = read_page(write_report(tmp_path, evaluation(), decode))
    assert not page.loads and not {"link", "img", "iframe"} & set(page.seen) and page.seen.count("script") == 2
    assert "run/<script>alert(1)</script>[red]" in page.words and " <b>" in page.words
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\(|@import", html) and page.seen.count("svg") == 4


def test_page_names_characters_that_turn_the_text_around(tmp_path: Path) -> None:
    record = DecodeRecord(
        0,
        [8, 2],
        {"prefill": 1, "draft": 1, "verify": 1},
        [Cycle(0, recovered=True, accept_mask=[False], draft_tokens=[8])],
        steps=[1, 3],
    )
    turned = "\u202ereversed\u2066"
    task = Task("one", [Prompt(prompt=turned, answer="7")], make_scorer("exact"))
    single = assemble(turned, task, [Run("linear", {}, [record])], lambda tokens: turned, settings={})
    html = write_report(tmp_path, single, lambda tokens: turned * len(tokens)).read_text()
    assert "\\u202ereversed\\u2066" in html
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069]|[^\\]\\u202e", html.split('id="traces">')[1])
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", html)


def test_page_of_one_mode_with_one_position(tmp_path: Path) -> None:
    record = DecodeRecord(
        0,
        [8, 2],
        {"prefill": 1, "draft": 1, "verify": 1},
        [Cycle(0, recovered=True, accept_mask=[False])],
        steps=[1, 3],
    )
    task = Task("one", [Prompt(prompt="7", answer="7")], make_scorer("exact"))
    single = assemble("m", task, [Run("linear", {}, [record])], decode, settings={})
    page = read_page(write_report(tmp_path, single, decode))
    assert page.seen.count("svg") == 3


def test_table_names_modes_and_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(evaluation())
    shown = capsys.readouterr().out
    assert "[red]" in shown and "prefill" in shown and "…" not in shown
    row = next(line.split() for line in shown.splitlines() if line.strip().startswith("linear"))
    assert row == ["linear", "50.0%", "0.75", "1.00", "1.33", "20", "50.0%"]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .* is a file"):
        usable_directory(tmp_path / "file" / "report")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot make the folder"):
        usable_directory(tmp_path / "link")


def test_ticks_and_label_spreading() -> None:
    assert svg.ticks(0.76, 0.94, 5) == pytest.approx([0.8, 0.85, 0.9])
    assert svg.spread([10, 11, 50], 5, 0, 52) == [10, 15, 50]
    assert svg.spread([50, 51], 5, 0, 52) == [47, 52]


def test_an_evaluation_goes_on_where_it_was_interrupted(tmp_path: Path, ranks: RankPool) -> None:
    """Nothing that was decoded before the disk was full is decoded again, and the report is the same.

    What has been decoded is known by the weights, wherever they lie.
    """
    world = ranks.start("full disk", 1, jobs.evaluate_until_the_disk_is_full, logs=tmp_path, folder=str(tmp_path))
    assert ranks.wait(world) == [0], world.output()
    result = world.result()
    assert result["codes"] == [0, 0, 2, 0, 0, 0, 2]  # the last finds the report of the one before
    assert result["left"] == ["unfinished-0.jsonl"]
    assert result["decoded"] == [2, 3, 4, 5, 0, 1, 2, 3, 4, 5]  # of diffusion, and of linear: ar was complete
    assert result["other"] == 3 * [0, 1, 2, 3, 4, 5]  # other weights at the same path have all to decode
    refusals = [line for line in world.output().splitlines() if line.startswith("nemodiff: error")]
    assert ["full" in refusals[0], "report already" in refusals[1]] == [True, True]

    def tokens(name: str) -> list[tuple[str, str, list[int]]]:
        records = read_jsonl(tmp_path / name / "records.jsonl", LoggedRecord)
        return [(record.mode, record.prompt, record.decoded.tokens) for record in records]

    assert tokens("out") == tokens("undisturbed")
    assert not list((tmp_path / "out").glob("unfinished*")) and not list(tmp_path.glob(".out*"))
