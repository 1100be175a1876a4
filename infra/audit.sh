#!/usr/bin/env bash
# Looks the pinned dependencies up: releases that were withdrawn from the index, and known vulnerabilities (pip-audit).
# Exit code: 0 nothing found, 1 something found, 2 the advisories could not be asked, so that nothing is known.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
pins=(infra/requirements.txt infra/requirements-dataflow.txt infra/requirements-test.txt)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ! { "$uv" venv --quiet --python .venv/bin/python "$scratch/env" \
    && "$uv" pip install --quiet --python "$scratch/env" pip-audit; }; then
    echo "pip-audit could not be installed; nothing is known of the pins" >&2
    exit 2
fi

found=0
for file in "${pins[@]}"; do
    if ! said=$("$uv" pip install --dry-run --require-hashes --python "$scratch/env" -r "$file" 2>&1); then
        echo "$said" >&2
        echo "$file: the index could not be asked; nothing is known of what was withdrawn" >&2
        exit 2
    fi
    if grep -i yanked <<<"$said"; then
        echo "$file: pins a release that was withdrawn: pin another" >&2
        found=1
    fi
done
echo "withdrawn releases: $( ((found)) && echo some || echo none)"

for file in "${pins[@]}"; do
    if ! "$scratch/env/bin/pip-audit" --strict --disable-pip --require-hashes --progress-spinner off -r "$file" \
        >"$scratch/said" 2>&1; then
        cat "$scratch/said" >&2
        if ! grep -q "known vulnerabilit" "$scratch/said"; then
            echo "$file: the advisories could not be asked; nothing is known of its vulnerabilities" >&2
            exit 2
        fi
        found=1
    fi
done
((found)) || echo "known vulnerabilities: none"
exit "$found"
