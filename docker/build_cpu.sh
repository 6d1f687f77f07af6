#!/usr/bin/env bash
# Builds docker/Dockerfile.cpu with buildah where no container registry is reachable: the base is made by debootstrap from this
# machine's own Debian mirror, and pip inside of the build is configured as pip outside is.
#
#   docker/build_cpu.sh            needs root, buildah and debootstrap; 7 GB under IMAGE_DIR (default /var/tmp/momentkv-image)
#   BASE=debian:12-slim docker/build_cpu.sh      a base from a registry instead
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGE_DIR=${IMAGE_DIR:-/var/tmp/momentkv-image}
BUILDAH=(buildah --root "$IMAGE_DIR/storage" --runroot "$IMAGE_DIR/run" --storage-driver vfs)
mkdir -p "$IMAGE_DIR"

if [[ -z ${BASE:-} ]]; then
    BASE=localhost/debian:12
    if ! "${BUILDAH[@]}" inspect --type image "$BASE" >/dev/null 2>&1; then
        mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Component: main' | sort -u | head -1)
        rm -rf "$IMAGE_DIR/debian"
        debootstrap --variant=minbase bookworm "$IMAGE_DIR/debian" "$mirror" >"$IMAGE_DIR/debootstrap.log"
        container=$("${BUILDAH[@]}" from scratch)
        cp -a "$IMAGE_DIR/debian/." "$("${BUILDAH[@]}" mount "$container")/"
        "${BUILDAH[@]}" umount "$container" >/dev/null
        "${BUILDAH[@]}" commit --rm "$container" "$BASE"
        rm -rf "$IMAGE_DIR/debian"
    fi
fi

mapfile -t volumes < <(python3 docker/pip_settings.py "$IMAGE_DIR/pip")
# Docker's image format: OCI's has no health check.
"${BUILDAH[@]}" bud --isolation chroot --format docker --layers=false --build-arg BASE="$BASE" "${volumes[@]}" \
    -f docker/Dockerfile.cpu -t momentkv:cpu .
"${BUILDAH[@]}" images momentkv:cpu
