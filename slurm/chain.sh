#!/bin/bash
# Submit jobs that run one after another, each when the one before has succeeded: slurm/chain.sh FILE
# A line of FILE holds the arguments of sbatch, without quotes, such as: --nodes=4 slurm/train.sbatch joint data=data/corpus
# Empty lines and lines that begin with # are skipped. Prints the number of each job.
set -euo pipefail

if (($# != 1)); then
  echo "usage: slurm/chain.sh FILE" >&2
  exit 2
fi
if ! command -v sbatch >/dev/null; then
  echo "slurm/chain.sh: error: no sbatch on this machine; run it where jobs are submitted" >&2
  exit 2
fi
before=()
while read -r -a words || ((${#words[@]})); do
  if ((${#words[@]} == 0)) || [[ ${words[0]} == \#* ]]; then
    continue
  fi
  job=$(sbatch --parsable "${before[@]}" "${words[@]}")
  job=${job%%;*}
  echo "$job ${words[*]}"
  before=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done <"$1"
