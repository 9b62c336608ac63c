"""lm-evaluation-harness: its three kinds of figures, sampling, long contexts and stops, against ``--model hf``."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from nemodiff_train.cli import main
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.errors import UserError
from tests import small

WORDS = "the quick brown fox jumps over the lazy dog while 0123 of 45 are counted "
LONG = WORDS * 40
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: [" dog", " fox jumps", "x", " 45"]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "texts": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "fox"
generation_kwargs: {until: ["\\n\\n", "q"], max_gen_toks: 12}
metric_list: [{metric: exact_match}, {metric: bleu}]
""",
}

REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


class Harness:
    """A small random model as Hugging Face and Megatron have it, and the harness on both."""

    def __init__(self, folder: Path, bos: bool) -> None:
        from transformers import AutoTokenizer

        from nemodiff_train.conversion.importing import import_checkpoint
        from nemodiff_train.model.hf_directory import HFDirectory

        self.folder = folder
        small.qwen3(folder / "hf", num_hidden_layers=4, max_position_embeddings=128)
        if bos:
            tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
            tokenizer.add_special_tokens({"bos_token": "<bos>"})
            number = tokenizer.convert_tokens_to_ids("<bos>")
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", number)]
            )
            tokenizer.save_pretrained(folder / "hf")
            assert AutoTokenizer.from_pretrained(folder / "hf")("x")["input_ids"][0] == number < small.VOCABULARY
        import_checkpoint(HFDirectory(folder / "hf"), str(folder / "megatron"))
        from lm_eval.api.registry import get_model

        import nemodiff_train.evaluation.lm_eval  # noqa: F401  (registers the model)

        sizes = {"batch_size": 4, "device": "cpu"}
        self.ours: Any = get_model("nemodiff").create_from_arg_string(f"checkpoint={folder}/megatron,mode=ar", sizes)
        self.theirs: Any = get_model("hf").create_from_arg_string(f"pretrained={folder}/hf", sizes)
        rows = [WORDS, "the quick", WORDS[:30], "lazy dog", LONG, ""]
        for name, text in TASKS.items():
            asked = rows[:-1] if name == "texts" else rows  # Transformers does not continue nothing
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"q": row}) + "\n" for row in asked))
            data = (
                f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            )
            (folder / f"{name}.yaml").write_text(f"{data}test_split: test{text}")

    def run(self, model: Any, *tasks: str, **changes: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the figures as the harness prints them, and every response."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(self.folder), include_defaults=False)
        made = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **changes)
        figures = {
            f"{task} {name}": f"{value:.4f}"
            for task, values in made["results"].items()
            for name, value in values.items()
            if isinstance(value, float)
        }
        return figures, {task: [row["resps"] for row in made["samples"][task]] for task in tasks}

    def ask(self, model: Any, prompt: str, **options: Any) -> str:
        """Continue one prompt."""
        from lm_eval.api.instance import Instance

        return str(model.generate_until([Instance("generate_until", {}, (prompt, options), 0)], True)[0])


@pytest.fixture(scope="module", params=["bos", "no bos"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("harness"), request.param == "bos")


def test_the_three_figures_are_those_of_the_harness_own_model(harness: Harness) -> None:
    """To the last printed digit; one prompt has more tokens than the model has positions, and one has none."""
    ours, our_responses = harness.run(harness.ours, *TASKS)
    theirs, their_responses = harness.run(harness.theirs, *TASKS)
    assert len(ours) == 7 and ours == theirs
    assert our_responses["texts"] == their_responses["texts"]


@pytest.mark.parametrize(("system", "turns"), [(True, True), (False, True), (True, False)])
def test_conversations_are_those_of_the_harness_own_model(
    harness: Harness, system: bool, turns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With examples as turns or in one message, and with a template that takes a system message or refuses it."""
    template = REFUSES_SYSTEM * (not system) + (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for model in (harness.ours, harness.theirs):
        model.tokenizer.chat_template = template
    harness.ours._chat = None
    asked = {"num_fewshot": 1, "system_instruction": "be a fox", "apply_chat_template": True}
    (ours, our_responses), (theirs, their_responses) = (
        harness.run(model, "choices", "texts", **asked, fewshot_as_multiturn=turns)
        for model in (harness.ours, harness.theirs)
    )
    assert ours == theirs and our_responses["texts"] == their_responses["texts"]
    said = "the system message is left out" in " ".join(capsys.readouterr().err.split())
    assert said == (not system)


def test_sampling_keywords_act_or_are_refused(harness: Harness) -> None:
    greedy = harness.run(harness.ours, "texts")[1]
    of_one = {"gen_kwargs": "do_sample=true,temperature=1.0,top_k=1"}
    assert harness.run(harness.ours, "texts", **of_one)[1] == greedy
    drawn = {"gen_kwargs": "do_sample=true,temperature=1.0"}
    first = harness.run(harness.ours, "texts", **drawn)[1]
    assert first != greedy
    harness.ours.batch_size_per_gpu = 1
    assert harness.run(harness.ours, "texts", **drawn)[1] == first  # whatever the batch
    assert harness.run(harness.ours, "texts", gen_kwargs="num_beams=1,temperature=0")[1] == greedy


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"repetition_penalty": 1.3}, "--gen_kwargs repetition_penalty=1.3: decoding takes do_sample"),
        ({"do_sample": True, "temprature": 1}, "Did you mean 'temperature'"),
        ({"do_sample": True, "max_gen_toks": 9}, "takes a temperature above 0"),
        ({"do_sample": True, "temperature": "warm"}, "temperature=warm is not a number"),
        ({"max_gen_toks": 128}, "leaves no room for a prompt: the model has 128 positions"),
    ],
)
def test_keywords_that_are_refused(harness: Harness, options: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        harness.ask(harness.ours, "fox", **options)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ("mode=ar,add_boss_token=true", "--model_args has no 'add_boss_token'; .*Did you mean 'add_bos_token'"),
        ("mode=ar,temperature=1", "temperature: the harness sets it for each task; use --gen_kwargs"),
        ("mode=ar,steps=many", "steps=many is not a number"),
        ("mode=ar,max_length=129", "max_length=129: the model has 128 positions"),
    ],
)
def test_words_of_model_args_that_are_refused(harness: Harness, words: str, needle: str) -> None:
    from nemodiff_train.evaluation.lm_eval import NemodiffLM

    with pytest.raises(UserError, match=needle):
        NemodiffLM.create_from_arg_string(f"checkpoint={harness.folder}/megatron,{words}", {"batch_size": 1})
    with pytest.raises(UserError, match="names no checkpoint"):
        NemodiffLM.create_from_arg_string("mode=ar")


def test_results_say_how_many_tokens_a_forward_made(harness: Harness) -> None:
    harness.ask(harness.ours, "fox", max_gen_toks=5)
    made = harness.ours.get_model_info()
    assert made["mode"] == "ar" and made["tokens_per_forward"] == 1
    assert made["new_tokens"] == sum(made["forwards"].values())


SPELLED = {0: "", 1: "a", 2: "b", 3: "stop", 4: " é"}
SPECIAL = {**SPELLED, 0: "<end>"}


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        ("<end>", [1, 2, 0, 2], "ab"),
        ("<end>b", [1, 2, 0, 2], "ab"),
        ("b<end>", [1, 2, 0, 2], "a"),
        ("st", [1, 0, 2, 3], "ab"),
        ("op", [1, 0, 2, 3], "abst"),
        ("bstop", [1, 0, 4, 2, 0, 3], "a é"),
        ("zz", [1, 0, 2], "ab"),
    ],
)
def test_stop_strings_may_hold_special_tokens(stop: str, tokens: list[int], text: str) -> None:
    settings = DecodingSettings(
        stop_strings=(stop,),
        detokenize=lambda ids: "".join(SPELLED[token] for token in ids),
        detokenize_with_special=lambda ids: "".join(SPECIAL[token] for token in ids),
    )
    if "<end>" in stop:
        assert settings.holds_stop(tokens)
    assert settings.text(tokens) == text


def test_a_special_token_stops_a_request(harness: Harness) -> None:
    """A token that greedy decoding writes is made special; the harness' own model is asked for the same."""
    ours, theirs = harness.ours, harness.theirs
    prompt, token = next(_written_in_ascii(ours))
    for model in (ours, theirs):
        model.tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    before = ours.tokens
    stopped = harness.ask(ours, prompt, max_gen_toks=40, until=[token])
    assert ours.tokens - before < 40
    assert stopped == harness.ask(theirs, prompt, max_gen_toks=40, until=[token])
    assert stopped != harness.ask(ours, prompt, max_gen_toks=40)


def _written_in_ascii(model: Any) -> Iterator[tuple[str, str]]:
    """Yield prompts and a token of ASCII that greedy decoding writes after them, which is none of their own."""
    for prompt in (WORDS[start:] for start in range(len(WORDS))):
        context = torch.tensor([model.tok_encode(prompt)])
        made = model._model_generate(context, context.shape[1] + 40, [], torch.ones_like(context), do_sample=False)
        written = model.tokenizer.convert_ids_to_tokens(
            made[0, context.shape[1] + 2 : context.shape[1] + 30].tolist()
        )
        yield from ((prompt, token) for token in written if token and token.isascii() and token not in prompt)


def test_the_verb_hands_its_arguments_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", lambda self, parsed: seen.append(parsed))
    monkeypatch.setattr(sys, "argv", ["nemodiff"])
    assert main(["lm-eval", "--tasks", "gsm8k", "--model_args", "checkpoint=x"]) == 0
    (parsed,) = seen
    assert (parsed.model, parsed.tasks, parsed.model_args) == ("nemodiff", ["gsm8k"], {"checkpoint": "x"})
    (tmp_path / "own.py").write_text("print('a mode of my own')")
    assert main(["lm-eval", "--extend", str(tmp_path / "own.py"), "--tasks", "gsm8k"]) == 0
    assert seen[1].tasks == ["gsm8k"] and "a mode of my own" in capsys.readouterr().out
