# shellcheck shell=bash
# Sourced by ./run: a private registry, configured as registry.test: TLS with a private CA, authentication for every
# request, deletion allowed. Its users are bob, who may read it, and eve, who may not.

company=$scratch/company

make_company() {
  mkdir -p "$company"
  openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=the company's authority" \
    -keyout "$company/ca.key" -out "$company/ca.pem" 2>/dev/null
  openssl req -newkey rsa:2048 -nodes -subj "/CN=localhost" -keyout "$company/server.key" \
    -out "$company/server.csr" 2>/dev/null
  printf 'subjectAltName = DNS:localhost, DNS:auth.docker.io, IP:127.0.0.1, IP:%s, IP:%s\n' \
    "$(address_of_this_machine)" "$address_of_hubs_tokens" >"$company/names"
  openssl x509 -req -days 2 -in "$company/server.csr" -CA "$company/ca.pem" -CAkey "$company/ca.key" \
    -CAcreateserial -extfile "$company/names" -out "$company/server.pem" 2>/dev/null
  mkdir -p "$company/trust"
  cp "$company/ca.pem" "$company/trust/ca.crt"
  bob_may_read
}

# A non-loopback address of this machine, or 127.0.0.1 if there is none.
address_of_this_machine() {
  hostname -I 2>/dev/null | tr ' ' '\n' | grep -m1 -E '^[0-9.]+$' || echo 127.0.0.1
}

bob_may_read() {
  htpasswd -Bbc "$company/users" bob bobs-password 2>/dev/null
}

nobody_may_read() {
  htpasswd -Bbc "$company/users" somebody-else their-password 2>/dev/null
}

start_registry() {
  cat >"$company/registry.yml" <<EOF
version: 0.1
storage: {filesystem: {rootdirectory: $company/registry}, delete: {enabled: true}}
auth: {htpasswd: {realm: the company, path: $company/users}}
http:
  addr: "$(cat "$state/registry.address" 2>/dev/null || echo 127.0.0.1:0)"
  tls: {certificate: $company/server.pem, key: $company/server.key}
EOF
  start_docker_registry registry "$company/registry.yml"
}

# Its section in ifnewer's configuration.
configure_company() {
  cat >"$state/upstreams.toml" <<EOF
[upstream."registry.test"]
url = "https://localhost:$(port_of registry)"
ca_file = "$company/ca.pem"

[[rule]]
images = ["registry.test/private/pushed*"]
max_age = "1h"
EOF
}

port_of() {
  local address
  address=$(<"$state/$1.address")
  echo "${address##*:}"
}

# push_to_company IMAGE REPOSITORY:TAG: without the cache.
push_to_company() {
  skopeo copy -q --insecure-policy --dest-cert-dir "$company/trust" --dest-creds bob:bobs-password \
    "oci:$layout:$1" "docker://localhost:$(port_of registry)/$2"
}
