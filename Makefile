.PHONY: demo test check audit
.DEFAULT_GOAL := demo

unexport PYTHONDONTWRITEBYTECODE  # packages compiled at every import double the start of every process

demo: .venv/ready  ## the main job, offline: AR checkpoint in, tri-mode checkpoint out, scored in three modes
	.venv/bin/nemodiff demo --output runs/demo

test: .venv/ready  ## the test suite
	.venv/bin/python -m pytest

check: .venv/ready  ## style and types
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy
	.venv/bin/mypy $(filter-out tools/engines tools/setup,$(wildcard tools/[a-z]*[!h] tools/bench/[a-z]*))

audit:  ## known vulnerabilities of the pinned packages; needs uv and the network
	sed 's/+[^ ]*//' constraints.txt | uv tool run pip-audit --disable-pip --no-deps --requirement /dev/stdin

.venv/ready: pyproject.toml constraints.txt .python-version
	tools/setup
