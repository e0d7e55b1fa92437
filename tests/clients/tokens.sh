# shellcheck shell=bash
# Sourced by ./run: the company's other registry, tokens.test, with rights per repository that a token service (tokens.py)
# hands out, on the registry's own host: the cache itself fetches tokens from no other. Everyone may read public/demo, bob
# private/demo too; eve has a login.

all_of_tokens() {
  door=proxy
  scenario "tokens: a registry with a token service, a fresh cache and a fresh daemon start" tokens_are_fresh
  scenario "tokens: docker login as bob, whose token comes by a tunnel, and pull" bob_pulls_by_token
  scenario "tokens: eve logs in and gets what is public, by no door what is not" eve_gets_what_is_public
  scenario "tokens: who has no login gets what is public" stranger_gets_what_is_public
  scenario "tokens: unchanged pulls are one HEAD each and no bytes" tokens_unchanged
  scenario "tokens: registry killed: everyone gets what is public, eve nothing else" tokens_killed
  scenario "tokens: registry back, bob's right revoked: denied at the first answer" tokens_revoked
  stop tokens
  stop tokens_registry
  stop_dockerd
  rm -f "$state/upstreams.toml"
}

tokens_private=tokens.test/private/demo
tokens_public=tokens.test/public/demo

tokens_are_fresh() {
  stop_dockerd
  rm -rf "$scratch/dockerd" "$company" "$scratch"/login-*
  make_company
  give_rights '["public/demo", "private/demo"]'
  start tokens python3 "$here/tokens.py" "$company" "$(address_of_this_machine):0"
  wait_for tokens 20 grep -q 'listening on ' "$logs/tokens.out"
  sed -n 's/^listening on //p' "$logs/tokens.out" | tail -n 1 >"$state/tokens.address"
  start_tokens_registry
  cat >"$state/upstreams.toml" <<EOF
[upstream."tokens.test"]
url = "https://$(<"$state/tokens_registry.address")"
ca_file = "$company/ca.pem"
EOF
  set_version demo "demo for bob alone"
  push_by_token demo private/demo
  push_by_token other public/demo
  layers_of demo >"$state/tokens.layers"
  fresh_mirror
  cat "$company/ca.pem" "$scratch/ifnewer/certs/ca.pem" >"$company/both.pem"
  trust=$company/both.pem start_dockerd ""
}

# give_rights READS: what bob may read, as JSON.
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
    realm: https://$(<"$state/tokens.address")/token
    service: tokens.test
    issuer: the company
    rootcertbundle: $company/ca.pem
http:
  addr: "$(cat "$state/tokens_registry.address" 2>/dev/null || echo "$(address_of_this_machine):0")"
  tls: {certificate: $company/server.pem, key: $company/server.key}
EOF
  start_docker_registry tokens_registry "$company/tokens-registry.yml"
}

# push_by_token IMAGE REPOSITORY: past the cache.
push_by_token() {
  env NO_PROXY='*' SSL_CERT_FILE="$company/ca.pem" skopeo copy -q --insecure-policy --dest-creds bob:bobs-password \
    "oci:$layout:$1" "docker://$(<"$state/tokens_registry.address")/$2:latest"
}

# token_for USER:PASSWORD REPOSITORY: as a client would get it; with ":" as nobody.
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
  docker_ pull -q "$tokens_private"
  prints "$tokens_private" "demo for bob alone"
  expect "manifest GETs" 1 "$(asked 'GET /v2/private/demo/manifests/')"
  grep -q '^GET /token 200 bob private/demo:pull$' "$logs/tokens.out" || fail "bob's daemon got no token for the image"
  # Clients go to 127.0.0.0/8 without a proxy.
  [[ $(<"$state/tokens.address") == 127.* ]] ||
    grep -F "=\"$(<"$state/tokens.address")\"" "$logs/ifnewer.err" | grep -q tunnelled || fail "no token came by a tunnel"
}

eve_gets_what_is_public() {
  login=$scratch/login-eve
  echo eves-password | docker_ login -u eve --password-stdin tokens.test
  forget_images
  docker_ image inspect "$tokens_private" >/dev/null 2>&1 && fail "the image was not forgotten"
  docker_ pull -q "$tokens_public"
  prints "$tokens_public" "other one"
  digest_by_token private/demo >"$state/tokens.digest"
  refused_as "$login" "$tokens_private" "$denied"
  refused_as "$login" "$tokens_private@$(<"$state/tokens.digest")" "$denied"
  no_token_reads eve:eves-password '401|403'
  no_token_reads : '401|403'
}

# digest_by_token REPOSITORY: past the cache.
digest_by_token() {
  header_of "$(curl -sSfI --noproxy '*' --cacert "$company/ca.pem" -H "Accept: $manifest_type" \
    -H "Authorization: Bearer $(token_for bob:bobs-password "$1")" \
    "https://$(<"$state/tokens_registry.address")/v2/$1/manifests/latest" | tr -d '\r')" docker-content-digest
}

# no_token_reads USER:PASSWORD STATUSES: private/demo, by every door; nor its layers through what is public.
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
  by_every_door_shown "$3/$4" tokens.test -H "Authorization: Bearer $(token_for "$1" "$3")" >"$scratch/statuses"
  grep -qvE " ($2)$" "$scratch/statuses" || return 0
  cat "$scratch/statuses"
  fail "$1 was not refused $3/$4"
}

stranger_gets_what_is_public() {
  forget_images
  login=$scratch/docker-cli
  docker_ pull -q "$tokens_public"
  prints "$tokens_public" "other one"
  refused_as "$login" "$tokens_private" "$denied"
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
    docker_ pull -q "$tokens_public"
    prints "$tokens_public" "other one"
  done
  refused_as "$scratch/login-eve" "$tokens_private" "$denied|$upstream_cause"
  refused_as "$scratch/docker-cli" "$tokens_private" "$denied|$upstream_cause"
  no_token_reads eve:eves-password '401|403|502'
  no_token_reads : '401|403|502'
}

tokens_revoked() {
  give_rights '["public/demo"]'
  start_tokens_registry
  is_heard_soon tokens.test
  refused_as "$scratch/login-bob" "$tokens_private" "$denied"
  refused_as "$scratch/login-bob" "$tokens_private@$(<"$state/tokens.digest")" "$denied"
  no_token_reads bob:bobs-password '401|403'
}
