# shellcheck shell=bash
# Sourced by ./run, after servers.sh and images.sh: `setup` and `doctor` with a real dockerd, which is as fresh as one
# from a package: its own data, its own configuration, and a root of its own in which its files lie.

setup_root=$scratch/host

all_of_setup() {
  [[ -z ${DIRECT:-} ]] || return 0
  scenario "setup: docker by setup, doctor green, then undone byte for byte" setup_then_doctor
  scenario "setup: the same over verified TLS" setup_then_doctor_tls
  scenario "setup: doctor finds out a daemon that pulls past the cache" doctor_finds_out
  scenario "setup: containerd pulls by what setup wrote" setup_containerd
  scenario "setup: skopeo pulls by what setup wrote for podman" setup_podman
}

# A host with a configuration that someone has written by hand: tabs, CRLF, no newline at the end.
fresh_host() {
  stop dockerd
  rm -rf "$setup_root" "$scratch/dockerd"
  fresh_mirror
  mkdir -p "$setup_root/etc/docker" "$setup_root/run" "$setup_root/var/run"
  printf '{\r\n\t"log-level": "info" ,\n\t"debug": false}' >"$setup_root/etc/docker/daemon.json"
  push demo library/demo:latest
}

# What ifnewer announced, as its operator would have configured it; the Hub's place is taken by our registry.
configured() {
  cat >"$scratch/ifnewer/operator.toml" <<EOT
data = "$scratch/ifnewer/data"
[listen]
registry = ["$1"]
admin = "$(<"$state/ifnewer.admin")"
[tls]
folder = "$scratch/ifnewer/certs"
[store]
free = "1 MiB"
[upstream."docker.io"]
url = "http://$(upstream_address)"
EOT
  local name
  for name in ghcr.io quay.io registry.k8s.io gcr.io public.ecr.aws mcr.microsoft.com registry.gitlab.com; do
    printf '[upstream."%s"]\nenabled = false\n' "$name" >>"$scratch/ifnewer/operator.toml"
  done
}

ifnewer_() {
  "$ifnewer" "$@" --config "$scratch/ifnewer/operator.toml" --root "$setup_root"
}

# [CA]: the daemon whose files lie in the root; the Hub behind a dead proxy, as in start_dockerd.
start_host_dockerd() {
  : >"$logs/dockerd.err"
  start dockerd env -u http_proxy -u https_proxy -u all_proxy -u ALL_PROXY \
    HTTP_PROXY=http://127.0.0.1:1 HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=127.0.0.1,::1,localhost \
    ${1:+"SSL_CERT_FILE=$1"} \
    dockerd --config-file "$setup_root/etc/docker/daemon.json" --host "unix://$setup_root/var/run/docker.sock" \
    --data-root "$scratch/dockerd/data" --exec-root "$scratch/dockerd/exec" --pidfile "$setup_root/run/docker.pid" \
    --containerd-namespace "ifnewer-setup-$$" --containerd-plugins-namespace "ifnewer-setup-plugins-$$" \
    --storage-driver vfs --bridge none --iptables=false --ip6tables=false
  wait_for dockerd 60 host_docker version
}

host_docker() {
  DOCKER_HOST=unix://$setup_root/var/run/docker.sock DOCKER_CONFIG=$scratch/docker-cli timeout 300 docker "$@"
}

# It takes a moment from SIGHUP until the daemon has read its file.
uses_mirror() {
  host_docker info --format '{{json .RegistryConfig.Mirrors}}' | grep -qF "$1"
}

setup_then_doctor() {
  fresh_host
  configured "$(<"$state/ifnewer.plain")"
  start_host_dockerd
  applied_and_undone "http://$(<"$state/ifnewer.plain")"
}

setup_then_doctor_tls() {
  fresh_host
  configured "$(<"$state/ifnewer.tls")"
  # 20.10 reads certs.d from the machine's own /etc/docker only: trust comes by the environment there.
  start_host_dockerd "$scratch/ifnewer/certs/ca.pem"
  applied_and_undone "https://$(<"$state/ifnewer.tls")" --address "https://$(<"$state/ifnewer.tls")"
}

# applied_and_undone URL [OPTION…]
applied_and_undone() {
  local url=$1 file=$setup_root/etc/docker/daemon.json
  shift
  cp -p "$file" "$scratch/before"
  find "$setup_root/etc" | sort >"$scratch/before.list"
  ifnewer_ setup docker "$@" | grep -qF "$url" || fail "setup does not show $url"
  cmp "$file" "$scratch/before" || fail "showing has changed the file"
  ifnewer_ setup docker --apply "$@" >"$scratch/said"
  cat "$scratch/said"
  grep -q 'reloaded dockerd' "$scratch/said" || fail "dockerd was not told"
  wait_for dockerd 10 uses_mirror "$url"
  [[ $(ifnewer_ setup docker --apply "$@") == "nothing to do"* ]] || fail "the second time is not said to change nothing"
  ifnewer_ doctor --canary demo || fail "doctor is not green"
  ifnewer_ doctor --canary demo | grep -q '^ok *canary .*through this cache' || fail "the canary is not ok"
  [[ -z $(host_docker images -q) ]] || fail "the canary stayed in the daemon"
  ifnewer_ setup docker --undo
  cmp "$file" "$scratch/before" || fail "undone, but not byte for byte"
  expect "mode and owner" "$(stat -c '%a %u %g' "$scratch/before")" "$(stat -c '%a %u %g' "$file")"
  diff <(find "$setup_root/etc" | sort) "$scratch/before.list" || fail "undone, but files or folders were left"
}

doctor_finds_out() {
  local status=0
  fresh_host
  configured "$(<"$state/ifnewer.plain")"
  # A daemon with another mirror, here the registry itself: it pulls well, and past the cache.
  jq -n --arg mirror "http://$(upstream_address)" '{"registry-mirrors": [$mirror]}' >"$setup_root/etc/docker/daemon.json"
  start_host_dockerd
  ifnewer_ doctor --canary demo >"$scratch/said" || status=$?
  cat "$scratch/said"
  grep -q '^FAILED *docker ' "$scratch/said" || fail "the mirror that is not us was not noticed"
  grep -q '^FAILED *canary .*NOT through this cache' "$scratch/said" || fail "the pull past the cache was not noticed"
  expect "exit code, which is how many failed" 2 "$status"
  if ifnewer_ setup docker --apply >"$scratch/said" 2>&1; then fail "another mirror was written over"; fi
  grep -q 'already names' "$scratch/said" || fail "the other mirror is not named"
  ifnewer_ setup docker --apply --force
  wait_for dockerd 10 uses_mirror "$(<"$state/ifnewer.plain")"
  ifnewer_ doctor --canary demo || fail "doctor is not green with the other mirror behind us"
}

setup_podman() {
  fresh_host
  configured "$(<"$state/ifnewer.plain")"
  ifnewer_ setup podman --apply
  start_counting
  rm -rf "$scratch/copied"
  env -u http_proxy -u https_proxy HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=127.0.0.1,::1,localhost HOME="$scratch" \
    REGISTRY_AUTH_FILE="$scratch/no-auth.json" timeout 120 skopeo \
    --registries-conf "$setup_root/etc/containers/registries.conf.d/50-ifnewer.conf" --insecure-policy \
    copy -q docker://docker.io/library/demo:latest "dir:$scratch/copied"
  curl -sSf "http://$(<"$state/ifnewer.admin")/api/v1/events?limit=1" | jq -e '.events[0].route == "prefix"' >/dev/null ||
    fail "the pull did not come through the door that setup wrote down"
  ifnewer_ setup podman --undo
  [[ ! -e $setup_root/etc/containers ]] || fail "undone, but something was left"
}

# containerd itself, as ctr calls it: the kubelet's call needs a network plugin that is not here.
setup_containerd() {
  local url
  fresh_host
  configured "$(<"$state/ifnewer.plain")"
  ifnewer_ setup containerd --apply
  url="http://$(<"$state/ifnewer.plain")"
  grep -qF "$url" "$setup_root/etc/containerd/certs.d/docker.io/hosts.toml" || fail "hosts.toml does not name $url"
  # No dockerd runs here, which doctor rightly minds.
  ifnewer_ doctor >"$scratch/said" || true
  grep -q '^ok *containerd ' "$scratch/said" || fail "doctor does not find the files right"
  start_host_containerd "$setup_root/etc/containerd/config.toml"
  env HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=127.0.0.1 timeout 120 ctr -a "$scratch/containerd/sock" image pull \
    --hosts-dir "$setup_root/etc/containerd/certs.d" --snapshotter native docker.io/library/demo:latest
  curl -sSf "http://$(<"$state/ifnewer.admin")/api/v1/events?limit=100" |
    jq -e '[.events[] | select(.route == "ns" and .reference == "latest")] | length > 0' >/dev/null ||
    fail "the pull did not come with ?ns="
  stop containerd KILL
  ifnewer_ setup containerd --undo
  [[ ! -e $setup_root/etc/containerd ]] || fail "undone, but something was left"
}

# With the file that setup wrote, which a containerd that cannot read it would not start with.
start_host_containerd() {
  stop containerd KILL
  unmount_below "$scratch/containerd"
  rm -rf "$scratch/containerd"
  mkdir -p "$scratch/containerd"
  {
    printf 'root = "%s/containerd/root"\nstate = "%s/containerd/state"\n' "$scratch" "$scratch"
    cat "$1"
    printf '[grpc]\naddress = "%s/containerd/sock"\n' "$scratch"
    printf '[plugins."io.containerd.grpc.v1.cri"]\nstream_server_port = "0"\n'
    printf '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "native"\n'
  } >"$scratch/containerd/config.toml"
  start containerd containerd -c "$scratch/containerd/config.toml"
  wait_for containerd 30 ctr -a "$scratch/containerd/sock" version
}
