// Keeps the page current: fetches it again when something was decided, and exchanges the parts that changed.
"use strict";
(() => {
  const SOON_MS = 400, BUSY_MS = 1000, IDLE_MS = 15000;
  let timer = 0, loading = false, wanted = false;

  const plan = (ms) => {
    clearTimeout(timer);
    timer = setTimeout(refresh, document.hidden ? IDLE_MS : ms);
  };

  const inUse = (part) => {
    const focused = document.activeElement;
    return focused !== document.body && part.contains(focused) && focused.matches("input");
  };

  async function refresh() {
    if (loading) { wanted = true; return; }
    loading = true;
    try {
      const reply = await fetch(location.pathname + location.search, { headers: { accept: "text/html" } });
      if (reply.ok) {
        const fresh = new DOMParser().parseFromString(await reply.text(), "text/html");
        for (const part of document.querySelectorAll("[data-live]")) {
          const next = fresh.getElementById(part.id);
          if (!next || inUse(part) || next.outerHTML === part.outerHTML) continue;
          const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
          part.replaceWith(document.importNode(next, true));
          if (focused) document.querySelector(`#${part.id} [aria-label="${CSS.escape(focused)}"]`)?.focus();
        }
        document.documentElement.dataset.live = "yes";
      }
    } catch {
      document.documentElement.dataset.live = "no";
    } finally {
      loading = false;
      const busy = document.querySelector("[data-busy]");
      plan(wanted ? SOON_MS : busy ? BUSY_MS : IDLE_MS);
      wanted = false;
    }
  }

  const copyable = () => {
    if (!navigator.clipboard) return;
    for (const pre of document.querySelectorAll("pre")) {
      const button = document.createElement("button");
      button.className = "quiet copy";
      button.type = "button";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(pre.innerText);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
      pre.before(button);
    }
  };

  const decisions = new EventSource("/api/v1/events/stream");
  decisions.addEventListener("decision", () => plan(SOON_MS));
  decisions.addEventListener("open", () => { document.documentElement.dataset.live = "yes"; });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) plan(SOON_MS); });
  copyable();
  plan(document.querySelector("[data-busy]") ? BUSY_MS : IDLE_MS);
})();
