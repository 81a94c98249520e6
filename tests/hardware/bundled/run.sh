#!/bin/sh
# Runs the hardware suite. What follows goes to pytest:
#   ./run.sh --quick
#   ./run.sh --transports nixl --devices cpu,gpu --junitxml suite.xml --hardware-json suite.json
# PYTHON names the interpreter (default python3). Nothing is installed and nothing outside this folder is written,
# but for what the options name.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python3}
"$PYTHON" "$here/unpack.py"
PYTHONPATH="$here/site:$here/source${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -m pytest -p no:cacheprovider --rootdir "$here/source" -c "$here/source/pyproject.toml" \
  "$here/source/tests/hardware" "$@"
