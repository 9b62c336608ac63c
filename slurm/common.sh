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

step() { # srun in the container, if there is one
  local options=()
  if [[ -n $CONTAINER ]]; then
    options=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$WORK")
  fi
  srun --kill-on-bad-exit=1 "${options[@]}" "$@"
}
