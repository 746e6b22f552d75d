#!/bin/sh
# Compiles the bytecode of all packages in .venv, once. If PYTHONDONTWRITEBYTECODE is set, each
# process of a run would otherwise compile torch and vLLM again, which takes 10 s.
# Usage: sh requirements/compile.sh    (from any folder, after install.sh; `make` runs it)
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}

if cmp -s "$VENV/installed" "$VENV/compiled"; then
    exit 0
fi
# The status is no error: some packages bring files that are not Python of this version.
"$VENV/bin/python" -W ignore -m compileall -qq -j 0 "$VENV"/lib/python3*/site-packages || true
cp "$VENV/installed" "$VENV/compiled"
