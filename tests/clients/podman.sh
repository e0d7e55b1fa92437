# shellcheck shell=bash
# Sourced by ./run: podman with a private store and a mirror in registries.conf.

podman_starts() {
  podman_stops
  rm -rf "$scratch/podman"
  mkdir -p "$scratch/podman"
  write_registries
}

podman_stops() {
  unmount_below "$scratch/podman"
}

podman_can_choose() { :; }

# podman_pulls REF [ARCH]
podman_pulls() {
  podman_ pull --quiet --arch "${2:-amd64}" "$1" >"$scratch/podman-said" 2>&1 || { cat "$scratch/podman-said"; return 1; }
}

podman_digest() { podman_ image inspect --format '{{.Digest}}' "$1"; }

# A limit above the machine's cannot be set, with or without root.
podman_says() {
  podman_ run --rm --pull never --network none --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$1" 2>&1
}

podman_has() { expect "architecture" "$1" "$(podman_ image inspect --format '{{.Architecture}}' "$multi")"; }
podman_forgets() { podman_ rmi --all --force >/dev/null; }
podman_was_told() { mirrors_also_failed "$scratch/podman-said"; }

podman_() {
  be_cut_off
  "${cut_off[@]}" CONTAINERS_REGISTRIES_CONF="$scratch/registries.conf" timeout 120 podman \
    --root "$scratch/podman/root" --runroot "$scratch/podman/run" --tmpdir "$scratch/podman/tmp" \
    --storage-driver vfs --cgroup-manager cgroupfs --events-backend file "$@"
}
