#!/usr/bin/env python3
"""Restores a recovery point from a local Blockferry store, by docs/formats alone: what a stranger would write.

usage: restore.py STORE_DIR VOLUME KEY_FILE OUT [POINT]

VOLUME is NAME, MACHINE/NAME or the UUID; POINT the first digits of a point's id (default: the newest that is not fuzzy).
Everything is checked as docs/formats/README.md says; the first thing that does not fit ends it by name. OUT must not exist.
"""
import hmac
import struct
import sys
import uuid
from collections import namedtuple
from functools import lru_cache, reduce
from pathlib import Path
from types import SimpleNamespace

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PAGE, PAGES, BLOCK, FUZZY = 4096, 64, 262144, 1
Epoch = namedtuple("Epoch", "epoch incarnation key_id salt close")
CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in CRC_TABLE]

def check(fits, what):
    if not fits:
        raise ValueError(what)

def digest(data):
    return blake3(data).digest()

def hkdf(ikm, salt, info):
    return hmac.digest(hmac.digest(salt, ikm, "sha256"), info + b"\1", "sha256")

def crc32c(data):
    return reduce(lambda crc, byte: crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF], data, 0xFFFFFFFF) ^ 0xFFFFFFFF

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

def read_header(path):
    header, (_, f) = SimpleNamespace(), envelope(path.read_bytes(), b"BFVOLUME", path)
    _, header.fleet, header.volume, _ = f.take("16s16s16s16s")
    header.machine, header.name = f.block().decode(), f.block().decode()
    _, page, block, _, header.key_id, header.signing_key = f.take("qIIII32s")
    check((page, block) == (PAGE, BLOCK), f"{path}: pages of {page} bytes, blocks of {block}")
    header.verifier = Ed25519PublicKey.from_public_bytes(header.signing_key)
    header.sizes = dict(f.take("IQ") for _ in f.count())
    header.wrapped = [(*f.take("IB3s16s32s"), f.block(), f.block()) for _ in f.count()]
    f.end()
    return header

def find_volume(store, wanted):
    known = [(path.parent, read_header(path)) for path in sorted((store / "v1/volumes").glob("*/header"))]
    found = [(at, header) for at, header in known if wanted in (at.name, header.name, f"{header.machine}/{header.name}")]
    check(len(found) == 1, f"{len(found)} volumes are called {wanted}")
    check(found[0][1].volume == uuid.UUID(found[0][0].name).bytes, f"{found[0][0]}: its header is of another volume")
    return found[0]

def data_key(key_file, header):
    lines = (text := Path(key_file).read_bytes()).decode("ascii").split("\n")
    check(len(lines) == 5 and lines[0] == "blockferry-key v1" and lines[4] == "", f"{key_file}: not a key file")
    values = [line.removeprefix(name) for line, name in zip(lines[1:4], ("id: ", "key: ", "check: "), strict=True)]
    check(digest(text[: text.rindex(b"check: ")])[:4].hex() == values[2], f"{key_file}: its check does not fit")
    file_id, key = bytes.fromhex(values[0]), bytes.fromhex(values[1])
    info = b"blockferry wrap v1" + header.volume + struct.pack("<I", header.key_id)
    for key_id, kind, _, wrapping_id, salt, _, wrapped in header.wrapped:
        if (key_id, kind, wrapping_id) == (header.key_id, 1, file_id):
            opened = AESGCM(hkdf(key, salt, info)).decrypt(bytes(12), wrapped, info)
            seed = hkdf(opened, header.volume, b"blockferry close signing v1")
            public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
            check(public == header.signing_key, "the header's signing key was altered")
            return opened
    raise ValueError(f"{key_file} opens no key of this volume")

def read_close(data, header, what):
    close, (_, f) = SimpleNamespace(id=digest(data)), envelope(data, b"BFCLOSE\0", what)
    check(len(f.data) == 292, f"{what}: a close of {len(f.data)} bytes")
    fleet, volume, close.incarnation, close.key_id, close.epoch, close.parent, close.salt = f.take("16s16sIIQ32s32s")
    _, close.consistency, algorithm, reserved, close.disk_bytes, *close.counts, close.root = f.take("qBBHQQQQQ32s")
    check((fleet, volume) == (header.fleet, header.volume), f"{what}: a close of another volume")
    check(algorithm == 1 and reserved == 0 and close.consistency <= 4, f"{what}: unknown values")
    check(header.sizes.get(close.incarnation) == close.disk_bytes, f"{what}: a disk that the header does not know")
    header.verifier.verify(f.data[228:], b"blockferry close v1\0" + f.data[:228])
    return close

def segment(f):  # as the log names it: path, size, digest, offset of the index, records
    return f.block().decode(), *f.take("Q32sQI")

def read_base(path, header):
    """A state that a key holder signed; its places are paths of segments."""
    data = path.read_bytes()
    size = 24 + int.from_bytes(data[16:20], "little")
    base, (_, f) = SimpleNamespace(), envelope(data[:size], b"BFBASE\0\0", path)
    volume, base.seq, base.entry_digest, base.generation, _, _, _, flags = f.take("16sQ32sQ16sqQB3x")
    check((volume, f"{base.seq:020}") == (header.volume, path.name) and flags <= 1, f"{path}: it belongs elsewhere")
    base.close = read_close(f.block(), header, path)
    base.expired = {base.close.id} if flags else set()
    base.epochs = [Epoch(*f.take("QII32s32s")) for _ in f.count()]
    pages, signed = [f.take("QII32s") for _ in f.count()], f.data[: f.at]
    base.segments = [segment(f) for _ in f.count()]
    base.places, base.entries, at = [named[0] for named in base.segments], data[size:], size
    for _, count, _, expected in pages:
        page, at = data[at : at + 140 * count], at + 140 * count
        plain = b"".join(page[entry : entry + 16] + bytes(12) + page[entry + 28 : entry + 140] for entry in range(0, 140 * count, 140))
        check(crc32c(page) == f.take("I") and digest(plain) == expected, f"{path}: a page is not the one that is signed")
    header.verifier.verify(f.raw(64), b"blockferry base v1\0" + signed)
    f.end()
    entry = (path.parent.parent / f"log/{path.name}").read_bytes()
    check(digest(entry) == base.entry_digest and at == len(data), f"{path}: it does not fit its log entry, or is cut short")
    return base

def read_log(folder, header):
    """What the log says: (close, paths of its segments) of each epoch, oldest first; segments by path; closes that expired."""
    log = SimpleNamespace(epochs=[], segments={}, expired=set(), base=None)
    previous, head, generation, seq = bytes(32), SimpleNamespace(id=bytes(32), epoch=0), 0, 1
    if bases := sorted((folder / "bases").glob("*")):
        base = log.base = read_base(bases[-1], header)
        previous, head, generation, seq = base.entry_digest, base.close, base.generation, base.seq + 1
        log.epochs, log.expired = [(base.close, base.places)], base.expired
        log.segments = {named[0]: named for named in base.segments}
    while (path := folder / f"log/{seq:020}").exists():
        data = path.read_bytes()
        version, f = envelope(data, b"BFLOGENT", path, (1, 2))
        before, (volume, number, generation, _, follows, _, _) = generation, f.take("16sQQ16s32s16sq")
        check((volume, number) == (header.volume, seq), f"{path}: it belongs elsewhere")
        check(follows == previous and generation >= before, f"{path}: it does not follow the entry before it")
        segments = [segment(f) for _ in f.count()]
        log.segments.update((named[0], named) for named in segments)
        for _ in f.count():
            close, places = read_close(f.block(), header, path), [segments[f.take("I")][0] for _ in f.count()]
            check(close.parent == head.id and close.epoch > head.epoch, f"{path}: epoch {close.epoch} does not follow the head")
            log.epochs.append((close, places))
            head = close
        expired = [f.raw(32) for _ in f.count()]
        log.expired.update(expired)
        check(not segments and generation == before if version == 2 else not expired, f"{path}: not of version {version}")
        for _ in f.count() if version == 2 else ():
            new, old = segment(f), {f.block().decode() for _ in f.count()}
            log.segments[new[0]] = new
            for _, places in log.epochs:
                places[:] = [new[0] if path in old else path for path in places]
        _ = [f.block() for _ in f.count()] if version == 2 else []  # condemned: no epoch is in them
        f.end()
        previous, seq = digest(data), seq + 1
    later = [entry.name for entry in (folder / "log").iterdir() if entry.name.isdigit() and int(entry.name) > seq]
    check(not later, f"{path} is missing, though {later[:1]} is there")
    return log

@lru_cache(16)
def read_index(store, segment):
    """(volume, incarnation, epoch) -> [(path, offset, metadata)] of a segment; offset 0 where the record was collected."""
    path, size, _, index_offset, records = segment
    with open(store / path, "rb") as file:
        magic, version, zero = struct.unpack("<8sHHxxxx", file.read(16))
        check((magic, zero) == (b"BFSEGMT\0", 0) and version in (1, 2), f"{path}: no segment of version 1 or 2")
        file.seek(index_offset)
        tail = file.read()
    footer, index = tail[-48:], tail[:-48]
    values = (index_offset, len(index), crc32c(index), records, 0, version, 0, crc32c(footer[:32]), 0, b"BFSEGEND")
    fits = footer == struct.pack("<QIIIQHHII8s", *values) and size == index_offset + len(tail)
    check(fits, f"{path}: its size, its footer, or the index's checksum")
    f, groups = Fields(index, path), {}
    for _ in f.count():
        group = f.raw(16), *f.take("IQ")
        groups.setdefault(group, []).extend((path, f.take("Q"), f.raw(96)) for _ in f.count())
    f.end()
    return groups

META = struct.Struct("<BBHIQQQQII16s32s")

def merkle(metas):
    ranges = {}
    for meta in metas:
        ranges.setdefault(META.unpack(meta)[4] // 4096, []).append(meta)
    level = [digest(b"blockferry leaf v1" + struct.pack("<Q", at) + b"".join(found)) for at, found in ranges.items()]
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [digest(b"blockferry node v1" + b"".join(pair)) if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0] if level else digest(b"blockferry empty v1")

def prove(store, volume, log, close, places):
    """(epoch, record, first block, blocks, pages) of an epoch, after comparing its records with what its close signs."""
    found = []
    for path in dict.fromkeys(places):
        found += read_index(store, log.segments[path]).get((volume, close.incarnation, close.epoch), [])
    found.sort(key=lambda record: META.unpack(record[2])[4])
    data = zero = size = end = 0
    for record in found:
        _, _, reserved, blocks, block, data_mask, zero_mask, _, length, reserved_too, _, _ = META.unpack(record[2])
        check(block >= end and data_mask & zero_mask == 0 and (reserved, reserved_too) == (0, 0), f"{record[0]}: metadata")
        data, zero, size = data + data_mask.bit_count(), zero + zero_mask.bit_count() * blocks, size + length
        end = block + blocks
        yield close, record, block, blocks, data_mask | zero_mask
    check([len(found), data, zero, size] == close.counts, f"epoch {close.epoch}: its segments are not what its close counts")
    check(merkle(record[2] for record in found) == close.root, f"epoch {close.epoch}: its Merkle root differs")

def based(store, volume, log):
    """As prove, of all that the base's signature covers; the records as their segments have them now."""
    for first, blocks, number, place, _, live, _, meta in struct.iter_unpack("<QIIIQQQ96s", log.base.entries):
        epoch, record = log.base.epochs[number], (None, 0, meta)
        if live & META.unpack(meta)[5]:
            group = read_index(store, log.segments[log.base.places[place]])[volume, epoch.incarnation, epoch.epoch]
            record = next((found for found in group if found[2] == meta), record)
        yield epoch, record, first, blocks, live

def plan(store, volume, log, epochs, disk_bytes):
    """(epoch, record, live pages) for all records that hold a page of the disk, newest epoch first."""
    pages, live = -(-disk_bytes // PAGE), []
    missing = {block: (1 << min(PAGES, pages - block * PAGES)) - 1 for block in range(-(-pages // PAGES))}
    for close, places in reversed(epochs):
        is_base = log.base and close is log.base.close
        found = based(store, volume, log) if is_base else prove(store, volume, log, close, places)
        for epoch, record, first, blocks, pages in found if missing else ():
            for block in range(first, first + blocks):
                fresh = missing.get(block, 0) & pages
                if data := fresh & META.unpack(record[2])[5]:
                    check(record[1], f"epoch {epoch.epoch}: a record of block {block} that the point needs is gone")
                    live.append((epoch, record, data))
                missing[block] = missing.get(block, 0) & ~fresh
        missing = {block: pages for block, pages in missing.items() if pages}
    check(not missing, f"the point is not complete: {len(missing)} blocks lack pages")
    return live

def open_record(data, record, volume, close, key):
    """The pages of a record's data mask, joined."""
    path, offset, meta = record
    kind, codec, _, blocks, block, data_mask, zero_mask, counter, _, _, tag, expected = META.unpack(meta)
    what = f"{path}: record at byte {offset}"
    check(digest(data) == expected, f"{what}: its digest is not the one that the close signs")
    plain = data_mask.bit_count() * PAGE
    place = (volume, close.incarnation, close.key_id, close.epoch, block, data_mask, zero_mask, blocks)
    head = (b"BFRD", 1, 104, kind, codec, 1, 0, 0, 0, *place, plain, len(data) - 104, 0, counter, 0)
    fits = struct.unpack_from("<4sHHBBBBHH16sIIQQQQIIIIQI", data) == head and data[-16:] == tag
    check(fits, f"{what}: its header is not what its metadata says")
    opened = AESGCM(key).decrypt(struct.pack("<QI", counter, 0), data[104:], data[:100])
    pages = zstandard.ZstdDecompressor().decompress(opened, max_output_size=plain) if codec == 1 else opened
    check(len(pages) == plain, f"{what}: it opens to {len(pages)} bytes, not {plain}")
    return pages

def main(store, volume, key_file, out, point=""):
    store = Path(store)
    folder, header = find_volume(store, volume)
    key, log, keys = data_key(key_file, header), read_log(folder, header), {}
    wanted = [at for at, (close, _) in enumerate(log.epochs) if close.consistency > (0 if point else FUZZY)]
    wanted = [at for at in wanted if (found := log.epochs[at][0].id) not in log.expired and found.hex().startswith(point)]
    check(wanted if not point else len(wanted) == 1, f"{len(wanted)} points fit {point or 'latest'}")
    chosen = log.epochs[wanted[-1]][0]
    with open(out, "xb") as target:
        target.truncate(chosen.disk_bytes)
        for close, record, live in plan(store, header.volume, log, log.epochs[: wanted[-1] + 1], chosen.disk_bytes):
            if close.epoch not in keys:
                place = struct.pack("<IQI", close.incarnation, close.epoch, close.key_id)
                keys[close.epoch] = hkdf(key, close.salt, b"blockferry epoch v1" + header.volume + place)
            _, _, _, _, block, mask, _, _, length, *_ = META.unpack(record[2])
            with open(store / record[0], "rb") as file:
                file.seek(record[1])
                pages = open_record(file.read(length), record, header.volume, close, keys[close.epoch])
            for number, page in enumerate(page for page in range(PAGES) if mask >> page & 1):
                at = block * BLOCK + page * PAGE
                if live >> page & 1:
                    target.seek(at)
                    target.write(pages[number * PAGE : (number + 1) * PAGE][: chosen.disk_bytes - at])
    print(f"restored point {chosen.id.hex()} of {header.machine}/{header.name}, {chosen.disk_bytes} bytes")

if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, InvalidSignature, InvalidTag) as error:
        sys.exit(f"restore.py: {error or type(error).__name__}")
