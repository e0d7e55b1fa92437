# shellcheck shell=bash
# Sourced by ./run: many concurrent clients and a registry with little bandwidth, compared with the same clients without the
# cache.

slow_images=12
slow_layers=4
slow_layer_bytes=250000
docker_images=10

all_of_pressure() {
  [[ -z ${DIRECT:-} ]] || return 0
  transport=plain
  scenario "pressure: $slow_images images of $slow_layers layers, a registry with little bandwidth" slow_registry_starts
  scenario "pressure: $slow_images skopeo copies at once, directly" skopeo_copies_directly
  scenario "pressure: $slow_images skopeo copies at once, through the cache" skopeo_copies_through
  scenario "pressure: two dockerd with $docker_images images each at once, directly" dockerd_pulls_directly
  scenario "pressure: two dockerd with $docker_images images each at once, through the cache" dockerd_pulls_through
  for daemon in second dockerd; do stop_dockerd; done
  stop slow
  rm -f "$state/hub.toml"
}

slow_registry_starts() {
  local n layer
  upstream_is_up
  for ((n = 1; n <= slow_images; n++)); do
    umoci new --image "$layout:slow$n"
    for ((layer = 1; layer <= slow_layers; layer++)); do
      head -c "$slow_layer_bytes" /dev/urandom >"$scratch/layers/noise"
      umoci insert --rootless --image "$layout:slow$n" "$scratch/layers/noise" "/noise$layer"
    done
    push "slow$n" "library/slow$n:latest"
  done
  rm "$scratch/layers/noise"
  : >"$logs/slow.out"
  start slow python3 "$here/fronts.py" slow "$(upstream_address)"
  wait_for slow 20 grep -q 'listening on ' "$logs/slow.out"
  sed -n 's/^listening on //p' "$logs/slow.out" >"$state/slow.address"
  # A download takes longer than `first_byte_timeout`, so queueing that counts as unavailability fails.
  printf 'url = "http://%s"\nfirst_byte_timeout = "3s"\n' "$(<"$state/slow.address")" >"$state/hub.toml"
}

# as_quick_as_directly NAME: the time of "through" against that of "direct".
as_quick_as_directly() {
  local direct through
  direct=$(<"$state/$1.direct.ms")
  through=$(<"$state/$1.through.ms")
  echo "directly $direct ms, through the cache $through ms"
  ((through * 10 <= direct * 11)) || fail "$1: $through ms through the cache, $direct ms directly"
}

# timed NAME COMMAND…: records its milliseconds.
timed() {
  local name=$1 began=${EPOCHREALTIME/[.,]/}
  shift
  "$@"
  echo $(((${EPOCHREALTIME/[.,]/} - began) / 1000)) >"$state/$name.ms"
}

# all_end_well PID…: fails if one of them failed.
all_end_well() {
  local pid bad=0
  for pid in "$@"; do wait "$pid" || bad=$((bad + 1)); done
  ((bad == 0)) || fail "$bad of $# did not succeed"
}

# --- skopeo -------------------------------------------------------------------------------------------------------------

skopeo_copies_directly() {
  timed skopeo.direct skopeo_copies_all "$(<"$state/slow.address")"
}

skopeo_copies_through() {
  fresh_mirror
  timed skopeo.through skopeo_copies_all "$(address)"
  as_quick_as_directly skopeo
}

# skopeo_copies_all REGISTRY: all images at once, each by a separate skopeo. For an OCI layout skopeo fetches all layers of
# an image at once, for a folder it does not.
skopeo_copies_all() {
  local n pids=()
  rm -rf "$scratch/copied"
  mkdir -p "$scratch/copied"
  be_cut_off
  for ((n = 1; n <= slow_images; n++)); do
    "${cut_off[@]}" timeout 120 skopeo --registries-conf /dev/null --insecure-policy --override-os linux \
      --override-arch amd64 copy -q --src-tls-verify=false "docker://$1/library/slow$n:latest" \
      "oci:$scratch/copied/slow$n" &
    pids+=($!)
  done
  all_end_well "${pids[@]}"
}

# --- dockerd ------------------------------------------------------------------------------------------------------------

dockerd_pulls_directly() {
  two_fresh_daemons "http://$(<"$state/slow.address")"
  timed dockerd.direct two_daemons_pull
}

dockerd_pulls_through() {
  fresh_mirror
  two_fresh_daemons "$(mirror_for_dockerd)"
  timed dockerd.through two_daemons_pull
  as_quick_as_directly dockerd
}

# two_fresh_daemons MIRROR
two_fresh_daemons() {
  for daemon in dockerd second; do
    stop_dockerd
    rm -rf "${scratch:?}/$daemon"
    start_dockerd "$1"
  done
}

two_daemons_pull() {
  local n pids=()
  for daemon in dockerd second; do
    for ((n = 1; n <= docker_images; n++)); do
      docker_ pull -q "slow$n" &
      pids+=($!)
    done
  done
  all_end_well "${pids[@]}"
}
