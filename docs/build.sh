#!/usr/bin/env bash
# The documentation as a site in build/site: bash docs/build.sh [mkdocs arguments, such as --site-dir DIR]
#
# A broken link, a page that is missing in mkdocs.yml and a module that does not exist are errors.
source "$(dirname "${BASH_SOURCE[0]}")/../examples/common.sh"

cd "$ROOT"
prepare_environment
stage "documentation" python -m mkdocs build --strict "$@"
