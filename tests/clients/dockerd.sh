# shellcheck shell=bash
# Sourced by ./run: a private dockerd with `registry-mirrors`, and its scenarios.

all_of_dockerd() {
  dockerd_scenarios plain
  dockerd_scenarios tls
  only_trusted_certificates
}

dockerd_scenarios() {
  transport=$1
  local at="dockerd, $transport${chained:+, two caches}"
  scenario "$at: a fresh cache and a fresh daemon start" everything_is_fresh
  scenario "$at: cold pull, and it runs" cold_pull
  scenario "$at: unchanged pull is one HEAD and no bytes" unchanged_pull
  scenario "$at: moved tag downloads the new bytes" moved_tag
  scenario "$at: fourteen layers" many_layers
  scenario "$at: multi-arch index, this machine's image" multi_arch
  scenario "$at: multi-arch index, the other image" multi_arch_other
  scenario "$at: by digest" by_digest
  scenario "$at: 300 MiB" big_image
  scenario "$at: 300 MiB again costs the upstream nothing" big_image_again
  scenario "$at: a tag that does not exist is 404" absent_tag
  [[ -z ${DIRECT:-} ]] || return 0
  scenario "$at: upstream cut off every $cut_bytes bytes" cut_again_and_again
  scenario "$at: upstream killed, pulled images still pull" upstream_killed
  scenario "$at: upstream killed, the error of an uncached image names the cause" never_seen
  scenario "$at: ifnewer restarted without upstream, pulled images still pull" restarted_without_upstream
  scenario "$at: upstream back, the newer tag arrives" upstream_back
}

everything_is_fresh() {
  stop_dockerd
  rm -rf "$scratch/dockerd"
  fresh_mirror
  set_version demo "demo one for $transport"
  push demo library/demo:latest
  start_dockerd "$(mirror_for_dockerd)"
}

cold_pull() {
  start_counting
  docker_ pull -q demo
  prints demo "demo one for $transport"
  expect "upstream manifest GETs" 1 "$(asked 'GET /v2/library/demo/manifests/')"
}

unchanged_pull() {
  start_counting
  [[ $(docker_ pull demo) == *"Image is up to date"* ]] || fail "docker did not report that the image is up to date"
  expect "upstream HEADs of the tag" 1 "$(asked 'HEAD /v2/library/demo/manifests/latest ')"
  expect "upstream GETs" 0 "$(asked 'GET /v2/library')"
  forget_images
  start_counting
  docker_ pull -q demo
  expect "upstream HEADs of the tag, daemon emptied" 1 "$(asked 'HEAD /v2/library/demo/manifests/latest ')"
  [[ -n ${DIRECT:-} ]] || expect "blob bytes from upstream, daemon emptied" 0 "$(blob_bytes_sent)"
  [[ -n ${DIRECT:-} ]] || expect "upstream GETs, daemon emptied" 0 "$(asked 'GET /v2/library')"
}

moved_tag() {
  set_version demo "demo two for $transport"
  push demo library/demo:latest
  start_counting
  docker_ pull -q demo
  prints demo "demo two for $transport"
  (($(blob_bytes_sent) > 0)) || fail "the new layer did not come from the upstream"
  (($(blob_bytes_sent) < 100000)) || fail "more than the new layer came from the upstream: $(blob_bytes_sent) bytes"
}

many_layers() {
  docker_ pull -q many
  prints many "many layers"
  expect "layers" 14 "$(docker_ image inspect many | jq '.[0].RootFS.Layers | length')"
}

multi_arch() {
  docker_ pull -q multi
  prints multi "multi on amd64"
  expect "the digest docker recorded" "multi@$(digest_at_upstream library/multi latest)" \
    "$(docker_ image inspect multi | jq -r '.[0].RepoDigests[0]')"
}

multi_arch_other() {
  docker_ pull -q --platform linux/arm64 multi
  expect "architecture" arm64 "$(docker_ image inspect multi | jq -r '.[0].Architecture')"
  docker_ rmi -f multi
}

by_digest() {
  local image
  forget_images
  digest_at_upstream library/demo latest >"$state/demo.digest"
  image=demo@$(<"$state/demo.digest")
  docker_ pull -q "$image"
  prints "$image" "demo two for $transport"
}

big_image() {
  start_counting
  docker_ pull -q big
  prints big "three hundred mebibytes"
  (($(blob_bytes_sent) >= big_bytes)) || fail "the upstream sent only $(blob_bytes_sent) bytes"
}

big_image_again() {
  forget_images
  start_counting
  docker_ pull -q big
  [[ -n ${DIRECT:-} ]] || expect "blob bytes from upstream" 0 "$(blob_bytes_sent)"
}

absent_tag() {
  refused_by_docker demo:never-pushed
  daemon_said 'manifest unknown'
}

# dockerd mirrors only the Hub: the other registry is a path prefix at the cache's address.
cut_again_and_again() {
  local image before
  image=$(<"$state/ifnewer.plain")/cut.example/library/broken
  before=$(cuts library/broken)
  docker_ pull -q "$image"
  prints "$image" "broken off again and again"
  (($(cuts library/broken) - before >= broken_bytes / cut_bytes)) || fail "the upstream was not interrupted repeatedly"
}

upstream_killed() {
  # Each was pulled by tag while the upstream was available, so each is cached under its name.
  kill_upstream
  everything_seen_pulls
}

restarted_without_upstream() {
  stop_ifnewer
  start_ifnewer
  everything_seen_pulls
}

everything_seen_pulls() {
  forget_images
  seen_pulls demo "demo two for $transport"
  seen_pulls many "many layers"
  seen_pulls multi "multi on amd64"
  seen_pulls big "three hundred mebibytes"
  forget_images
  seen_pulls "demo@$(<"$state/demo.digest")" "demo two for $transport"
}

seen_pulls() {
  docker_ pull -q "$1" || fail "$1 did not pull"
  prints "$1" "$2"
}

never_seen() {
  refused_by_docker demo:not-seen-before
  daemon_said "$upstream_cause"
}

upstream_back() {
  local seconds=0
  start_upstream
  set_version demo "demo three for $transport"
  push demo library/demo:latest
  until docker_ pull -q demo && [[ $(docker_ run --rm --network none demo) == "demo three for $transport" ]]; do
    ((seconds++ < 60)) || fail "the newer tag was not served within a minute of the upstream's return"
    sleep 1
  done
}

only_trusted_certificates() {
  [[ -z ${DIRECT:-} ]] || return 0
  transport=tls
  scenario "dockerd, tls: a daemon without the CA rejects the cache" untrusting_daemon_refuses
}

untrusting_daemon_refuses() {
  upstream_is_up
  stop_dockerd
  start_dockerd "$(mirror_for_dockerd)" SSL_CERT_FILE=/dev/null
  refused_by_docker demo
  daemon_said 'certificate signed by unknown authority'
}

# --- expectations ------------------------------------------------------------------------------------------------

refused_by_docker() {
  wc -l <"$logs/dockerd.err" >"$state/dockerd.said"
  if docker_ pull "$1" >"$scratch/said" 2>&1; then fail "docker pulled $1"; fi
  cat "$scratch/said"
}

# daemon_said REGEX: the daemon shows its user the error of the *Hub*, the last host it tried (here a dead proxy). The
# mirror's error is in the daemon's log.
daemon_said() {
  tail -n "+$(($(<"$state/dockerd.said") + 1))" "$logs/dockerd.err" | grep -v proxyconnect >"$scratch/mirror-said" || true
  cat "$scratch/mirror-said"
  grep -qiE "$1" "$scratch/mirror-said" || fail "the daemon's log does not contain: $1"
}

# --- the daemon --------------------------------------------------------------------------------------------------

# The current daemon: name of its folder and its log.
daemon=dockerd

# start_dockerd MIRROR [VARIABLE=VALUE…]: a private daemon (data, state, socket, configuration, containerd), never the
# machine's. Without a mirror if MIRROR is empty.
start_dockerd() {
  local mirror=$1 own=$scratch/$daemon
  shift
  mkdir -p "$own" "$scratch/docker-cli"
  jq -n --arg mirror "$mirror" '{"registry-mirrors": [$mirror | select(. != "")]}' >"$own/daemon.json"
  rm -f "$own/pid"
  : >"$logs/$daemon.err"
  be_cut_off
  start "$daemon" "${cut_off[@]}" "$@" \
    dockerd --config-file "$own/daemon.json" --host "unix://$own/sock" \
    --data-root "$own/data" --exec-root "$own/exec" --pidfile "$own/pid" \
    --containerd-namespace "ifnewer-$$" --containerd-plugins-namespace "ifnewer-plugins-$$" \
    --storage-driver vfs --bridge none --iptables=false --ip6tables=false
  wait_for "$daemon" 60 docker_ version
}

stop_dockerd() {
  stop "$daemon"
}

# With the login in the folder $login; without one if it is empty.
docker_() {
  DOCKER_HOST=unix://$scratch/$daemon/sock DOCKER_CONFIG=${login:-$scratch/docker-cli} timeout 300 docker "$@"
}

forget_images() {
  docker_ images -q --no-trunc | sort -u | xargs -r env DOCKER_HOST="unix://$scratch/$daemon/sock" \
    DOCKER_CONFIG="$scratch/docker-cli" docker rmi -f >/dev/null
}

prints() {
  expect "what $1 prints" "$2" "$(docker_ run --rm --network none "$1" 2>&1)"
}

