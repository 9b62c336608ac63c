"""The report: every figure from the records alone, the replay, and what a browser makes of the page."""

import json
import math
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from nemodiff_train.cli import main
from nemodiff_train.decoding.generation import Cycle, DecodingSettings
from nemodiff_train.evaluation.evaluation import all_points
from nemodiff_train.evaluation.metrics import summarise
from nemodiff_train.evaluation.pareto import SweepPoint, areas, aup, front
from nemodiff_train.evaluation.records import DecodeRecord
from nemodiff_train.evaluation.settings import EvaluationSettings, relevant_settings, settings_of
from nemodiff_train.report import charts, display
from nemodiff_train.report.page import inline_json
from nemodiff_train.report.report import write_report
from nemodiff_train.report.run_page import RunPage
from nemodiff_train.report.trace import trace
from tests import browser, evaluations


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished report."""
    directory = tmp_path_factory.mktemp("report")
    write_report(directory, evaluations.evaluation(), evaluations.text)
    return directory


def test_the_page_of_a_run(tmp_path: Path) -> None:
    """Long curves are means over steps, what cannot be drawn is left out, and text from outside is escaped."""
    page = RunPage("runs/<b>x</b>", "joint", 2000, "a: <script>")
    nothing = {"grad_norm": None, "learning_rate": 1e-5, "mfu": 0.25, "eval/tpf/own<i>": 2.0, "eval/accuracy/ar": 0.0}
    for step in range(1, 1001):
        page.add({"step": step, "tokens": 64 * step, "ar_loss": float(step), "diffusion_loss": math.nan, **nothing})
    points = page.series["ar_loss"].shown
    assert len(points) == 250 and points[0] == (4, 2.5) and points[-1] == (1000, 998.5)
    page.add({"step": 1001, "tokens": 1, "ar_loss": 7.0, "diffusion_loss": math.inf})
    assert page.series["ar_loss"].shown[-1] == (1001, 7.0)
    page.show(evaluations.evaluation(), evaluations.text)
    (tmp_path / "index.html").write_text(page.render())
    read = browser.read_page(tmp_path / "index.html")
    assert not read.loads and read.seen.count("svg") == 5
    assert "runs/<b>x</b>" in read.words and "a: <script>" in read.words and "diffusion loss" not in read.words


# Figures, recomputed from the lines of records.jsonl with nothing but arithmetic.


def runs_of(directory: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    runs = defaultdict(list)
    for line in (directory / "records.jsonl").read_text().splitlines():
        row = json.loads(line)
        runs[row["mode"], json.dumps(row["settings"])].append(row)
    return runs


def share(rows: list[dict[str, Any]]) -> float:
    return sum(row["correct"] for row in rows) / len(rows)


def forwards(rows: list[dict[str, Any]], *, without: str = "") -> int:
    return sum(n for row in rows for kind, n in row["decoded"]["forwards"].items() if kind != without)


def figures(rows: list[dict[str, Any]], ar: list[dict[str, Any]]) -> dict[str, Any]:
    """The scalar figures of one run."""
    decoded = [row["decoded"] for row in rows]
    tokens = sum(len(one["tokens"]) for one in decoded)
    cycles = [one["accepted"] + one["recovered"] + one["bonus"] for row in decoded for one in row["cycles"]]
    seconds = sum(one["seconds"] for one in decoded)
    n, p, z = len(rows), share(rows), 1.959964
    centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return {
        "prompts": n,
        "accuracy": p,
        "accuracy_low": max(0.0, (centre - half) / (1 + z * z / n)),
        "accuracy_high": min(1.0, (centre + half) / (1 + z * z / n)),
        "tokens": tokens,
        "tpf_all": tokens / forwards(rows),
        "tpf_no_prefill": tokens / forwards(rows, without="prefill"),
        "acceptance_length": sum(cycles) / len(cycles) if cycles else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "forwards_per_second": forwards(rows) / seconds,
        "identical_to_ar": sum(
            a["decoded"]["tokens"] == b["decoded"]["tokens"] for a, b in zip(rows, ar, strict=True)
        )
        / n,
    }


def acceptance(rows: list[dict[str, Any]]) -> list[tuple[int, int, int, int]]:
    cycles = [cycle["accept_mask"] for row in rows for cycle in row["decoded"]["cycles"]]
    width = max(map(len, cycles), default=0)
    return [
        (
            len(cycles),
            sum(cycle[at] for cycle in cycles),
            sum(all(cycle[:at]) for cycle in cycles),
            sum(all(cycle[: at + 1]) for cycle in cycles),
        )
        for at in range(width)
    ]


def test_every_figure_follows_from_the_records(report: Path) -> None:
    runs = runs_of(report)
    written = json.loads((report / "metrics.json").read_text())
    shown = [*written["modes"].items(), *((point["mode"], point["metrics"]) for point in written["sweep"])]
    assert len(shown) == 4 + 4 + 2
    for mode, metrics in shown:
        rows = runs[mode, json.dumps(metrics["settings"])]
        for name, value in figures(rows, runs["ar", "{}"]).items():
            assert metrics[name] == (None if value is None else pytest.approx(value)), (mode, name)
        counts = [
            (a["drafts"], a["verifier_matches"], a["reached"], a["accepted"])
            for a in metrics["acceptance_by_position"]
        ]
        assert counts == acceptance(rows)
        assert sum(metrics["forwards"].values()) == forwards(rows)


def test_bars_stay_within_the_drawing() -> None:
    """An oracle's search, many times its path, is told and not drawn."""
    searched = DecodeRecord(0, [5, 6, 7], {"prefill": 1, "denoise": 1, "search": 400}, steps=[2, 2, 2])
    plain = DecodeRecord(0, [5, 6, 7], {"prefill": 1, "decode": 2}, steps=[1, 2, 3])
    drawn = charts.forwards_bars({"oracle": summarise([searched], [True], {}), "ar": summarise([plain], [True], {})})
    bars = [(float(x), float(width)) for x, width in re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"', drawn)]
    assert len(bars) == 4 and max(x + width for x, width in bars) <= charts.WIDTH
    assert "(found by 13333 of search)" in drawn


def test_categories_follow_from_the_records(report: Path) -> None:
    runs = runs_of(report)
    written = json.loads((report / "metrics.json").read_text())
    assert len(written["categories"]) == 3 * 4
    for row in written["categories"]:
        headline = runs[row["mode"], json.dumps(written["modes"][row["mode"]]["settings"])]
        rows = [each for each in headline if each["category"] == row["category"]]
        again = figures(rows, rows)
        assert len(rows) == row["prompts"] == 4
        for name in ("accuracy", "tpf_all", "acceptance_length"):
            assert row[name] == (None if again[name] is None else pytest.approx(again[name]))


def test_areas_follow_from_the_records(report: Path) -> None:
    points = defaultdict(list)
    for (mode, settings), rows in runs_of(report).items():
        tokens = sum(len(row["decoded"]["tokens"]) for row in rows)
        points[mode, json.loads(settings).get("block_size")].append((tokens / forwards(rows), 100 * share(rows)))
    best = max(accuracy for curve in points.values() for _, accuracy in curve)
    written = json.loads((report / "metrics.json").read_text())["areas"]
    assert written["best"] == pytest.approx(best)
    found = {(row["mode"], row["curve"]): row for row in written["rows"]}
    for size in (4, 8):
        curve = sorted(points["diffusion", size])
        kept = [at for at in curve if at[1] >= curve[0][1] - 5]
        assert found["diffusion", f"block size {size}"]["aup"] == pytest.approx(area(kept, best))
        assert found["diffusion", f"block size {size}"]["dropped"] == len(curve) - len(kept)
    assert found["ar", "one setting"]["aup"] == pytest.approx(points["ar", None][0][1])
    assert set(found) >= {("diffusion", "front of all settings"), ("linear", "by block size")}


def area(curve: list[tuple[float, float]], best: float) -> float:
    heights = [y * min(math.exp(-3 * (1 - y / best)), 1) for _, y in curve]
    steps = [(b[0] - a[0]) / 2 for a, b in pairwise(curve)]
    trapezoids = [step * (a + b) for step, (a, b) in zip(steps, pairwise(heights), strict=True)]
    return curve[0][0] * curve[0][1] + sum(trapezoids)


def test_page_prints_the_figures(report: Path) -> None:
    page = (report / "report.html").read_text()
    written = json.loads((report / "metrics.json").read_text())
    for metrics in written["modes"].values():
        assert f"{100 * metrics['accuracy']:.1f}%" in page
        assert f'data-label="TPF (all)">{metrics["tpf_all"]:.2f}' in page
    for row in written["areas"]["rows"]:
        assert f"<b>{row['aup']:.1f}</b>" in page
    assert f"{written['areas']['best']:.1f}%" in page
    assert "Autoregressive, Block diffusion, Linear self-speculation, unheard;" in page


# The front and the area.


def point(tpf: float, accuracy: float, mode: str = "diffusion", **settings: float) -> SweepPoint:
    """A point of given figures."""
    metrics = summarise([DecodeRecord(0, [1], {"denoise": 1}, steps=[1])], [True], dict(settings))
    return SweepPoint(mode=mode, metrics=metrics.model_copy(update={"tpf_all": tpf, "accuracy": accuracy / 100}))


def test_front_keeps_what_no_other_beats() -> None:
    points = [point(1, 80), point(2, 80), point(3, 70), point(3, 60), point(2.5, 69), point(4, 50)]
    assert [(p.tpf, round(p.accuracy)) for p in front(points)] == [(2, 80), (3, 70), (4, 50)]


def test_aup_by_hand() -> None:
    weight = math.exp(-3 * (1 - 76 / 80))
    assert aup([(1, 80), (3, 76)], 80) == pytest.approx(80 + 1 * (76 * weight + 80))
    assert aup([(2, 50)], 80) == 100
    assert aup([(1, 0), (2, 0)], 0) == 0


def test_areas_drop_what_is_too_far_below_and_move_with_the_best() -> None:
    curve = [point(1, 60, threshold=0.9), point(2, 55, threshold=0.7), point(3, 54, threshold=0.5)]
    alone = areas(curve)
    assert [(row.curve, row.dropped, len(row.points)) for row in alone.rows] == [("by threshold", 1, 2)]
    beside = areas([*curve, point(1, 90, "ar")])
    assert (beside.best, beside.best_mode) == (pytest.approx(90), "ar")
    assert beside.rows[0].aup < alone.rows[0].aup


def test_grid_of_settings() -> None:
    settings = DecodingSettings(block_size=16, threshold=0.9)
    plan = EvaluationSettings(thresholds=(0.5,), block_sizes=(8, 16))
    grid = settings_of("diffusion", settings, plan)
    assert [(each.block_size, each.threshold) for each in grid] == [(8, 0.5), (8, 0.9), (16, 0.5), (16, 0.9)]
    assert [each.block_size for each in settings_of("linear", settings, plan)] == [8, 16]
    assert settings_of("ar", settings, plan) == [settings]


def test_settings_that_a_mode_depends_on() -> None:
    settings = DecodingSettings()
    assert relevant_settings("tree", settings) == ("max_new_tokens", "block_size", "tree_nodes", "tree_width")
    assert relevant_settings("oracle", settings) == ("max_new_tokens", "block_size", "search_budget")


def test_points_hold_each_run_once() -> None:
    made = evaluations.evaluation()
    assert [p.mode for p in all_points(made.modes, made.sweep)] == ["ar", "unheard"] + ["diffusion"] * 4 + [
        "linear"
    ] * 2


# The replay.


def test_trace_of_drafts() -> None:
    record = DecodeRecord(
        0,
        [5, 6, 7, 8, 9],
        {"prefill": 1, "draft": 2, "verify": 2},
        [
            Cycle(0, recovered=True, draft_tokens=[1, 7], accept_mask=[False, True]),
            Cycle(2, bonus=True, draft_tokens=[7, 8], accept_mask=[True, True]),
        ],
        steps=[1, 3, 5, 5, 5],
    )
    found = trace(record, evaluations.text)
    assert [(piece.text, piece.position, piece.step) for piece in found.pieces] == [
        (" w5", 0, 0), (" w6", 1, 1), (" w7", 2, 2), (" w8", 3, 2), (" w9", 4, 2)
    ]  # fmt: skip
    assert [(draft.start, draft.texts, draft.accepted) for draft in found.drafts] == [
        (1, [" w1", " w7"], 0),
        (2, [" w7", " w8"], 2),
    ]
    assert [(frame.step, frame.draft, frame.verified) for frame in found.frames] == [
        (0, None, False),
        (0, 0, False),
        (1, 0, True),
        (1, 1, False),
        (2, 1, True),
    ]
    assert found.frames[0].words.startswith("Forward 1 of 5") and "accepts 2 of 2" in found.frames[-1].words


def test_trace_without_drafts() -> None:
    ar = trace(DecodeRecord(0, [5, 6], {"prefill": 1, "decode": 1}, steps=[1, 2]), evaluations.text)
    assert [frame.words for frame in ar.frames] == [
        "Forward 1 of 2 \N{MIDDLE DOT} 1 of 2 tokens",
        "Forward 2 of 2 \N{MIDDLE DOT} 2 of 2 tokens",
    ]
    cut = Cycle(1, draft_tokens=[6, 7], accept_mask=[True, True])
    record = DecodeRecord(0, [5, 6], {"prefill": 1, "draft": 1, "verify": 1}, [cut], steps=[1, 3])
    assert trace(record, evaluations.text).drafts[0].accepted == 1


def test_inlined_json_cannot_leave_its_element() -> None:
    value = {"text": "</script><!-- & \u2028"}
    written = inline_json(value)
    assert not re.search("[<>&\u2028]", written) and json.loads(written) == value


def test_unknown_modes_have_a_colour() -> None:
    assert display.mode_class("unheard") == "mode-other" and ".mode-other" in display.mode_colours(dark=True)
    assert display.title("unheard") == "unheard"


# The command.


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--block-sizes", "8,x"], "--block-sizes '8,x'"),
        (["--block-sizes", "1"], "it must be at least 2"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "checkpoint", *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# What a browser makes of the page.


@browser.needs_browser
def test_page_is_drawn_in_light_and_dark(report: Path, tmp_path: Path) -> None:
    light, dark = (
        Image.open(browser.screenshot(report / "report.html", tmp_path / f"{dark}.png", dark=dark)).convert("L")
        for dark in (False, True)
    )
    for picture in (light, dark):
        assert len(picture.getcolors() or []) > 50, "the page is blank"
    assert mean(light) > 200 and mean(dark) < 60
    assert ImageChops.difference(light, dark).getbbox() is not None


def mean(picture: Image.Image) -> float:
    counts = picture.histogram()
    return sum(value * count for value, count in enumerate(counts)) / sum(counts)


@browser.needs_browser
@pytest.mark.parametrize("width", [390, 1000])
def test_nothing_is_wider_than_the_window(report: Path, width: int) -> None:
    clipped = "[...document.querySelectorAll('.stack')].filter(box => box.scrollWidth > box.clientWidth).length"
    script = f"[document.documentElement.scrollWidth, {clipped}].join()"
    assert browser.evaluate(report / "report.html", script, width=width) == f"{width},0"


@browser.needs_browser
def test_slider_replays_the_decoding(report: Path) -> None:
    record = next(
        row.decoded
        for row in evaluations.evaluation().records
        if row.mode == "linear" and row.settings == {"block_size": 8}
    )
    script = """(() => {
      const slider = document.getElementById('frame'), seen = [];
      const text = document.querySelector('.output:not([hidden]) .text');
      for (let at = 0; at <= slider.max; at++) {
        slider.value = at;
        slider.dispatchEvent(new Event('input'));
        const count = (kind) => text.querySelectorAll(kind).length;
        seen.push([count('.piece:not(.masked)'), count('.tentative'), count('del')]);
      }
      return JSON.stringify(seen);
    })()"""
    seen = json.loads(browser.evaluate(report / "report.html", script))
    expected, committed = [[1, 0, 0]], 1
    for cycle in record.cycles:
        expected.append([committed, len(cycle.draft_tokens), 0])
        committed += cycle.committed
        expected.append([committed, 0, len(cycle.draft_tokens) - cycle.accepted])
    assert seen == expected and committed == len(record.tokens)


@browser.needs_browser
def test_arrow_keys_modes_and_samples(report: Path) -> None:
    script = """(() => {
      const viewer = document.getElementById('viewer'), slider = document.getElementById('frame');
      const press = (key) => viewer.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
      const shown = () => [...viewer.querySelectorAll('.output')].filter((each) => each.checkVisibility());
      const last = Number(slider.value);
      press('ArrowLeft'); press('ArrowLeft'); press('ArrowRight');
      const stepped = last - slider.value;
      viewer.querySelectorAll('input[name=mode]')[0].click();
      const sample = document.getElementById('sample');
      sample.value = 3;
      sample.dispatchEvent(new Event('change'));
      return [stepped, shown().length, shown()[0].dataset.mode, shown()[0].closest('article').dataset.sample].join();
    })()"""
    assert browser.evaluate(report / "report.html", script) == "1,1,ar,3"


@browser.needs_browser
def test_page_runs_its_script_under_its_own_policy(report: Path, tmp_path: Path) -> None:
    """Without the script the controls are hidden and all outputs are there; the page as written shows them."""
    dumped = browser.dump(report / "report.html")
    assert re.search(r'id="viewer" class="live"', dumped)
    still = (report / "report.html").read_text()
    (tmp_path / "still.html").write_text(re.sub(r"<script>.*?</script>", "", still, flags=re.DOTALL))
    visible = "[...document.querySelectorAll('.output')].filter((each) => each.checkVisibility()).length"
    assert browser.evaluate(tmp_path / "still.html", visible) == str(6 * 4)
    assert browser.evaluate(tmp_path / "still.html", "document.getElementById('frame').checkVisibility()") == "false"
