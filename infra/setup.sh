#!/usr/bin/env bash
# Makes .venv with the pinned, hashed requirements and the project itself. Needs Python 3.11-3.13, and uv or pip.
set -euo pipefail
cd "$(dirname "$0")/.."

python=""
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: no Python 3.11, 3.12 or 3.13 found: install one and run again" >&2
    exit 1
fi

rm -rf .venv
if command -v uv >/dev/null; then
    uv=uv
    uv venv --quiet --python "$(command -v "$python")" .venv
else
    "$python" -m venv .venv || { echo "setup: install uv, or Python's venv module (python3-venv)" >&2; exit 1; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    uv=.venv/bin/uv
fi
"$uv" pip install --quiet --python .venv --require-hashes -r infra/requirements-test.txt
"$uv" pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
touch .venv/ready
