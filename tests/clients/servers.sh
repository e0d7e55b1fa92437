# shellcheck shell=bash
# Sourced by ./run: shared by all scenarios: processes, the upstream, the interrupted upstream, and ifnewer, each on a free
# port. A scenario runs in a subshell, so state is in files under $scratch/state.

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

# stop NAME [SIGNAL]: sends the signal, waits ten seconds, then kills the process group.
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
  unmount_below "$scratch"
}

unmount_below() {
  awk -v under="$1/" 'index($2, under) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r -n1 umount -l
}

# wait_for NAME SECONDS CONDITION…: until the condition is true; fails if the process ended or is slow.
wait_for() {
  local name=$1 tries=$(($2 * 20))
  shift 2
  while ! "$@" >/dev/null 2>&1; do
    runs "$(<"$state/$name.pid")" || fail "$name ended at start"
    ((tries-- > 0)) || fail "$name is not ready in time"
    sleep 0.05
  done
}

# be_cut_off: fills $cut_off, a prefix for a client's command. It sets a dead proxy for every registry but those on
# loopback, so a client cannot fall back to the registry; with $transport proxy, it sets ifnewer. With $transport tls or
# proxy the client trusts ifnewer's CA. Podman and skopeo log in with the file $auth.
be_cut_off() {
  local ca proxy=http://127.0.0.1:1
  ca=$(trusted)
  [[ $transport != proxy ]] || proxy=http://$(address)
  echo '{}' >"$scratch/no-auth.json"
  cut_off=(env -u http_proxy -u https_proxy -u all_proxy -u ALL_PROXY -u no_proxy
    HTTP_PROXY=http://127.0.0.1:1 HTTPS_PROXY="$proxy" NO_PROXY=127.0.0.1,::1,localhost
    HOME="$scratch" REGISTRY_AUTH_FILE="${auth:-$scratch/no-auth.json}" ${ca:+"SSL_CERT_FILE=$ca"})
}

# --- upstream --------------------------------------------------------------------------------------------------

start_upstream() {
  # The first start takes any free port; later ones reuse it, because ifnewer is configured with it.
  cat >"$scratch/upstream.yml" <<EOF
version: 0.1
storage: {filesystem: {rootdirectory: $scratch/upstream}}
http: {addr: "$(cat "$state/upstream.address" 2>/dev/null || echo 127.0.0.1:0)"}
EOF
  start_docker_registry upstream "$scratch/upstream.yml"
}

# start_docker_registry NAME CONFIGURATION: saves its address under the name.
start_docker_registry() {
  : >"$logs/$1.err"
  OTEL_TRACES_EXPORTER=none start "$1" docker-registry serve "$2"
  wait_for "$1" 20 grep -q 'listening on ' "$logs/$1.err"
  grep -o 'listening on [0-9.:]*' "$logs/$1.err" | cut -d' ' -f3 >"$state/$1.address"
}

kill_upstream() {
  stop upstream KILL
}

upstream_address() {
  cat "$state/upstream.address"
}

# start_counting [SERVER]: from here on `asked` counts the requests of this server, or of the upstream.
start_counting() {
  echo "$logs/${1:-upstream}.out" >"$state/counting"
  wc -l <"$(<"$state/counting")" >"$state/counted"
}

# asked REGEX: the number of requests "METHOD /path" at the upstream since start_counting.
asked() {
  since_counting | grep -cE "\"$1" || true
}

# Bytes of blobs that the upstream sent since start_counting (its access log: … "GET /v2/… HTTP/1.1" STATUS BYTES …).
blob_bytes_sent() {
  since_counting | grep -E '"GET [^ ]*/blobs/' | sed -E 's/.*" [0-9]{3} ([0-9]+) .*/\1/' | awk '{ s += $1 } END { print s + 0 }'
}

since_counting() {
  tail -n "+$(($(<"$state/counted") + 1))" "$(<"$state/counting")"
}

# Blobs that were requested more than once from the upstream since start_counting.
fetched_twice() {
  since_counting | grep -oE '"GET [^ ]*/blobs/[^ ]*' | sort | uniq -d
}

# --- the interrupted upstream --------------------------------------------------------------------------------

# Every blob response ends after $cut_bytes bytes. ifnewer has this registry as cut.example.
cut_bytes=$((1024 * 1024))

start_cutting() {
  rustc --edition 2024 -O -o "$scratch/cutting-upstream" "$here/cutting.rs"
  start cutting "$scratch/cutting-upstream" "$(upstream_address)" "$cut_bytes"
  wait_for cutting 20 grep -q 'listening on ' "$logs/cutting.out"
  sed -n 's/^listening on //p' "$logs/cutting.out" >"$state/cutting.address"
}

# cuts REPOSITORY: the number of its interrupted responses.
cuts() {
  grep -c "^cut after [0-9]* of GET /v2/$1/blobs/" "$logs/cutting.out" || true
}

# bytes_through_the_cuts REPOSITORY DIGEST: the bytes of this blob in all responses together.
bytes_through_the_cuts() {
  sed -nE "s|^(passed\|cut after) ([0-9]+) of GET /v2/$1/blobs/$2 .*|\2|p" "$logs/cutting.out" | awk '{ s += $1 } END { print s + 0 }'
}

# --- ifnewer ---------------------------------------------------------------------------------------------------

# Prefix of its command, for an environment that differs from this machine's.
ifnewer_in=()

start_ifnewer() {
  # Free ports at the first start, and the same ones after a restart, because the clients are configured with them.
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
$(cat "$state/hub.toml" 2>/dev/null || echo "url = \"http://$(upstream_address)\"")

[upstream."cut.example"]
$(cat "$state/cut.toml" 2>/dev/null || echo "url = \"http://$(<"$state/cutting.address")\"")

$(cat "$state/upstreams.toml" 2>/dev/null || true)
EOF
  : >"$logs/ifnewer.out"
  : >"$logs/ifnewer.err"
  start ifnewer "${ifnewer_in[@]}" "$ifnewer" serve --config "$scratch/ifnewer/ifnewer.toml"
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
