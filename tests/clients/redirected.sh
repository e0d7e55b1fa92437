# shellcheck shell=bash
# Sourced by ./run: clients that are redirected to a bucket (`redirect` in [shared]). For those that resume a broken response
# of any registry, the bucket ends each response in the middle, so that they resume there. The bucket is SeaweedFS.

# Every response of the bucket to a client ends after so many bytes. The large layer of library/broken has 8 MiB.
bucket_cut_bytes=$((5 * 1024 * 1024))

all_of_redirected() {
  [[ -z ${DIRECT:-} ]] || return 0
  transport=plain parts=1
  ifnewer_in=(env AWS_ACCESS_KEY_ID=fleet AWS_SECRET_ACCESS_KEY=secret-of-the-fleet)
  scenario "redirected: a fresh cache over a bucket that has the image" bucket_has_the_image
  for client in skopeo podman; do
    scenario "redirected: ifnewer has no earlier redirect of this address" redirects_to_nobody_yet
    scenario "redirected: $client reads the layer from the bucket" follows_the_redirect
    "${client}_stops"
  done
  scenario "redirected: the bucket breaks off" bucket_breaks_off
  client=ctr parts=2
  scenario "redirected: ctr reads the layer from the bucket, in two parts" follows_the_redirect
  ctr_stops
  scenario "redirected: ifnewer has no earlier redirect of this address" redirects_to_nobody_yet
  scenario "redirected: dockerd reads the layer from the bucket, in two parts" dockerd_follows_the_redirect
  stop_dockerd
  stop_ifnewer
  stop bucket KILL
  stop bucket-cutting
  ifnewer_in=()
  rm -f "$state/upstreams.toml"
}

in_bucket=docker.io/library/broken:latest

bucket_has_the_image() {
  start_bucket
  start_bucket_cutting
  redirects_to bucket
  upstream_is_up
  fresh_mirror
  skopeo_starts
  skopeo_pulls "$in_bucket"
  wait_for ifnewer 30 is_uploaded
}

bucket_breaks_off() {
  stop_ifnewer
  redirects_to bucket-cutting
  start_ifnewer
}

# All clients have one address here, and one that asks for a blob again within a minute is served by ifnewer.
redirects_to_nobody_yet() {
  stop_ifnewer
  start_ifnewer
}

redirects_to() {
  cat >"$state/upstreams.toml" <<EOF
[shared]
bucket = "s3://images/team-a"
endpoint = "http://127.0.0.1:$(<"$state/bucket.port")"
region = "us-east-1"
redirect = "always"
redirect_endpoint = "http://127.0.0.1:$(<"$state/$1.port")"
EOF
}

# The layer, its predecessors, the config and the manifest.
is_uploaded() {
  (($(metric 'ifnewer_shared_uploads_total{result="done"}') >= 4)) && (($(metric ifnewer_shared_uploads_waiting) == 0))
}

metric() {
  curl -sSf "http://$(<"$state/ifnewer.admin")/metrics" | awk -v name="$1" '$1 == name { n = $2 } END { print n + 0 }'
}

start_bucket() {
  local ports
  mkdir -p "$scratch/bucket"
  cat >"$scratch/bucket/s3.json" <<'EOF'
{"identities": [{"name": "caches", "actions": ["Read", "Write", "List"],
  "credentials": [{"accessKey": "fleet", "secretKey": "secret-of-the-fleet"}]}]}
EOF
  mapfile -t ports < <(python3 -c '
import socket
found = [socket.create_server(("127.0.0.1", 0)) for _ in range(8)]
print(*(one.getsockname()[1] for one in found), sep="\n")')
  echo "${ports[6]}" >"$state/bucket.port"
  start bucket env HOME="$scratch/bucket" "$WEED" server -dir="$scratch/bucket" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
    -master.telemetry=false -master.volumeSizeLimitMB=256 -volume.max=20 -filer -s3 -s3.config="$scratch/bucket/s3.json" \
    -s3.iam=false -s3.port.iceberg=0 -s3.port.lance=0 -master.port="${ports[0]}" -master.port.grpc="${ports[1]}" \
    -volume.port="${ports[2]}" -volume.port.grpc="${ports[3]}" -filer.port="${ports[4]}" -filer.port.grpc="${ports[5]}" \
    -s3.port="${ports[6]}" -s3.port.grpc="${ports[7]}"
  wait_for bucket 60 curl -sSf -X PUT --data ready "http://127.0.0.1:${ports[4]}/buckets/images/ready"
  # It answers without a signature, with 403.
  wait_for bucket 60 curl -sS -o "$scratch/bucket/said" "http://127.0.0.1:${ports[6]}/images/"
}

start_bucket_cutting() {
  : >"$logs/bucket-cutting.out"
  start bucket-cutting "$scratch/cutting-upstream" "127.0.0.1:$(<"$state/bucket.port")" "$bucket_cut_bytes"
  wait_for bucket-cutting 20 grep -q 'listening on ' "$logs/bucket-cutting.out"
  sed -n 's/^listening on .*://p' "$logs/bucket-cutting.out" >"$state/bucket-cutting.port"
}

follows_the_redirect() {
  local redirects
  redirects=$(metric ifnewer_shared_redirects_total)
  : >"$logs/bucket-cutting.out"
  "${client}_starts"
  start_counting
  "${client}_pulls" "$in_bucket"
  says "$in_bucket" "broken off again and again"
  was_redirected "$redirects"
}

dockerd_follows_the_redirect() {
  local redirects
  redirects=$(metric ifnewer_shared_redirects_total)
  : >"$logs/bucket-cutting.out"
  stop_dockerd
  rm -rf "$scratch/dockerd"
  start_dockerd "$(mirror_for_dockerd)"
  start_counting
  docker_ pull -q broken
  prints broken "broken off again and again"
  was_redirected "$redirects"
}

# was_redirected REDIRECTS: since then the client read the layer from the bucket, in $parts.
was_redirected() {
  (($(metric ifnewer_shared_redirects_total) >= $1 + parts)) || fail "the client was not redirected, or did not resume"
  expect "broken responses of the bucket" $((parts - 1)) "$(grep -c '^cut after .* of GET /images/team-a/v1/blobs/' "$logs/bucket-cutting.out" || true)"
  expect "upstream GETs" 0 "$(asked 'GET /v2/library/broken/')"
}
