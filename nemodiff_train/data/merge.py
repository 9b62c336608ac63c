"""``nemodiff data merge``: data sets that were prepared side by side become one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemodiff_train.data.manifest import Manifest, Plan, check_files, verify_checksums
from nemodiff_train.data.partial_output import Parts, Totals
from nemodiff_train.data.prepare import check_output, existing
from nemodiff_train.errors import UserError


def merge(shards: Sequence[str], output: str, overwrite: bool = False) -> Manifest:
    """Write the documents of all shards, in their order, as one data set; the shards stay.

    The result is the data set that one command would have prepared of all inputs.

    Args:
        shards: Prefixes of data sets that ``nemodiff data prepare`` made.
        output: Prefix of the result.
        overwrite: Replace a data set that is there.

    Returns:
        The manifest of the result.

    Raises:
        UserError: A shard is missing, damaged or named twice; two were made with different tokenizers; or the
            output cannot be used.  Nothing is left behind then.
    """
    check_output(output)
    manifests = [_read(shard) for shard in shards]
    _check_alike(shards, manifests)
    if any(Path(shard).absolute() == Path(output).absolute() for shard in shards):
        raise UserError(f"--output {output}: one of the shards; choose another name")
    plan = _plan(manifests)
    unfinished = Parts(output, plan, shards)
    if not overwrite and (finished := existing(output, plan, unfinished)):
        return finished
    with unfinished.locked():
        unfinished.restore(overwrite)
        return _write(shards, manifests, output, unfinished)


def _write(shards: Sequence[str], manifests: Sequence[Manifest], output: str, unfinished: Parts) -> Manifest:
    try:
        for shard, manifest in zip(shards, manifests, strict=True):
            verify_checksums(shard, manifest)
        unfinished.adopt([Totals(documents=m.documents, tokens=m.tokens, bytes=m.bytes) for m in manifests])
        return unfinished.publish(np.dtype(manifests[0].dtype).type)
    except UserError:
        unfinished.discard()
        raise
    except OSError as error:
        unfinished.discard()
        raise UserError(f"{output}: {error}; the same command starts again") from error


def _read(shard: str) -> Manifest:
    manifest = Manifest.read(shard)
    if manifest is None:
        raise UserError(f"{shard}.json: no such manifest; only what 'nemodiff data prepare' has finished is merged")
    check_files(shard, manifest)
    return manifest


def _check_alike(shards: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Refuse a shard that occurs twice, and those whose tokens mean something else than the first one's."""
    if twice := [shard for number, shard in enumerate(shards) if shard in shards[:number]]:
        raise UserError(f"{twice[0]}: named twice; its documents would be in the result twice")
    for shard, manifest in zip(shards, manifests, strict=True):
        if not manifest.same_tokens(manifests[0]) or manifest.dtype != manifests[0].dtype:
            raise UserError(
                f"{shard}: prepared with another tokenizer, end-of-document token or chat template than {shards[0]}; "
                "prepare them alike"
            )


def _plan(manifests: Sequence[Manifest]) -> Plan:
    """What one command for all inputs would have been."""
    first = manifests[0]
    return Plan(
        tokenizer=first.tokenizer,
        eod_token_id=first.eod_token_id,
        chat_template=first.chat_template,
        text_field=", ".join(dict.fromkeys(manifest.text_field for manifest in manifests)),
        inputs=[source for manifest in manifests for source in manifest.inputs],
    )
