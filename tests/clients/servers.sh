# shellcheck shell=bash
# Sourced by ./run: the three programs of a scenario (upstream, ifnewer, a private dockerd), each on a free port.
# A scenario runs in a subshell, so everything worth remembering is a file under $scratch/state.

state=$scratch/state
logs=$scratch/logs
mkdir -p "$state" "$logs"

# --- processes -------------------------------------------------------------------------------------------------

# start NAME COMMAND…: in its own process group, stdout to NAME.out and stderr to NAME.err.
start() {
  local name=$1
  shift
  setsid "$@" >>"$logs/$name.out" 2>>"$logs/$name.err" </dev/null &
  echo $! >"$state/$name.pid"
}

# stop NAME [SIGNAL]: asks, waits ten seconds, then kills the whole group.
stop() {
  local pid tries
  [[ -e $state/$1.pid ]] || return 0
  pid=$(<"$state/$1.pid")
  rm "$state/$1.pid"
  kill "-${2:-TERM}" "$pid" 2>/dev/null || true
  for ((tries = 0; tries < 100; tries++)); do
    runs "$pid" || break
    sleep 0.1
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
}

runs() {
  [[ -e /proc/$1/status ]] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null
}

stop_everything() {
  local file
  for file in "$state"/*.pid; do
    [[ -e $file ]] && stop "$(basename "$file" .pid)"
  done
  awk -v under="$scratch/" 'index($2, under) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r -n1 umount -l
}

# wait_for NAME SECONDS CONDITION…: until the condition holds; says why not when the process is gone or slow.
wait_for() {
  local name=$1 tries=$(($2 * 20))
  shift 2
  while ! "$@" >/dev/null 2>&1; do
    runs "$(<"$state/$name.pid")" || fail "$name ended at start"
    ((tries-- > 0)) || fail "$name is not ready in time"
    sleep 0.05
  done
}

# --- upstream --------------------------------------------------------------------------------------------------

start_upstream() {
  # The first start takes any free port; later ones must come back where ifnewer knows it.
  cat >"$scratch/upstream.yml" <<EOF
version: 0.1
storage: {filesystem: {rootdirectory: $scratch/upstream}}
http: {addr: "$(cat "$state/upstream.address" 2>/dev/null || echo 127.0.0.1:0)"}
EOF
  : >"$logs/upstream.err"
  OTEL_TRACES_EXPORTER=none start upstream docker-registry serve "$scratch/upstream.yml"
  wait_for upstream 20 grep -q 'listening on ' "$logs/upstream.err"
  grep -o 'listening on [0-9.:]*' "$logs/upstream.err" | cut -d' ' -f3 >"$state/upstream.address"
}

kill_upstream() {
  stop upstream KILL
}

upstream_address() {
  cat "$state/upstream.address"
}

# From here on `asked` counts.
start_counting() {
  wc -l <"$logs/upstream.out" >"$state/counted"
}

# asked REGEX: how many requests "METHOD /path" the upstream got since start_counting.
asked() {
  since_counting | grep -cE "\"$1" || true
}

# The bytes of blobs the upstream sent since start_counting (its access log: … "GET /v2/… HTTP/1.1" STATUS BYTES …).
blob_bytes_sent() {
  since_counting | grep -E '"GET [^ ]*/blobs/' | sed -E 's/.*" [0-9]{3} ([0-9]+) .*/\1/' | awk '{ s += $1 } END { print s + 0 }'
}

since_counting() {
  tail -n "+$(($(<"$state/counted") + 1))" "$logs/upstream.out"
}

# --- ifnewer ---------------------------------------------------------------------------------------------------

start_ifnewer() {
  # Free ports the first time; after a restart the same ones, because the clients' configuration names them.
  local plain tls
  plain=$(cat "$state/ifnewer.plain" 2>/dev/null || echo 127.0.0.1:0)
  tls=$(cat "$state/ifnewer.tls" 2>/dev/null || echo '[::1]:0')
  mkdir -p "$scratch/ifnewer"
  cat >"$scratch/ifnewer/ifnewer.toml" <<EOF
data = "$scratch/ifnewer/data"
default_upstream = "docker.io"

[listen]
registry = ["$plain", "$tls"]
admin = "127.0.0.1:0"

[tls]
folder = "$scratch/ifnewer/certs"

[upstream."docker.io"]
url = "http://$(upstream_address)"
EOF
  : >"$logs/ifnewer.out"
  : >"$logs/ifnewer.err"
  start ifnewer "$ifnewer" serve --config "$scratch/ifnewer/ifnewer.toml"
  wait_for ifnewer 20 has_announced_all
  announced 'registry listening on' 127. >"$state/ifnewer.plain"
  announced 'registry listening on' '[::1]' >"$state/ifnewer.tls"
  announced 'admin listening on' '' >"$state/ifnewer.admin"
}

stop_ifnewer() {
  stop ifnewer
}

has_announced_all() {
  [[ -n $(announced 'registry listening on' 127.) && -n $(announced 'registry listening on' '[::1]') &&
    -n $(announced 'admin listening on' '') ]]
}

# announced WORDS START: the address after WORDS that begins with START.
announced() {
  cat "$logs/ifnewer.out" "$logs/ifnewer.err" |
    awk -v words="$1 " -v start="$2" '
      (at = index($0, words)) {
        split(substr($0, at + length(words)), rest, /[ ,"]/)
        if (index(rest[1], start) == 1) { print rest[1]; exit }
      }'
}

# --- dockerd ---------------------------------------------------------------------------------------------------

# start_dockerd MIRROR [CA]: a daemon of our own (data, state, socket, configuration, containerd), never the machine's.
# The Hub is put behind a dead proxy, so that a pull that the mirror failed can only fail, on any machine.
start_dockerd() {
  local ca=${2:-}
  mkdir -p "$scratch/dockerd" "$scratch/docker-cli"
  jq -n --arg mirror "$1" '{"registry-mirrors": [$mirror]}' >"$scratch/dockerd/daemon.json"
  rm -f "$scratch/dockerd/pid"
  : >"$logs/dockerd.err"
  start dockerd env -u http_proxy -u https_proxy -u all_proxy -u ALL_PROXY \
    HTTP_PROXY=http://127.0.0.1:1 HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=127.0.0.1,::1,localhost \
    ${ca:+"SSL_CERT_FILE=$ca"} \
    dockerd --config-file "$scratch/dockerd/daemon.json" --host "unix://$scratch/dockerd/sock" \
    --data-root "$scratch/dockerd/data" --exec-root "$scratch/dockerd/exec" --pidfile "$scratch/dockerd/pid" \
    --containerd-namespace "ifnewer-$$" --containerd-plugins-namespace "ifnewer-plugins-$$" \
    --storage-driver vfs --bridge none --iptables=false --ip6tables=false
  wait_for dockerd 60 docker_ version
}

stop_dockerd() {
  stop dockerd
}

docker_() {
  DOCKER_HOST=unix://$scratch/dockerd/sock DOCKER_CONFIG=$scratch/docker-cli timeout 300 docker "$@"
}

forget_images() {
  docker_ images -q --no-trunc | sort -u | xargs -r env DOCKER_HOST="unix://$scratch/dockerd/sock" \
    DOCKER_CONFIG="$scratch/docker-cli" docker rmi -f >/dev/null
}

prints() {
  expect "what $1 prints" "$2" "$(docker_ run --rm --network none "$1" 2>&1)"
}

# --- skopeo ----------------------------------------------------------------------------------------------------

# skopeo_through MIRROR INSECURE IMAGE [CA]: copies docker.io/IMAGE by way of the mirror, the Hub cut off as above.
skopeo_through() {
  cat >"$scratch/registries.conf" <<EOF
[[registry]]
prefix = "docker.io"
location = "docker.io"
[[registry.mirror]]
location = "$1"
insecure = $2
EOF
  rm -rf "$scratch/copied"
  env -u http_proxy -u https_proxy -u all_proxy -u ALL_PROXY \
    HTTP_PROXY=http://127.0.0.1:1 HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=127.0.0.1,::1,localhost \
    ${4:+"SSL_CERT_FILE=$4"} HOME="$scratch" REGISTRY_AUTH_FILE="$scratch/no-auth.json" \
    timeout 120 skopeo --registries-conf "$scratch/registries.conf" --insecure-policy \
    copy -q "docker://docker.io/$3" "dir:$scratch/copied"
}
