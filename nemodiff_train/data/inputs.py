"""The options that say what is read: shared by the commands that take records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemodiff_train.data.columns import AnswerColumns, Columns, Document, MessagesColumn, TextColumn
from nemodiff_train.data.sources import Source, resolve
from nemodiff_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """The arguments of ``nemodiff data prepare`` that name its inputs, and what is read of them."""

    inputs: list[str]
    text_field: str | None = None
    split: str | None = None
    glob: str | None = None
    chat: bool = False
    messages_field: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UserError: Names the option.
        """
        pair = [self.prompt_field is not None, self.answer_field is not None]
        if any(pair) and not all(pair) and (self.chat or not pair[0]):
            raise UserError("--prompt-field and --answer-field go together")
        if (self.messages_field or self.answer_field) is not None and not self.chat:
            raise UserError("--messages-field, --prompt-field and --answer-field go with --chat")
        if self.prompt_field is not None and self.prompt_field == self.answer_field:
            raise UserError(f"--prompt-field and --answer-field are both '{self.prompt_field}'; name two fields")
        if self.messages_field is not None and self.prompt_field is not None:
            raise UserError("--messages-field and --prompt-field both say where answers are; give one of them")
        if self.text_field is not None and self.chat:
            raise UserError("--text-field goes without --chat")

    def columns(self, template: str | None) -> Columns[Document]:
        """Return the fields to take from a record.

        Args:
            template: Source of the chat template; None without ``chat``.
        """
        if not self.chat:
            return TextColumn(self.text_field or "text")
        if self.prompt_field and self.answer_field:
            return AnswerColumns(self.prompt_field, self.answer_field, template)
        return MessagesColumn(self.messages_field or "messages", template)

    def sources[Item](self, columns: Columns[Item]) -> Sequence[Source[Item]]:
        """Find the inputs, without reading documents.

        Raises:
            UserError: One cannot be read, or an option applies to none of them.
        """
        sources = resolve(self.inputs, columns, self.split or "train", self.glob or "*")
        if self.text_field is not None and not any(source.has_records for source in sources):
            raise UserError(f"--text-field {self.text_field}: the inputs are texts, without fields; leave it out")
        if self.split is not None and not any(source.info.split for source in sources):
            raise UserError(f"--split {self.split}: the inputs are files, without splits; leave it out")
        if self.glob is not None and not any(Path(name).is_dir() for name in self.inputs):
            raise UserError(f"--glob {self.glob}: no input is a directory; leave it out")
        return sources
