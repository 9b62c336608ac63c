"""What is in a user's records and tokenizer is learned as it was meant, refused, or named with a count."""

import gzip
import json
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemodiff_train.cli import main
from nemodiff_train.data import partial_output, prepare
from nemodiff_train.data.chat import ChatEncoder, end_of_turn_id
from nemodiff_train.data.columns import AnswerColumns, MessagesColumn, TextColumn
from nemodiff_train.data.indexed import IndexedDataset
from nemodiff_train.data.messages import Conversation
from nemodiff_train.data.sources import documents, resolve
from nemodiff_train.data.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from nemodiff_train.demo.tokenizer import byte_level_bpe
from nemodiff_train.errors import UserError
from tests.prepared import one_line, read_back, run, write_jsonl

SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|bot|>", "<|end|>"]
TEXTS = ["the cat sat on the mat\n  and so  on", "What is 2 + 2? It is 4.", "Oslo is cold, Rome is warm"] * 20
TURNS = (
    "{% if tools %}{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}"
    "{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% else %}{{ eos_token if ends }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "cold"},
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "warm"},
]


def saved(folder: Path, kind: str, template: str = TURNS, **config: Any) -> str:
    """Save a tokenizer: ``bytes``, or ``words`` with a space before every text as SentencePiece has it."""
    backend = byte_level_bpe(TEXTS, 700, SPECIAL)
    if kind == "words":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
        backend.train_from_iterator(TEXTS, trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(described))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template, **config}))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: saved(folder / kind, kind) for kind in ("bytes", "words")}


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("class_name", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_ids_are_those_of_the_file_whatever_class_is_named(tmp_path: Path, kind: str, class_name: str) -> None:
    folder = saved(tmp_path / "one", kind, tokenizer_class=class_name, added_tokens_decoder={})
    told, loaded = Tokenizer.from_file(f"{folder}/tokenizer.json"), load_tokenizer(folder)
    for text in ("the cat  sat\n\n on\tit", " so", "caf\u00e9<|end|> warm"):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == told.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids) == told.decode(ids, skip_special_tokens=False)
    assert loaded("so")["input_ids"][0] == 0 and vocabulary_size(loaded) == told.get_vocab_size()
    loaded.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "again"))) == tokenizer_fingerprint(loaded)


def test_tokens_of_the_configuration_alone_are_added(tmp_path: Path) -> None:
    more = {"content": "<|more|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = Tokenizer.from_file(f"{saved(tmp_path / 'plain', 'bytes')}/tokenizer.json").get_vocab_size()
    added = {str(size): {**more, "single_word": False}}
    folder = saved(tmp_path / "one", "bytes", tokenizer_class="LlamaTokenizerFast", added_tokens_decoder=added)
    assert load_tokenizer(folder)("so<|more|>", add_special_tokens=False)["input_ids"][-1] == size
    loaded = load_tokenizer(folder)
    assert isinstance(loaded.added_tokens_decoder[size], AddedToken)


def turns(tokenizer: Any, *talk: Any, **given: Any) -> list[list[list[int]]]:
    """The ids of the sequences of each document that a conversation becomes."""
    encoder = ChatEncoder(tokenizer, end_of_turn_id(tokenizer, None))
    encoded = encoder((Conversation(list(talk), "talk", **given),))
    return [
        [part.tolist() for part in np.split(document.tokens, np.cumsum(document.lengths)[:-1])]
        for document in encoded.documents
    ]


def joined(parts: list[list[int]]) -> list[int]:
    return [id for part in parts for id in part]


def asked(tokenizer: Any, talk: list[Any]) -> list[int]:
    """What decoding reads."""
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("ends", [False, True])
def test_turns_are_pieces_of_one_tokenized_text(
    tokenizers: dict[str, str], kind: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No turn begins with a space that nobody wrote; an end of the whole text is not an end of turn."""
    tokenizer = load_tokenizer(tokenizers[kind])
    monkeypatch.setattr(tokenizer, "chat_template", "{% set ends = " + str(ends).lower() + " %}" + TURNS)
    (document,) = turns(tokenizer, *TALK)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    ids = tokenizer(whole.removesuffix("</s>").removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert joined(document) == ids
    assert document[0] == asked(tokenizer, TALK[:1]) and joined(document[:3]) == asked(tokenizer, TALK[:3])
    assert [tokenizer.decode(document[turn]) for turn in (1, 3)] == ["cold<|end|>", "warm<|end|>"]


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize(("before", "answer"), [("Answer: ", "warm"), ("Answer:", "\n\nwarm"), ("  ", " 4 so")])
def test_a_token_across_the_border_leaves_the_prompt_as_decoding_reads_it(
    tokenizers: dict[str, str], kind: str, before: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    said = "{% for m in messages %}{{ m.content if m.role == 'user' else start + m.content }}<|end|>{% endfor %}"
    template = f"{{% set start = '{before}' %}}{said}{{% if add_generation_prompt %}}{{{{ start }}}}{{% endif %}}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = [TALK[0], {"role": "assistant", "content": answer}, TALK[2], {"role": "assistant", "content": answer}]
    found = turns(tokenizer, *talk)
    assert sum(map(len, found)) == 4
    for document in found:
        for number in range(0, len(document), 2):
            history = joined(document[: number + 1])
            assert history in (asked(tokenizer, talk[:1]), asked(tokenizer, talk[:3]))
            assert tokenizer.decode(history + document[number + 1]).endswith(f"{before}{answer}<|end|>")


def test_marked_turns_are_read_and_not_learned(tokenizers: dict[str, str]) -> None:
    tokenizer = load_tokenizer(tokenizers["bytes"])
    (document,) = turns(tokenizer, *TALK, ignored=frozenset([1]))
    assert [tokenizer.decode(turn) for turn in document] == [
        "<|user|>\nOslo?<|end|>\n<|bot|>\ncold<|end|>\n<|user|>\nRome?<|end|>\n<|bot|>\n",
        "warm<|end|>",
    ]


def read(path: Path, *, template: str | None = TURNS, columns: Any = None) -> tuple[list[Any], dict[str, Any]]:
    """The documents of a file, and what is told of the rest."""
    columns = columns or MessagesColumn("messages", template)
    found = list(documents(resolve([str(path)], columns, "train", "*")))
    return found, {kind: dict(counts) for kind, counts in columns.notes._counts.items()}


def one(tmp_path: Path, record: dict[str, Any], **given: Any) -> tuple[Conversation, dict[str, Any]]:
    found, told = read(write_jsonl(tmp_path / "one.jsonl", [record]), **given)
    (conversation,) = found
    return conversation, told


def test_public_shapes_of_conversations(tmp_path: Path) -> None:
    """ShareGPT, OpenAI's parts and arguments, tools and messages as JSON, a system prompt beside the messages."""
    plain = one(tmp_path, {"messages": TALK})[0].messages
    parts = [
        {**m, "content": [{"type": "text", "text": m["content"][:2]}, {"type": "text", "text": m["content"][2:]}]}
        for m in TALK
    ]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    for messages in (parts, sharegpt, json.dumps(TALK), [{**m, "name": None, "tool_calls": None} for m in TALK]):
        assert one(tmp_path, {"messages": messages})[0].messages == plain
    given, _ = one(tmp_path, {"messages": TALK, "system": "be brief"})
    assert given.messages == [{"role": "system", "content": "be brief"}, *plain]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    called = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        TALK[1],
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}}]
    for form in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        given, told = one(tmp_path, {"messages": called, "tools": form})
        assert given.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        assert given.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}  # type: ignore[index]
        assert given.messages[1]["content"] == "" and not told


def test_arrow_and_json_lines_give_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    given = ({"city": {"name": "Oslo"}}, {"sum": [{"a": 1}, {"b": 2}]}, {"city": {"land": "Italy"}})
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in given]
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": called}]} for called in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines, told = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    arrow, told_of_arrow = read(tmp_path / "rows.parquet")
    assert [c.messages for c in lines] == [c.messages for c in arrow]
    assert not told and told_of_arrow["null values inside messages, taken for Arrow's filling"] == {"tool_calls": 3}


def test_what_is_not_used_is_counted(
    tmp_path: Path, tokenizers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"role": "assistant", "content": "cold", "reasoning_content": "hm", "weight": 1}
    rows: list[Any] = [
        {"messages": [TALK[0], answer, TALK[0]], "source": "s", "chosen": None},
        {"messages": [TALK[0], {"role": "assistant", "content": " "}], "source": "t"},
        {"messages": [TALK[0], {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": None}, TALK[1]]},
        {"messages": [TALK[0], {**TALK[1], "train": False}]},
        {"messages": []},
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert run(source, tokenizers["bytes"], tmp_path / "out", "--chat") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "fields of records that are not read: source (2); first in" in said and "rows.jsonl:1" in said
    assert "chat template does not read: reasoning_content (1)" in said
    assert "messages after the last answer, which are not used: of role 'user' (1)" in said
    assert "a message without text (3)" in said and "no messages (1)" in said
    assert "every answer is marked as not trained on (1)" in said
    pairs = [{"q": "a?", "a": "b", "input": "c"}, {"q": "a?", "a": None, "input": None}]
    columns = AnswerColumns("q", "a")
    assert read(write_jsonl(tmp_path / "pairs.jsonl", pairs), columns=columns)[1] == {
        "fields of records that are not read": {"input": 1},
        "records left out": {"no text": 1},
    }
    _, told = one(tmp_path, {"messages": TALK[:2], "tools": [{"name": "f"}]}, template="{{ messages }}")
    assert told == {"keys of messages that the chat template does not read": {"tools (beside the messages)": 1}}


def test_parts_that_a_template_names_and_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A role that it does not know, and a key that it reads of something else."""
    known = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|user|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    folder = saved(tmp_path / "tokenizer", "bytes", known)
    extra = {"role": "tool", "content": "rain"}
    called = {**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [{"messages": [{**TALK[0], "name": "Bob"}, called, extra, TALK[3]]}, {"messages": TALK}] * 30
    assert run(write_jsonl(tmp_path / "rows.jsonl", rows), folder, tmp_path / "out", "--chat") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "does not read: name of role 'user' (30), content of role 'tool' (30);" in said


def test_the_template_for_tools_and_answers_to_nothing(tmp_path: Path) -> None:
    """Of several templates it is Transformers' choice; an answer with an empty prompt has nothing to follow from."""
    named = [{"name": "default", "template": TURNS.replace("tools", "none")}, {"name": "tool_use", "template": TURNS}]
    tokenizer = load_tokenizer(saved(tmp_path / "one", "bytes", named))  # type: ignore[arg-type]
    (document,) = turns(tokenizer, *TALK, tools=[{"name": "f"}])
    assert tokenizer.decode(document[0]).startswith('[{"name": "f"}]<|end|>')
    assert turns(tokenizer, *TALK)[0][0] == asked(tokenizer, TALK[:1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    for template in (tokenizer.chat_template, TURNS + "{{ messages[0].role }}"):  # the second takes no empty list
        tokenizer.chat_template = template
        encoder = ChatEncoder(tokenizer, end_of_turn_id(tokenizer, None))
        assert encoder((Conversation(TALK[1:], "talk"),)).left_out == {"an answer with nothing before it": 1}


def test_two_values_for_one_thing_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, text, columns in (
        ("a.jsonl", '{"text": "a", "text": "b"}', TextColumn("text")),
        ("b.json", '[{"text": "a", "text": "b"}]', TextColumn("text")),
        ("c.jsonl", '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', None),
    ):
        (tmp_path / name).write_text(text + "\n")
        with pytest.raises(UserError, match=rf"{name}.*occurs twice"):
            read(tmp_path / name, columns=columns)
    with pytest.raises(UserError, match="two system prompts"):
        one(tmp_path, {"messages": TALK, "system": "a", "system_prompt": "b"})
    assert one(tmp_path, {"messages": TALK, "system": "a", "system_prompt": "a"})[0].messages[0]["content"] == "a"
    for mark in ("weight", "training", "loss_mask"):
        row = {"messages": TALK, mark: 0}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
        for file in (tmp_path / "rows.parquet", write_jsonl(tmp_path / "rows.jsonl", [row])):
            with pytest.raises(UserError, match=f"'{mark}' is 0"):
                read(file)


def test_an_end_that_is_not_read_behind_a_letter_is_refused(tokenizers: dict[str, str]) -> None:
    tokenizer = load_tokenizer(tokenizers["bytes"])
    assert end_of_turn_id(tokenizer, None) == tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.add_tokens([AddedToken("<|end|>", single_word=True)], special_tokens=True)
    with pytest.raises(UserError, match=r"'<.end.>' ends an answer, .* remove its single_word"):
        end_of_turn_id(tokenizer, None)


def test_one_date_for_all_conversations_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the run that began it, however often it is continued."""
    folder = saved(tmp_path / "dated", "bytes", "{{ strftime_now('%Y') + ' ' }}" + TURNS)
    source = write_jsonl(tmp_path / "talks.jsonl", [{"messages": TALK[:2]}] * 100)
    words = ["data", "prepare", str(source), "--chat", "--tokenizer", folder, "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(partial_output, "CHUNK_BYTES", 1)
        patch.setattr(prepare, "documents", lambda sources: chain(islice(documents(sources), 70), [None]))
        with pytest.raises(AttributeError):  # the None, after a chunk
            main([*words, "--workers", "1"])
    state = json.loads((tmp_path / "out.partial/state.json").read_text())
    (tmp_path / "out.partial/state.json").write_text(json.dumps({**state, "started": "2001-02-03T04:05:06"}))
    assert main([*words, "--workers", "1"]) == 0
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.decode(tokens) for tokens in IndexedDataset(str(tmp_path / "out"))][::2]
    assert prompts[0].startswith(str(datetime.now().year)) and prompts[-1].startswith("2001")


def test_an_answer_that_the_template_drops_is_left_out(tokenizers: dict[str, str]) -> None:
    tokenizer = load_tokenizer(tokenizers["bytes"])
    talk = [TALK[0], {"role": "assistant", "content": "", "reasoning_content": "hm"}]
    encoded = ChatEncoder(tokenizer, end_of_turn_id(tokenizer, None))((Conversation(talk, "talk"),))
    assert not encoded.documents and sum(encoded.left_out.values()) == 1


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "assistant", "content": {"text": "x"}}, "of type dict"),
        ({"role": "assistant", "content": 3}, "of type int"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "'weight' of a message is 0.5"),
        ({"role": "user", "content": "x", "train": True}, "only answers are"),
        ({"role": "gpt", "content": "x"}, "rename it to 'assistant'"),
        ({"from": "function_call", "value": "{}"}, "rename it to 'assistant'"),
        ({"role": "assistant", "content": "x", "train_detail": []}, "'train_detail'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, "not a JSON object"),
    ],
)
def test_what_cannot_be_learned_as_meant_is_refused(tmp_path: Path, message: Any, said: str) -> None:
    with pytest.raises(UserError, match=r"one\.jsonl:1: ") as refusal:
        one(tmp_path, {"messages": [*TALK[:2], message]})
    assert said in str(refusal.value)


@pytest.mark.parametrize("record", [{"weight": 0}, {"train": False}, {"tools": 3}, {"system": {"a": 1}}])
def test_fields_beside_the_messages_are_used_or_refused(tmp_path: Path, record: Any) -> None:
    with pytest.raises(UserError, match=r"one\.jsonl:1: "):
        one(tmp_path, {"messages": TALK, **record})


def test_records_by_content_not_by_name(tmp_path: Path) -> None:
    """A list, a record per line, one object; marks of byte order, Windows' line ends, compression."""
    rows = [{"text": "one", "id": 1}, {"text": "two\r\n", "id": 2}]
    lines = "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n"
    contents = {
        "a.json": json.dumps(rows).encode(),
        "b.json": b"\xef\xbb\xbf" + lines.encode(),
        "c.json": json.dumps(rows, indent=2).encode(),
        "d.ndjson": lines.encode(),
        "e.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "f.jsonl.gz": gzip.compress(lines.encode()),
        "g.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found, told = read(tmp_path / name, columns=TextColumn("text"))
        assert found == ["one", "two\r\n"], name
        assert told == {"fields of records that are not read": {"id": 2}}
    (tmp_path / "h.json").write_text(json.dumps(rows[0], indent=2))
    assert read(tmp_path / "h.json", columns=TextColumn("text"))[0] == ["one"]
    for name, content in {
        "lines": lines.encode(),
        "a.txt": lines.encode(),
        "a.csv": b"text,id\none,1\n",
        "a.zip": b"PK",
        "b.jsonl.gz": b"no",
        "c.jsonl.gz": gzip.compress(lines.encode())[:20],
        "d.json": b'{"version": 1, "data": []}',
        "e.json": b'[{"text": "a"}, 3]',
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read(tmp_path / name, columns=TextColumn("text"))


def test_links_in_a_corpus_are_read_or_named(tokenizers: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("two")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "linked").symlink_to("../elsewhere", target_is_directory=True)
    assert read(folder, columns=TextColumn("text"))[0] == ["one", "two"]
    for target, said in (("nowhere", "leads nowhere"), ("../elsewhere/up", "it is in")):
        if said == "it is in":
            (tmp_path / "elsewhere" / "up").symlink_to("../corpus", target_is_directory=True)
        link = folder / ("z.txt" if said == "leads nowhere" else "z")
        link.symlink_to(target)
        with pytest.raises(UserError, match=said):
            read(folder, columns=TextColumn("text"))
        link.unlink()


def test_options_that_cannot_act_are_refused(
    tokenizers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one")
    for options, said in (
        (("--text-field", "body"), "without fields"),
        (("--split", "test"), "without splits"),
        (("--glob", "*.py"), "no input is a directory"),
        (("--messages-field", "talk"), "go with --chat"),
        (("--text-field", "body", "--chat"), "goes without --chat"),
    ):
        assert run(tmp_path / "a.txt", tokenizers["bytes"], tmp_path / "out", *options) == 2
        assert said in one_line(capsys)
    assert run(tmp_path / "a.txt", tokenizers["words"], tmp_path / "out") == 0
    assert len(read_back(tmp_path / "out", tokenizers["words"])) == 1
