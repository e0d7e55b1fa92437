# shellcheck shell=bash
# Sourced by .ci/run, tests/clients/run and benches/run: brings the Debian programs a script needs.

# dockerd and nginx live where an ordinary user's PATH does not look.
export PATH=$PATH:/usr/sbin:/sbin

# needs PROGRAM=PACKAGE…  Installs the packages of the programs that are absent. Answers 0 when all are there.
# Where they cannot be had it fails the run in CI (CI=true), and elsewhere says loudly what is skipped and answers 1.
needs() {
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  ((${#missing[@]})) || return 0

  if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    echo "installing ${missing[*]}"
    install_packages "${missing[@]}" && return 0
  fi

  if [[ ${CI:-} == true ]]; then
    echo "FAIL  these packages are needed and cannot be installed: ${missing[*]}" >&2
    exit 1
  fi
  {
    echo "=================================================================="
    echo "SKIPPED: ${0} needs packages that are not here: ${missing[*]}"
    echo "         As root on Debian it installs them itself."
    echo "=================================================================="
  } >&2
  return 1
}

# A daemon that a package would start at once is not ours to start: invoke-rc.d obeys RUNLEVEL=1.
install_packages() {
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 && return 0
  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
