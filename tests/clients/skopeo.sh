# shellcheck shell=bash
# Sourced by ./run: skopeo, which copies images and runs none; and functions shared with podman.

skopeo_starts() {
  write_registries
  skopeo_forgets
}

skopeo_stops() { skopeo_forgets; }
skopeo_can_choose() { :; }

# skopeo_pulls REF [ARCH]: into a folder named after the reference.
skopeo_pulls() {
  be_cut_off
  mkdir -p "$scratch/copied"
  rm -rf "$(copy_of "$1")"
  "${cut_off[@]}" timeout 120 skopeo --registries-conf "$scratch/registries.conf" --insecure-policy \
    --override-os linux --override-arch "${2:-amd64}" \
    copy -q "docker://$1" "dir:$(copy_of "$1")" >"$scratch/skopeo-said" 2>&1 ||
    { cat "$scratch/skopeo-said"; return 1; }
}

copy_of() { echo "$scratch/copied/${1//[^a-z0-9.-]/_}"; }

skopeo_digest() { echo "sha256:$(sha256sum "$(copy_of "$1")/manifest.json" | cut -d' ' -f1)"; }

# The version is in the last layer that has one. umoci writes archives without the end that tar expects.
skopeo_says() {
  local layer version
  for layer in $(jq -r '.layers | reverse[].digest' "$(copy_of "$1")/manifest.json"); do
    version=$({ gzip -dc "$(copy_of "$1")/${layer#sha256:}"; head -c 1536 /dev/zero; } | tar -xO version 2>/dev/null || true)
    [[ -z $version ]] || break
  done
  echo "$version"
}

skopeo_has() {
  local config
  config=$(jq -r .config.digest "$(copy_of "$multi")/manifest.json")
  expect "architecture" "$1" "$(jq -r .architecture "$(copy_of "$multi")/${config#sha256:}")"
}

skopeo_forgets() { rm -rf "$scratch/copied"; }
skopeo_was_told() { mirrors_also_failed "$scratch/skopeo-said"; }

# --- skopeo and podman -----------------------------------------------------------------------------------------------

# docker.io by the cache's default upstream; the other registry by its name as path prefix. Through the proxy, a
# registry is requested by its own name.
write_registries() {
  local registry at
  : >"$scratch/registries.conf"
  [[ $transport != proxy ]] || return 0
  for registry in docker.io cut.example; do
    at=$(address)
    [[ $registry == docker.io ]] || at=$at/$registry
    cat <<EOF
[[registry]]
prefix = "$registry"
location = "$registry"
[[registry.mirror]]
location = "$at"
insecure = $(is_insecure)
EOF
  done >"$scratch/registries.conf"
}

# Only the mirror's error, without the registry's own.
mirrors_also_failed() {
  if [[ $transport == proxy ]]; then cat "$1"; return; fi
  grep -o 'Mirrors also failed: .*])' "$1" | tail -n 1
}
