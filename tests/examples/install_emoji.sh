#!/usr/bin/env bash
# Install what the emoji example reads (font, list of emoji, names) if this machine allows it. Otherwise print the reason
# and exit with 0: some tests of tests/examples/test_emoji.py are skipped then.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install_packages.sh"

missing=()
for package in fonts-noto-color-emoji unicode-data unicode-cldr-core; do
    [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) = *"ok installed" ]] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "emoji: font and Unicode's data are here"
    exit 0
fi
install_packages "emoji" "${missing[@]}" || exit 0
echo "emoji: installed ${missing[*]}"
