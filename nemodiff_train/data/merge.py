"""Join data sets that were prepared side by side."""

from collections.abc import Sequence
from pathlib import Path

from nemodiff_train.data.manifest import Manifest, Provenance
from nemodiff_train.data.partial_output import Chunk, ChunkSize, PartialOutput
from nemodiff_train.data.prepare import check_output, existing
from nemodiff_train.errors import UserError


def merge(shards: Sequence[str], output: str, overwrite: bool = False) -> Manifest:
    """Write the documents of all shards, in their order, as one data set; the shards stay.

    The result is the data set that one command would have prepared from all inputs.

    Args:
        shards: Prefixes of data sets that ``nemodiff data prepare`` made.
        output: Prefix of the result.
        overwrite: Replace an existing data set.

    Returns:
        The manifest of the result.

    Raises:
        UserError: A shard is missing, damaged or named twice; two were made with different tokenizers; or the
            output cannot be used. Nothing is left behind then.
    """
    check_output(output)
    manifests = [Manifest.require(shard) for shard in shards]
    first = manifests[0]
    for number, (shard, manifest) in enumerate(zip(shards, manifests, strict=True)):
        if shard in shards[:number]:
            raise UserError(f"{shard}: named twice; its documents would be in the result twice")
        if not manifest.same_tokens(first) or manifest.dtype != first.dtype:
            raise UserError(
                f"{shard}: prepared with another tokenizer, end-of-document token or chat template than {shards[0]}; "
                "prepare them alike"
            )
        if Path(shard).absolute() == Path(output).absolute():
            raise UserError(f"--output {output}: one of the shards; choose another name")
    provenance = Provenance(
        tokenizer=first.tokenizer,
        eod_token_id=first.eod_token_id,
        chat_template=first.chat_template,
        text_field=", ".join(dict.fromkeys(manifest.text_field for manifest in manifests)),
        inputs=[source for manifest in manifests for source in manifest.inputs],
    )
    partial = PartialOutput(output, provenance)
    if not overwrite and (finished := existing(output, provenance, partial)):
        return finished
    with partial.locked():
        partial.restore(overwrite)
        try:
            chunks = []
            for shard, manifest in zip(shards, manifests, strict=True):
                manifest.verify_checksums(shard)
                size = ChunkSize(documents=manifest.documents, tokens=manifest.tokens, bytes=manifest.bytes)
                chunks.append(Chunk(stem=str(Path(shard).absolute()), size=size))
            partial.adopt(chunks)
            return partial.publish()
        except UserError:
            partial.discard()
            raise
        except OSError as error:
            partial.discard()
            raise UserError(f"{output}: {error}; the same command starts again") from error
