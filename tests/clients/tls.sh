# shellcheck shell=bash
# Sourced by ./run: TLS versions and suites for clients, on the cache's own name and within CONNECT.

all_of_tls() {
  [[ -z ${DIRECT:-} ]] || return 0
  transport=tls
  scenario "tls: a fresh cache starts" fresh_mirror
  scenario "tls: 1.2 and 1.3 are accepted, within CONNECT too" new_versions
  scenario "tls: 1.0 and 1.1 are rejected, within CONNECT too" old_versions
  scenario "tls: suites without forward secrecy or without authenticated encryption are rejected" weak_suites
  scenario "tls: h2 if the client offers it, else http/1.1" protocols
}

# openssl's own minimum is lowered, so that a rejection is the cache's.
handshake() {
  openssl s_client -connect "$(address)" -servername localhost -CAfile "$scratch/ifnewer/certs/ca.pem" \
    -verify_return_error -brief "$@" </dev/null 2>&1
}

handshake_within_connect() {
  openssl s_client -proxy "$(address)" -connect registry-1.docker.io:443 -servername registry-1.docker.io \
    -CAfile "$scratch/ifnewer/certs/ca.pem" -verify_return_error -brief "$@" </dev/null 2>&1
}

new_versions() {
  local version shake
  for shake in handshake handshake_within_connect; do
    for version in 2 3; do
      "$shake" "-tls1_$version" | tee "$scratch/said"
      grep -q "Protocol version: TLSv1.$version" "$scratch/said" || fail "TLS 1.$version is not supported"
      grep -q 'Verification: OK' "$scratch/said" || fail "the certificate is not verified"
    done
  done
}

old_versions() {
  local version shake
  for shake in handshake handshake_within_connect; do
    for version in -tls1 -tls1_1; do
      refused_by_us "$shake" "$version" -cipher 'ALL:@SECLEVEL=0'
    done
  done
}

weak_suites() {
  local suite
  for suite in AES128-SHA AES256-GCM-SHA384 ECDHE-RSA-AES128-SHA ECDHE-ECDSA-AES256-SHA \
    ECDHE-ECDSA-AES128-SHA256 DHE-RSA-AES128-GCM-SHA256 ADH-AES128-SHA NULL-SHA256; do
    refused_by_us handshake -tls1_2 -cipher "$suite:@SECLEVEL=0"
    refused_by_us handshake_within_connect -tls1_2 -cipher "$suite:@SECLEVEL=0"
  done
}

# refused_by_us COMMAND…: by an alert of the server, not by openssl itself.
refused_by_us() {
  if "$@" >"$scratch/said"; then cat "$scratch/said"; fail "accepted: $*"; fi
  cat "$scratch/said"
  grep -qE 'alert (protocol version|handshake failure)|tlsv1 alert' "$scratch/said" || fail "not rejected by the cache: $*"
}

protocols() {
  local ca=$scratch/ifnewer/certs/ca.pem base hub
  base=https://$(address)/v2/
  hub=https://registry-1.docker.io/v2/
  expect "h2 offered" 2 "$(version_of --http2 --cacert "$ca" "$base")"
  expect "http/1.1 offered" 1.1 "$(version_of --http1.1 --cacert "$ca" "$base")"
  expect "nothing offered" 1.1 "$(version_of --no-alpn --cacert "$ca" "$base")"
  expect "h2 offered within CONNECT" 2 "$(version_of --http2 --cacert "$ca" -x "http://$(address)" "$hub")"
  expect "nothing offered within CONNECT" 1.1 "$(version_of --no-alpn --cacert "$ca" -x "http://$(address)" "$hub")"
}

version_of() {
  curl -sSf -o /dev/null -w '%{http_version}' "$@"
}
