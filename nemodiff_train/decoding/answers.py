"""The answers of a regeneration that has not finished: written as they are made, taken over by a repetition.

A hidden folder beside the output holds ``state.json``, which says what the answers depend on, and one log per
data-parallel replica.  A line that was cut short is decoded again.
"""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

from megatron.core import parallel_state
from pydantic import BaseModel, Field, JsonValue, NonNegativeInt, ValidationError

from nemodiff_train.distributed import barrier, is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import LineLog, replace_atomic, usable_directory, write_atomic
from nemodiff_train.schema import checked

Settings = dict[str, JsonValue]
End = Literal["stop", "length", "empty"]
"""How an answer ended: at a stop token or text, at the limit, or without text."""


def log_of_replica(folder: Path, name: str) -> Path | None:
    """Return the log of this rank's data-parallel replica, or None on a rank beside the one that writes it.

    Args:
        folder: Where it is.
        name: Begins its name, before the number of the replica.
    """
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    return folder / f"{name}-{parallel_state.get_data_parallel_rank()}.jsonl" if ranks == (0, 0) else None


class GeneratedAnswer(BaseModel):
    """An answer that the model has written to a record."""

    record: NonNegativeInt
    """Number of the record among those of all inputs that are not left out."""
    turn: NonNegativeInt
    """Number of the answer in its record."""
    text: str
    tokens: NonNegativeInt
    """New tokens, the stop token included."""
    end: End


class _State(BaseModel):
    settings: Settings
    started: datetime = Field(default_factory=datetime.now)
    joined: bool = False
    """Whether the output is complete, here or in its place."""


class UnfinishedAnswers:
    """The folder of one output.

    Args:
        output: The file that the answers are for.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f".{output.name}.partial")
        self._output = output
        self._joined = self.folder / "joined.jsonl"
        self._state: _State | None = self._stored()

    def _stored(self) -> _State | None:
        path, remedy = self.folder / "state.json", f"remove the directory {self.folder} to start afresh"
        return checked(_State, path.read_bytes(), path, remedy) if path.is_file() else None

    def _save(self, state: _State) -> None:
        usable_directory(self.folder)
        write_atomic(self.folder / "state.json", state.model_dump_json())

    @property
    def joined(self) -> bool:
        """Whether a command has been interrupted that had nothing left to do but move its output into place."""
        return self._state is not None and self._state.joined

    def is_complete(self, settings: Settings) -> bool:
        """Return whether that command had these settings, and its output is there, here or in its place."""
        exists = self._joined.exists() or self._output.exists()
        return self._state is not None and self._state.joined and self._state.settings == settings and exists

    def check(self, settings: Settings, overwrite: bool) -> None:
        """Refuse what another command has left.

        Args:
            settings: All that the answers depend on.
            overwrite: Whether it is to be dropped instead.

        Raises:
            UserError: Names the folder.
        """
        if self._state is not None and self._state.settings != settings and not overwrite:
            raise UserError(
                f"{self.folder}: left by an interrupted command with another checkpoint, other inputs or other "
                "options; repeat that command, or start afresh with --overwrite"
            )

    def begin(self, settings: Settings) -> datetime:
        """Take over what an earlier start of this command has left, or drop that of another; every rank calls this.

        Args:
            settings: All that the answers depend on.

        Returns:
            When the command was started first.
        """
        barrier()  # every rank has read the state
        # Joined, and yet to begin: somebody has removed the output.
        if is_main_process() and (self._state is None or self._state.settings != settings or self._state.joined):
            self.discard()
            self._save(_State(settings=settings))
        barrier()
        self._state = self._stored()
        assert self._state is not None
        return self._state.started

    def logs(self) -> list[Path]:
        """Return the logs of all replicas, of this start and of earlier ones."""
        return sorted(self.folder.glob("answers-*.jsonl"))

    def log(self) -> LineLog:
        """Return the log of this rank's replica."""
        return LineLog(log_of_replica(self.folder, "answers"))

    def publish(self, lines: Iterable[str]) -> None:
        """Write the lines of the output, move it into place and remove the folder."""
        draft = self.folder / "draft.jsonl"
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        replace_atomic(draft, self._joined)
        assert self._state is not None
        self._save(self._state.model_copy(update={"joined": True}))
        self.move()

    def move(self) -> None:
        """Move the finished output into place, if it is not there, and remove the folder."""
        if self._joined.exists():
            replace_atomic(self._joined, self._output)
        self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class AnswerIndex:
    """Finds a record's answers in the logs; their texts stay on the disk.

    Args:
        logs: Files that no process is writing.
    """

    def __init__(self, logs: Iterable[Path]) -> None:
        self._files = [path.open("rb") for path in logs]
        self._lines: dict[int, dict[int, tuple[int, int]]] = {}  # record -> turn -> file and offset of the line
        for number, file in enumerate(self._files):
            offset = 0
            for line in file:
                with suppress(ValidationError):  # the rest of a line that was cut short
                    answer = GeneratedAnswer.model_validate_json(line)
                    self._lines.setdefault(answer.record, {})[answer.turn] = (number, offset)
                offset += len(line)

    def __len__(self) -> int:
        """Return the number of answers."""
        return sum(map(len, self._lines.values()))

    def answers_of_record(self, record: int) -> list[GeneratedAnswer]:
        """Return the answers of a record, in their order, each once."""
        lines, answers = self._lines.get(record, {}), []
        for number, offset in (lines[turn] for turn in sorted(lines)):
            self._files[number].seek(offset)
            answers.append(GeneratedAnswer.model_validate_json(self._files[number].readline()))
        return answers
