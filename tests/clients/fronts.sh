# shellcheck shell=bash
# Sourced by ./run: registries behind fronts that respond wrongly to HEAD, limit requests or redirect clients without a login
# to a login page; and a tag that two kinds of clients pull with different Accept headers.

all_of_fronts() {
  [[ -z ${DIRECT:-} ]] || return 0
  transport=plain
  scenario "fronts: a fresh cache, ctr and skopeo start" fronts_are_fresh
  scenario "fronts: ctr pulls, the tag moves, skopeo pulls, outage: ctr gets the new image" newest_for_ctr
  scenario "fronts: skopeo pulls, the tag moves, ctr pulls, outage: skopeo gets the new image" newest_for_skopeo
  scenario "fronts: wrong HEAD: cold pulls of two images that share a layer" lying_cold
  scenario "fronts: wrong HEAD: a moved tag brings the new image" lying_moved
  scenario "fronts: wrong HEAD: an outage leaves both images" lying_killed
  scenario "fronts: five requests a second: a cold pull waits as a direct one does" limited_cold
  scenario "fronts: login page: bob pulls through the proxy" portal_for_bob
  scenario "fronts: login page: a client without a login gets nothing on any route" portal_for_strangers
  scenario "fronts: login page, registry killed: bob pulls, a client without a login does not" portal_killed
  ctr_stops
  stop_fronts
  rm -f "$state/upstreams.toml"
}

fronts_are_fresh() {
  stop_fronts
  upstream_is_up
  start_fronts
  fresh_mirror
  ctr_starts
  skopeo_starts
}

start_fronts() {
  local kind
  : >"$state/upstreams.toml"
  for kind in lying limited portal; do
    : >"$logs/$kind.out"
    start "$kind" python3 "$here/fronts.py" "$kind" "$(upstream_address)"
    wait_for "$kind" 20 grep -q 'listening on ' "$logs/$kind.out"
    printf '[upstream."%s.test"]\nurl = "http://%s"\n\n' "$kind" \
      "$(sed -n 's/^listening on //p' "$logs/$kind.out")" >>"$state/upstreams.toml"
  done
}

stop_fronts() {
  local kind
  for kind in lying limited portal; do stop "$kind"; done
}

# --- two kinds of clients on one tag ------------------------------------------------------------------------------------

newest_for_ctr() { newest_for ctr skopeo; }
newest_for_skopeo() { newest_for skopeo ctr; }

# newest_for FIRST SECOND: FIRST pulls, the tag moves, SECOND pulls, the upstream is stopped: FIRST gets SECOND's image.
newest_for() {
  local client image
  upstream_is_up
  set_version demo "demo old, $1 first"
  push demo library/demo:latest
  "$1_pulls" "$demo"
  set_version demo "demo new, $1 first"
  push demo library/demo:latest
  image=$(digest_at_upstream library/demo latest)
  "$2_pulls" "$demo"
  kill_upstream
  for client in "$1" "$2"; do
    "${client}_forgets"
    "${client}_pulls" "$demo"
    expect "the digest that $client gets in the outage" "$image" "$("${client}_digest" "$demo")"
  done
  upstream_is_up
}

# --- wrong HEAD responses ----------------------------------------------------------------------------------------------------------

lying_cold() {
  upstream_is_up
  skopeo_copies lying.test/library/demo:latest
  skopeo_copies lying.test/library/other:latest
  ctr_copies lying.test/library/other:latest
}

lying_moved() {
  set_version other "other moved behind a lying HEAD"
  push other library/other:latest
  skopeo_copies lying.test/library/other:latest
  ctr_copies lying.test/library/other:latest
}

lying_killed() {
  stop lying KILL
  skopeo_copies lying.test/library/demo:latest
  skopeo_copies lying.test/library/other:latest
}

# --- limited requests ---------------------------------------------------------------------------------------------------

# Fourteen layers. Direct clients wait a few seconds too.
limited_cold() {
  local began
  upstream_is_up
  began=$SECONDS
  skopeo_copies limited.test/library/many:latest
  grep -q ' 429$' "$logs/limited.out" || fail "the front did not limit anything"
  ((SECONDS - began <= 20)) || fail "the pull took $((SECONDS - began)) s"
}

# --- a login page in front ------------------------------------------------------------------------------------------------

portal_for_bob() {
  upstream_is_up
  through_proxy bob:bobs-password "$scratch/copied/portal"
  expect "digest" "$(digest_at_upstream library/other latest)" \
    "sha256:$(sha256sum "$scratch/copied/portal/manifest.json" | cut -d' ' -f1)"
}

portal_for_strangers() {
  strangers_get_nothing
  # Same result after the requests above.
  strangers_get_nothing
}

portal_killed() {
  stop portal KILL
  portal_for_bob
  strangers_get_nothing
}

strangers_get_nothing() {
  local path shown layer
  upstream_is_up
  layer=$(layers_of other | tail -n 1)
  if through_proxy "" "$scratch/copied/stranger"; then fail "skopeo pulled without bob's password"; fi
  for shown in "" eve:eves-password; do
    for path in manifests/latest "manifests/$(digest_at_upstream library/other latest)" "blobs/$layer" \
      manifests/never-there "blobs/sha256:$(printf '%064d' 1)"; do
      by_every_route_shown "library/other/$path" portal.test ${shown:+-u "$shown"} >"$scratch/statuses"
      by_every_route_shown "library/other/$path" portal.test -I ${shown:+-u "$shown"} >>"$scratch/statuses"
      ! grep -E ' 2[0-9][0-9]$' "$scratch/statuses" || fail "${shown:-a client without a login} was given $path"
    done
  done
}

# through_proxy USER:PASSWORD FOLDER: skopeo requests portal.test by its name.
through_proxy() {
  local login=(--src-no-creds)
  [[ -z $1 ]] || login=(--src-creds "$1")
  rm -rf "$2"
  transport=proxy be_cut_off
  "${cut_off[@]}" "SSL_CERT_FILE=$scratch/ifnewer/certs/ca.pem" "HTTPS_PROXY=http://$(address)" \
    timeout 60 skopeo --registries-conf /dev/null --insecure-policy --override-os linux --override-arch amd64 \
    copy -q "${login[@]}" docker://portal.test/library/other:latest "dir:$2"
}

# skopeo_copies REGISTRY/REPOSITORY:TAG: with the registry's name as path prefix. The image must match the upstream's.
skopeo_copies() {
  local repository=${1#*/}
  be_cut_off
  rm -rf "$scratch/copied/front"
  "${cut_off[@]}" timeout 120 skopeo --registries-conf /dev/null --insecure-policy --override-os linux \
    --override-arch amd64 copy -q --src-tls-verify=false "docker://$(address)/$1" "dir:$scratch/copied/front"
  expect "digest by skopeo" "$(digest_at_upstream "${repository%:*}" "${repository##*:}")" \
    "sha256:$(sha256sum "$scratch/copied/front/manifest.json" | cut -d' ' -f1)"
}

# ctr_copies REGISTRY/REPOSITORY:TAG
ctr_copies() {
  local repository=${1#*/}
  ctr_forgets
  ctr_pulls "$1"
  expect "digest by ctr" "$(digest_at_upstream "${repository%:*}" "${repository##*:}")" "$(ctr_digest "$1")"
}
