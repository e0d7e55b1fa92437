"""Load of a fleet over one day, by form: no cache, a cache on each host, a regional pair, a bucket, and redirects.

    tests/fleet/model.py [--hosts 1000] [--pulls 1000000] [--seed 1]

A simulation of which images each host, cache and bucket has when a pull arrives. The requests of one pull are those that
tests/fleet/run and the system tests count. Prints the table of
docs/fleet.md.
"""

import argparse
import bisect
import collections
import itertools
import random

MIB = 1 << 20
DAY_S = 86_400

# An image: index, manifest, config and ten layers, and a repository of its own.
MANIFESTS, BLOBS, IMAGE_BYTES = 2, 11, 300 * MIB
IMAGES = 4_000
# Of the pulls, the share that the most popular images have: Zipf with this exponent.
SKEW = 1.0
# Each tag names a new image so often a day. Half of its layers are those of the image before.
MOVES_A_DAY, NEW_SHARE = 1, 0.5

# A host has an empty disk when it is born, and lives this long. Of the hosts, so many are born in one burst at 9 o'clock.
HOST_LIFE_S, BURST_SHARE, BURST_S = 4 * 3600, 0.3, 600
# Images that fit on a host, and on a regional cache.
HOST_IMAGES, REGIONAL_IMAGES = 60, 1_500

# List prices of S3 in dollars for 1,000 requests.
GET_PRICE, PUT_PRICE = 0.0004, 0.005
PARTS = 6  # an upload of a layer of 30 MiB, in parts of 5 MiB

# The claim of a layer, without followers: its read, a look each second, and the writes of a download of a few seconds.
CLAIM_GETS, CLAIM_PUTS = 6, 2
# That of a manifest: one write. Deletions cost nothing.
MANIFEST_CLAIM_PUTS = 1

# A tag record is renewed at this age.
RENEWAL_S = 300


class Lru:
    """What a disk has: images in order of their last use."""

    def __init__(self, images_max):
        self.images_max, self.images = images_max, collections.OrderedDict()

    def use(self, image):
        """Whether it was there. It is there afterwards."""
        found = image in self.images
        self.images[image] = True
        self.images.move_to_end(image)
        if len(self.images) > self.images_max:
            self.images.popitem(last=False)
        return found


class Load:
    """Requests and bytes at one service."""

    def __init__(self):
        self.count, self.bytes, self.seconds = collections.Counter(), 0, collections.Counter()

    def add(self, second, size=0, **requests):
        self.count.update(requests)
        self.bytes += size
        self.seconds[second] += sum(requests.values())

    def peak(self):
        return max(self.seconds.values(), default=0)


class Form:
    """One way to run a fleet. `records`: caches know from the bucket what a repository has."""

    def __init__(self, hosts=0, regional=0, bucket=False, records=False, redirect=False):
        self.hosts = [Lru(HOST_IMAGES) for _ in range(hosts)]
        self.regional = [Lru(REGIONAL_IMAGES) for _ in range(regional)]
        self.in_bucket = set() if bucket else None
        self.records, self.redirect = records, redirect
        self.noted, self.recorded = {}, {}
        self.registry, self.bucket = Load(), Load()

    def born(self, host):
        if self.hosts:
            self.hosts[host] = Lru(HOST_IMAGES)

    def pull(self, second, host, image):
        caches = [self.hosts[host]] if self.hosts else []
        caches += [self.regional[image[0] % len(self.regional)]] if self.regional else []
        if self.records:
            self.renew(second, host, image[0])
        found = [cache.use(image) for cache in caches]
        if True not in found:
            self.fetch(second, image)
            return
        # Unchanged, whichever cache has it: one HEAD.
        self.registry.add(second, head=1)
        if self.redirect and not (self.hosts and found[0]):
            self.bucket.add(second, IMAGE_BYTES, get=BLOBS)

    def renew(self, second, host, tag):
        """Reads the record of a tag that this cache has not noted for a while, and writes it unless another cache has."""
        if second - self.noted.get((host, tag), -DAY_S) < RENEWAL_S:
            return
        self.noted[host, tag] = second
        self.bucket.add(second, get=1)
        if second - self.recorded.get(tag, -DAY_S) >= RENEWAL_S:
            self.recorded[tag] = second
            self.bucket.add(second, put=1)

    def fetch(self, second, image):
        """By a cache that lacks the image, or a host without one."""
        if self.in_bucket is None:
            self.registry.add(second, IMAGE_BYTES, head=1, get=MANIFESTS, blob=BLOBS)
            return
        # One HEAD names the digest of the tag. Without records, each digest that is new in the repository costs one more.
        heads = 1 if self.records else MANIFESTS + BLOBS
        # Those of the manifest and its image; that of the tag is counted by `renew`.
        records = 2 if self.records else 0
        self.bucket.add(second, IMAGE_BYTES, get=MANIFESTS + BLOBS + records)
        if image in self.in_bucket:
            self.registry.add(second, head=heads)
            return
        tag, version = image
        new = round(BLOBS * NEW_SHARE) if (tag, version - 1) in self.in_bucket else BLOBS
        self.in_bucket.add(image)
        self.registry.add(second, IMAGE_BYTES * new // BLOBS, head=heads, get=MANIFESTS, blob=new)
        layers = new - 1
        self.bucket.add(second, get=layers * CLAIM_GETS)
        manifests = MANIFESTS * (1 + MANIFEST_CLAIM_PUTS)
        self.bucket.add(second, put=manifests + 1 + layers * (PARTS + 2 + CLAIM_PUTS) + records)

    def dollars(self):
        return (self.bucket.count["get"] * GET_PRICE + self.bucket.count["put"] * PUT_PRICE) / 1000


def pulls(hosts, count, seed):
    """(second, host, its generation, image) in order of time."""
    source = random.Random(seed)
    weights = list(itertools.accumulate(1 / (rank + 1) ** SKEW for rank in range(IMAGES)))
    moves = [source.uniform(0, DAY_S / MOVES_A_DAY) for _ in range(IMAGES)]
    born = []
    for _ in range(hosts):
        in_burst = source.random() < BURST_SHARE
        born.append(9 * 3600 + source.uniform(0, BURST_S) if in_burst else source.uniform(0, HOST_LIFE_S))
    times = sorted(time_of_day(source) for _ in range(count))
    for time in times:
        host = source.randrange(hosts)
        generation = int((time - born[host]) // HOST_LIFE_S)
        tag = bisect.bisect(weights, source.uniform(0, weights[-1]))
        version = int((time - moves[tag]) // (DAY_S / MOVES_A_DAY)) + 1
        yield int(time), host, generation, (tag, version)


def time_of_day(source):
    """Two thirds of the pulls are between 8 and 18 o'clock."""
    return source.uniform(8 * 3600, 18 * 3600) if source.random() < 2 / 3 else source.uniform(0, DAY_S)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--pulls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    hosts = chosen.hosts
    forms = {
        "no cache": Form(),
        "a cache on each host": Form(hosts),
        "regional pair, nothing on the hosts": Form(regional=2),
        "regional pair, a cache on each host": Form(hosts, regional=2),
        "a cache on each host, one bucket": Form(hosts, bucket=True),
        "the same with records": Form(hosts, bucket=True, records=True),
        "regional pair, bucket, redirects, nothing on the hosts": Form(regional=2, bucket=True, redirect=True),
    }
    generations = {}
    for second, host, generation, image in pulls(hosts, chosen.pulls, chosen.seed):
        is_new = generations.get(host) != generation
        generations[host] = generation
        for form in forms.values():
            if is_new:
                form.born(host)
            form.pull(second, host, image)
    print(f"{chosen.hosts:,} hosts, {chosen.pulls:,} pulls in a day, seed {chosen.seed}\n")
    print("| | HEAD | manifest GET | blob GET | TiB | peak a second | bucket GET | PUT | TiB | peak a second | $ a day |")
    print("| --- " * 11 + "|")
    for name, form in forms.items():
        registry, bucket = form.registry, form.bucket
        figures = [registry.count[kind] for kind in ("head", "get", "blob")]
        figures += [registry.bytes / 2**40, registry.peak(), bucket.count["get"], bucket.count["put"]]
        figures += [bucket.bytes / 2**40, bucket.peak()]
        shown = [f"{figure:,}" if isinstance(figure, int) else f"{figure:.1f}" for figure in figures]
        print(f"| {' | '.join([name, *shown, f'{form.dollars():.2f}'])} |")


main()
