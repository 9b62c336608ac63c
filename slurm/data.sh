#!/bin/bash
# Turn a folder of files into one data set: slurm/data.sh [--chat] FOLDER TOKENIZER PREFIX [option of sbatch ...]
# An array prepares one file per task, as PREFIX-0, PREFIX-1, ...; a job that waits for it merges them into PREFIX.
# --chat takes conversations. Prints the number of the merging job, for --dependency and 'nemodiff launch --after'.
set -euo pipefail

chat=()
if [[ ${1:-} == --chat ]]; then
  chat=(--chat)
  shift
fi
if (($# < 3)); then
  echo "usage: slurm/data.sh [--chat] FOLDER TOKENIZER PREFIX [option of sbatch ...]" >&2
  exit 2
fi
if ! command -v sbatch >/dev/null; then
  echo "slurm/data.sh: error: no sbatch on this machine; run it where jobs are submitted" >&2
  exit 2
fi
SCRIPTS=${SCRIPTS:-$(dirname "$0")}
export SCRIPTS
folder=$1 tokenizer=$2 prefix=$3
shift 3

shopt -s nullglob
files=("$folder"/*)
count=${#files[@]}
if ((count == 0)); then
  echo "slurm/data.sh: $folder has no files" >&2
  exit 2
fi

array=$(sbatch --parsable "$@" --array="0-$((count - 1))" "$SCRIPTS/data.sbatch" "$folder" "$tokenizer" "$prefix" \
  "${chat[@]}")
shards=()
for ((number = 0; number < count; number++)); do
  shards+=("$prefix-$number")
done
sbatch --parsable "$@" --job-name=nemodiff-merge --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
  "$SCRIPTS/task.sbatch" data merge "${shards[@]}" --output "$prefix"
