#!/usr/bin/env bash
# Pins pyproject.toml's dependencies, with hashes, for every supported Python: infra/requirements*.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
compile() {
    "$uv" pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
        --custom-compile-command infra/compile-requirements.sh pyproject.toml "$@"
}
compile --extra test --output-file infra/requirements-test.txt
compile --extra eval --extra serve --constraint infra/requirements-test.txt --output-file infra/requirements.txt
compile --extra dataflow --constraint infra/requirements-test.txt --output-file infra/requirements-dataflow.txt
