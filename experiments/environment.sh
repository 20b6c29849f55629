# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: makes .venv at the root of the project if it is missing, installs the
# requirements file given as $1 when it changed since the last time, and puts .venv/bin first on the PATH.
# PYTHON names the interpreter to build it with (>= 3.11, which transformers 5.23 asks for).

_requirements="$1"
_suitable() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
  _python=""
  for _candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3; do
    if command -v "$_candidate" >/dev/null 2>&1 && _suitable "$_candidate"; then _python="$_candidate"; break; fi
  done
  if [ -z "$_python" ]; then
    echo "gve needs Python >= 3.11 (found: $(python3 --version 2>&1 || echo none)); install one or set PYTHON=/path/to/python3.x" >&2
    exit 2
  fi
  if ! "$_python" -m venv .venv 2>/tmp/gve-venv.$$; then
    rm -rf .venv
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
      # Debian and Ubuntu split venv out of the interpreter's package.
      _version="$("$_python" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')"
      apt-get update -q && apt-get install -q -y "$_version-venv"
      "$_python" -m venv .venv
    else
      cat /tmp/gve-venv.$$ >&2
      echo "python3 -m venv failed; on Debian/Ubuntu: sudo apt-get install python3-venv" >&2
      exit 2
    fi
  fi
  rm -f /tmp/gve-venv.$$
fi

_stamp=".venv/.installed-$(basename "$(dirname "$_requirements")")"
_wanted="$(cat requirements.txt "$_requirements" pyproject.toml | cksum)"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
  echo "installing $_requirements into .venv (torch is the large one) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$_requirements"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
  echo "$_wanted" > "$_stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
