"""``nemodiff launch --slurm RECIPE``: a recipe as a SLURM job."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nemodiff_train.cli.ranks import at_least_1
from nemodiff_train.config.registry import check_arguments, check_recipe
from nemodiff_train.credentials import check_no_secrets
from nemodiff_train.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("recipe", help="a function in recipes/, or FILE.py[:function]")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    parser.add_argument("--slurm", action="store_true", required=True, help="the scheduler")
    parser.add_argument("--nodes", type=at_least_1, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--time", default="04:00:00", metavar="LIMIT", help="time limit of one job, as SLURM writes it"
    )
    parser.add_argument("--name", default="nemodiff", help="name of the job and its log")
    parser.add_argument(
        "--partition", help="partition of the cluster (default: that of SBATCH_PARTITION or the site)"
    )
    parser.add_argument("--account", help="account to charge (default: that of SBATCH_ACCOUNT or yours)")
    parser.add_argument("--gres", help="generic resources per node, such as gpu:8 (default: all that it has)")
    parser.add_argument("--after", type=int, metavar="JOB", help="start after this job has succeeded")
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


def run(arguments: argparse.Namespace) -> None:
    """Print the script, or submit it."""
    text = script(arguments)
    if arguments.dry_run:
        sys.stdout.write(text)
        return
    if not os.access(".", os.W_OK, effective_ids=True):
        raise UserError(
            f"'{Path.cwd()}' cannot be written to, and SLURM puts the job's log there; submit from a folder that all "
            "nodes share"
        )
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; run on a login node, or see the script with --dry-run")
    done = subprocess.run(["sbatch"], input=text, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    print(done.stdout.strip())


def script(arguments: argparse.Namespace) -> str:
    """Return ``slurm/train.sbatch`` with this job's options and arguments.

    Raises:
        UserError: An option is malformed, there is no such recipe or argument, or one holds a key or password.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", arguments.time):
        raise UserError(f"--time {arguments.time} is not a SLURM time; write hours:minutes:seconds or days-hours")
    if not re.fullmatch(r"[\w.-]+", arguments.name):
        raise UserError(f"--name {arguments.name}: use letters, digits, '.', '_' and '-'")
    for option in ("partition", "account", "gres"):
        if not re.fullmatch(r"[\w.:,=@-]+", value := getattr(arguments, option) or "none"):
            raise UserError(f"--{option} {value}: use letters, digits and '.:,=@_-'")
    if arguments.after is not None and arguments.after < 1:
        raise UserError(f"--after {arguments.after}: use the number of a job")
    check_recipe(arguments.recipe)
    check_no_secrets(dict(override.partition("=")[::2] for override in arguments.settings))
    check_arguments(arguments.recipe, arguments.settings)
    import slurm

    folder = Path(slurm.__path__[0])
    text = (folder / "train.sbatch").read_text()
    options = {"nodes": arguments.nodes, "time": arguments.time, "job-name": arguments.name}
    for option, value in options.items():
        text = re.sub(rf"(?m)^#SBATCH --{option}=.*$", f"#SBATCH --{option}={value}", text)
    more = {
        "dependency": arguments.after and f"afterok:{arguments.after}",
        **{option: getattr(arguments, option) for option in ("partition", "account", "gres")},
    }
    lines = "".join(f"#SBATCH --{option}={value}\n" for option, value in more.items() if value)
    text = text.replace("#SBATCH --requeue\n", lines + "#SBATCH --requeue\n")
    recipe = shlex.join([arguments.recipe, *arguments.settings])
    start = "set -euo pipefail\n"
    return text.replace(start, f"{start}set -- {recipe}\nSCRIPTS=${{SCRIPTS:-{shlex.quote(str(folder))}}}\n", 1)
