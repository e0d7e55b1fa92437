"""Maintenance of the bucket by an operator: inventory, deletion of images, garbage collection."""

import asyncio
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess

from bucket import KEY, READER, READER_SECRET, SECRET, Bucket, host
from fleet import Requests
from kit.client import get, manifest, pull
from kit.content import Image
from kit.lab import until
from kit.process import plain_environment
from shared import recorded, uploaded

NAME = "library/app"
MANY = 2500
RSS_MAX_MIB = 100


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    key = bucket.folder / "records.key"
    key.write_text("cd" * 32)
    key.chmod(0o600)
    with_key = f'key_file = "{key}"'
    image = registry.push_image(NAME, "1", Image([("one", 3_000_000), ("two", 200_000)], label="one"))
    other = registry.push_image(NAME, "2", Image([("one", 3_000_000), ("three", 400_000)], label="two"))
    first = host(fleet, registry, bucket, with_key)
    for tag, content in (("1", image), ("2", other)):
        fleet.check(f"a pull of tag {tag}", await pull(first.address, NAME, tag, content))
    count = len({*image.blobs, *other.blobs}) + 2
    fleet.check("the objects are uploaded", await uploaded(first, count))
    fleet.check("the tag records are written", await recorded(first, "tag", count=2))
    first.stop()
    operator = Operator(first)

    await inventory(fleet, bucket, operator, image, other)
    await removed(fleet, registry, bucket, operator, with_key, image)
    await collected(fleet, registry, bucket, operator, image, other)
    await many(fleet, bucket, operator)


class Operator:
    """Runs commands with the configuration of a cache."""

    def __init__(self, cache, key=KEY, secret=SECRET):
        self.cache = cache
        self.environment = {
            **plain_environment(), "IFNEWER_CONFIG": str(cache.folder / "ifnewer.toml"),
            "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
        }

    def start(self, *words):
        return subprocess.Popen([os.environ["IFNEWER"], "shared", *words, "--json"], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=self.environment)

    async def run(self, *words):
        """Exit code, response and message."""
        done = self.start(*words)
        out, err = await asyncio.to_thread(done.communicate)
        return done.returncode, json.loads(out or b"null"), err.decode()


async def aged(operator, count):
    """Waits until so many blobs and manifests are older than a second. Ages are whole seconds of the storage."""
    for _ in range(100):
        _, found, _ = await operator.run("gc", "--older", "1s")
        if found["deleted"]["objects"] == count:
            return True
        await asyncio.sleep(0.1)
    return False


def names(bucket, *kinds):
    return {path for kind in kinds for path in bucket.objects(kind)}


async def inventory(fleet, bucket, operator, image, other):
    code, found, message = await operator.run("ls")
    fleet.equal("the inventory", 0, code)
    counts = {kind["kind"]: kind["objects"] for kind in found["kinds"]}
    kinds = ("blobs", "manifests", "records/tag", "records/content", "records/public")
    fleet.equal("its counts", {kind: len(bucket.objects(kind)) for kind in kinds},
                {kind: counts.get(kind, 0) for kind in kinds})
    size = sum(size for _, size in {*image.blobs, *other.blobs})
    fleet.check("its ages", all(kind["undated"] == 0 and kind["oldest_seconds"] < 300 for kind in found["kinds"]), found)
    fleet.check("its bytes", found["bytes"] > size, found["bytes"])

    code, found, message = await operator.run("ls", f"{NAME}:1")
    fleet.equal("the objects of an image", (0, ""), (code, message))
    digests = [entry["digest"] for entry in found["tag_record"]["digests"]]
    fleet.equal("its tag record", [image.digest], digests)
    fleet.equal("all of them are in the bucket", {image.digest, image.config, *image.layers},
                {entry["digest"] for entry in found["objects"] if entry["state"] == "present"})
    states = [entry["content_record"]["state"] for entry in found["objects"] if entry["role"] == "manifest"]
    fleet.equal("the content record of its manifest", ["present"], states)
    code, found, message = await operator.run("ls", f"{NAME}@{other.digest}")
    fleet.equal("the objects of a digest", (0, 4), (code, len(found["objects"])))


async def removed(fleet, registry, bucket, operator, with_key, image):
    before = names(bucket, "blobs", "manifests", "records")
    code, found, message = await operator.run("rm", f"{NAME}:1")
    fleet.equal("a trial removal", (0, True, True, 1), (code, found["dry_run"], found["tag_record"], len(found["objects"])))
    fleet.equal("it deletes nothing", before, names(bucket, "blobs", "manifests", "records"))
    code, found, message = await operator.run("rm", f"{NAME}:1", "--yes")
    fleet.equal("a removal", (0, True, 1), (code, found["tag_record"], len(found["objects"])))
    gone = before - names(bucket, "blobs", "manifests", "records")
    hex_ = image.digest.removeprefix("sha256:")
    fleet.equal("it deletes the manifest alone", {f"team-a/v1/manifests/sha256/{hex_[:2]}/{hex_}"}, gone)
    code, found, message = await operator.run("ls", f"{NAME}:1")
    fleet.equal("the tag names nothing", [], found["tag_record"]["digests"])

    registry.refuse()
    born = host(fleet, registry, bucket, with_key)
    reply = await get(born.address, manifest(NAME, "1"))
    fleet.check("a cache born in an outage does not serve the tag", reply.status >= 500, reply.status)
    reply = await get(born.address, manifest(NAME, "2"))
    fleet.equal("it serves another tag with a layer of the removed image", 200, reply.status)
    born.stop()
    registry.listen()
    # Times in records have a precision of two seconds.
    await asyncio.sleep(4.1)
    at_registry = Requests(registry)
    born = host(fleet, registry, bucket, with_key)
    fleet.check("after the outage the tag is pulled", await pull(born.address, NAME, "1", image))
    fleet.equal("its GETs at the registry", 1, at_registry.count("GET "))
    fleet.check("the manifest is in the bucket again", await until(lambda: gone <= names(bucket, "manifests"), 20, 0.2))
    fleet.check("so is the tag record", await recorded(born, "tag"))
    born.stop()

    code, found, message = await operator.run("rm", f"{NAME}:1", "--blobs")
    fleet.equal("a trial with its blobs", (0, 1 + len(image.blobs)), (code, len(found["objects"])))
    layer = image.layers[1]
    code, found, message = await operator.run("ls", layer)
    fleet.equal("the objects of a layer", (0, 1), (code, len(found["objects"])))
    code, found, message = await operator.run("rm", layer[:-1], "--yes")
    fleet.equal("a digest that is too short", (2, True), (code, "is not a digest" in message))
    code, found, message = await operator.run("rm", layer, "--yes")
    fleet.equal("the removal of a digest", (0, 1), (code, len(found["objects"])))
    code, found, message = await operator.run("rm", layer, "--yes")
    fleet.equal("its second removal finds nothing", (1, []), (code, found["objects"]))
    fleet.check("its object is deleted", not [path for path in bucket.objects("blobs") if path.endswith(layer[7:])])
    code, found, message = await operator.run("rm", "registry.unknown.example/app:1")
    fleet.equal("an unknown upstream", (2, True), (code, "not a configured upstream" in message))


async def collected(fleet, registry, bucket, operator, image, other):
    records = names(bucket, "records")
    _, found, _ = await operator.run("ls")
    total = found["bytes"]
    _, found, _ = await operator.run("gc", "--size", f"{total}B")
    fleet.equal("a total size that is not exceeded", 0, found["deleted"]["objects"])
    limit = total - 100_000
    code, found, message = await operator.run("gc", "--size", f"{limit}B", "--yes")
    remaining = found["listed"]["bytes"] - found["deleted"]["bytes"]
    fleet.check("garbage collection by size", code == 0 and found["deleted"]["objects"] >= 1 and remaining <= limit, found)
    before = names(bucket, "blobs", "manifests")
    fleet.check("the others are older than a second", await aged(operator, len(before)))
    code, found, message = await operator.run("gc", "--older", "1s")
    fleet.equal("a trial by age", (0, len(before)), (code, found["deleted"]["objects"]))
    fleet.equal("it deletes nothing", before, names(bucket, "blobs", "manifests"))
    reader = Operator(operator.cache, READER, READER_SECRET)
    code, found, message = await reader.run("gc", "--older", "1s", "--yes")
    fleet.equal("a credential that may not delete", (1, 0, True), (code, found["deleted"]["objects"], "denies access" in message))
    code, found, message = await operator.run("gc", "--older", "1s", "--yes")
    fleet.equal("garbage collection by age", (0, len(before)), (code, found["deleted"]["objects"]))
    fleet.equal("blobs and manifests that remain", set(), names(bucket, "blobs", "manifests"))
    fleet.equal("records are kept", records, names(bucket, "records"))
    born = host(fleet, registry, bucket)
    fleet.check("a pull after it", await pull(born.address, NAME, "2", other))
    born.stop()


def memory_peak_mib(pid):
    """0 once it has ended."""
    found = re.search(r"^VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) / 1024 if found else 0


async def many(fleet, bucket, operator):
    """Several pages, and an interruption."""
    kept, manifests = len(names(bucket, "blobs")), len(names(bucket, "manifests"))

    def write():
        for number in range(MANY):
            hex_ = hashlib.sha256(str(number).encode()).hexdigest()
            bucket.write(f"team-a/v1/blobs/sha256/{hex_[:2]}/{hex_}", b"x")

    await asyncio.to_thread(write)
    fleet.check("they are older than a second", await aged(operator, MANY + kept + manifests))
    listing = operator.start("ls")
    reading, peak_mib = asyncio.create_task(asyncio.to_thread(listing.stdout.read)), 0
    # The maximum that wait4 reports contains the process that started it.
    while not reading.done():
        peak_mib = max(peak_mib, memory_peak_mib(listing.pid))
        await asyncio.sleep(0.005)
    out, status = await reading, listing.wait()
    blobs = [kind["objects"] for kind in json.loads(out)["kinds"] if kind["kind"] == "blobs"]
    fleet.equal("an inventory of several pages", (0, [MANY + kept]), (status, blobs))
    fleet.check("its memory was read", peak_mib > 0)
    fleet.at_most("its memory", peak_mib, RSS_MAX_MIB, "MiB")
    running = operator.start("gc", "--older", "1s", "--yes")
    await until(lambda: len(bucket.objects("blobs")) < MANY, 20, 0.1)
    running.send_signal(signal.SIGINT)
    out, err = await asyncio.to_thread(running.communicate)
    found = json.loads(out)
    left = len(bucket.objects("blobs"))
    fleet.equal("an interrupted collection", (1, True, True), (running.returncode, found["interrupted"], b"interrupted" in err))
    fleet.check("it has not deleted everything", left > 0, left)
    blobs = [kind["objects"] for kind in found["deleted"]["kinds"] if kind["kind"] == "blobs"]
    fleet.equal("it says what it has deleted", [MANY + kept - left], blobs)
    code, found, message = await operator.run("gc", "--older", "1s", "--yes")
    fleet.equal("the next one deletes the rest", (0, 0), (code, len(bucket.objects("blobs"))))
