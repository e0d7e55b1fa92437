# shellcheck shell=bash
# Sourced by ./run: a machine booted by systemd, in private namespaces: this machine's files under an overlay in memory, with
# its own processes and cgroups. It shares the private network of this run.

machine=$scratch/machine
cgroup_name=ifnewer-$(basename "$scratch")

boot_machine() {
  mkdir -p "$machine"
  start machine unshare --mount --pid --uts --ipc --fork --kill-child bash -euc "
    $(declare -f boot mount_files make_devices own_cgroups enter_cgroups)
    boot '$machine' '$cgroup_name'"
  wait_for machine 60 machine_is_up
}

machine_is_up() {
  [[ $(in_machine systemctl is-system-running) == @(running|degraded) ]]
}

# in_machine COMMAND…: as root in that machine.
in_machine() {
  local first
  first=$(pgrep -P "$(<"$state/machine.pid")")
  nsenter --target "$first" --mount --pid --uts --ipc --cgroup --root --wd -- \
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"
}

# --- inside ----------------------------------------------------------------------------------------------------------

boot() {
  enter_cgroups "$2"
  mount_files "$1"
  cd "$1/root"
  # Without this machine's services, and without a container's policy against starting services.
  rm -rf etc/systemd/system/*.wants usr/sbin/policy-rc.d etc/ifnewer var/cache/ifnewer var/lib/ifnewer
  systemd-id128 new >etc/machine-id
  # Not by chroot, because a process in a chroot cannot create a user namespace (PrivateUsers=).
  pivot_root . .
  umount -l .
  exec unshare --cgroup env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=basic.target --log-target=console --show-status=no
}

mount_files() {
  mount -t tmpfs machine "$1"
  mkdir "$1"/{upper,work,root}
  mount -t overlay machine -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
  cd "$1/root"
  mount -t proc proc proc
  # It shares the kernel, so it must not change kernel settings.
  mount --bind -o ro proc/sys proc/sys
  mount -t sysfs -o ro sys sys
  mount -t tmpfs run run
  mount -t tmpfs tmp tmp
  make_devices
}

make_devices() {
  local name
  mount -t tmpfs dev dev
  mkdir dev/{pts,shm,mqueue}
  mount -t devpts -o ptmxmode=0666 devpts dev/pts
  ln -s pts/ptmx dev/ptmx
  for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
  done
  ln -s /proc/self/fd dev/fd
  ln -s /dev/null dev/console
}

# The cgroup of this process in each hierarchy, of version 1, 2 or both.
own_cgroups() {
  local controllers path at
  while IFS=: read -r _ controllers path; do
    at=/sys/fs/cgroup/${controllers#name=}
    if [[ -z $controllers && -d /sys/fs/cgroup/unified ]]; then at=/sys/fs/cgroup/unified; fi
    [[ ! -d $at$path ]] || echo "$at$path"
  done </proc/self/cgroup
}

# Below the current cgroup, so that `unshare --cgroup` makes it systemd's root.
enter_cgroups() {
  local at
  while read -r at; do
    mkdir "$at/$1"
    # A cpuset needs processors before a process can join it.
    [[ ! -e $at/cpuset.cpus ]] || cp "$at/cpuset.cpus" "$at/cpuset.mems" "$at/$1/" 2>/dev/null || true
    echo $$ >"$at/$1/cgroup.procs" || true
  done < <(own_cgroups)
}

# cgroups can be removed only after their processes have ended, which takes a moment.
remove_cgroups() {
  local at tries
  while read -r at; do
    for ((tries = 0; tries < 50; tries++)); do
      [[ -d $at/$cgroup_name ]] || break
      find "$at/$cgroup_name" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
    done
  done < <(own_cgroups)
}
