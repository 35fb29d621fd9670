# Packages of the system that tests need. Sourced by bash.

# install_packages WHAT PACKAGE...: install them where this machine allows it: Debian or Ubuntu, as root. Elsewhere say
# why and go on with status 1; the tests that need WHAT are then skipped with the reason.
install_packages() {
    local what=$1 log
    shift
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "$what: only root on Debian or Ubuntu can install $* here; tests of what is missing are skipped"
        return 1
    fi
    log=$(mktemp)
    # The lists of packages may be old or absent.
    if ! { _apt_install "$@" || { apt-get update -q && _apt_install "$@"; }; } >"$log" 2>&1; then
        echo "$what: installing $* failed; tests of what is missing are skipped:"
        tail -n 5 "$log"
        return 1
    fi
}

_apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}
