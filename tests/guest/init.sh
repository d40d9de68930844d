#!/bin/busybox sh
# The guest's only script: process 1 of an initramfs. What it prints after "GUEST:" is read by run.py.
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /run /tmp /state
mount -t tmpfs tmp /run
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs trace /sys/kernel/tracing
exec >/dev/ttyS0 2>&1 </dev/null
say() { echo "GUEST: $*"; }
give_up() { say "failed: $*"; tail -n 30 /state/sender.log; poweroff -f; }
phase=$(sed -n 's/.*phase=\([a-z]*\).*/\1/p' /proc/cmdline)
receiver=$(sed -n 's/.*receiver=\([0-9.:]*\).*/\1/p' /proc/cmdline)
say "$(uname -r), phase $phase"
for module in virtio_pci virtio_blk virtio_net dm_mod raid1; do modprobe $module || give_up "modprobe $module"; done
ip link set lo up
ip link set eth0 up || give_up "no network"
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
export LVM_SUPPRESS_FD_WARNINGS=1
sender() { command=$1; shift; blockferry-sender $command --state-dir /state/sender "$@"; }
lvm_() { command=$1; shift; lvm $command --config 'activation { udev_sync=0 udev_rules=0 } devices { use_devicesfile=0 }' "$@"; }

if [ "$phase" = first ]; then
    /usr/sbin/mke2fs -q -t ext4 /dev/vda || give_up mke2fs
    mount -t ext4 /dev/vda /state || give_up mount
    lvm_ pvcreate -q /dev/vdb && lvm_ vgcreate -q vg /dev/vdb && lvm_ lvcreate -q -Wn -l 100%FREE -n lv vg || give_up lvm
    mdadm --create /dev/md0 --run --assume-clean --level=1 --raid-devices=2 /dev/vdc /dev/vdd || give_up mdadm
    sender register -i "$receiver" -P /passphrase.txt --name guest || give_up register
else
    mount -t ext4 /dev/vda /state || give_up mount
    lvm_ vgchange -ay -q vg || give_up lvm
    mdadm --assemble --run /dev/md0 /dev/vdc /dev/vdd || give_up mdadm
fi
sender preflight || say "preflight ended with $?"
sender run --volume lv=/dev/vg/lv,capture=ebpf --volume md=/dev/md0,capture=ebpf --memory-budget 128MiB --point-interval 5s \
    --metrics-listen 127.0.0.1:9465 >>/state/sender.log 2>&1 &
running=$!
tail -f /state/sender.log &

point() {
    for attempt in $(seq 600); do
        answer=$(sender point --volume "$1" --json 2>/run/why)
        code=$?
        # 3: there is one, though weaker than it could be; nothing is mounted here that could be frozen.
        if [ $code = 0 ] || [ $code = 3 ]; then say "point $1 $answer"; return; fi
        grep -q '^State:.Z' /proc/$running/status && give_up "the sender ended"
        sleep 0.2
    done
    give_up "no point of $1: $(cat /run/why)"
}
pages() { echo $(($(blockdev --getsize64 "$1") / 4096)); }
write_some() { # DEVICE COUNT
    total=$(pages "$1")
    for turn in $(seq "$2"); do
        /usr/bin/dd if=/dev/urandom of="$1" bs=4k count=1 seek=$(($(/usr/bin/od -An -N4 -tu4 /dev/urandom) % total)) oflag=direct conv=notrunc 2>/dev/null ||
            give_up "a write to $1"
    done
}
point lv
point md
if [ "$phase" = first ]; then
    write_some /dev/vg/lv 100
    write_some /dev/md0 100
    point lv
    point md
    say "under load"
    while true; do write_some /dev/vg/lv 20; write_some /dev/md0 20; done
fi
wget -q -O - http://127.0.0.1:9465/metrics | grep -E '^blockferry_sender_(source_read|sent)_bytes_total' | while read -r line; do say "metric $line"; done
write_some /dev/vg/lv 50
write_some /dev/md0 50
point lv
point md
for name in lv md; do
    [ $name = lv ] && device=/dev/vg/lv || device=/dev/md0
    say "sha256 $name $(/usr/bin/dd if=$device bs=1M iflag=direct 2>/dev/null | /usr/bin/sha256sum | cut -c1-64)"
done
say "done"
poweroff -f
