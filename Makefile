# Two commands: `make demo` shows the whole way, `make test` checks it. Each sets up what it needs.
.PHONY: demo test setup requirements audit clean

setup: .venv/ready

.venv/ready: pyproject.toml infra/requirements-test.txt infra/setup.sh
	infra/setup.sh

demo: setup
	.venv/bin/fusion demo --output demo-output

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest

# Compile the pins anew from pyproject.toml.
requirements: setup
	infra/compile-requirements.sh

# Look the pins up: withdrawn releases, known vulnerabilities.
audit: setup
	infra/audit.sh

clean:
	rm -rf .venv demo-output
