# shellcheck shell=bash
# Sourced by ./run: the Kubernetes manifest. Without a cluster, it is validated by the API's schema, and its configuration and
# hosts.toml are used unchanged.

manifest=$root/packaging/kubernetes/ifnewer.yaml
kubernetes_version=1.31

# The checker includes the API's schema, and needs PyYAML. In Debian, virtual environments need a separate package.
bring_kubernetes_checker() {
  python3 -c 'import ensurepip' 2>/dev/null || install_packages python3-venv
  python3 -m venv "$1"
  "$1/bin/pip" install --quiet --disable-pip-version-check kubernetes-validate==1.31.0
}

all_of_kubernetes() {
  scenario "kubernetes: the manifest is one by the API's schema" manifest_is_valid
  scenario "every YAML in the documentation is YAML" documented_yaml_is_yaml
  scenario "kubernetes: its configuration serves" its_configuration_serves
  scenario "kubernetes: containerd pulls by its hosts.toml" containerd_pulls_by_its_hosts
  scenario "kubernetes: its probe tells a cache that serves from one that is gone" its_probe_tells
  stop containerd KILL
}

manifest_is_valid() {
  "$KUBERNETES_CHECKER/bin/kubernetes-validate" --strict -k "$kubernetes_version" "$manifest"
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

# from_the_manifest FILE: the entry FILE of its ConfigMap.
from_the_manifest() {
  "$KUBERNETES_CHECKER/bin/python" - "$manifest" "$1" <<'PYTHON'
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
