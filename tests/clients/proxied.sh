# shellcheck shell=bash
# Sourced by ./run: every client through HTTPS_PROXY, without a mirror: each requests the registry by its own name and trusts
# ifnewer's CA. Then containerd with one host for all registries.

all_of_proxied() {
  [[ -z ${DIRECT:-} ]] || return 0
  local client
  transport=proxy
  scenario "dockerd, proxy: a fresh cache and a fresh daemon start" proxied_is_fresh
  scenario "dockerd, proxy: cold pull, and it runs" cold_pull
  scenario "dockerd, proxy: unchanged pull is one HEAD and no bytes" unchanged_pull
  scenario "dockerd, proxy: moved tag downloads the new bytes" moved_tag
  scenario "dockerd, proxy: multi-arch index, this machine's image" multi_arch
  scenario "dockerd, proxy: by digest" by_digest
  scenario "dockerd, proxy: an unconfigured registry is not reachable" unknown_registry
  scenario "dockerd, proxy: upstream cut off every $cut_bytes bytes" proxied_cut_off
  scenario "dockerd, proxy: upstream killed, pulled images still pull" proxied_killed
  scenario "dockerd, proxy: upstream killed, the error of an uncached image names the cause" proxied_never_seen
  stop_dockerd
  for client in ctr cri podman skopeo; do
    mirrored_scenarios
    "${client}_stops"
  done
  transport=plain
  scenario "containerd, one host for all: two registries by ?ns=, then without them" by_default_host
}

proxied_is_fresh() {
  stop_dockerd
  rm -rf "$scratch/dockerd"
  fresh_mirror
  set_version demo "demo one for $transport"
  push demo library/demo:latest
  start_dockerd ""
}

proxied_cut_off() {
  local before
  before=$(cuts library/broken)
  docker_ pull -q cut.example/library/broken
  prints cut.example/library/broken "broken off again and again"
  (($(cuts library/broken) - before >= broken_bytes / cut_bytes)) || fail "the upstream was not interrupted repeatedly"
}

unknown_registry() {
  if docker_ pull nobody.test/library/demo >"$scratch/said" 2>&1; then fail "docker pulled from an unconfigured registry"; fi
  cat "$scratch/said"
  grep -q Forbidden "$scratch/said" || fail "CONNECT was not rejected with 403"
}

proxied_killed() {
  kill_upstream
  forget_images
  seen_pulls demo "demo two for $transport"
  seen_pulls multi "multi on amd64"
  seen_pulls cut.example/library/broken "broken off again and again"
  forget_images
  seen_pulls "demo@$(<"$state/demo.digest")" "demo two for $transport"
}

# The cache is the registry here, so docker shows its error.
proxied_never_seen() {
  if docker_ pull demo:not-seen-before >"$scratch/said" 2>&1; then fail "docker pulled an image that does not exist"; fi
  cat "$scratch/said"
  grep -qiE "$upstream_cause" "$scratch/said" || fail "docker's error has no cause"
}

# One hosts.toml, in the folder _default: only ?ns= names the registry.
by_default_host() {
  local ref client=ctr
  fresh_mirror
  start_containerd
  rm -r "$scratch/containerd/hosts/docker.io"
  ctr_pulls docker.io/library/demo:latest
  is_as_at_upstream docker.io/library/demo:latest library/demo
  ctr_pulls cut.example/library/other:latest
  is_as_at_upstream cut.example/library/other:latest library/other
  expect "registries that came by ?ns=" "cut.example docker.io" \
    "$(decisions | jq -r '[.[] | select(.route == "ns") | .upstream] | unique | join(" ")')"
  kill_upstream
  ctr_forgets
  for ref in docker.io/library/demo:latest cut.example/library/other:latest; do
    ctr_pulls "$ref"
  done
  says cut.example/library/other:latest "other one"
  ctr_stops
}

# Recent decisions of the cache, newest first.
decisions() {
  curl -sSf "http://$(<"$state/ifnewer.admin")/api/v1/events?limit=1000" | jq -c .events
}
