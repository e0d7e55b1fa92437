"""A cache that starts with an empty disk in an outage, and serves what other caches have recorded in the bucket."""

import os
import subprocess

from bucket import Bucket, host
from fleet import basic
from kit.client import blob, get, manifest, pull
from kit.content import Image
from kit.process import plain_environment
from shared import recorded, uploaded

NAME = "library/app"
ALICE = {"Authorization": basic("alice")}


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    key = bucket.folder / "records.key"
    made = subprocess.run([os.environ["IFNEWER"], "shared", "key", "new"], capture_output=True, check=True, env=plain_environment())
    key.write_bytes(made.stdout)
    key.chmod(0o600)
    with_key = f'key_file = "{key}"'
    with_grants = f"{with_key}\ngrants = true"
    public = registry.push_image(NAME, "1", Image([("one", 3_000_000), ("two", 200_000)], label="public"))
    private = registry.push_image("team/app", "1", Image([("three", 300_000)], config=("private", 900), label="private"))
    registry.allow("team/app", [basic("alice")])

    first = host(fleet, registry, bucket, with_grants)
    fleet.check("a pull before the outage", await pull(first.address, NAME, "1", public))
    fleet.check("a private pull before the outage", await pull(first.address, "team/app", "1", private, headers=ALICE))
    fleet.check("the objects are uploaded", await uploaded(first, len(public.blobs) + len(private.blobs) + 2))
    fleet.check("the records are written", await recorded(first, "tag", "content", "public", "grant"))
    registry.refuse()

    born = host(fleet, registry, bucket, with_key)
    reply = await get(born.address, manifest(NAME, "1"))
    fleet.equal("born in the outage: a public image is served as stale", (200, public.digest, True),
                (reply.status, reply.digest, reply.is_stale))
    fleet.at_most("its manifest", reply.seconds, 2.5, "s")
    fleet.check("it is pulled", await pull(born.address, NAME, "1", public))
    for what, caller in (("nobody", {}), ("alice", ALICE)):
        paths = [manifest("team/app", "1"), manifest("team/app", private.digest), blob("team/app", private.layers[0])]
        replies = [await get(born.address, path, headers=caller) for path in paths]
        fleet.check(f"without grants: the private image, by {what}, is refused", all(reply.status >= 400 for reply in replies),
                    [reply.status for reply in replies])

    granting = host(fleet, registry, bucket, with_grants)
    for what, caller in (("nobody", {}), ("bob", {"Authorization": basic("bob")})):
        reply = await get(granting.address, manifest("team/app", "1"), headers=caller)
        fleet.check(f"with grants: the private image, by {what}, is refused", reply.status >= 400, reply.status)
    reply = await get(granting.address, manifest("team/app", "1"), headers=ALICE)
    fleet.equal("with grants: the private image, by alice, is served as stale", (200, private.digest, True),
                (reply.status, reply.digest, reply.is_stale))
    fleet.at_most("its manifest", reply.seconds, 2.5, "s")
    fleet.check("it is pulled", await pull(granting.address, "team/app", "1", private, headers=ALICE))
    reply = await get(granting.address, manifest("team/app", "1"), headers={"Authorization": basic("bob")})
    fleet.check("with grants: what is cached now, by bob, is refused", reply.status >= 400, reply.status)

    for what, cache in (("without a key", host(fleet, registry, bucket)), ("with another key", foreign(fleet, registry, bucket))):
        reply = await get(cache.address, manifest(NAME, "1"))
        fleet.check(f"{what}: the public image is refused", reply.status >= 500, reply.status)


def foreign(fleet, registry, bucket):
    key = bucket.folder / "foreign.key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    return host(fleet, registry, bucket, f'key_file = "{key}"')
