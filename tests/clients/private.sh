# shellcheck shell=bash
# Sourced by ./run: authorization in a private registry, requested by real clients under the registry's own name.

all_of_private() {
  [[ -z ${DIRECT:-} ]] || return 0
  transport=proxy
  scenario "private: the private registry, a fresh cache and a fresh daemon start" private_is_fresh
  scenario "private: a client without a login is denied" nobody_is_refused
  scenario "private: docker login as bob, pull, and it runs" bob_pulls
  scenario "private: bob's unchanged pull is one HEAD and no bytes" bob_pulls_again
  scenario "private: eve's login fails, her daemon and her curl get nothing on any route" eve_gets_nothing
  scenario "private: containerd as bob by ?ns= and by path prefix" bob_by_mirror
  scenario "private: podman and skopeo log in as bob and pull through the proxy" bob_by_podman
  scenario "private: docker push through the proxy, visible at once on every route" pushed
  scenario "private: skopeo copy through the proxy, visible at once" copied
  scenario "private: skopeo delete through the proxy, gone at once" deleted
  scenario "private: registry killed: bob pulls, eve and a client without a login do not" bob_pulls_alone
  scenario "private: the cache restarted without the registry: the same" bob_pulls_alone_after_restart
  scenario "private: registry back, bob's grant revoked: denied at the first response" bob_is_revoked
  scenario "private: registry killed again: bob stays denied" bob_stays_denied
  stop registry
  all_of_tokens
}

private_is_fresh() {
  stop_dockerd
  stop registry
  rm -rf "$scratch/dockerd" "$company" "$scratch"/login-*
  make_company
  start_registry
  configure_company
  set_version demo "demo one for bob"
  push_to_company demo private/demo:latest
  push_to_company other private/other:latest
  fresh_mirror
  start_dockerd ""
  # Eve's login always fails. Her clients send her password anyway.
  mkdir -p "$scratch/login-eve"
  jq -n --arg auth "$(printf 'eve:eves-password' | base64)" '{auths: {"registry.test": {auth: $auth}}}' \
    >"$scratch/login-eve/config.json"
}

private=registry.test/private/demo

# Docker's texts for a denial. While the registry is unavailable, its error has the cause instead.
denied='unauthorized|no basic auth|denied'

nobody_is_refused() {
  refused_as "$scratch/docker-cli" "$private" "$denied"
  # The challenge is the registry's own.
  diff <(challenge_of -x "http://$(address)" --cacert "$scratch/ifnewer/certs/ca.pem" https://registry.test/v2/) \
    <(challenge_of --cacert "$company/ca.pem" "https://localhost:$(port_of registry)/v2/") ||
    fail "the challenge is not the registry's"
}

challenge_of() {
  curl -sSi "$@" | tr -d '\r' | grep -i '^www-authenticate:' || echo none
}

bob_pulls() {
  login=$scratch/login-bob
  echo bobs-password | docker_ login -u bob --password-stdin registry.test
  start_counting registry
  docker_ pull -q "$private"
  prints "$private" "demo one for bob"
  expect "manifest GETs" 1 "$(asked 'GET /v2/private/demo/manifests/')"
  expect "blobs fetched twice" "" "$(fetched_twice)"
}

bob_pulls_again() {
  login=$scratch/login-bob
  forget_images
  start_counting registry
  docker_ pull -q "$private"
  expect "questions about the image" 1 "$(asked '[A-Z]* /v2/private/demo/')"
  expect "HEADs of the tag" 1 "$(asked 'HEAD /v2/private/demo/manifests/latest ')"
}

eve_gets_nothing() {
  login=$scratch/login-eve-tries
  if echo eves-password | docker_ login -u eve --password-stdin registry.test; then fail "eve logged in"; fi
  digest_in_company private/demo latest >"$state/private.digest"
  forget_images
  refused_as "$scratch/login-eve" "$private" "$denied"
  refused_as "$scratch/login-eve" "$private@$(<"$state/private.digest")" "$denied"
  nothing_for eve:eves-password
  nothing_for :
}

# nothing_for USER:PASSWORD: 401 or 403 for the tag, the manifest and a layer, on every route. While the registry is down
# also 502, as for unknown content.
nothing_for() {
  local path refusal='401|403'
  [[ -e $state/registry.pid ]] || refusal='401|403|502'
  for path in manifests/latest "manifests/$(<"$state/private.digest")" "blobs/$(layers_of demo | head -n 1)"; do
    by_every_route "$1" "private/demo/$path" >"$scratch/statuses"
    grep -qvE " ($refusal)$" "$scratch/statuses" || continue
    cat "$scratch/statuses"
    fail "$1 was not denied $path"
  done
  expect "statuses of what is not there" "$(by_every_route "$1" private/demo/manifests/latest)" \
    "$(by_every_route "$1" private/never-there/manifests/latest)"
}

# by_every_route USER:PASSWORD PATH: a line "ROUTE STATUS" for each, in the private registry; ":" sends no credential.
by_every_route() {
  local user=(-u "$1")
  [[ $1 != : ]] || user=()
  by_every_route_shown "$2" registry.test "${user[@]}"
}

# by_every_route_shown PATH REGISTRY [CURL'S OPTIONS…]
by_every_route_shown() {
  local path=$1 registry=$2 plain
  plain=http://$(address)/v2
  shift 2
  echo "proxy $(status_of "$@" -x "http://$(address)" --cacert "$scratch/ifnewer/certs/ca.pem" "https://$registry/v2/$path")"
  echo "ns $(status_of "$@" "$plain/$path?ns=$registry")"
  echo "prefix $(status_of "$@" "$plain/$registry/$path")"
}

status_of() {
  curl -sS -o /dev/null -w '%{http_code}' -H "Accept: $manifest_type" -H "Accept: $index_type" \
    -H "Accept: $docker_type" "$@"
}

# digest_in_company REPOSITORY TAG: without the cache.
digest_in_company() {
  header_of "$(curl -sSfI -u bob:bobs-password --cacert "$company/ca.pem" -H "Accept: $manifest_type" \
    -H "Accept: $docker_type" "https://localhost:$(port_of registry)/v2/$1/manifests/$2" | tr -d '\r')" docker-content-digest
}

# refused_as LOGIN IMAGE REGEX
refused_as() {
  login=$1
  if docker_ pull "$2" >"$scratch/said" 2>&1; then fail "docker pulled $2"; fi
  cat "$scratch/said"
  grep -qiE "$3" "$scratch/said" || fail "docker's error does not match: $3"
}

# containerd sends its login after a challenge, so bob needs no proxy. Docker and podman do not: they decide by the
# response to /v2/, and the mirror's has no challenge.
bob_by_mirror() {
  local at
  transport=plain
  start_containerd
  ctr_pulls_as eve:eves-password "$private:latest" && fail "containerd pulled for eve"
  ctr_pulls_as bob:bobs-password "$private:latest"
  expect "digest" "$(digest_in_company private/demo latest)" "$(ctr_digest "$private:latest")"
  at=$(address)/$private:latest
  ctr_pulls_as eve:eves-password "$at" --plain-http && fail "containerd pulled for eve with a path prefix"
  ctr_pulls_as bob:bobs-password "$at" --plain-http
  expect "digest" "$(digest_in_company private/demo latest)" "$(ctr_digest "$at")"
  ctr_stops
}

# ctr_pulls_as USER:PASSWORD REF [OPTION…]
ctr_pulls_as() {
  local user=$1 ref=$2
  shift 2
  be_cut_off
  ctr_forgets
  ctr_said "${cut_off[@]}" timeout 120 ctr --address "$scratch/containerd/sock" images pull --user "$user" \
    --hosts-dir "$scratch/containerd/hosts" --snapshotter native --platform linux/amd64 "$@" "$ref"
}

bob_by_podman() {
  auth=$scratch/auth-bob.json
  rm -f "$auth"
  podman_starts
  if podman_pulls "$private:latest"; then fail "podman pulled without a login"; fi
  if podman_ login -u eve -p eves-password registry.test; then fail "eve logged in"; fi
  podman_ login -u bob -p bobs-password registry.test
  podman_pulls "$private:latest"
  expect "what $private says" "demo one for bob" "$(podman_says "$private:latest")"
  podman_stops
  skopeo_pulls "$private:latest"
  expect "digest by skopeo" "$(digest_in_company private/demo latest)" "$(skopeo_digest "$private:latest")"
  skopeo_forgets
}

skopeo_as_bob() {
  auth=$scratch/auth-bob.json
  be_cut_off
  "${cut_off[@]}" timeout 120 skopeo --insecure-policy "$@"
}

# In these repositories `max_age` is one hour: only changes through the cache are visible at once.
pushed() {
  login=$scratch/login-bob
  pushed=registry.test/private/pushed:latest
  docker_ pull -q "$private"
  docker_ pull -q registry.test/private/other
  docker_ tag "$private" "$pushed"
  docker_ push -q "$pushed"
  every_route_has pushed/manifests/latest "$(digest_in_company private/pushed latest)"
  # Docker does not request layers that it has, and a tag with an incomplete image is revalidated each time.
  forget_images
  docker_ pull -q "$pushed"
  start_counting registry
  every_route_has pushed/manifests/latest "$(digest_in_cache private/pushed latest)"
  expect "questions while the tag is fresh" 0 "$(asked '[A-Z]* /v2/private/pushed/')"
  docker_ pull -q registry.test/private/other
  docker_ tag registry.test/private/other "$pushed"
  docker_ push -q "$pushed"
  every_route_has pushed/manifests/latest "$(digest_in_company private/pushed latest)"
  forget_images
  docker_ pull -q "$pushed"
  prints "$pushed" "other one"
}

copied() {
  skopeo_as_bob copy "oci:$layout:demo" docker://registry.test/private/pushed:copied
  every_route_has pushed/manifests/copied "$(digest_in_company private/pushed copied)"
  skopeo_as_bob copy "oci:$layout:many" docker://registry.test/private/pushed:copied
  every_route_has pushed/manifests/copied "$(digest_in_company private/pushed copied)"
}

deleted() {
  local path digest
  digest=$(digest_in_company private/pushed copied)
  skopeo_as_bob delete docker://registry.test/private/pushed:copied
  for path in copied "$digest"; do
    by_every_route bob:bobs-password "private/pushed/manifests/$path" >"$scratch/statuses"
    expect "statuses of $path" "proxy 404 ns 404 prefix 404" "$(xargs <"$scratch/statuses")"
  done
}

# every_route_has PATH DIGEST: below private/, as bob.
every_route_has() {
  local plain
  plain=http://$(address)/v2
  expect "digest by the proxy" "$2" "$(digest_for_bob -x "http://$(address)" \
    --cacert "$scratch/ifnewer/certs/ca.pem" "https://registry.test/v2/private/$1")"
  expect "digest by ?ns=" "$2" "$(digest_for_bob "$plain/private/$1?ns=registry.test")"
  expect "digest by the name in front" "$2" "$(digest_for_bob "$plain/registry.test/private/$1")"
}

digest_for_bob() {
  header_of "$(curl -sSfI -u bob:bobs-password -H "Accept: $manifest_type" -H "Accept: $docker_type" "$@" | tr -d '\r')" \
    docker-content-digest
}

digest_in_cache() {
  digest_for_bob "http://$(address)/v2/registry.test/$1/manifests/$2"
}

# --- outage and revocation -------------------------------------------------------------------------------------------

bob_pulls_alone() {
  stop registry KILL
  forget_images
  bob_pulls_what_he_saw
  refused_as "$scratch/login-eve" "$private" "$denied|$upstream_cause"
  refused_as "$scratch/docker-cli" "$private" "$denied|$upstream_cause"
  nothing_for eve:eves-password
  nothing_for :
}

bob_pulls_alone_after_restart() {
  stop_ifnewer
  start_ifnewer
  forget_images
  bob_pulls_what_he_saw
  refused_as "$scratch/login-eve" "$private" "$denied|$upstream_cause"
  nothing_for eve:eves-password
  nothing_for :
}

bob_pulls_what_he_saw() {
  login=$scratch/login-bob
  docker_ pull -q "$private"
  prints "$private" "demo one for bob"
  forget_images
  docker_ pull -q "$private@$(<"$state/private.digest")"
  forget_images
}

bob_is_revoked() {
  nobody_may_read
  start_registry
  is_heard_soon registry.test
  start_counting registry
  refused_as "$scratch/login-bob" "$private" "$denied"
  expect "answers other than 401 to bob" 0 "$(since_counting | grep -vc '" 401 ' || true)"
  refused_as "$scratch/login-bob" "$private@$(<"$state/private.digest")" "$denied"
  nothing_for bob:bobs-password
}

# is_heard_soon REGISTRY: until the cache has noticed that it is available. A request without a login suffices.
is_heard_soon() {
  local tries=0
  until is_heard "$1"; do
    ((tries++ < 120)) || fail "the registry's return was not noticed within a minute"
    by_every_route_shown private/demo/manifests/latest "$1" >/dev/null
    sleep 0.5
  done
}

is_heard() {
  curl -sSf "http://$(<"$state/ifnewer.admin")/api/v1/upstreams" |
    jq -e --arg name "$1" '.upstreams[] | select(.name == $name) | .unavailable == null' >/dev/null
}

bob_stays_denied() {
  stop registry KILL
  refused_as "$scratch/login-bob" "$private" "$denied|$upstream_cause"
  nothing_for bob:bobs-password
}
