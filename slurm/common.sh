# shellcheck shell=bash
# Functions of the batch scripts: the environment, and a step inside it.

enter_site() {
  cd "$WORK" || exit 1
  if [[ -z $CONTAINER ]]; then
    # shellcheck disable=SC2086
    [[ -z $MODULES ]] || module load $MODULES
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
  fi
}

# Start a program inside the site's environment, on every node of the job. A step gets GPUs only if it asks for them.
step() {
  local options=() inside=()
  [[ -z $STEP_GPUS ]] || read -r -a options <<<"$STEP_GPUS"
  if [[ -n $CONTAINER && $CONTAINER == *.sif ]]; then
    inside=(apptainer exec --nv --bind "$MOUNTS" --pwd "$WORK" "$CONTAINER")
  elif [[ -n $CONTAINER ]]; then
    options+=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$WORK")
  fi
  srun --kill-on-bad-exit=1 "${options[@]}" "${inside[@]}" "$@"
}
