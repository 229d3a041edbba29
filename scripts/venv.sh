#!/usr/bin/env bash
# Make a virtual environment in the folder $1 with the first Python between 3.10 and 3.13 that is found.
# PYTHON=/path/to/python chooses one.
set -euo pipefail
venv=$1

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }

if supported "$venv/bin/python"; then exit 0; fi

python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if supported "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "no Python")
    echo "error: OpenVSA needs Python 3.10 to 3.13, and this machine has $found." >&2
    echo "Install one (on Debian or Ubuntu: apt-get install python3 python3-venv), or name it with PYTHON=..." >&2
    exit 1
fi
# Debian and Ubuntu keep what makes environments in a package of its own.
if ! "$python" -c 'import ensurepip' 2>/dev/null; then "$(dirname "$0")/apt_install.sh" python3-venv; fi
echo "making $venv with $("$python" --version)"
"$python" -m venv --clear "$venv"
