# shellcheck shell=bash
# Sourced by ./run: `min_age`, `ifnewer approve` and `ifnewer block`. Every client uses HTTPS_PROXY, so it cannot ask the
# registry itself after a denial. One image has a long `min_age` and is approved, blocked and unblocked; the other has a short
# one and becomes old enough.

approved=docker.io/library/approved:latest
aged=docker.io/library/aged:latest

# The older image is pulled, the tag moves, and one client pulls the older image again within this time.
short_min_age=10s

block_reason="CVE-2026-1234, see the incident"

all_of_min_age() {
  [[ -z ${DIRECT:-} ]] || return 0
  local client clients=(dockerd ctr cri podman skopeo)
  transport=proxy
  scenario "min_age: a fresh cache and fresh clients start" min_age_is_fresh
  scenario "min_age: first image, its age unknown: served" first_image
  scenario "min_age: the tag moved: the older image" older_image
  scenario "min_age: the newer image is approved: served" approved_image
  scenario "min_age: the newer image is blocked: denied, with the reason" blocked_image
  scenario "min_age: the newer image is unblocked: served" unblocked_image
  scenario "min_age: the newer image is old enough: served" aged_image
  for client in "${clients[@]}"; do "${client}_stops"; done
  rm -f "$state"/{hub,upstreams}.toml
}

min_age_is_fresh() {
  local client
  printf 'url = "http://%s"\nmin_age = "1h"\non_unknown_age = "serve"\n' "$(upstream_address)" >"$state/hub.toml"
  printf '[[rule]]\nimages = ["docker.io/library/aged:*"]\nmin_age = "%s"\n' "$short_min_age" >"$state/upstreams.toml"
  make_image approved "the older image" amd64
  make_image aged "the older image" amd64
  push approved library/approved:latest
  push aged library/aged:latest
  fresh_mirror
  for client in "${clients[@]}"; do "${client}_starts"; done
}

first_image() {
  digest_at_upstream library/approved latest >"$state/older.digest"
  all_pull "$approved" "the older image" "$(<"$state/older.digest")"
}

# The image that becomes old enough is seen first here, and pulled last.
older_image() {
  local older
  older=$(digest_at_upstream library/aged latest)
  set_version aged "the newer image"
  one_pulls skopeo "$aged" "the older image" "$older"
  push aged library/aged:latest
  aged_at >"$state/aged.at"
  one_pulls skopeo "$aged" "the older image" "$older"

  set_version approved "the newer image"
  push approved library/approved:latest
  digest_at_upstream library/approved latest >"$state/newer.digest"
  start_counting
  all_pull "$approved" "the older image" "$(<"$state/older.digest")"
  expect "upstream GETs" 0 "$(asked 'GET /v2/library/approved/')"
}

approved_image() {
  operated approve "${approved%:*}@$(<"$state/newer.digest")" --reason reviewed
  all_pull "$approved" "the newer image" "$(<"$state/newer.digest")"
}

blocked_image() {
  local client
  operated block "$(<"$state/newer.digest")" --reason "$block_reason"
  for client in "${clients[@]}"; do
    echo "--- $client"
    "${client}_forgets"
    if "${client}_pulls" "$approved"; then fail "$client pulled a blocked image"; fi
    "${client}_was_told" | tee "$scratch/told"
    grep -qF "$block_reason" "$scratch/told" || fail "the error of $client has no: $block_reason"
  done
  operated why "$approved" | grep -qF "is blocked by the operator" || fail "ifnewer why does not show the block"
  operated blocks | grep -qF "$block_reason" || fail "ifnewer blocks does not have the reason"
}

unblocked_image() {
  operated unblock "$(<"$state/newer.digest")"
  all_pull "$approved" "the newer image" "$(<"$state/newer.digest")"
}

aged_image() {
  local at tries=$((2 * 5 * ${short_min_age%s}))
  at=$(<"$state/aged.at")
  while (($(date +%s) <= at)); do
    ((tries-- > 0)) || fail "the newer image is to be served only from second $at on"
    sleep 0.2
  done
  all_pull "$aged" "the newer image" "$(digest_at_upstream library/aged latest)"
}

# The second since 1970 from which the newer image is served.
aged_at() {
  local head
  head=$(curl -sSfI -H "Accept: $manifest_type" "http://$(address)/v2/library/aged/manifests/latest" | tr -d '\r')
  date -d "$(header_of "$head" ifnewer-cooling-until)" +%s
}

# all_pull REF TEXT DIGEST: every client, without an image in its store.
all_pull() {
  local client
  for client in "${clients[@]}"; do one_pulls "$client" "$@"; done
}

one_pulls() {
  local client=$1
  echo "--- $client"
  "${client}_forgets"
  "${client}_pulls" "$2"
  says "$2" "$3"
  expect "the digest of $2" "$4" "$("${client}_digest" "$2")"
}

# --- dockerd as a client of mirrored.sh --------------------------------------------------------------------------------

dockerd_starts() {
  stop_dockerd
  rm -rf "$scratch/dockerd"
  start_dockerd ""
}

dockerd_stops() { stop_dockerd; }

dockerd_pulls() {
  docker_ pull -q "$1" >"$scratch/docker-said" 2>&1 || { cat "$scratch/docker-said"; return 1; }
}

dockerd_digest() { docker_ image inspect --format '{{index .RepoDigests 0}}' "$1" | cut -d@ -f2; }
dockerd_says() { docker_ run --rm --network none "$1" 2>&1; }
dockerd_forgets() { forget_images; }
dockerd_was_told() { cat "$scratch/docker-said"; }
