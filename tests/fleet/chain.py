"""A sidecar in front of a regional cache: public and private images, over TLS, plain HTTP and by CONNECT."""

import asyncio

from fleet import Requests, basic, layers, members
from kit.client import blob, get, manifest, pull
from kit.registry import token_of

SIDECARS = 4
CLIENTS = 2

ALICE, MALLORY = basic("alice"), basic("mallory")

# The name of the registry in the sidecars, and how a client of a sidecar names it.
PRIVATE = "registry.example"


async def run(fleet):
    for transport in ("tls", "plain", "proxy"):
        await chained(fleet, transport)


async def chained(fleet, transport):
    registry = fleet.registry()
    regional = fleet.regional(registry)
    sidecars = [sidecar(fleet, regional, transport) for _ in range(SIDECARS)]
    await public(fleet, transport, registry, sidecars)
    await by_basic(fleet, transport, registry, (sidecars[0], regional))
    await by_token(fleet, transport, registry, (sidecars[0], regional))
    for cache in [regional, *sidecars]:
        cache.stop()


def sidecar(fleet, regional, transport):
    if transport == "proxy":
        more = f'[upstream."{PRIVATE}"]\nproxy = "http://{regional.host}"\nca_file = "{regional.certs / "ca.pem"}"\n'
        return fleet.sidecar(regional, "sidecar-proxy.toml", transport, more=more)
    url = f"{'https' if transport == 'tls' else 'http'}://{regional.host}"
    more = f'[upstream."{PRIVATE}"]\nurl = "{url}"\nrepository_prefix = "{PRIVATE}"\nca_file = "{regional.certs / "ca.pem"}"\n'
    return fleet.sidecar(regional, transport=transport, more=more)


async def public(fleet, transport, registry, sidecars):
    name, image = "library/app", registry.push_image("library/app", "1", layers("one"))
    at_registry = Requests(registry)
    pulls = [pull(cache.address, name, "1", image) for cache in sidecars for _ in range(CLIENTS)]
    fleet.check(f"{transport}: {len(pulls)} clients of {SIDECARS} sidecars pull a cold image", all(await asyncio.gather(*pulls)))
    fleet.equal(f"{transport}: bytes at the registry, in images", 1.0, at_registry.times(image))
    fleet.equal(f"{transport}: manifest GETs at the registry", 1, at_registry.count("GET .*/manifests/"))

    for cache in sidecars[:2]:
        at_registry = Requests(registry)
        fleet.check(f"{transport}: unchanged pull", await pull(cache.address, name, "1", image))
        fleet.equal(f"{transport}: HEADs of the tag", 1, at_registry.count(f"HEAD /v2/{name}/manifests/1$"))
        fleet.equal(f"{transport}: GETs", 0, at_registry.count("GET "))
    fleet.equal(f"{transport}: Cache-Status of both, the regional one first", ["hit", "hit"], await members(sidecars[0], name, "1"))

    moved = registry.push_image(name, "1", layers("two", 1))
    at_registry = Requests(registry)
    pulls = [pull(cache.address, name, "1", moved) for cache in sidecars]
    fleet.check(f"{transport}: a moved tag is seen by all sidecars", all(await asyncio.gather(*pulls)))
    fleet.equal(f"{transport}: bytes of the new image, in images", 1.0, at_registry.times(moved))
    at_registry = Requests(registry)
    fleet.check(f"{transport}: the old image by digest", await pull(sidecars[1].address, name, image.digest, image))
    fleet.equal(f"{transport}: requests for it at the registry", 0, at_registry.count(""))


async def by_basic(fleet, transport, registry, caches):
    sidecar_, regional = caches
    image = registry.push_image("team/basic", "1", layers(f"basic {transport}", 1))
    registry.allow("team/basic", [ALICE])
    name, alice, mallory = f"{PRIVATE}/team/basic", {"Authorization": ALICE}, {"Authorization": MALLORY}
    cold = await get(sidecar_.address, manifest(name, "1"))
    fleet.equal(f"{transport}: Basic: the registry's challenge reaches the client", (401, 'Basic realm="pressure"'),
                (cold.status, cold.headers.get("www-authenticate")))
    fleet.check(f"{transport}: Basic: alice pulls", await pull(sidecar_.address, name, "1", image, headers=alice))
    fleet.check(f"{transport}: Basic: alice pulls again", await pull(sidecar_.address, name, "1", image, headers=alice))
    for cache in caches:
        await denied(fleet, f"{transport}: Basic: {which(cache, regional)}", cache, name, image, [{}, mallory])
    fleet.equal(f"{transport}: Basic: credentials that the registry saw", {"", ALICE, MALLORY},
                registry.credentials("/team/basic/"))
    registry.allow("team/basic", [])
    reply = await get(sidecar_.address, manifest(name, "1"), headers=alice)
    fleet.equal(f"{transport}: Basic: alice without her right", 401, reply.status)


async def by_token(fleet, transport, registry, caches):
    sidecar_, regional = caches
    image = registry.push_image("team/token", "1", layers(f"token {transport}", 1))
    # No cache knows this host, so none asks it for a token. Between caches over TLS, an http:// URL on loopback would be
    # taken for the token service of the regional cache itself.
    host = "tokens.example" if transport == "tls" else "localhost"
    registry.allow_by_token("team/token", [ALICE], host)
    name = f"{PRIVATE}/team/token"
    cold = await get(sidecar_.address, manifest(name, "1"))
    realm = registry.url.replace("127.0.0.1", host)
    challenge = f'Bearer realm="{realm}/token",service="registry",scope="repository:team/token:pull"'
    fleet.equal(f"{transport}: token: the registry's challenge reaches the client", (401, challenge),
                (cold.status, cold.headers.get("www-authenticate")))
    alice, mallory = ({"Authorization": f"Bearer {token_of(user)}"} for user in (ALICE, MALLORY))
    for what in ("cold", "again"):
        fleet.check(f"{transport}: token: alice pulls, {what}", await pull(sidecar_.address, name, "1", image, headers=alice))
    for cache in caches:
        await denied(fleet, f"{transport}: token: {which(cache, regional)}", cache, name, image, [{}, mallory])
    if host != "localhost":
        return
    # A mirror's client that has a password only: the cache closest to the registry gets the token.
    pulled = await pull(sidecar_.address, name, "1", image, headers={"Authorization": ALICE})
    fleet.check(f"{transport}: token: alice pulls by her password", pulled)
    reply = await get(sidecar_.address, manifest(name, "1"), headers={"Authorization": MALLORY})
    fleet.equal(f"{transport}: token: mallory by password", 401, reply.status)
    tokens = {f"Bearer {token_of(user)}" for user in (ALICE, MALLORY, "")}
    fleet.check(f"{transport}: token: credentials that the registry saw",
                registry.credentials("/team/token/") <= {"", ALICE, MALLORY, *tokens}, registry.credentials("/team/token/"))


async def denied(fleet, what, cache, name, image, callers):
    """Neither anonymous clients nor those without a right get anything that is cached."""
    paths = [manifest(name, "1"), manifest(name, image.digest), blob(name, image.layers[0]), blob(name, image.config)]
    statuses = [(await get(cache.address, path, headers=caller)).status for path in paths for caller in callers]
    fleet.equal(f"{what} denies clients without the right", [401] * len(statuses), statuses)


def which(cache, regional):
    return "the regional cache" if cache is regional else "the sidecar"
