# shellcheck shell=bash
# Sourced by ./run: a private containerd with hosts.toml, driven by `ctr` (client ctr) and by the call that the kubelet
# makes (client cri).

# --- ctr: resolves and fetches in its own process --------------------------------------------------------------------

ctr_starts() { start_containerd; }
ctr_stops() { stop containerd KILL; }
ctr_can_choose() { :; }

# ctr_pulls REF [ARCH]
ctr_pulls() {
  be_cut_off
  ctr_said "${cut_off[@]}" timeout 120 ctr --address "$scratch/containerd/sock" \
    images pull --hosts-dir "$scratch/containerd/hosts" --snapshotter native --platform "linux/${2:-amd64}" "$1"
}

ctr_digest() { ctr_ images ls "name==$1" | awk 'NR == 2 { print $3 }'; }
ctr_says() { runs_in_containerd default "$1"; }
ctr_has() { has_architecture default "$1"; }
ctr_forgets() { forget_namespace default; }
ctr_was_told() { cat "$scratch/ctr-said"; }

ctr_said() {
  "$@" >"$scratch/ctr-said" 2>&1 || { cat "$scratch/ctr-said"; return 1; }
}

# --- CRI: the daemon resolves and fetches ----------------------------------------------------------------------------

cri_starts() { start_containerd; }
cri_stops() { stop containerd KILL; }
cri_can_choose() { false; }

# The kubelet's call without the kubelet: gRPC is one HTTP/2 request, and the trailer of the response has the result. The
# message is PullImageRequest{image: ImageSpec{image: REF}}, three nested lengths under 128, hence one byte each.
cri_pulls() {
  local ref=$1 name
  : >"$logs/containerd.err"
  name=$(printf '\\x%02x' $((${#ref} + 4)) 10 $((${#ref} + 2)) 10 ${#ref})
  printf '%b' "\\x00\\x00\\x00\\x00$name$ref" |
    curl -sS --max-time 120 --http2-prior-knowledge --unix-socket "$scratch/containerd/sock" \
      -H 'content-type: application/grpc' -H 'te: trailers' --data-binary @- \
      -D "$scratch/cri-said" -o /dev/null http://localhost/runtime.v1.ImageService/PullImage
  cat "$scratch/cri-said"
  grep -q $'^grpc-status: 0\r*$' "$scratch/cri-said"
}

cri_digest() { ctr_ --namespace k8s.io images ls "name==$1" | awk 'NR == 2 { print $3 }'; }
cri_says() { runs_in_containerd k8s.io "$1"; }
cri_has() { has_architecture k8s.io "$1"; }
cri_forgets() { forget_namespace k8s.io; }

# The response has the error of the last host tried. The mirror's error is in the daemon's log.
cri_was_told() { cat "$scratch/cri-said" "$logs/containerd.err"; }

# --- both ------------------------------------------------------------------------------------------------------------

ctr_() {
  timeout 120 ctr --address "$scratch/containerd/sock" "$@"
}

# Each image prints a line. ctr 1.6 can lose the output of a process that ends at once, so a run that succeeds without
# output is repeated.
runs_in_containerd() {
  local output status tries
  for ((tries = 0; tries < 3; tries++)); do
    status=0
    output=$(ctr_ --namespace "$1" run --rm --snapshotter native "$2" "says-$RANDOM" 2>&1) || status=$?
    [[ -z $output && $status -eq 0 ]] || break
    echo "NOTE  ctr run printed nothing and ended with 0: $2" >&2
  done
  ((status == 0)) || output+=" (ctr ended with $status)"
  echo "$output"
}

# The index lists both platforms: the cached configuration shows which one was pulled.
has_architecture() {
  local config
  config=$(ctr_ --namespace "$1" content get "$(digest_at_upstream library/multi "$2")" | jq -r .config.digest)
  expect "architecture" "$2" "$(ctr_ --namespace "$1" content get "$config" | jq -r .architecture)"
}

forget_namespace() {
  ctr_ --namespace "$1" images ls -q | xargs -r timeout 60 ctr --address "$scratch/containerd/sock" --namespace "$1" \
    images rm --sync >/dev/null
}

# A private daemon: data, state, sockets and configuration are below the scratch folder.
start_containerd() {
  local at=$scratch/containerd
  stop containerd KILL
  unmount_below "$at"
  rm -rf "$at"
  mkdir -p "$at"
  write_hosts "$at/hosts"
  cat >"$at/config.toml" <<EOF
version = 2
root = "$at/root"
state = "$at/state"
[grpc]
  address = "$at/sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$at/opt"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "$at/cni"
  conf_dir = "$at/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "$at/hosts"
EOF
  : >"$logs/containerd.err"
  be_cut_off
  start containerd "${cut_off[@]}" containerd --config "$at/config.toml"
  wait_for containerd 60 ctr_ version
  wait_for containerd 60 grep -q 'containerd successfully booted' "$logs/containerd.err"
}

# docker.io has its own folder. Every other registry uses the default one, where `?ns=` names it. Through the proxy, a
# registry is requested by its own name.
write_hosts() {
  local ca registry
  mkdir -p "$1"
  [[ $transport != proxy ]] || return 0
  ca=$(trusted)
  for registry in docker.io _default; do
    mkdir -p "$1/$registry"
    {
      [[ $registry == _default ]] || echo 'server = "https://127.0.0.1:1"'
      printf '[host."%s"]\n  capabilities = ["pull", "resolve"]\n' "$(mirror)"
      [[ -z $ca ]] || printf '  ca = "%s"\n' "$ca"
    } >"$1/$registry/hosts.toml"
  done
}
