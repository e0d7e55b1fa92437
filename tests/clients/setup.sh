# shellcheck shell=bash
# Sourced by ./run, after servers.sh and images.sh: `setup` and `doctor` with a real dockerd as after installing a
# package: with its own data, configuration and root folder.

setup_root=$scratch/host

all_of_setup() {
  [[ -z ${DIRECT:-} ]] || return 0
  scenario "setup: setup docker, doctor passes, then undo byte for byte" setup_then_doctor
  scenario "setup: the same over verified TLS" setup_then_doctor_tls
  scenario "setup: doctor detects a daemon that pulls without the cache" doctor_finds_out
  scenario "setup: containerd pulls with the files of setup" setup_containerd
  scenario "setup: skopeo pulls with podman's file of setup" setup_podman
}

# A host with a configuration written by hand: tabs, CRLF, no newline at the end.
fresh_host() {
  stop dockerd
  rm -rf "$setup_root" "$scratch/dockerd"
  fresh_mirror
  mkdir -p "$setup_root/etc/docker" "$setup_root/run" "$setup_root/var/run"
  printf '{\r\n\t"log-level": "info" ,\n\t"debug": false}' >"$setup_root/etc/docker/daemon.json"
  push demo library/demo:latest
}

# The addresses of ifnewer as its operator would configure them; the test registry replaces the Hub.
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

# [CA]: the daemon with its files in the root; a dead proxy before the Hub, as in start_dockerd.
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

# The daemon reads its file a moment after SIGHUP.
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
  # 20.10 reads certs.d only from the machine's /etc/docker, so the environment sets the trust there.
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
  cmp "$file" "$scratch/before" || fail "setup without --apply changed the file"
  ifnewer_ setup docker --apply "$@" >"$scratch/said"
  cat "$scratch/said"
  grep -q 'reloaded dockerd' "$scratch/said" || fail "dockerd was not reloaded"
  wait_for dockerd 10 uses_mirror "$url"
  [[ $(ifnewer_ setup docker --apply "$@") == "nothing to do"* ]] || fail "the second apply reports changes"
  ifnewer_ doctor --canary demo || fail "doctor reports a failure"
  ifnewer_ doctor --canary demo | grep -q '^ok *canary .*through this cache' || fail "the canary is not ok"
  [[ -z $(host_docker images -q) ]] || fail "the canary image was not removed"
  ifnewer_ setup docker --undo
  cmp "$file" "$scratch/before" || fail "undo did not restore the file byte for byte"
  expect "mode and owner" "$(stat -c '%a %u %g' "$scratch/before")" "$(stat -c '%a %u %g' "$file")"
  diff <(find "$setup_root/etc" | sort) "$scratch/before.list" || fail "undo left files or folders"
}

doctor_finds_out() {
  local status=0
  fresh_host
  configured "$(<"$state/ifnewer.plain")"
  # A daemon with another mirror, here the registry itself: it pulls without the cache.
  jq -n --arg mirror "http://$(upstream_address)" '{"registry-mirrors": [$mirror]}' >"$setup_root/etc/docker/daemon.json"
  start_host_dockerd
  ifnewer_ doctor --canary demo >"$scratch/said" || status=$?
  cat "$scratch/said"
  grep -q '^FAILED *docker ' "$scratch/said" || fail "the other mirror was not reported"
  grep -q '^FAILED *canary .*NOT through this cache' "$scratch/said" || fail "the pull without the cache was not reported"
  expect "exit code, which is how many failed" 2 "$status"
  if ifnewer_ setup docker --apply >"$scratch/said" 2>&1; then fail "another mirror was overwritten"; fi
  grep -q 'already names' "$scratch/said" || fail "the other mirror is not named"
  ifnewer_ setup docker --apply --force
  wait_for dockerd 10 uses_mirror "$(<"$state/ifnewer.plain")"
  ifnewer_ doctor --canary demo || fail "doctor fails with the other mirror in second place"
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
    fail "the pull did not use the route that setup configured"
  ifnewer_ setup podman --undo
  [[ ! -e $setup_root/etc/containers ]] || fail "undo left files"
}

# containerd by ctr, because the kubelet's call needs a network plugin.
setup_containerd() {
  local url
  fresh_host
  configured "$(<"$state/ifnewer.plain")"
  ifnewer_ setup containerd --apply
  url="http://$(<"$state/ifnewer.plain")"
  grep -qF "$url" "$setup_root/etc/containerd/certs.d/docker.io/hosts.toml" || fail "hosts.toml does not name $url"
  # No dockerd runs here, so doctor reports failures.
  ifnewer_ doctor >"$scratch/said" || true
  grep -q '^ok *containerd ' "$scratch/said" || fail "doctor does not accept the files"
  start_host_containerd "$setup_root/etc/containerd/config.toml"
  env HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=127.0.0.1 timeout 120 ctr -a "$scratch/containerd/sock" image pull \
    --hosts-dir "$setup_root/etc/containerd/certs.d" --snapshotter native docker.io/library/demo:latest
  curl -sSf "http://$(<"$state/ifnewer.admin")/api/v1/events?limit=100" |
    jq -e '[.events[] | select(.route == "ns" and .reference == "latest")] | length > 0' >/dev/null ||
    fail "the pull did not use ?ns="
  stop containerd KILL
  ifnewer_ setup containerd --undo
  [[ ! -e $setup_root/etc/containerd ]] || fail "undo left files"
}

# With the file that setup wrote. containerd does not start if it cannot parse it.
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
