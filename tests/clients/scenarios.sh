# shellcheck shell=bash
# Sourced by ./run and ../packaging/run: scenarios and their failures. Needs $logs. A failure shows the ends of the logs in $told.

passed=0
failed=0
skipped=0

total() {
  echo "$passed passed, $failed failed, $skipped skipped"
}

can_run_daemons() {
  [[ $(id -u) == 0 ]] && return 0
  [[ ${CI:-} != true ]] || { echo "FAIL  private daemons need root" >&2; exit 1; }
  echo "SKIPPED: private daemons need root" >&2
  return 1
}

expect() {
  [[ $2 == "$3" ]] || fail "$1: expected '$2', got '$3'"
}

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# scenario NAME FUNCTION: runs FUNCTION in a subshell that stops at the first failure; prints one line.
scenario() {
  local status began took
  began=${EPOCHREALTIME/[.,]/}
  set +e
  (
    set -e
    "$2"
  ) >"$logs/scenario" 2>&1 </dev/null
  status=$?
  set -e
  took=$(((${EPOCHREALTIME/[.,]/} - began) / 1000))
  if ((status == 0)); then
    passed=$((passed + 1))
    printf 'ok    %-74s %6d ms\n' "$1" "$took"
  else
    failed=$((failed + 1))
    printf 'FAIL  %-74s %6d ms\n' "$1" "$took"
    explain
  fi
}

explain() {
  local log
  sed 's/^/      | /' "$logs/scenario" | tail -n 30
  for log in "${told[@]}"; do
    [[ -s $logs/$log ]] || continue
    echo "      --- the end of $log"
    tail -n 12 "$logs/$log" | cut -c1-400 | sed 's/^/      | /'
  done
}
