"""Regenerated data sets: against Transformers' greedy generation, in any batch and after any kill."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemodiff_train.cli import main
from nemodiff_train.data.columns import Record
from nemodiff_train.data.messages import Conversation
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding import regeneration
from nemodiff_train.decoding.answers import GeneratedAnswer, UnfinishedAnswers
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.rewriting import ChatRewriter, Request
from nemodiff_train.files import LineLog
from nemodiff_train.sampler.storage import write_sampler
from tests import small
from tests.prepared import one_line, read_back, write_jsonl
from tools.support.ranks import RankPool, World, run_commands

NEW = 16
STOPS = ("r", "J", "z", "Q", "_")
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}\n{{ message.content }}{{ message.tool_calls or '' }}"
    "<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}[assistant\n{% endif %}{{ tools or '' }}"
).replace("<|endoftext|>", small.EOD)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "count"}]}


def asked(text: str, count: int = 1) -> list[dict[str, Any]]:
    """Turns whose answers are to be written again."""
    turns = ({"role": "user", "content": f"{text} {turn}?"} for turn in range(count))
    return [message for turn in turns for message in (turn, {"role": "assistant", "content": "old"})]


TALKS: list[dict[str, Any]] = [
    *({"id": number, "messages": asked(f"how {number}" * (1 + number % 4), 1 + number % 3)} for number in range(14)),
    {"id": 14, "system": "be brief", "messages": asked("fox", 2), "tools": [{"name": "count"}]},
    {"id": 15, "messages": [*asked("one")[:1], CALL, {"role": "tool", "content": "7"}, *asked("lazy", 2)]},
    {"id": 16, "messages": [asked("dog")[0], {"role": "assistant", "content": "old", "weight": 0}, *asked("over")]},
    {"id": 17, "messages": [{"from": "human", "value": "quick?"}, {"from": "gpt", "value": "old"}]},
    {"id": 18, "messages": []},
]


class Greedy:
    """What Transformers' greedy generation writes, up to the first stop."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(str(folder))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def __call__(self, prompt: list[int]) -> tuple[str, bool]:
        """Return the text of prompt and answer, the length of the former's, and whether the answer was ended."""
        mask = self.tokenizer.mask_token_id
        ids = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, suppress_tokens=[mask], pad_token_id=0
        )[0].tolist()
        start = len(self.tokenizer.decode(prompt))
        for end in range(len(prompt) + 1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:end])
            cuts = [cut for stop in (*STOPS, small.EOD) if (cut := text.find(stop, start)) >= 0]
            if cuts:
                return text[: min(cuts)], True
        return self.tokenizer.decode(ids), False

    def talk(self, talk: dict[str, Any]) -> dict[str, Any] | None:
        """Return a conversation with answers of its own."""
        given: list[dict[str, Any]] = [
            {"role": {"human": "user", "gpt": "assistant"}[m["from"]], "content": m["value"]} if "from" in m else m
            for m in talk["messages"]
        ]
        messages, answered = [{"role": "system", "content": "be brief"}] if "system" in talk else [], 0
        for message in given:
            if message["role"] != "assistant":
                messages.append(message)
            elif message is CALL or message.get("weight") == 0:
                messages.append({**message, "weight": 0})
            else:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, tools=talk.get("tools")
                )
                prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                said, ended = self(prompt)
                said = said[len(self.tokenizer.decode(prompt)) :]
                if not ended or not said.strip():
                    while messages and (messages[-1]["role"] != "assistant" or "weight" in messages[-1]):
                        messages.pop()
                    break
                messages.append({"role": "assistant", "content": said})
                answered += 1
        return {**talk, "messages": messages} if answered else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen 3 with a chat template, as Hugging Face and Megatron have it, and conversations."""
    folder = tmp_path_factory.mktemp("regenerate")
    small.qwen3(folder / "hf", max_position_embeddings=256)
    made = load_tokenizer(str(folder / "hf"))
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "hf")
    assert main(["convert", "import", str(folder / "hf"), str(folder / "model"), "--mask-token", small.MASK]) == 0
    write_jsonl(folder / "talks.jsonl", TALKS)
    return folder


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Greedy:
    return Greedy(folder / "hf")


def words(folder: Path, output: Path, *options: str, source: str = "talks.jsonl", chat: bool = True) -> list[str]:
    stops = [word for stop in STOPS for word in ("--stop", stop)]
    given = ["data", "regenerate", str(folder / "model"), str(folder / source), "--output", str(output)]
    return [
        *given,
        *(["--chat"] if chat else []),
        "--max-new-tokens",
        str(NEW),
        "--block-size",
        "8",
        *stops,
        *options,
    ]


@pytest.fixture(scope="module")
def talked(folder: Path) -> Path:
    """Conversations in the model's words, by an undisturbed command of one process."""
    assert main(words(folder, folder / "talked.jsonl")) == 0
    return folder / "talked.jsonl"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_conversations_are_as_transformers_writes_them(talked: Path, greedy: Greedy) -> None:
    """In order, each answer after the model's own earlier ones; what is cut or empty ends a conversation."""
    expected = [talk for talk in map(greedy.talk, TALKS[:-1]) if talk is not None]
    assert rows(talked) == expected
    kept = {row["id"]: len(row["messages"]) for row in expected}
    assert 0 < len(kept) < 18 and any(count < len(TALKS[number]["messages"]) for number, count in kept.items())


def test_prepare_takes_them(folder: Path, talked: Path, tmp_path: Path) -> None:
    """What the model has not written is not learned."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare = ["data", "prepare", str(talked), "--chat", "--tokenizer", str(folder / "hf"), "--workers", "1"]
    assert main([*prepare, "--output", str(tmp_path / "own")]) == 0
    sequences = IndexedDataset(str(tmp_path / "own"))
    tokenizer = load_tokenizer(str(folder / "hf"))
    learned = [tokenizer.decode(sequences[number].tolist()) for number in range(1, len(sequences), 2)]
    written = [m["content"] for row in rows(talked) for m in row["messages"] if m["role"] == "assistant"]
    assert learned == [f"{text}{small.EOD}" for text in written if text not in ("", "old")]


def test_texts_go_on(folder: Path, greedy: Greedy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From their first tokens, or after a prompt in a field; what is cut is marked."""
    texts = [{"text": f"the quick {number} caf\u00e9 \u2028 brown fox", "k": number} for number in range(8)]
    write_jsonl(folder / "texts.jsonl", texts)
    for name, options in (("texts", ("--prompt-tokens", "9")), ("prompts", ("--prompt-field", "text"))):
        output = tmp_path / f"{name}.jsonl"
        assert main(words(folder, output, *options, source="texts.jsonl", chat=False)) == 0
        expected = []
        for row in texts:
            ids = greedy.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            text, ended = greedy(ids[: 9 if name == "texts" else None])
            text = text if ended else text.rstrip("\ufffd")
            expected.append({**row, "text": text, "finish_reason": "stop" if ended else "length"})
        assert rows(output) == expected
        assert {row["finish_reason"] for row in expected} == {"stop", "length"}
    told = capsys.readouterr().err.splitlines()[-1]
    cut = sum(row["finish_reason"] == "length" for row in expected)
    assert "prompts.jsonl: 8 records, 8 answers of" in told and f"; {cut} answers cut after {NEW} tokens" in told
    prepare = ["data", "prepare", str(tmp_path / "texts.jsonl"), "--tokenizer", str(folder / "hf"), "--workers", "1"]
    assert main([*prepare, "--output", str(tmp_path / "own")]) == 0
    assert read_back(tmp_path / "own", str(folder / "hf")) == [row["text"] for row in rows(tmp_path / "texts.jsonl")]


def test_pairs_get_their_answers(folder: Path, greedy: Greedy, tmp_path: Path) -> None:
    """A prompt needs no answer beforehand; its record keeps the rest."""
    pairs = [{"q": f"how {number}?", "n": [number]} for number in range(8)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    fields = "--prompt-field", "q", "--answer-field", "a"
    assert main(words(folder, tmp_path / "pairs.jsonl", *fields, source="pairs.jsonl")) == 0
    talks = [
        greedy.talk({"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant"}]}) for row in pairs
    ]
    expected = [{**row, "a": talk["messages"][1]["content"]} for row, talk in zip(pairs, talks, strict=True) if talk]
    assert rows(tmp_path / "pairs.jsonl") == expected and 0 < len(expected) < len(pairs)


def test_batches_and_processes_change_nothing(folder: Path, talked: Path, ranks: RankPool, tmp_path: Path) -> None:
    """At temperature 0 in any mode, and above it in one."""
    assert main(words(folder, tmp_path / "ar.jsonl", "--batch-size", "3", "--mode", "ar")) == 0
    hot = "--temperature", "1", "--seed", "5"
    assert main(words(folder, tmp_path / "hot.jsonl", "--batch-size", "4", *hot)) == 0
    commands = [words(folder, tmp_path / "two.jsonl"), words(folder, tmp_path / "two-hot.jsonl", *hot)]
    assert ranks.call("two", 2, run_commands, logs=tmp_path, folder=str(tmp_path), commands=commands) == [0, 0]
    contents = {path.stem: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert contents["ar"] == contents["two"] == talked.read_bytes()
    assert contents["hot"] == contents["two-hot"] != talked.read_bytes()


def test_killed_and_resumed(folder: Path, talked: Path, ranks: RankPool, tmp_path: Path) -> None:
    """By SIGKILL to one of two processes, and with a line cut short; what is there is not written again."""
    output = tmp_path / "out.jsonl"
    partial = UnfinishedAnswers(output).folder

    def answers() -> int:
        return sum(path.read_bytes().count(b"\n") for path in partial.glob("answers-*"))

    def kill(world: World) -> None:
        if answers() > 3:
            world.send(1, signal.SIGKILL)

    arguments = {"folder": str(tmp_path), "commands": [words(folder, output, "--batch-size", "1")]}
    world = ranks.start("killed", 2, run_commands, logs=tmp_path, **arguments)
    assert -signal.SIGKILL in ranks.wait(world, during=kill)
    assert not output.exists() and answers() > 3
    log = next(path for path in sorted(partial.glob("answers-*")) if path.stat().st_size)
    os.truncate(log, log.stat().st_size - 5)
    before = answers()
    with pytest.MonkeyPatch.context() as patch:
        added = counted(patch)
        assert main(words(folder, output, "--batch-size", "4")) == 0
    assert output.read_bytes() == talked.read_bytes() and not partial.exists()
    assert added and before + len(added) == total(folder, tmp_path)


def counted(patch: pytest.MonkeyPatch) -> list[GeneratedAnswer]:
    """Return a list that gets every answer that is written from now on."""
    added: list[GeneratedAnswer] = []
    write: Callable[..., None] = LineLog.write

    def add(log: LineLog, lines: Iterable[str]) -> None:
        written = list(lines)
        added.extend(GeneratedAnswer.model_validate_json(line) for line in written if line)
        write(log, written)

    patch.setattr(LineLog, "write", add)
    return added


def total(folder: Path, tmp_path: Path) -> int:
    """Return the number of answers that an undisturbed command writes."""
    with pytest.MonkeyPatch.context() as patch:
        added = counted(patch)
        assert main(words(folder, tmp_path / "again.jsonl")) == 0
    return len(added)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_interrupted_while_publishing(
    folder: Path, talked: Path, tmp_path: Path, moves: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the output is whole, before it is marked, and before it is moved."""
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    left = [moves + 1]  # the first is that of state.json

    def replace(path: Path, target: Path) -> Path:
        if not left[0]:
            raise SystemError
        left[0] -= 1
        return Path(os.replace(path, target) or target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Path, "replace", replace)
        main(words(folder, output, "--overwrite"))
    assert output.read_text() == "old\n"
    with pytest.MonkeyPatch.context() as patch:
        added = counted(patch)
        assert main(words(folder, output, "--overwrite")) == 0
    assert not added and output.read_bytes() == talked.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("written", "said", "content"),
    [
        ("{{ m.content }}", " fox ", " fox "),
        (" {{ m.content }}", " fox ", "fox "),
        ("{{ m.content | trim }}", "\nfox", "fox"),
        ("{{ m.content }}", " \n", ""),
    ],
)
def test_the_template_writes_what_the_model_has_written(folder: Path, written: str, said: str, content: str) -> None:
    """A space that it puts before answers is not doubled."""
    tokenizer = load_tokenizer(str(folder / "hf"))
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ m.role }}}}:{written}{small.EOD}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rewriter = ChatRewriter(tokenizer, ChatTemplate(tokenizer), "messages", None)
    record = Record({}, Conversation(asked("quick"), "here"))
    settings = DecodingSettings(
        detokenize_with_special=lambda ids: str(tokenizer.decode(ids)), stop_token_ids=frozenset([0])
    )
    ids = [*tokenizer(said, add_special_tokens=False)["input_ids"], 0]
    assert rewriter.text(Request(0, record, [], rewriter.prompt(record, [])), ids, settings) == content


def test_what_cannot_be_decoded_is_left_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt without room, and one with a token that the tokenizer has and the model has not."""
    shutil.copytree(folder / "hf", tmp_path / "hf")
    tokenizer = load_tokenizer(str(tmp_path / "hf"))
    tokenizer.add_tokens([f"<{number}>" for number in range(small.VOCABULARY - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path / "hf")
    assert main(["convert", "import", str(tmp_path / "hf"), str(tmp_path / "model"), "--mask-token", small.MASK]) == 0
    texts = ("fox " * 400, f"the {tokenizer.convert_ids_to_tokens(small.VOCABULARY)} quick", "the quick")
    write_jsonl(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    options = ("--prompt-field", "text")
    assert main(words(tmp_path, tmp_path / "o.jsonl", *options, source="long.jsonl", chat=False)) == 0
    assert [row["text"].startswith("the quick") for row in rows(tmp_path / "o.jsonl")] == [True]
    said = "2 records with a prompt that is empty, too long, or of tokens that the model lacks; 2 records left out"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--output", "old.jsonl"), "exists already; name another --output, or replace it with --overwrite"),
        (("--output", "out.json"), "ends in .jsonl"),
        (("--prompt-tokens", "3"), "--prompt-tokens goes without --chat"),
        (("--prompt-field", "q"), "go together"),
        (("--messages-field", "talk"), "no field 'talk'"),
        (("--mode", "linaer"), "unknown mode 'linaer'"),
        (("--prompt-field", "q", "--answer-field", "q"), "are both 'q'; name two fields"),
        (("--batch-size", "0"), "'0' is not a whole number above 0"),
        (("--batch-size", "9" * 30), "is more than 1,000,000,000"),
        (("--nproc", "0"), "--nproc is 0"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
    ],
)
def test_refused_in_one_line(
    folder: Path, tmp_path: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chdir(tmp_path)
    (tmp_path / "old.jsonl").write_text("{}\n")
    assert main(words(folder, Path("out.jsonl"), *options)) == 2
    assert said in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


def test_texts_need_a_prompt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, tmp_path / "out.jsonl", chat=False)) == 2
    assert "say which part of a record is the prompt" in one_line(capsys)
    write_jsonl(folder / "blank.jsonl", [{"text": ""}])
    options = ("--prompt-tokens", "3")
    assert main(words(folder, tmp_path / "out.jsonl", *options, source="blank.jsonl", chat=False)) == 2
    assert "blank.jsonl: no record has a prompt; check --text-field" in one_line(capsys)


def test_bad_records_are_refused_before_anything_is_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(regeneration, "load_decoding_model", load)
    write_jsonl(folder / "bad.jsonl", [TALKS[0], {"messages": "hi"}])
    assert main(words(folder, tmp_path / "out.jsonl", source="bad.jsonl")) == 2
    assert "bad.jsonl:2: not a list of messages" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_answers_of_another_command_are_refused(
    folder: Path, talked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(UnfinishedAnswers, "publish", broken)
        main(words(folder, output, "--seed", "3"))
    capsys.readouterr()
    assert main(words(folder, output)) == 2 and "left by an interrupted command" in one_line(capsys)
    assert main(words(folder, output, "--overwrite")) == 0 and output.read_bytes() == talked.read_bytes()


def broken(*arguments: Any) -> None:
    raise SystemError


def interrupted(folder: Path, output: Path, method: str, *options: str) -> None:
    """Run a command that a method of the unfinished answers ends."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(UnfinishedAnswers, method, broken)
        main(words(folder, output, *options))


def test_a_finished_output_is_that_of_its_own_command(
    folder: Path, talked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted while it was moved into place: another command does not take it for its own."""
    output = tmp_path / "out.jsonl"
    interrupted(folder, output, "move", "--max-new-tokens", "2")
    capsys.readouterr()
    assert main(words(folder, output)) == 2 and "left by an interrupted command" in one_line(capsys)
    assert not output.exists()
    assert main(words(folder, output, "--overwrite")) == 0 and output.read_bytes() == talked.read_bytes()
    interrupted(folder, output, "move", "--overwrite")
    next(UnfinishedAnswers(output).folder.glob("joined.jsonl")).replace(output)  # killed after the move
    output.unlink()  # and somebody has removed it since
    assert main(words(folder, output)) == 0 and output.read_bytes() == talked.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_input_is_not_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by name nor in a directory, where the output of before would be among the inputs."""
    source = write_jsonl(tmp_path / "talks.jsonl", TALKS)
    before = source.read_bytes()
    for given in (source, tmp_path):
        assert main(words(folder, source, "--overwrite", source=str(given))) == 2
        assert "is one of the inputs; name another --output" in one_line(capsys)
        assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_half_a_surrogate_pair_in_another_field_stays(folder: Path, tmp_path: Path) -> None:
    """The text of an answer is written as it is, in a record that UTF-8 cannot hold too."""
    (folder / "half.jsonl").write_text(
        '{"text": "caf\u00e9", "id": "\\ud83d"}\n{"text": "caf\u00e9", "id": "\u00e9"}\n', encoding="utf-8"
    )
    output = tmp_path / "out.jsonl"
    assert main(words(folder, output, "--prompt-field", "text", source="half.jsonl", chat=False)) == 0
    assert [row["id"] for row in rows(output)] == ["\ud83d", "\u00e9"]
    assert "caf\u00e9" in output.read_text(encoding="utf-8").splitlines()[1]


def test_an_answer_to_nothing_is_asked_for_where_the_template_can(folder: Path) -> None:
    """Else the conversation is left out, as by prepare, instead of ending the command."""
    tokenizer = load_tokenizer(str(folder / "hf"))
    record = Record({}, Conversation(asked("quick", 2)[1:], "here"))
    for template, some in ((TEMPLATE, True), (TEMPLATE + "{{ messages[0].role }}", False)):
        tokenizer.chat_template = template
        rewriter = ChatRewriter(tokenizer, ChatTemplate(tokenizer), "messages", None)
        assert rewriter.count(record) == 2
        assert bool(rewriter.prompt(record, [])) == some
    alone = Record({}, Conversation(asked("quick")[1:], "here"))
    assert rewriter.count(alone) == 1 and rewriter.prompt(alone, []) == []


def test_answers_by_another_sampler_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the same name, trained anew since the interruption."""
    sampler, output = tmp_path / "sampler", tmp_path / "out.jsonl"
    options = "--mode", "diffusion", "--policy", "trained", "--sampler", str(sampler), "--max-new-tokens", "1"
    write_sampler(sampler, small.sampler(8, 0.3))
    interrupted(folder, output, "publish", *options)
    shutil.rmtree(sampler)
    write_sampler(sampler, small.sampler(8, 0.4))
    capsys.readouterr()
    assert main(words(folder, output, *options)) == 2
    assert "left by an interrupted command" in one_line(capsys)
