# shellcheck shell=bash
# Sourced by ./run: the Debian package on a machine booted by systemd.

all_of_deb() {
  scenario "the package is made, and what it holds belongs to root and is for all to read" package_is_made
  scenario "a machine boots" boot_machine
  scenario "installed: the service answers, under systemd's whole hardening, as a user of its own" installed_it_answers
  scenario "a client pulls through it" a_client_pulls
  scenario "every command in root's shell means this cache" commands_mean_this_cache
  scenario "the authority is replaced by root, and the service reads its key" authority_is_replaced
  scenario "a wrong configuration changes nothing at a reload" wrong_configuration_changes_nothing
  scenario "the watchdog ends what hangs" watchdog_ends_what_hangs
  scenario "systemd hands over port 443" socket_is_handed_over
  scenario "an upgrade restarts it, and keeps the configuration" upgrade_restarts_it
  scenario "what was disabled stays disabled over an upgrade" disabled_stays_disabled
  scenario "removed it is gone, and purged it leaves nothing" purged_leaves_nothing
  stop machine KILL
}

package_is_made() {
  "$root/packaging/deb" "$ifnewer" "$scratch/deb" >"$state/deb"
  local deb said path
  deb=$(<"$state/deb")
  said=$(dpkg-deb --contents "$deb")
  echo "$said"
  [[ -z $(awk '$2 != "root/root" || $1 ~ /^.......[^r]/ || $1 ~ /^........w/' <<<"$said") ]] || fail "owner or mode"
  for path in /usr/bin/ifnewer /etc/ifnewer/ifnewer.toml /lib/systemd/system/ifnewer.service /usr/share/doc/ifnewer/copyright \
    /usr/share/man/man1/ifnewer-setup.1.gz /usr/share/bash-completion/completions/ifnewer /usr/share/doc/ifnewer/docs/clients.md; do
    grep -qF " .$path" <<<"$said" || fail "$path is not in the package"
  done
  dpkg-deb --field "$deb" Depends | grep -q 'libc6 (>= '
  expect "conffiles" /etc/ifnewer/ifnewer.toml "$(dpkg-deb --info "$deb" conffiles)"
}

install_deb() {
  in_machine tee /root/ifnewer.deb <"$(<"$state/deb")" >/dev/null
  in_machine dpkg --force-confold --install /root/ifnewer.deb
}

# Ready means that the program notified systemd, not only that it runs.
is_ready() {
  [[ $(in_machine systemctl is-active ifnewer) == active ]] || { in_machine journalctl -u ifnewer --no-pager -n 15; fail "the service is not active"; }
  curl -sSf http://127.0.0.1:5001/readyz
}

installed_it_answers() {
  install_deb
  in_machine dpkg --verify ifnewer
  is_ready
  expect "enabled" enabled "$(in_machine systemctl is-enabled ifnewer)"
  expect "its user" ifnewer "$(in_machine ps -o user= -C ifnewer)"
  expect "the owner of the key" "ifnewer 600" "$(in_machine stat -c '%U %a' /var/lib/ifnewer/certs/ca.key)"
  in_machine sh -c 'grep -E "^(CapEff|NoNewPrivs|Seccomp):" /proc/$(pidof ifnewer)/status' | tr '\n\t' '  ' |
    grep -q 'CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2'
}

# A change of the administrator, which an upgrade must keep.
a_client_pulls() {
  hub_at 127.0.0.1 | in_machine tee -a /etc/ifnewer/ifnewer.toml
  in_machine ifnewer check
  in_machine systemctl reload ifnewer
  skopeo copy -q --insecure-policy --src-tls-verify=false docker://127.0.0.1:5000/library/demo:latest "dir:$scratch/pulled"
  [[ $(reason_of_pull http://127.0.0.1:5000) == *revalidated* ]] || fail "the image is not cached"
}

commands_mean_this_cache() {
  in_machine ifnewer check | grep -F /var/cache/ifnewer
  in_machine ifnewer healthcheck
  in_machine ifnewer ls | grep -F library/demo
  in_machine ifnewer ca export >"$scratch/ca.pem"
  reason_of_pull https://127.0.0.1:5000 "$scratch/ca.pem"
  in_machine ifnewer setup podman --apply
  in_machine ifnewer ca install
  in_machine cmp /usr/local/share/ca-certificates/ifnewer.crt /var/lib/ifnewer/certs/ca.pem
  in_machine ifnewer doctor --json >"$scratch/doctor.json" || true
  cat "$scratch/doctor.json"
  # Only the checks of the cache matter here, not those of this machine's clients.
  jq -r '.checks[] | select(.name | IN("listener", "listener-tls", "ready", "disk")) | "\(.name) \(.state)"' "$scratch/doctor.json" \
    >"$scratch/doctor"
  expect "what doctor finds" "disk ok listener ok listener-tls ok ready ok" "$(sort "$scratch/doctor" | xargs)"
  in_machine ifnewer setup podman --undo
}

authority_is_replaced() {
  local before
  before=$(in_machine ifnewer ca export)
  in_machine ifnewer ca rotate
  in_machine systemctl reload ifnewer
  in_machine ifnewer ca export >"$scratch/ca.pem"
  [[ $before != "$(<"$scratch/ca.pem")" ]] || fail "the authority is the old one"
  reason_of_pull https://127.0.0.1:5000 "$scratch/ca.pem"
  in_machine systemctl restart ifnewer
  reason_of_pull https://127.0.0.1:5000 "$scratch/ca.pem"
}

wrong_configuration_changes_nothing() {
  in_machine cp /etc/ifnewer/ifnewer.toml /root/
  echo 'no = "such key"' | in_machine tee -a /etc/ifnewer/ifnewer.toml
  in_machine systemctl reload ifnewer || true
  is_ready
  in_machine journalctl -u ifnewer --no-pager -n 20 | grep -F 'ifnewer.toml'
  in_machine cp /root/ifnewer.toml /etc/ifnewer/
  in_machine systemctl reload ifnewer
}

# A stopped process does not ping the watchdog, so systemd kills it and starts another.
watchdog_ends_what_hangs() {
  local pid tries
  in_machine mkdir -p /run/systemd/system/ifnewer.service.d
  printf '[Service]\nWatchdogSec=1s\n' | in_machine tee /run/systemd/system/ifnewer.service.d/soon.conf
  in_machine systemctl daemon-reload
  in_machine systemctl restart ifnewer
  pid=$(in_machine pidof ifnewer)
  sleep 2
  expect "the process, two seconds later" "$pid" "$(in_machine pidof ifnewer)"
  in_machine kill -STOP "$pid"
  for ((tries = 0; tries < 200; tries++)); do
    if [[ $(in_machine systemctl show -p NRestarts --value ifnewer) == 1 ]] && curl -sf http://127.0.0.1:5001/readyz; then break; fi
    sleep 0.1
  done
  [[ $(in_machine pidof ifnewer) != "$pid" ]] || fail "the same process is there"
  is_ready
  in_machine rm -r /run/systemd/system/ifnewer.service.d
  in_machine systemctl daemon-reload
}

socket_is_handed_over() {
  in_machine systemctl stop ifnewer
  in_machine systemctl start ifnewer.socket
  # The first connection starts the service. Its certificate is for the registry that the client requests.
  curl -sSf --cacert "$scratch/ca.pem" --connect-to registry-1.docker.io:443:127.0.0.1:443 https://registry-1.docker.io/v2/
  reason_of_pull http://127.0.0.1:5000
  is_ready
  in_machine systemctl stop ifnewer.socket ifnewer
  in_machine systemctl start ifnewer
}

upgrade_restarts_it() {
  local before
  before=$(in_machine pidof ifnewer)
  install_deb
  [[ $(in_machine pidof ifnewer) != "$before" ]] || fail "the old program runs on"
  is_ready
  [[ $(reason_of_pull http://127.0.0.1:5000) == *revalidated* ]] || fail "the cache or its configuration has changed"
}

disabled_stays_disabled() {
  in_machine systemctl disable ifnewer
  install_deb
  expect "after an upgrade" disabled "$(in_machine systemctl is-enabled ifnewer || true)"
}

purged_leaves_nothing() {
  in_machine dpkg --remove ifnewer
  ! curl -sf http://127.0.0.1:5001/healthz || fail "it still answers"
  in_machine test -e /var/cache/ifnewer
  in_machine test -e /etc/ifnewer/ifnewer.toml
  in_machine dpkg --purge ifnewer
  expect "what is left" "" "$(in_machine find /etc/ifnewer /var/cache/ifnewer /var/lib/ifnewer /lib/systemd/system/ifnewer.service \
    /etc/systemd/system/multi-user.target.wants/ifnewer.service 2>/dev/null || true)"
}
