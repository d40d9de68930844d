#!/usr/bin/env python3
"""Restores a recovery point from a local Blockferry store, by docs/formats alone: what a stranger would write.

usage: restore.py STORE_DIR VOLUME KEY_FILE OUT [POINT]

VOLUME is NAME, MACHINE/NAME or the UUID; POINT the first digits of a point's id (default: the newest that is not fuzzy).
Everything is checked as docs/formats/README.md says; the first thing that does not fit ends it by name. OUT must not exist.
"""
import os
import struct
import sys
import uuid
from types import SimpleNamespace

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PAGE, PAGES, BLOCK = 4096, 64, 262144
FULL = (1 << PAGES) - 1
FUZZY = 1

def check(fits, what):
    if not fits:
        raise ValueError(what)

def digest(data):
    return blake3(data).digest()

CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in CRC_TABLE]

def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF

def hkdf(ikm, salt, info):
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(ikm)

class Fields:
    """Reads a body field by field."""

    def __init__(self, data, what):
        self.data, self.at, self.what = data, 0, what

    def raw(self, length):
        check(self.at + length <= len(self.data), f"{self.what}: cut short")
        self.at += length
        return self.data[self.at - length : self.at]

    def take(self, layout):
        values = struct.unpack("<" + layout, self.raw(struct.calcsize("<" + layout)))
        return values if len(values) > 1 else values[0]

    def block(self):
        return self.raw(self.take("I"))

    def text(self):
        return self.block().decode()

    def count(self):
        return range(self.take("I"))

    def end(self):
        check(self.at == len(self.data), f"{self.what}: bytes after the end")

def envelope(data, magic, what, versions=(1,)):
    check(len(data) >= 24 and data[:8] == magic, f"{what}: not a {magic!r}")
    version, critical, _, _, length = struct.unpack_from("<HHHHI", data, 8)
    check(version in versions and critical == 0, f"{what}: version {version}, critical flags {critical} are unknown")
    check(len(data) == 24 + length, f"{what}: {len(data)} bytes, expected {24 + length}")
    check(struct.unpack("<I", data[-4:])[0] == crc32c(data[:-4]), f"{what}: checksum")
    return version, Fields(data[20:-4], what)

def read_header(data, what):
    header, (_, f) = SimpleNamespace(), envelope(data, b"BFVOLUME", what)
    header.nonce = f.raw(16)
    header.fleet, header.volume, header.machine = f.raw(16), f.raw(16), f.raw(16)
    header.machine_name, header.name = f.text(), f.text()
    _, page, block, _, header.key_id = f.take("qIIII")
    check((page, block) == (PAGE, BLOCK), f"{what}: pages of {page} bytes, blocks of {block}")
    header.signing_key = f.raw(32)
    header.sizes = dict(f.take("IQ") for _ in f.count())
    header.wrapped = []
    for _ in f.count():
        key_id, kind, _ = f.take("IB3s")
        header.wrapped.append((key_id, kind, f.raw(16), f.raw(32), f.block(), f.block()))
    f.end()
    return header

def find_volume(store, wanted):
    folder = os.path.join(store, "v1/volumes")
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name, "header")
        if os.path.exists(path):
            with open(path, "rb") as file:
                header = read_header(file.read(), path)
            if wanted in (name, header.name, f"{header.machine_name}/{header.name}"):
                check(header.volume == uuid.UUID(name).bytes, f"{path}: of another volume")
                found.append((os.path.join(folder, name), header))
    check(len(found) == 1, f"{len(found)} volumes are called {wanted}")
    return found[0]

def data_key(key_file, header):
    with open(key_file, "rb") as file:
        text = file.read(4097)
    lines = text.decode("ascii").split("\n")
    check(len(lines) == 5 and lines[0] == "blockferry-key v1" and lines[4] == "", f"{key_file}: not a key file")
    values = [line.removeprefix(name) for line, name in zip(lines[1:4], ("id: ", "key: ", "check: "), strict=True)]
    check(digest(text[: text.rindex(b"check: ")])[:4].hex() == values[2], f"{key_file}: its check does not fit")
    file_id, key = bytes.fromhex(values[0]), bytes.fromhex(values[1])
    info = b"blockferry wrap v1" + header.volume + struct.pack("<I", header.key_id)
    for key_id, kind, wrapping_id, salt, _, wrapped in header.wrapped:
        if (key_id, kind, wrapping_id) == (header.key_id, 1, file_id):
            opened = AESGCM(hkdf(key, salt, info)).decrypt(bytes(12), wrapped, info)
            seed = hkdf(opened, header.volume, b"blockferry close signing v1")
            public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
            check(public == header.signing_key, "the header's signing key was altered")
            return opened
    raise ValueError(f"{key_file} opens no key of this volume")

def read_close(data, what):
    close, (_, f) = SimpleNamespace(), envelope(data, b"BFCLOSE\0", what)
    body = f.data
    close.id, close.signed, close.signature = digest(data), b"blockferry close v1\0" + body[:228], body[228:]
    close.fleet, close.volume = f.raw(16), f.raw(16)
    close.incarnation, close.key_id, close.epoch = f.take("IIQ")
    close.parent, close.salt = f.raw(32), f.raw(32)
    close.time, close.consistency, algorithm, reserved = f.take("qBBH")
    check(algorithm == 1 and reserved == 0 and close.consistency <= 4 and len(body) == 292, f"{what}: unknown values")
    close.disk_bytes, *close.counts = f.take("QQQQQ")
    close.root = f.raw(32)
    return close

def read_log(folder, header):
    """All committed epochs, oldest first: (close, segments)."""
    epochs, previous, head, generation, seq = [], bytes(32), None, 0, 1
    key = Ed25519PublicKey.from_public_bytes(header.signing_key)
    path = os.path.join(folder, "log", f"{seq:020}")
    while os.path.exists(path):
        with open(path, "rb") as file:
            data = file.read()
        _, f = envelope(data, b"BFLOGENT", path)
        check(f.raw(16) == header.volume and f.take("Q") == seq, f"{path}: it belongs elsewhere")
        before, generation = generation, f.take("Q")
        f.raw(16)
        check(f.raw(32) == previous and generation >= before, f"{path}: it does not follow the entry before it")
        f.raw(16)
        f.take("q")
        segments = [(f.text(), f.take("Q"), f.raw(32), *f.take("QI")) for _ in f.count()]
        for _ in f.count():
            close = read_close(f.block(), path)
            places = [segments[f.take("I")] for _ in f.count()]
            check(close.parent == (head.id if head else bytes(32)), f"{path}: a close does not follow the head")
            check(close.epoch > (head.epoch if head else 0), f"{path}: epoch {close.epoch} comes again")
            check((close.fleet, close.volume) == (header.fleet, header.volume), f"{path}: a close of another volume")
            check(header.sizes.get(close.incarnation) == close.disk_bytes, f"{path}: a disk that the header does not know")
            key.verify(close.signature, close.signed)
            epochs.append((close, places))
            head = close
        check(f.take("I") == 0, f"{path}: expiries are unknown in version 1")
        f.end()
        previous, seq = digest(data), seq + 1
        path = os.path.join(folder, "log", f"{seq:020}")
    later = [name for name in os.listdir(os.path.join(folder, "log")) if name.isdigit() and int(name) > seq]
    check(not later, f"{path} is missing, though {later[:1]} is there")
    return epochs

def read_index(store, segment):
    """(volume, incarnation, epoch) -> [(path, offset, metadata)] of a segment."""
    path, size, _, index_offset, records = segment
    with open(os.path.join(store, path), "rb") as file:
        check(os.fstat(file.fileno()).st_size == size, f"{path}: not {size} bytes")
        check(file.read(16) == b"BFSEGMT\0" + struct.pack("<HHI", 1, 0, 0), f"{path}: no segment of version 1")
        file.seek(index_offset)
        tail = file.read()
    footer, index = tail[-48:], tail[:-48]
    offset, length, crc, count, zero, version, zero_too, own_crc, zero_again, magic = struct.unpack("<QIIIQHHII8s", footer)
    check((magic, version, own_crc) == (b"BFSEGEND", 1, crc32c(footer[:32])), f"{path}: footer")
    check((offset, length, count) == (index_offset, len(index), records) and (zero, zero_too, zero_again) == (0, 0, 0), f"{path}: footer")
    check(crc == crc32c(index), f"{path}: checksum of the index")
    f, groups = Fields(index, path), {}
    for _ in f.count():
        group = f.raw(16), *f.take("IQ")
        groups.setdefault(group, []).extend((path, f.take("Q"), f.raw(96)) for _ in f.count())
    f.end()
    return groups

META = struct.Struct("<BBHIQQQQII16s32s")

def merkle(metas):
    leaves, ranges = [], {}
    for meta in metas:
        ranges.setdefault(META.unpack(meta)[4] // 4096, []).append(meta)
    for number, members in ranges.items():
        leaves.append(digest(b"blockferry leaf v1" + struct.pack("<Q", number) + b"".join(members)))
    while len(leaves) > 1:
        pairs = [leaves[at : at + 2] for at in range(0, len(leaves), 2)]
        leaves = [digest(b"blockferry node v1" + b"".join(pair)) if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0] if leaves else digest(b"blockferry empty v1")

def prove(store, close, segments):
    """The epoch's records in block order, after comparing them with what its close signs."""
    found = []
    for segment in segments:
        found += read_index(store, segment).get((close.volume, close.incarnation, close.epoch), [])
    found.sort(key=lambda record: META.unpack(record[2])[4])
    data = zero = size = end = 0
    for path, _, meta in found:
        _, _, reserved, blocks, block, data_mask, zero_mask, _, length, reserved_too, _, _ = META.unpack(meta)
        check(block >= end and data_mask & zero_mask == 0 and (reserved, reserved_too) == (0, 0), f"{path}: metadata")
        data, zero, size = data + data_mask.bit_count(), zero + zero_mask.bit_count() * blocks, size + length
        end = block + blocks
    check([len(found), data, zero, size] == close.counts, f"epoch {close.epoch}: its segments are not what its close counts")
    check(merkle(record[2] for record in found) == close.root, f"epoch {close.epoch}: its Merkle root differs")
    return found

def pages_of(block, disk_bytes):
    pages = max(0, min(PAGES, -(-disk_bytes // PAGE) - block * PAGES))
    return (1 << pages) - 1

def plan(store, epochs, disk_bytes):
    """(close, record, live pages) for all records that hold a page of the disk, newest epoch first."""
    missing = {block: pages_of(block, disk_bytes) for block in range(-(-disk_bytes // BLOCK))}
    live = []
    for close, segments in reversed(epochs):
        if not missing:
            break
        for record in prove(store, close, segments):
            _, _, _, blocks, first, data_mask, zero_mask, *_ = META.unpack(record[2])
            for block in range(first, first + blocks):
                fresh = missing.get(block, 0) & (data_mask | zero_mask)
                if fresh & data_mask:
                    live.append((close, record, fresh & data_mask))
                if fresh:
                    missing[block] &= ~fresh
                    if not missing[block]:
                        del missing[block]
    check(not missing, f"the point is not complete: {len(missing)} blocks lack pages")
    return live

def open_record(data, record, close, key):
    """The pages of a record's data mask, joined."""
    path, offset, meta = record
    kind, codec, _, blocks, block, data_mask, zero_mask, counter, _, _, tag, expected = META.unpack(meta)
    what = f"{path}: record at byte {offset}"
    check(digest(data) == expected, f"{what}: its digest is not the one that the close signs")
    head = struct.unpack_from("<4sHHBBBBHH16sIIQQQQIIIIQI", data)
    place = (close.volume, close.incarnation, close.key_id, close.epoch, block, data_mask, zero_mask, blocks)
    plain = data_mask.bit_count() * PAGE
    check(head[:9] == (b"BFRD", 1, 104, kind, codec, 1, 0, 0, 0) and head[9:17] == place, f"{what}: header")
    check(head[17:] == (plain, len(data) - 104, 0, counter, 0) and data[-16:] == tag, f"{what}: header")
    opened = AESGCM(key).decrypt(struct.pack("<QI", counter, 0), data[104:], data[:100])
    pages = zstandard.ZstdDecompressor().decompress(opened, max_output_size=plain) if codec == 1 else opened
    check(len(pages) == plain, f"{what}: it opens to {len(pages)} bytes, not {plain}")
    return pages

def main(store, volume, key_file, out, point=""):
    folder, header = find_volume(store, volume)
    key = data_key(key_file, header)
    epochs = read_log(folder, header)
    wanted = [at for at, (close, _) in enumerate(epochs) if close.consistency > (0 if point else FUZZY)]
    wanted = [at for at in wanted if epochs[at][0].id.hex().startswith(point)]
    check(wanted if not point else len(wanted) == 1, f"{len(wanted)} points fit {point or 'latest'}")
    epochs = epochs[: wanted[-1] + 1]
    chosen, keys = epochs[-1][0], {}
    with open(out, "xb") as target:
        target.truncate(chosen.disk_bytes)
        for close, record, live in plan(store, epochs, chosen.disk_bytes):
            if close.epoch not in keys:
                place = struct.pack("<IQI", close.incarnation, close.epoch, close.key_id)
                keys[close.epoch] = hkdf(key, close.salt, b"blockferry epoch v1" + close.volume + place)
            block, mask, length = META.unpack(record[2])[4], META.unpack(record[2])[5], META.unpack(record[2])[8]
            with open(os.path.join(store, record[0]), "rb") as segment:
                segment.seek(record[1])
                pages = open_record(segment.read(length), record, close, keys[close.epoch])
            present = [page for page in range(PAGES) if mask >> page & 1]
            for number, page in enumerate(present):
                at = block * BLOCK + page * PAGE
                if live >> page & 1:
                    target.seek(at)
                    target.write(pages[number * PAGE : (number + 1) * PAGE][: chosen.disk_bytes - at])
    print(f"restored point {chosen.id.hex()} of {header.machine_name}/{header.name}, {chosen.disk_bytes} bytes")

if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, InvalidSignature, InvalidTag) as error:
        sys.exit(f"restore.py: {error or type(error).__name__}")
