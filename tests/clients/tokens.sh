# shellcheck shell=bash
# Sourced by ./run: a second private registry, tokens.test, with a token service (tokens.py) that grants access per repository,
# on the registry's own host, because the cache requests tokens from no other. Every client may read public/demo, bob also
# private/demo; eve has a login.

all_of_tokens() {
  transport=proxy
  scenario "tokens: a registry with a token service, a fresh cache and a fresh daemon start" tokens_are_fresh
  scenario "tokens: docker login as bob, with a token through a tunnel, and pull" bob_pulls_by_token
  scenario "tokens: eve logs in and gets public content only, on every route" eve_gets_what_is_public
  scenario "tokens: a client without a login gets public content" stranger_gets_what_is_public
  scenario "tokens: unchanged pulls are one HEAD each and no bytes" tokens_unchanged
  scenario "tokens: registry killed: every client gets public content, eve nothing else" tokens_killed
  scenario "tokens: token service killed too: no client can pull, and the error has the cause" tokens_all_killed
  scenario "tokens: both back, bob's grant revoked: denied at the first response" tokens_revoked
  scenario "local tokens: bob pulls with a token through the cache" ours_are_on
  scenario "local tokens: both killed: bob pulls by docker and podman, eve nothing" ours_killed
  scenario "local tokens: the cache restarted: the same" ours_after_restart
  scenario "local tokens: both back, bob's grant revoked: denied at the first response" tokens_revoked
  scenario "local tokens: both killed again: bob stays denied" ours_stay_denied
  tokens_end
  all_of_hub
}

# Docker Hub under its real names, with its token service at auth.docker.io; only ifnewer resolves them to test servers.
all_of_hub() {
  tokens_registry_name=docker.io
  ifnewer_in=(unshare --mount --propagation private
    sh -c "mount --bind '$company/hosts' /etc/hosts && exec \"\$@\"" -)
  scenario "hub: a Docker Hub with auth.docker.io, a fresh cache and a fresh daemon start" hub_is_fresh
  scenario "hub: docker login as bob, and pull of a private image" hub_bob_pulls
  scenario "hub: eve logs in and gets public content only" hub_eve_pulls
  scenario "hub: both killed: bob and eve as before" hub_killed
  ifnewer_in=()
  rm -f "$state/hub.toml" "$state/realm"
  tokens_end
}

tokens_end() {
  stop tokens
  stop tokens_registry
  stop_dockerd
  rm -f "$state/upstreams.toml" "$state/tokens.address" "$state/tokens_registry.address"
}

# A private address of this machine, because Docker Hub's token service is at port 443.
address_of_hubs_tokens=127.77.77.77

tokens_registry_name=tokens.test
tokens_private() { echo "$tokens_registry_name/private/demo"; }
tokens_public() { echo "$tokens_registry_name/public/demo"; }

tokens_are_fresh() {
  stop_dockerd
  rm -rf "$scratch/dockerd" "$company" "$scratch"/login-*
  make_company
  give_rights '["public/demo", "private/demo"]'
  start_tokens
  start_tokens_registry
  knows_tokens_registry
  tokens_are_filled
  fresh_mirror
  cat "$company/ca.pem" "$scratch/ifnewer/certs/ca.pem" >"$company/both.pem"
  trust=$company/both.pem start_dockerd ""
}

knows_tokens_registry() {
  echo '[upstream."tokens.test"]' >"$state/upstreams.toml"
  keys_of_tokens_registry "$@" >>"$state/upstreams.toml"
}

# keys_of_tokens_registry [REALM]: with local tokens for this token service.
keys_of_tokens_registry() {
  echo "url = \"https://$(<"$state/tokens_registry.address")\""
  echo "ca_file = \"$company/ca.pem\""
  [[ -z ${1:-} ]] || echo "local_tokens = \"$1\""
}

tokens_are_filled() {
  set_version demo "demo for bob alone"
  push_by_token demo private/demo
  push_by_token other public/demo
  layers_of demo >"$state/tokens.layers"
}

# start_tokens [ADDRESS]: a new address at the first start, later the same.
start_tokens() {
  : >"$logs/tokens.out"
  start tokens python3 "$here/tokens.py" "$company" \
    "$(cat "$state/tokens.address" 2>/dev/null || echo "${1:-$(address_of_this_machine):0}")"
  wait_for tokens 20 grep -q 'listening on ' "$logs/tokens.out"
  sed -n 's/^listening on //p' "$logs/tokens.out" >"$state/tokens.address"
}

# give_rights READS: the repositories that bob may read, as JSON.
give_rights() {
  jq -n --argjson reads "$1" '{
    "": {password: "", reads: ["public/demo"], writes: []},
    eve: {password: "eves-password", reads: ["public/demo"], writes: []},
    bob: {password: "bobs-password", reads: $reads, writes: $reads}}' >"$company/rights.new"
  mv "$company/rights.new" "$company/rights.json"
}

start_tokens_registry() {
  cat >"$company/tokens-registry.yml" <<EOF
version: 0.1
storage: {filesystem: {rootdirectory: $company/tokens-registry}}
auth:
  token:
    realm: $(cat "$state/realm" 2>/dev/null || echo "https://$(<"$state/tokens.address")/token")
    service: tokens.test
    issuer: the company
    rootcertbundle: $company/ca.pem
http:
  addr: "$(cat "$state/tokens_registry.address" 2>/dev/null || echo "$(address_of_this_machine):0")"
  tls: {certificate: $company/server.pem, key: $company/server.key}
EOF
  start_docker_registry tokens_registry "$company/tokens-registry.yml"
}

# push_by_token IMAGE REPOSITORY: without the cache.
push_by_token() {
  env NO_PROXY='*' SSL_CERT_FILE="$company/ca.pem" skopeo copy -q --insecure-policy --dest-creds bob:bobs-password \
    "oci:$layout:$1" "docker://$(<"$state/tokens_registry.address")/$2:latest"
}

# token_for USER:PASSWORD REPOSITORY: a token as a client gets it; ":" sends no credential.
token_for() {
  local user=(-u "$1")
  [[ $1 != : ]] || user=()
  curl -sSf --noproxy '*' --cacert "$company/ca.pem" "${user[@]}" \
    "https://$(<"$state/tokens.address")/token?service=tokens.test&scope=repository:$2:pull" | jq -r .token
}

bob_pulls_by_token() {
  login=$scratch/login-bob
  echo bobs-password | docker_ login -u bob --password-stdin tokens.test
  start_counting tokens_registry
  docker_ pull -q "$(tokens_private)"
  prints "$(tokens_private)" "demo for bob alone"
  expect "manifest GETs" 1 "$(asked 'GET /v2/private/demo/manifests/')"
  grep -q '^GET /token 200 bob private/demo:pull$' "$logs/tokens.out" || fail "bob's daemon got no token for the image"
  # Clients use no proxy for 127.0.0.0/8.
  [[ $(<"$state/tokens.address") == 127.* ]] ||
    grep -F "=\"$(<"$state/tokens.address")\"" "$logs/ifnewer.err" | grep -q tunnelled || fail "no token was fetched through a tunnel"
}

eve_gets_what_is_public() {
  login=$scratch/login-eve
  echo eves-password | docker_ login -u eve --password-stdin tokens.test
  forget_images
  docker_ image inspect "$(tokens_private)" >/dev/null 2>&1 && fail "the image was not deleted"
  docker_ pull -q "$(tokens_public)"
  prints "$(tokens_public)" "other one"
  digest_by_token private/demo >"$state/tokens.digest"
  refused_as "$login" "$(tokens_private)" "$denied"
  refused_as "$login" "$(tokens_private)@$(<"$state/tokens.digest")" "$denied"
  no_token_reads eve:eves-password '401|403'
  no_token_reads : '401|403'
}

# digest_by_token REPOSITORY: without the cache.
digest_by_token() {
  header_of "$(curl -sSfI --noproxy '*' --cacert "$company/ca.pem" -H "Accept: $manifest_type" \
    -H "Authorization: Bearer $(token_for bob:bobs-password "$1")" \
    "https://$(<"$state/tokens_registry.address")/v2/$1/manifests/latest" | tr -d '\r')" docker-content-digest
}

# no_token_reads USER:PASSWORD STATUSES: private/demo on every route, and its layers through the public repository.
no_token_reads() {
  local layer path
  layer=$(tail -n 1 "$state/tokens.layers")
  for path in manifests/latest "manifests/$(<"$state/tokens.digest")" "blobs/$layer"; do
    refused_by_token "$1" "$2" private/demo "$path"
  done
  refused_by_token "$1" "$2|404" public/demo "blobs/$layer"
  refused_by_token "$1" "$2|404" public/demo "manifests/$(<"$state/tokens.digest")"
}

# refused_by_token USER:PASSWORD STATUSES REPOSITORY PATH
refused_by_token() {
  by_every_route_shown "$3/$4" tokens.test -H "Authorization: Bearer $(token_for "$1" "$3")" >"$scratch/statuses"
  grep -qvE " ($2)$" "$scratch/statuses" || return 0
  cat "$scratch/statuses"
  fail "$1 was not denied $3/$4"
}

stranger_gets_what_is_public() {
  forget_images
  login=$scratch/docker-cli
  docker_ pull -q "$(tokens_public)"
  prints "$(tokens_public)" "other one"
  refused_as "$login" "$(tokens_private)" "$denied"
}

tokens_unchanged() {
  local image
  login=$scratch/login-bob
  forget_images
  for image in public/demo private/demo; do
    start_counting tokens_registry
    docker_ pull -q "tokens.test/$image"
    expect "questions about $image" 1 "$(asked "[A-Z]* /v2/$image/")"
    expect "HEADs of $image" 1 "$(asked "HEAD /v2/$image/manifests/latest ")"
  done
}

tokens_killed() {
  local who
  stop tokens_registry KILL
  for who in login-bob login-eve docker-cli; do
    forget_images
    login=$scratch/$who
    docker_ pull -q "$(tokens_public)"
    prints "$(tokens_public)" "other one"
  done
  refused_as "$scratch/login-eve" "$(tokens_private)" "$denied|$upstream_cause"
  refused_as "$scratch/docker-cli" "$(tokens_private)" "$denied|$upstream_cause"
  no_token_reads eve:eves-password '401|403|502'
  no_token_reads : '401|403|502'
}

tokens_all_killed() {
  stop tokens KILL
  refused_as "$scratch/login-bob" "$(tokens_private)" 'bad gateway|refused'
  refused_as "$scratch/login-bob" "$(tokens_public)" 'bad gateway|refused'
}

tokens_revoked() {
  give_rights '["public/demo"]'
  start_tokens
  start_tokens_registry
  is_heard_soon "$tokens_registry_name"
  refused_as "$scratch/login-bob" "$(tokens_private)" "$denied"
  refused_as "$scratch/login-bob" "$(tokens_private)@$(<"$state/tokens.digest")" "$denied"
  no_token_reads bob:bobs-password '401|403'
}

# --- local tokens --------------------------------------------------------------------------------------------------

ours_are_on() {
  # Clients use no proxy for 127.0.0.0/8, so the cache cannot intercept a host there.
  [[ $(<"$state/tokens.address") != 127.* ]] || fail "this machine has no address for which clients use a proxy"
  give_rights '["public/demo", "private/demo"]'
  knows_tokens_registry "https://$(<"$state/tokens.address")/token"
  stop_ifnewer
  start_ifnewer
  forget_images
  login=$scratch/login-bob
  docker_ pull -q "$(tokens_private)"
  docker_ pull -q "$(tokens_public)"
  if grep -q tunnelled "$logs/ifnewer.err"; then fail "the token service was reached through a tunnel"; fi
  refused_as "$scratch/login-eve" "$(tokens_private)" "$denied"
  new_logins
}

# Stored logins, for clients that never contacted the service.
new_logins() {
  write_login bob:bobs-password login-new-bob
  write_login bob:guessed login-guess
  write_login eve:eves-password login-new-eve
}

# write_login USER:PASSWORD NAME: for docker, and for podman.
write_login() {
  local server=$tokens_registry_name
  [[ $server != docker.io ]] || server=https://index.docker.io/v1/
  mkdir -p "$scratch/$2"
  jq -n --arg server "$server" --arg auth "$(printf %s "$1" | base64)" '{auths: {($server): {auth: $auth}}}' \
    >"$scratch/$2/config.json"
}

ours_killed() {
  stop tokens KILL
  stop tokens_registry KILL
  ours_are_served
  # Another client, without an older token.
  podman_starts
  auth=$scratch/login-new-bob/config.json
  podman_pulls "$(tokens_private):latest"
  expect "what it says" "demo for bob alone" "$(podman_says "$(tokens_private):latest")"
  podman_forgets
  auth=$scratch/login-new-eve/config.json
  if podman_pulls "$(tokens_private):latest"; then fail "podman pulled for eve"; fi
  podman_pulls "$(tokens_public):latest"
  podman_stops
}

# While both are down: bob pulls as before, every client reads public content, and nothing else is served.
ours_are_served() {
  local who
  for who in login-new-bob login-new-eve login-guess docker-cli; do
    forget_images
    login=$scratch/$who
    docker_ pull -q "$(tokens_public)"
    prints "$(tokens_public)" "other one"
  done
  login=$scratch/login-new-bob
  docker_ pull -q "$(tokens_private)"
  prints "$(tokens_private)" "demo for bob alone"
  forget_images
  for who in login-new-eve login-guess docker-cli; do
    refused_as "$scratch/$who" "$(tokens_private)" "$denied|$upstream_cause"
    refused_as "$scratch/$who" "$(tokens_private)@$(<"$state/tokens.digest")" "$denied|$upstream_cause"
  done
}

ours_after_restart() {
  stop_ifnewer
  start_ifnewer
  ours_are_served
}

ours_stay_denied() {
  stop tokens KILL
  stop tokens_registry KILL
  refused_as "$scratch/login-new-bob" "$(tokens_private)" "$denied|$upstream_cause"
  refused_as "$scratch/login-new-bob" "$(tokens_private)@$(<"$state/tokens.digest")" "$denied|$upstream_cause"
}

# --- Docker Hub ------------------------------------------------------------------------------------------------------

hub_is_fresh() {
  stop_dockerd
  stop ifnewer
  rm -rf "$scratch/dockerd" "$company" "$scratch"/login-*
  make_company
  echo "$address_of_hubs_tokens auth.docker.io" >"$company/hosts"
  give_rights '["public/demo", "private/demo"]'
  start_tokens "$address_of_hubs_tokens:443"
  start_tokens_registry
  tokens_are_filled
  digest_by_token private/demo >"$state/tokens.digest"
  # From here on its challenges name a host that this machine cannot resolve.
  stop tokens_registry
  echo https://auth.docker.io/token >"$state/realm"
  start_tokens_registry
  keys_of_tokens_registry "$(<"$state/realm")" >"$state/hub.toml"
  fresh_mirror
  start_dockerd ""
}

hub_bob_pulls() {
  login=$scratch/login-bob
  echo bobs-password | docker_ login -u bob --password-stdin
  docker_ pull -q private/demo
  prints private/demo "demo for bob alone"
  grep -q '^GET /token 200 bob private/demo:pull$' "$logs/tokens.out" || fail "bob's daemon got no token for the image"
  if grep -q tunnelled "$logs/ifnewer.err"; then fail "the token service was reached through a tunnel"; fi
}

hub_eve_pulls() {
  login=$scratch/login-eve
  if echo guessed | docker_ login -u eve --password-stdin; then fail "eve logged in with a guess"; fi
  echo eves-password | docker_ login -u eve --password-stdin
  forget_images
  docker_ pull -q public/demo
  refused_as "$login" private/demo "$denied"
}

hub_killed() {
  stop tokens KILL
  stop tokens_registry KILL
  new_logins
  ours_are_served
}
