# shellcheck shell=bash
# Sourced by ./run: the image built from its Dockerfile, with the compose files, under a private dockerd without access to
# network registries.

tree=$scratch/tree
# An address of the host that a container in any network reaches by its default route.
host_address=10.99.0.1

all_of_image() {
  scenario "a daemon starts" docker_starts
  scenario "docker-compose.yml: a checkout becomes an image in one command, with nothing but the program inside" \
    compose_builds_from_source
  scenario "docker-compose.yml: it becomes healthy, without rights and without a writable root" sidecar_is_healthy
  scenario "docker-compose.yml: the daemon beside it pulls through it" sidecar_is_pulled_through
  scenario "docker-compose.yml: a new container has what the old one held, and needs no registry" volume_is_kept
  scenario "docker-compose.yml: asked to stop, it ends by itself" sidecar_ends
  scenario "docker-compose.team.yml: with a program built before, it becomes healthy" team_is_healthy
  scenario "docker-compose.team.yml: a daemon pulls by name over TLS" team_is_pulled_through
  scenario "docker-compose.team.yml: nothing of it is told without the token, nor served without TLS" team_asks_for_its_token
  scenario "docker-compose.shared.yml: compose accepts it" shared_is_accepted
  stop_dockerd
}

docker_starts() {
  ip address add "$host_address/32" dev lo
  # The CA of a mirror is configured in the machine's files; these are private.
  mount -t tmpfs etc-docker /etc/docker 2>/dev/null || { mkdir -p /etc/docker && mount -t tmpfs etc-docker /etc/docker; }
  start_dockerd http://127.0.0.1:5000 NO_PROXY=127.0.0.1,cache.example.org
  copy_tree
}

# A checkout for the builder.
copy_tree() {
  mkdir -p "$tree/config"
  cp -r "$root"/{docker-compose.yml,.dockerignore,LICENSE-MIT,LICENSE-APACHE,Cargo.toml,Cargo.lock,.cargo,src,packaging} "$tree/"
  {
    printf 'default_upstream = "docker.io"\n'
    # By name, because a static program must resolve names without system libraries.
    hub_at hub.example
  } >"$tree/config/test.toml"
  cat >"$tree/test.yml" <<EOF
version: "3"
services:
  ifnewer:
    build: {args: {TARGET: $static_target}, network: none}
    extra_hosts: ["hub.example:$host_address"]
    volumes: ["$tree/config/test.toml:/etc/ifnewer/ifnewer.toml:ro"]
EOF
}

# compose FILE WORDS…
compose() {
  local file=$1
  shift
  # Debian's client includes BuildKit; a newer one earlier in the path needs a plugin.
  PATH=/usr/bin:$PATH DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1 BUILDKIT_PROGRESS=plain \
    DOCKER_HOST=unix://$scratch/dockerd/sock DOCKER_CONFIG=$scratch/docker-cli \
    docker-compose --ansi never -p ifnewer -f "$tree/$file" -f "$tree/test.yml" "$@"
}

container() {
  docker_ ps -aq --no-trunc --filter name=ifnewer_ifnewer
}

inspected() {
  docker_ inspect -f "$1" "$(container)"
}

becomes_healthy() {
  local tries
  for ((tries = 0; tries < 300; tries++)); do
    [[ $(inspected '{{.State.Health.Status}}') == healthy ]] && return 0
    sleep 0.1
  done
  docker_ logs "$(container)"
  fail "it is not healthy: $(inspected '{{json .State}}')"
}

# No registry is reachable, so this machine's toolchain, compiler and crates replace the base image of the Dockerfile,
# under its name. The build is not optimised, because that takes minutes and is not tested here.
rust_stands_in() {
  local name cargo packages
  name=$(sed -n 's/^ARG RUST=//p' "$tree/packaging/Dockerfile")
  cargo=${CARGO_HOME:-$HOME/.cargo}
  mapfile -t packages < <(apt-cache depends --recurse --installed --no-{recommends,suggests,conflicts,breaks,replaces,enhances} \
    gcc make libc6-dev coreutils dash sed grep mawk | grep '^[a-z]' | cut -d: -f1 | sort -u)
  # Packages list some files below symbolic links such as /bin.
  dpkg -L "${packages[@]}" | grep -v -e /share/ -e /locale/ -e ' ' | sed -E 's,^/(bin|sbin|lib|lib64)/,/usr/\1/,' |
    grep -vx -e /usr/bin/sh -e /usr/bin/cc | sort -u |
    while read -r file; do
      if [[ -e $file && ! -d $file ]]; then echo "${file#/}"; fi
    done >"$scratch/rust.files"
  mkdir -p "$scratch/links/usr/bin"
  ln -s dash "$scratch/links/usr/bin/sh"
  ln -s gcc "$scratch/links/usr/bin/cc"
  ln -s mawk "$scratch/links/usr/bin/awk"
  tar -c --transform 's,^\./,usr/local/rust/,' --transform 's,^registry/,cargo/registry/,' \
    -C / -T "$scratch/rust.files" bin lib lib64 -C "$scratch/links" usr/bin/sh usr/bin/cc usr/bin/awk \
    -C "$(rustc --print sysroot)" --exclude ./share --exclude ./lib/rustlib/src ./bin ./lib \
    -C "$cargo" registry/index registry/cache |
    docker_ import --change 'ENV PATH=/usr/local/rust/bin:/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true' \
      --change 'ENV CARGO_PROFILE_DIST_OPT_LEVEL=0 CARGO_PROFILE_DIST_LTO=off CARGO_PROFILE_DIST_CODEGEN_UNITS=256' \
      - "$name"
}

compose_builds_from_source() {
  rust_stands_in
  [[ ! -e $tree/target ]] || fail "a program lies there already"
  compose docker-compose.yml build
  docker_ create --name look ifnewer
  docker_ export look | tar -t | sort >"$scratch/files"
  docker_ rm look
  cat "$scratch/files"
  # Files that the daemon adds to every container are not of the image.
  expect "files" "LICENSE-APACHE LICENSE-MIT ifnewer var/cache/ifnewer/CACHEDIR.TAG" \
    "$(grep -vE '/$|^(dev|etc|proc|sys)/|^.dockerenv' "$scratch/files" | xargs)"
  expect "its user" 65532:65532 "$(docker_ image inspect -f '{{.Config.User}}' ifnewer)"
  # Only a static program runs in an empty image.
  expect "its version" "ifnewer $(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -1)" \
    "$(docker_ run --rm --network none ifnewer --version)"
}

sidecar_is_healthy() {
  compose docker-compose.yml up -d
  becomes_healthy
  expect "user, root and rights" "65532:65532 true [ALL]" \
    "$(inspected '{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}')"
  expect "who it is on the host" 65532 "$(docker_ top "$(container)" -o pid,uid | awk 'END { print $2 }')"
}

sidecar_is_pulled_through() {
  from_here
  docker_ pull -q demo
  expect "manifests fetched" 1 "$(asked_registry 'GET /v2/library/demo/manifests/')"
  docker_ rmi demo
  docker_ pull -q demo
  expect "manifests fetched in two pulls" 1 "$(asked_registry 'GET /v2/library/demo/manifests/')"
}

volume_is_kept() {
  local before
  before=$(container)
  compose docker-compose.yml down
  stop registry KILL
  compose docker-compose.yml up -d
  becomes_healthy
  [[ $(container) != "$before" ]] || fail "it is the same container"
  docker_ rmi demo
  docker_ pull -q demo
  [[ $(reason_of_pull http://127.0.0.1:5000) == *stale* ]] || fail "it is not served as stale"
  start_registry
}

sidecar_ends() {
  compose docker-compose.yml stop
  expect "its exit code" 0 "$(inspected '{{.State.ExitCode}}')"
  compose docker-compose.yml down --volumes
}

team_is_healthy() {
  (umask 077; openssl rand -hex 32 >"$tree/config/admin.token")
  chown 65532 "$tree/config/admin.token"
  mkdir -p "$tree/target/$static_target/dist"
  cp "$static" "$tree/target/$static_target/dist/ifnewer"
  PROGRAM=prebuilt compose packaging/docker-compose.team.yml up -d --build
  becomes_healthy
}

by_token() {
  curl -sSf -H "Authorization: Bearer $(<"$tree/config/admin.token")" "http://127.0.0.1:5001$1"
}

team_is_pulled_through() {
  local trust=/etc/docker/certs.d/cache.example.org:5000
  printf '127.0.0.1 localhost cache.example.org\n' >"$scratch/hosts"
  mount --bind "$scratch/hosts" /etc/hosts
  mkdir -p "$trust"
  by_token /ca.pem >"$trust/ca.crt"
  jq -n '{"registry-mirrors": ["https://cache.example.org:5000"]}' >"$scratch/dockerd/daemon.json"
  kill -HUP "$(<"$scratch/dockerd/pid")"
  docker_ rmi demo
  from_here
  docker_ pull -q demo
  # The daemon keeps manifests of removed images.
  expect "blobs fetched" 2 "$(asked_registry 'GET /v2/library/demo/blobs/')"
}

team_asks_for_its_token() {
  by_token /api/v1/status | jq -e .
  expect "without a token" 401 "$(curl -s -o "$scratch/said" -w '%{http_code}' http://127.0.0.1:5001/api/v1/status)"
  [[ $(curl -s -o "$scratch/said" -w '%{http_code}' http://127.0.0.1:5000/v2/) != 200 ]] || fail "it serves without TLS"
  compose packaging/docker-compose.team.yml down --volumes
}

# Its images are in a registry that is not reachable here; tests/fleet/run compose runs its commands and settings.
shared_is_accepted() {
  PATH=/usr/bin:$PATH docker-compose -f "$root/packaging/docker-compose.shared.yml" config -q
}
