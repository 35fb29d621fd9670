#!/usr/bin/env bash
# Install what the icons example reads: clip art, stamps and Unicode's data from Debian (as root), and the npm package
# @iconify/json into the user's cache. Where this machine does not allow it, say why and go on: tests of it are skipped.
#
#   bash examples/icons/install_icons.sh [FOLDER]     FOLDER: of the npm package; then give generate.py --iconify
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tests/install_packages.sh"

VERSION=2.2.535
FOLDER=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_cm3leon}
PACKAGE=iconify-json-$VERSION.tgz

missing=()
for package in openclipart-png openclipart-svg tuxpaint-stamps-default fonts-noto-color-emoji unicode-data \
    unicode-cldr-core; do
    [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) = *"ok installed" ]] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "icons: clip art, stamps, font and Unicode's data are here"
elif install_packages "icons" "${missing[@]}"; then
    echo "icons: installed ${missing[*]}"
fi

if [ -f "$FOLDER/$PACKAGE" ]; then
    echo "icons: $FOLDER/$PACKAGE is here"
elif ! command -v npm >/dev/null; then
    echo "icons: npm is not installed, so @iconify/json@$VERSION cannot be fetched; tests of it are skipped"
else
    mkdir -p "$FOLDER"
    log=$(mktemp)
    # npm checks the package's checksum; the file appears under its name when it is complete.
    part=$(mktemp -d "$FOLDER/.iconify-XXXXXX")
    if npm pack --silent --pack-destination "$part" "@iconify/json@$VERSION" >"$log" 2>&1; then
        mv "$part/$PACKAGE" "$FOLDER/$PACKAGE"
        echo "icons: fetched $FOLDER/$PACKAGE"
    else
        echo "icons: npm pack @iconify/json@$VERSION failed; tests of it are skipped:"
        tail -n 5 "$log"
    fi
    rm -rf "$part"
fi
exit 0
