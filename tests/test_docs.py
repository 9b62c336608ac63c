"""The documentation says what the program does: commands parse, options exist, links and names lead somewhere."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

from nemodiff_train.cli import VERBS, build_parser, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_OWN_FILE = re.compile(r"`((?:nemodiff_train|recipes|tests|tools)/[\w./-]*)`")
_MACHINE_PATH = re.compile(r"(?<![\w.~:/])/(?:home|mnt|root|tmp|Users|work)\b")
_REGISTRY = re.compile(r"pypi\.|pythonhosted|anaconda\.|npmjs|nvcr\.|ngc\.|index-url")


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _BLOCK.findall(page.read_text()) if language in languages]


def commands() -> list[list[str]]:
    """The words after ``nemodiff`` of every command line, whether started alone or by torchrun."""
    found = []
    for page in PAGES:
        for body in blocks(page, "bash", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["nemodiff"]:
                    found.append(words[1:])
                elif words[:1] == ["torchrun"]:
                    found.append(words[words.index("nemodiff_train") + 1 :])
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leaf_options(parser: argparse.ArgumentParser) -> set[str]:
    """Long options of a parser and of its sub-commands."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= leaf_options(sub)
    return found - {"--help", "--version"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_parses(words: list[str]) -> None:
    if words == ["--version"]:
        return
    assert parse(words).verb == words[0]


def batch_lines() -> list[tuple[str, list[str]]]:
    """Script and words of every job that docs/cluster.md names, in its table, its chain and its text."""
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    found = re.findall(r"slurm/(train|task)\.sbatch ([^`\n]+)", text)
    return [(script, shlex.split(re.sub(r"(: any recipe.*|\.\.\.)", "", words))) for script, words in found]


@pytest.mark.parametrize(("script", "words"), batch_lines(), ids=str)
def test_batch_line_parses(script: str, words: list[str]) -> None:
    if script == "train":
        assert parse(["train", *words]).settings
    else:
        assert parse(words).verb == words[0]


def test_every_verb_is_shown() -> None:
    assert {words[0] for words in commands()} >= set(VERBS)


@pytest.mark.parametrize(
    ("verb", "page"),
    [
        ("data", "data.md"),
        ("eval", "evaluation.md"),
        ("generate", "evaluation.md"),
        ("sampler", "evaluation.md"),
        ("convert", "conversion.md"),
    ],
)
def test_every_option_is_described(verb: str, page: str) -> None:
    described = set(re.findall(r"`(--[\w-]+)", (ROOT / "docs" / page).read_text()))
    shown = {word for words in commands() for word in words}
    assert leaf_options(build_parser(verb)) <= described | shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    for name in _OWN_FILE.findall(page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_import_what_exists(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nemodiff_train"):
                assert {name.name for name in node.names} <= defined_in(node.module), node.module


def defined_in(module: str) -> set[str]:
    """Names at the top of a module of ours, read without importing it."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names | {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize(
    ("section", "file"),
    [("objective", "objective/config.py"), ("dataset", "config/datasets.py"), ("resilience", "config/run.py")],
)
def test_named_settings_exist(section: str, file: str) -> None:
    tree = ast.parse((ROOT / "nemodiff_train" / file).read_text())
    fields = {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for page in PAGES:
        assert set(re.findall(rf"\b(?<!\.){section}\.(?!md\b)(\w+)", page.read_text())) <= fields, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_belongs_to_one_machine(page: Path) -> None:
    for line in page.read_text().splitlines():
        assert not _MACHINE_PATH.search(line), line
        assert not _REGISTRY.search(line), line
