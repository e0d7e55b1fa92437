# shellcheck shell=bash
# Sourced by ./run: the Kubernetes manifests. Without a cluster, they are validated by the API's schema, and their configuration
# and hosts.toml are used unchanged.

manifest=$root/packaging/kubernetes/ifnewer.yaml
with_bucket=$root/packaging/kubernetes/ifnewer-shared.yaml
kubernetes_version=1.31

# The checker includes the API's schema, and needs PyYAML. In Debian, virtual environments need a separate package.
bring_kubernetes_checker() {
  python3 -c 'import ensurepip' 2>/dev/null || install_packages python3-venv
  python3 -m venv "$1"
  "$1/bin/pip" install --quiet --disable-pip-version-check kubernetes-validate==1.31.0
}

all_of_kubernetes() {
  scenario "kubernetes: the manifests are valid by the API's schema" manifests_are_valid
  scenario "every YAML in the documentation is YAML" documented_yaml_is_yaml
  scenario "kubernetes: its configuration serves" its_configuration_serves
  scenario "kubernetes: containerd pulls by its hosts.toml" containerd_pulls_by_its_hosts
  scenario "kubernetes: its probe tells a cache that serves from one that is gone" its_probe_tells
  stop containerd KILL
  scenario "kubernetes: the manifest with a bucket differs from the other one by the bucket" bucket_is_the_difference
  scenario "kubernetes: its configuration serves without its bucket" configuration_serves_without_its_bucket
}

manifests_are_valid() {
  "$KUBERNETES_CHECKER/bin/kubernetes-validate" --strict -k "$kubernetes_version" "$manifest" "$with_bucket"
  # The checker must reject an invalid manifest.
  sed 's/hostNetwork:/hostNetworks:/' "$manifest" >"$scratch/wrong.yaml"
  ! "$KUBERNETES_CHECKER/bin/kubernetes-validate" --strict -k "$kubernetes_version" "$scratch/wrong.yaml" || fail "anything goes"
}

documented_yaml_is_yaml() {
  "$KUBERNETES_CHECKER/bin/python" - "$root"/docs/*.md "$root/README.md" <<'PYTHON'
import re, sys, yaml
found = 0
for document in sys.argv[1:]:
    for block in re.findall(r"^```yaml\n(.*?)^```$", open(document).read(), re.S | re.M):
        list(yaml.safe_load_all(block))
        found += 1
assert found > 2, found
PYTHON
}

# from_the_manifest FILE [MANIFEST]: the entry FILE of its ConfigMap.
from_the_manifest() {
  "$KUBERNETES_CHECKER/bin/python" - "${2:-$manifest}" "$1" <<'PYTHON'
import sys, yaml
for part in yaml.safe_load_all(open(sys.argv[1])):
    if part["kind"] == "ConfigMap":
        print(part["data"][sys.argv[2]], end="")
PYTHON
}

# The paths of the pod, below a folder that replaces its root.
its_configuration_serves() {
  local pod=$scratch/pod
  mkdir -p "$pod"
  openssl rand -hex 32 >"$pod/token"
  { from_the_manifest ifnewer.toml && hub_at 127.0.0.1; } | sed "s|/run/secrets/ifnewer/token|$pod/token|" >"$pod/ifnewer.toml"
  start ifnewer env IFNEWER_DATA="$pod/data" "$ifnewer" serve --config "$pod/ifnewer.toml"
  wait_for ifnewer 20 its_probe
}

its_probe() {
  "$ifnewer" healthcheck --config "$scratch/pod/ifnewer.toml"
}

containerd_pulls_by_its_hosts() {
  start_containerd
  rm -rf "$scratch/containerd/hosts"
  mkdir -p "$scratch/containerd/hosts/_default"
  from_the_manifest hosts.toml >"$scratch/containerd/hosts/_default/hosts.toml"
  from_here
  cri_pulls docker.io/library/demo:latest
  expect "manifests fetched" 1 "$(asked_registry 'GET /v2/library/demo/manifests/')"
  ctr_pulls docker.io/library/demo:latest
  expect "manifests fetched by both" 1 "$(asked_registry 'GET /v2/library/demo/manifests/')"
}

its_probe_tells() {
  its_probe
  stop ifnewer
  ! its_probe || fail "it finds a cache that is gone"
}

# What both have is the same, so that a change of one is not forgotten in the other.
bucket_is_the_difference() {
  "$KUBERNETES_CHECKER/bin/python" - "$manifest" "$with_bucket" <<'PYTHON'
import sys, yaml

def parts(path):
    found = {part["kind"]: part for part in yaml.safe_load_all(open(path))}
    return found, found["DaemonSet"]["spec"]["template"]["spec"], found["ConfigMap"]["data"]

one, pod, config = parts(sys.argv[1])
other, with_bucket, config_with_bucket = parts(sys.argv[2])
assert set(other) - set(one) == {"ServiceAccount"}, other.keys()
text, section = config["ifnewer.toml"], "[shared]"
assert config_with_bucket["ifnewer.toml"].startswith(text + section), config_with_bucket
assert config_with_bucket["hosts.toml"] == config["hosts.toml"]
assert with_bucket["serviceAccountName"] == other["ServiceAccount"]["metadata"]["name"]
for key in set(pod) - {"initContainers", "containers", "volumes"}:
    assert with_bucket[key] == pod[key], key
assert with_bucket["initContainers"][:2] == pod["initContainers"]
[cache], [cache_with_bucket] = pod["containers"], with_bucket["containers"]
for key in set(cache) - {"resources", "volumeMounts"}:
    assert cache_with_bucket[key] == cache[key], key
mounted = {mount["name"] for container in [*with_bucket["initContainers"], cache_with_bucket] for mount in container["volumeMounts"]}
assert mounted == {volume["name"] for volume in with_bucket["volumes"]}, mounted
assert not any(mount["name"] == "key-secret" for mount in cache_with_bucket["volumeMounts"])
PYTHON
}

# The key is installed by the command of the pod, as its user. The bucket is not reached, which is no reason to be unready.
configuration_serves_without_its_bucket() {
  local pod=$scratch/pod-with-bucket
  mkdir -p "$pod/secret" "$pod/keys" "$pod/identity"
  openssl rand -hex 32 >"$pod/token"
  printf 'no token' >"$pod/identity/token"
  "$ifnewer" shared key new >"$pod/secret/records.key"
  chmod 444 "$pod/secret/records.key"
  local -a install environment
  mapfile -t install < <(of_the_pod 'next(c for c in pod["initContainers"] if c["name"] == "key")["command"]')
  mapfile -t environment < <(of_the_pod '[entry["name"] + "=" + entry["value"] for entry in pod["containers"][0]["env"]]')
  install=("${install[@]//\/secret/$pod/secret}")
  "${install[@]//\/run\/keys/$pod/keys}"
  environment=("${environment[@]//\/run\/identity/$pod/identity}")
  { from_the_manifest ifnewer.toml "$with_bucket" && hub_at 127.0.0.1; } |
    sed "s|/run/secrets/ifnewer/token|$pod/token|; s|/run/keys|$pod/keys|" >"$pod/ifnewer.toml"
  start ifnewer env IFNEWER_DATA="$pod/data" "${environment[@]}" "$ifnewer" serve --config "$pod/ifnewer.toml"
  wait_for ifnewer 20 "$ifnewer" healthcheck --config "$pod/ifnewer.toml"
  reason_of_pull http://127.0.0.1:5000
  stop ifnewer
}

# of_the_pod EXPRESSION: a list in the pod of the manifest with a bucket, a line each.
of_the_pod() {
  "$KUBERNETES_CHECKER/bin/python" - "$with_bucket" "$1" <<'PYTHON'
import sys, yaml
[daemon_set] = [part for part in yaml.safe_load_all(open(sys.argv[1])) if part["kind"] == "DaemonSet"]
print(*eval(sys.argv[2], {"pod": daemon_set["spec"]["template"]["spec"]}), sep="\n")
PYTHON
}
