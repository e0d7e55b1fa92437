# shellcheck shell=bash
# Sourced by ./run: clients through two caches, one in front of the other over TLS, with the files of config/fleet.

chained=

all_of_chained() {
  local of_one=$upstream_cause
  chained=1 transport=plain
  # The regional cache answers with the cause, as 502 or 503.
  upstream_cause="responded with status 50|$of_one"
  for client in skopeo podman; do
    mirrored_scenarios
    "${client}_stops"
  done
  dockerd_scenarios plain
  upstream_cause=$of_one chained=
  stop regional
  rm -f "$state/hub.toml" "$state/cut.toml"
}

# An empty regional cache in front of the upstream. Leaves the sections of the other one's configuration.
fresh_regional() {
  local at
  stop regional
  rm -rf "$scratch/regional" "$logs"/regional.*
  mkdir -p "$scratch/regional"
  cat "$root/config/fleet/regional.toml" - >"$scratch/regional/regional.toml" <<EOF
[upstream."docker.io"]
url = "http://$(upstream_address)"
[upstream."cut.example"]
url = "http://$(<"$state/cutting.address")"
EOF
  start regional env IFNEWER_DATA="$scratch/regional/data" IFNEWER_TLS_FOLDER="$scratch/regional/certs" \
    IFNEWER_LISTEN_REGISTRY=127.0.0.1:0 IFNEWER_LISTEN_ADMIN=off \
    "$ifnewer" serve --config "$scratch/regional/regional.toml"
  wait_for regional 20 grep -q 'registry listening on' "$logs/regional.out"
  at=$(sed -nE 's/.*registry listening on ([0-9.:]+).*/\1/p' "$logs/regional.out" | head -n 1)
  section_of docker.io "$at" >"$state/hub.toml"
  section_of docker.io "$at" | sed 's/"docker\.io"/"cut.example"/' >"$state/cut.toml"
}

# section_of UPSTREAM ADDRESS: its keys in sidecar.toml, for the regional cache at this address.
section_of() {
  awk -v head="[upstream.\"$1\"]" '$0 == head { on = 1; next } /^\[/ { on = 0 } on' "$root/config/fleet/sidecar.toml" |
    sed "s|https://regional.example.org:5000|https://$2|; s|/etc/ifnewer/regional-ca.pem|$scratch/regional/certs/ca.pem|"
}
