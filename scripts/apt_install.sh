#!/usr/bin/env bash
# Install Debian packages as root, or through sudo where it asks for no password.
set -euo pipefail

as_root=
if [ "$(id -u)" -ne 0 ]; then as_root="sudo -n"; fi
if ! command -v apt-get >/dev/null || ! $as_root true 2>/dev/null; then
    echo "error: this needs the system packages: $*" >&2
    echo "This user cannot install them. Ask for them once, as root: apt-get install $*" >&2
    exit 1
fi
echo "installing system packages: $*"
$as_root apt-get update -qq
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
