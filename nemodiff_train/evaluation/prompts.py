"""A prompt set with answers, and the rule that scores a model's text."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train.evaluation.scorers import Scorer


class Prompt(BaseModel):
    """One prompt as the model reads it, and the answer that its continuation is scored against."""

    model_config = ConfigDict(frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    category: str | None = None


@dataclass(frozen=True)
class Task:
    """A named prompt set and the rule that scores it."""

    name: str
    prompts: list[Prompt]
    scorer: Scorer | None = None
    """None where prompts have no answers, or where a subclass scores."""

    def score(self, prompt_index: int, text: str) -> bool | None:
        """Return whether ``text`` answers the prompt at ``prompt_index``; None if it has no answer."""
        answer = self.prompts[prompt_index].answer
        return None if answer is None or self.scorer is None else self.scorer(text, answer)
