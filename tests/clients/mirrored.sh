# shellcheck shell=bash
# Sourced by ./run: the scenarios of every client that uses ifnewer as a mirror of several registries, with unchanged image
# names: docker.io/library/demo:latest. A client is a set of functions NAME_…:
#
#   starts            without data, configured for $transport; a second call deletes everything
#   pulls REF [ARCH]  fails if the pull fails
#   digest REF        the digest of REF in its store
#   says REF          the output of the image, or its /version for a client that cannot run it
#   has ARCH          fails if the pulled image of library/multi is not for ARCH
#   forgets           deletes every image
#   was_told          its error of a failed pull, without that of the registry itself
#   can_choose        succeeds if it can pull an image for another platform

mirrored() {
  client=$1
  for transport in plain tls; do
    mirrored_scenarios
  done
  "${client}_stops"
}

mirrored_scenarios() {
  local at="$client, $transport${chained:+, two caches}"
  scenario "$at: a fresh cache and a fresh client start" fresh_cache_and_client
  scenario "$at: cold pull, and it runs" cold
  scenario "$at: unchanged pull is one HEAD and no bytes" unchanged
  scenario "$at: moved tag downloads the new bytes" moved
  scenario "$at: multi-arch index, this machine's image" multi
  if "${client}_can_choose"; then scenario "$at: multi-arch index, the other image" multi_other; fi
  scenario "$at: by digest, cached and cold" by_digests
  scenario "$at: a tag that does not exist is 404" absent
  [[ -z ${DIRECT:-} ]] || return 0
  scenario "$at: upstream cut off every $cut_bytes bytes" cut_off_every
  scenario "$at: upstream killed, pulled images still pull" killed
  scenario "$at: upstream killed, the error of an uncached image names the cause" killed_never_seen
}

fresh_cache_and_client() {
  fresh_mirror
  set_version demo "demo one for $client by $transport"
  push demo library/demo:latest
  "${client}_starts"
}

cold() {
  start_counting
  "${client}_pulls" "$demo"
  says "$demo" "demo one for $client by $transport"
  is_as_at_upstream "$demo" library/demo
  expect "upstream manifest GETs" 1 "$(asked 'GET /v2/library/demo/manifests/')"
  expect "blobs fetched twice" "" "$(fetched_twice)"
}

unchanged() {
  unchanged_costs_one_head
  "${client}_forgets"
  unchanged_costs_one_head
}

unchanged_costs_one_head() {
  start_counting
  "${client}_pulls" "$demo"
  [[ -z ${DIRECT:-} ]] || return 0
  expect "upstream HEADs of the tag" 1 "$(asked 'HEAD /v2/library/demo/manifests/latest ')"
  expect "upstream GETs" 0 "$(asked 'GET /v2/library')"
}

moved() {
  set_version demo "demo two for $client by $transport"
  push demo library/demo:latest
  start_counting
  "${client}_pulls" "$demo"
  says "$demo" "demo two for $client by $transport"
  is_as_at_upstream "$demo" library/demo
  [[ -z ${DIRECT:-} ]] || return 0
  (($(blob_bytes_sent) > 0)) || fail "the new layer did not come from the upstream"
  (($(blob_bytes_sent) < 100000)) || fail "more than the new layer came from the upstream: $(blob_bytes_sent) bytes"
}

multi() {
  "${client}_pulls" "$multi"
  says "$multi" "multi on amd64"
  "${client}_has" amd64
}

multi_other() {
  "${client}_forgets"
  "${client}_pulls" "$multi" arm64
  "${client}_has" arm64
  "${client}_forgets"
}

by_digests() {
  local held cold
  held=docker.io/library/demo@$(digest_at_upstream library/demo latest)
  cold=docker.io/library/other@$(digest_at_upstream library/other latest)
  printf '%s\n' "$held" "$cold" >"$state/by-digest"
  "${client}_forgets"
  start_counting
  "${client}_pulls" "$held"
  says "$held" "demo two for $client by $transport"
  [[ -n ${DIRECT:-} ]] || expect "upstream GETs for what is held" 0 "$(asked 'GET /v2/library')"
  "${client}_pulls" "$cold"
  says "$cold" "other one"
  is_as_at_upstream "$cold" library/other
}

absent() {
  if "${client}_pulls" docker.io/library/demo:never-pushed; then fail "$client pulled a tag that does not exist"; fi
  "${client}_was_told" | tee "$scratch/told"
  grep -qiE 'manifest unknown|not ?found' "$scratch/told" || fail "$client did not report that the image does not exist"
}

cut_off_every() {
  local before bytes layer
  layer=$(layers_of broken | tail -n 1)
  before=$(cuts library/broken)
  bytes=$(bytes_through_the_cuts library/broken "$layer")
  "${client}_pulls" "$broken"
  says "$broken" "broken off again and again"
  is_as_at_upstream "$broken" library/broken
  (($(cuts library/broken) - before >= broken_bytes / cut_bytes)) || fail "the upstream was not interrupted repeatedly"
  expect "bytes the upstream sent of the broken layer" "$(layer_bytes "$layer")" \
    "$(($(bytes_through_the_cuts library/broken "$layer") - bytes))"
}

killed() {
  local ref
  kill_upstream
  "${client}_forgets"
  "${client}_pulls" "$demo"
  says "$demo" "demo two for $client by $transport"
  "${client}_pulls" "$multi"
  says "$multi" "multi on amd64"
  "${client}_pulls" "$broken"
  says "$broken" "broken off again and again"
  "${client}_forgets"
  while read -r ref; do
    "${client}_pulls" "$ref"
  done <"$state/by-digest"
}

killed_never_seen() {
  if "${client}_pulls" docker.io/library/demo:not-seen-before; then fail "$client pulled an image that does not exist"; fi
  "${client}_was_told" | tee "$scratch/told"
  grep -q 'docker\.io' "$scratch/told" || fail "the error of $client does not name the upstream"
  grep -qiE "$upstream_cause" "$scratch/told" || fail "the error of $client does not name the cause"
}

demo=docker.io/library/demo:latest
multi=docker.io/library/multi:latest
broken=cut.example/library/broken:latest

says() {
  expect "what $1 says" "$2" "$("${client}_says" "$1")"
}

# is_as_at_upstream REF REPOSITORY
is_as_at_upstream() {
  expect "the digest of $1" "$(digest_at_upstream "$2" latest)" "$("${client}_digest" "$1")"
}
