# shellcheck shell=bash
# Sourced by ./run: creates real images with umoci and pushes them with skopeo. Needs $scratch and `upstream_address`.

layout=$scratch/layout
big_bytes=$((300 * 1024 * 1024))
broken_bytes=$((8 * 1024 * 1024))

make_images() {
  mkdir -p "$scratch/rootfs" "$scratch/layers"
  rustc --edition 2024 -O -C target-feature=+crt-static -C panic=abort -C strip=symbols \
    -o "$scratch/rootfs/hello" "$here/hello.rs"
  umoci init --layout "$layout"
  make_image demo "demo one" amd64
  make_image other "other one" amd64
  make_image many "many layers" amd64
  add_layers many 12
  make_image multi-amd64 "multi on amd64" amd64
  make_image multi-arm64 "multi on arm64" arm64
  make_image big "three hundred mebibytes" amd64
  add_incompressible big "$big_bytes"
  make_image broken "broken off again and again" amd64
  add_incompressible broken "$broken_bytes"
}

# make_image NAME VERSION ARCHITECTURE: /hello prints VERSION, which is in a separate layer as in a real release.
make_image() {
  umoci new --image "$layout:$1"
  umoci insert --rootless --image "$layout:$1" "$scratch/rootfs" /
  set_version "$1" "$2"
  umoci config --image "$layout:$1" --config.entrypoint /hello --os linux --architecture "$3"
}

set_version() {
  printf '%s\n' "$2" >"$scratch/layers/version"
  umoci insert --rootless --image "$layout:$1" "$scratch/layers/version" /version
}

add_layers() {
  local n
  for ((n = 1; n <= $2; n++)); do
    seq "$n" "$((n * 10000))" >"$scratch/layers/$n"
    umoci insert --rootless --image "$layout:$1" "$scratch/layers/$n" "/layer-$n"
  done
}

add_incompressible() {
  head -c "$2" /dev/urandom >"$scratch/layers/noise"
  umoci insert --rootless --image "$layout:$1" "$scratch/layers/noise" /noise
  rm "$scratch/layers/noise"
}

# layers_of IMAGE: the digests of its pushed layers.
layers_of() {
  local manifest
  manifest=$(jq -r --arg name "$1" \
    '.manifests[] | select(.annotations["org.opencontainers.image.ref.name"] == $name) | .digest' "$layout/index.json")
  jq -r '.layers[].digest' "$layout/blobs/sha256/${manifest#sha256:}"
}

layer_bytes() {
  stat -c %s "$layout/blobs/sha256/${1#sha256:}"
}

push_all_images() {
  push demo library/demo:latest
  push other library/other:latest
  push many library/many:latest
  push big library/big:latest
  push broken library/broken:latest
  push multi-amd64 library/multi:amd64
  push multi-arm64 library/multi:arm64
  push_index library/multi latest amd64 arm64
}

# push IMAGE REPOSITORY:TAG
push() {
  skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$layout:$1" "docker://$(upstream_address)/$2"
}

# push_index REPOSITORY TAG ARCHITECTURE…: an index over the manifests already pushed under the architectures' tags.
push_index() {
  local repository=$1 tag=$2 arch entries='[]' head
  shift 2
  for arch in "$@"; do
    head=$(curl -sSfI -H "Accept: $manifest_type" "$(upstream_address)/v2/$repository/manifests/$arch" | tr -d '\r')
    entries=$(jq -c --arg type "$manifest_type" --arg arch "$arch" \
      --arg digest "$(header_of "$head" docker-content-digest)" \
      --argjson size "$(header_of "$head" content-length)" \
      '. + [{mediaType: $type, digest: $digest, size: $size, platform: {os: "linux", architecture: $arch}}]' \
      <<<"$entries")
  done
  jq -n --arg type "$index_type" --argjson entries "$entries" \
    '{schemaVersion: 2, mediaType: $type, manifests: $entries}' |
    curl -sSf -X PUT -H "Content-Type: $index_type" --data-binary @- \
      "$(upstream_address)/v2/$repository/manifests/$tag"
}

manifest_type=application/vnd.oci.image.manifest.v1+json
docker_type=application/vnd.docker.distribution.manifest.v2+json
index_type=application/vnd.oci.image.index.v1+json

header_of() {
  awk -F': ' -v name="$2" 'tolower($1) == name { print $2 }' <<<"$1"
}

# digest_at_upstream REPOSITORY TAG
digest_at_upstream() {
  header_of "$(curl -sSfI -H "Accept: $manifest_type" -H "Accept: $index_type" \
    "$(upstream_address)/v2/$1/manifests/$2" | tr -d '\r')" docker-content-digest
}
