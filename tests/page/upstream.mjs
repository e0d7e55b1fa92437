// A registry with three images, slow enough to watch.
import { createHash } from "node:crypto";
import { createServer } from "node:http";

const digest = (bytes) => "sha256:" + createHash("sha256").update(bytes).digest("hex");

export function upstream() {
  const manifests = new Map(), blobs = new Map();
  let pause = 0;
  const push = (repository, tag, sizes) => {
    const keep = (bytes) => { blobs.set(digest(bytes), bytes); return { digest: digest(bytes), size: bytes.length }; };
    const config = keep(Buffer.from(JSON.stringify({ os: "linux", architecture: "amd64", repository, tag })));
    const layers = sizes.map((size, place) => keep(Buffer.alloc(size, `${repository}:${tag}:${place}`)));
    const type = "application/vnd.oci.image.manifest.v1+json";
    const bytes = Buffer.from(JSON.stringify({
      schemaVersion: 2, mediaType: type,
      config: { mediaType: "application/vnd.oci.image.config.v1+json", ...config },
      layers: layers.map((layer) => ({ mediaType: "application/vnd.oci.image.layer.v1.tar", ...layer })),
    }));
    for (const name of [tag, digest(bytes)]) manifests.set(`${repository}@${name}`, { bytes, type });
  };
  const server = createServer(async (request, reply) => {
    const match = /^\/v2\/(.+)\/(manifests|blobs)\/([^/]+)$/.exec(request.url.split("?")[0]);
    const found = match && (match[2] === "manifests"
      ? manifests.get(`${match[1]}@${match[3]}`)
      : blobs.has(match[3]) && { bytes: blobs.get(match[3]), type: "application/octet-stream" });
    if (!found) { reply.writeHead(404, { "content-type": "application/json" }); return reply.end('{"errors":[]}'); }
    reply.writeHead(200, {
      "content-type": found.type, "content-length": found.bytes.length, "docker-content-digest": digest(found.bytes),
      "ratelimit-limit": "200;w=21600", "ratelimit-remaining": "143;w=21600",
    });
    if (request.method === "HEAD") return reply.end();
    for (let at = 0; at < found.bytes.length; at += 65536) {
      reply.write(found.bytes.subarray(at, at + 65536));
      if (pause && found.bytes.length > 100000) await new Promise((done) => setTimeout(done, pause));
    }
    reply.end();
  });
  return new Promise((done) => server.listen(0, "127.0.0.1", () => done({
    url: `http://127.0.0.1:${server.address().port}`, push, slow: (ms) => { pause = ms; }, end: () => server.close(),
  })));
}
