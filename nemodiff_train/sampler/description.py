"""The description in a trained sampler's folder; light to import: a bad folder is refused before anything slow."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train.errors import UserError
from nemodiff_train.schema import checked

DESCRIPTION = "sampler.json"
REMEDY = "train one with 'nemodiff sampler'"

HEAD_SIZE = 64
"""Width of an attention head of the network."""

LARGEST = {"block_size": 65_536, "layers": 64, "width": 8192}
"""The largest sizes of a sampler."""

Probability = Annotated[float, Field(ge=0, le=1)]


class Point(BaseModel):
    """Result of a policy on held-out blocks."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    threshold: Probability = Field(description="Probability from which it unmasked.")
    tokens_per_forward: float = Field(description="Tokens per denoise forward; no prefill, no commits.")
    wrong: float = Field(description="Share of the tokens that it would have got wrong.")


class Description(BaseModel):
    """Content of ``sampler.json``."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    block_size: int = Field(ge=2, le=LARGEST["block_size"], description="Positions of the blocks it was trained on.")
    layers: int = Field(ge=1, le=LARGEST["layers"])
    width: int = Field(ge=HEAD_SIZE, le=LARGEST["width"], multiple_of=HEAD_SIZE)
    features: list[str] = Field(description="Names of the features, in order.")
    threshold: Probability = Field(description="The one that decoding takes unless told otherwise.")
    checkpoint: str = Field(description="The iteration whose decisions it makes.")
    checksum: str = Field(description="Checksum of that iteration.")
    task: str = Field(description="Source of its prompts.")
    trajectories: int = Field(description="Blocks that were decoded to train it.")
    trained: list[Point] = Field(description="On held-out blocks, by threshold.")
    threshold_policy: list[Point] = Field(description="The policy ``threshold`` on the same blocks.")
    oracle: float = Field(
        description="Tokens per denoise forward there if every right token is unmasked, and no other."
    )


def check_sampler(policy: str | None, folder: str | None) -> None:
    """Refuse a trained sampler without its policy, the policy without a sampler, and what is not a sampler.

    Raises:
        UserError: Says which.
    """
    if (policy == "trained") != (folder is not None):
        raise UserError("--policy trained and --sampler DIR go together; give both, or neither")
    if folder is not None:
        describe(Path(folder))


def describe(folder: Path) -> Description:
    """Read the description of the sampler in a folder, and no weights.

    Raises:
        UserError: It holds no sampler, or one that cannot be used here.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise UserError(f"'{folder}' is not a trained sampler; {REMEDY}")
    return checked(Description, file.read_bytes(), file, REMEDY)
