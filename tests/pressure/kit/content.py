"""Images known at both ends: their bytes are derived from a seed."""

import functools
import hashlib
import json
import random

PIECE_BYTES = 64 << 20

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@functools.lru_cache(maxsize=None)
def noise(seed, size):
    """`size` bytes that hardly compress and are the same in every process."""
    source, left = random.Random(f"{seed}/{size}"), size
    pieces = []
    while left:
        pieces.append(source.randbytes(min(left, PIECE_BYTES)))
        left -= len(pieces[-1])
    return b"".join(pieces)


@functools.lru_cache(maxsize=None)
def noise_digest(seed, size):
    # Without a cache, because only the registry needs the bytes again.
    return digest_of(noise.__wrapped__(seed, size))


def digest_of(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


class Image:
    """A manifest with its layers, each a (seed, size)."""

    def __init__(self, layers, config=("config", 200), label=""):
        self.blobs = [config, *layers]
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self.descriptor("application/vnd.oci.image.config.v1+json", config),
                "layers": [self.descriptor("application/vnd.oci.image.layer.v1.tar", layer) for layer in layers],
                "annotations": {"label": str(label)},
            }
        ).encode()
        self.digest = digest_of(self.manifest)
        self.layers = [noise_digest(*layer) for layer in layers]
        self.config = noise_digest(*config)

    @staticmethod
    def descriptor(media_type, blob):
        return {"mediaType": media_type, "digest": noise_digest(*blob), "size": blob[1]}


def made_up_digest(*name):
    """A digest without content in any registry."""
    return digest_of(repr(name).encode())


def wide_manifest(label, layers):
    """A manifest of `count` layers without content."""
    entries = [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": made_up_digest(label, n), "size": 1000}
        for n in range(layers)
    ]
    config = Image.descriptor("application/vnd.oci.image.config.v1+json", ("config", 200))
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": entries}).encode()
