"""The records of an evaluation that has not finished: written as they are made, taken over by a repetition."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ValidationError

from nemodiff_train.decoding.answers import log_of_replica
from nemodiff_train.decoding.loading import DecodingModel
from nemodiff_train.evaluation.prompts import Task
from nemodiff_train.evaluation.records import DecodeRecord, Settings
from nemodiff_train.evaluation.settings import EvaluationSettings
from nemodiff_train.files import LineLog, usable_directory


class _Line(BaseModel):
    """One prompt that has been decoded."""

    evaluation: Settings
    """Everything that the continuation depends on, besides the mode, its settings and the prompt."""
    mode: str
    settings: Settings
    decoded: DecodeRecord


class UnfinishedRecords(LineLog):
    """The log of one data-parallel replica.

    A repetition of the same evaluation reads the earlier logs of all replicas, whose number may have been another.
    Lines of another evaluation are passed over, and a line that was cut short is decoded again.

    Args:
        output: Folder of the report.
        loaded: The model, whose parallel groups exist.
        task: Prompts.
        evaluation_settings: Whether prompts are put into a chat template.
        weights: Says by its contents what decodes.
    """

    def __init__(
        self, output: Path, loaded: DecodingModel, task: Task, evaluation_settings: EvaluationSettings, weights: str
    ) -> None:
        self._output = output
        decoding = {name: str(value) for name, value in sorted(vars(loaded.settings).items()) if not callable(value)}
        prompts = "\0".join(prompt.prompt for prompt in task.prompts)
        self._evaluation: Settings = {
            "weights": weights,
            "task": task.name,
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            "chat": evaluation_settings.chat,
            "decoding": json.dumps(decoding),
        }
        self._earlier: list[_Line] = []  # of this evaluation
        for text in (text for path in self._logs() for text in path.read_bytes().splitlines()):
            with contextlib.suppress(ValidationError):  # the end of a log that was cut short
                if (line := _Line.model_validate_json(text)).evaluation == self._evaluation:
                    self._earlier.append(line)
        super().__init__(log_of_replica(usable_directory(output), "unfinished"))

    def records_of_mode(self, mode: str, settings: Settings) -> list[DecodeRecord]:
        """Return the earlier records of a mode with its settings, in the order of the prompts, each once."""
        records = [line.decoded for line in self._earlier if (line.mode, line.settings) == (mode, settings)]
        by_prompt = {record.prompt_index: record for record in records}
        return [by_prompt[index] for index in sorted(by_prompt)]

    def add(self, mode: str, settings: Settings, records: Iterable[DecodeRecord]) -> None:
        """Write records."""
        make = partial(_Line, evaluation=self._evaluation, mode=mode, settings=settings)
        self.write(make(decoded=record).model_dump_json() for record in records)

    def remove(self) -> None:
        """Remove the logs of all replicas, when the report has what they hold."""
        for path in self._logs():
            path.unlink()

    def _logs(self) -> list[Path]:
        return sorted(self._output.glob("unfinished-*.jsonl"))
