// Lets the page work offline: keeps its own small files; files.js keeps the large ones.

const KEPT = "amortized-pulse";

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(keepAll());
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

async function keepAll() {
  const files = await (await fetch("offline.json")).json();
  await (await caches.open(KEPT)).addAll(files);
}

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).search === "") event.respondWith(newestOf(event.request));
});

/** The server's file if it can be reached, the kept one if not. */
async function newestOf(request) {
  const cache = await caches.open(KEPT);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request);
    if (!kept) throw error;
    return kept;
  }
}
