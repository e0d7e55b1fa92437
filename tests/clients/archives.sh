# shellcheck shell=bash
# Sourced by ./run, after servers.sh and images.sh: image archives between ifnewer and skopeo, in both directions.

all_of_archives() {
  [[ -z ${DIRECT:-} ]] || return 0
  scenario "archives: skopeo reads an export" skopeo_reads_an_export
  scenario "archives: an archive of skopeo is imported, and served while the registry is down" an_import_from_skopeo_is_served
}

archives_start() {
  transport=plain
  fresh_mirror
}

operated() { "$ifnewer" "$@" --admin "$(<"$state/ifnewer.admin")"; }

skopeo_reads_an_export() {
  local archive=$scratch/exported.tar
  archives_start
  operated pull --platform all multi:latest
  operated export multi:latest -o "$archive"
  expect "the digest that skopeo sees" "$(registry_digest)" \
    "sha256:$(skopeo inspect --raw "oci-archive:$archive" | sha256sum | cut -d' ' -f1)"
  # skopeo verifies all content that it copies.
  skopeo --insecure-policy copy -q --all "oci-archive:$archive" "dir:$scratch/exported"
  # Also as a folder.
  operated export multi:latest -o "$scratch/exported-layout"
  skopeo --insecure-policy copy -q --all "oci:$scratch/exported-layout" "dir:$scratch/exported-again"
  diff -r "$scratch/exported" "$scratch/exported-again"
  # For a compressed archive or docker's old format, the error states the remedy.
  gzip -kf "$archive"
  if operated import "$archive.gz" 2>"$scratch/said"; then fail "a compressed archive was accepted"; fi
  grep -q 'an uncompressed tar is expected' "$scratch/said"
  skopeo --insecure-policy copy -q --override-os linux --override-arch amd64 "oci-archive:$archive" \
    "docker-archive:$scratch/old.tar:multi:latest"
  if operated import "$scratch/old.tar" 2>"$scratch/said"; then fail "an old archive was accepted"; fi
  grep -q 'docker-archive:FILE oci-archive:OUT' "$scratch/said"
}

an_import_from_skopeo_is_served() {
  local archive=$scratch/written.tar digest copied=$scratch/imported
  archives_start
  digest=$(registry_digest)
  skopeo copy -q --insecure-policy --all --src-tls-verify=false "docker://$(upstream_address)/library/multi:latest" \
    "oci-archive:$archive:multi:latest"
  stop upstream
  # The name in the archive has no registry.
  if operated import "$archive" 2>"$scratch/said"; then fail "a name without a registry was accepted"; fi
  grep -q -- '--as' "$scratch/said"
  operated import --public --as multi:latest "$archive"
  rm -rf "$copied"
  skopeo --insecure-policy copy -q --all --src-tls-verify=false "docker://$(address)/library/multi:latest" "dir:$copied"
  expect "the digest served" "$digest" "sha256:$(sha256sum "$copied/manifest.json" | cut -d' ' -f1)"
  operated import --public --as multi:latest "$archive" | grep -q 'already cached'
}

registry_digest() {
  skopeo inspect --raw --tls-verify=false "docker://$(upstream_address)/library/multi:latest" | sha256sum |
    sed 's/^\([0-9a-f]*\).*/sha256:\1/'
}
