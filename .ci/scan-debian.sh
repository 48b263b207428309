#!/usr/bin/env bash
# Fails where Debian has mended a vulnerability of a package that an image still holds in its old version.
#
#   .ci/scan-debian.sh IMAGE
#
# Needs debsecan (a package of Debian and Ubuntu), which asks Debian's security tracker; DEBSECAN_SOURCE names another
# address. ENGINE: docker (default) or podman. pip-audit looks after the Python packages.
set -euo pipefail
image=${1:?an image}
engine=${ENGINE:-docker}

read_file() { "$engine" run --rm --network none --entrypoint cat "$image" "$1"; }

status=$(mktemp)
trap 'rm -f "$status"' EXIT
read_file /var/lib/dpkg/status > "$status"
suite=$(read_file /etc/os-release | sed -n 's/^VERSION_CODENAME=//p')
packages=$(grep -c '^Package: ' "$status")

source=()
[ -z "${DEBSECAN_SOURCE:-}" ] || source=(--source "$DEBSECAN_SOURCE")
found=$(debsecan --suite "$suite" --only-fixed --status "$status" "${source[@]}")
if [ -n "$found" ]; then
    echo "$found"
    echo "scan-debian: these are mended in Debian $suite; build on a newer python:slim" >&2
    exit 1
fi
echo "scan-debian: $packages packages of Debian $suite, none with a vulnerability that is mended there"
