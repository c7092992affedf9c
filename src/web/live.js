// Asks for the page again and puts in the sections that have changed. Without it the page is whole, and asks by itself every 10 s.
"use strict";
const INTERVAL_MS = 1000;
const PATIENCE_MS = 8000;

async function look() {
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(answer.statusText);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const other = next.getElementById(part.id);
      if (other && !part.isEqualNode(other)) part.replaceWith(document.adoptNode(other));
    }
    document.documentElement.classList.remove("is-lost");
  } catch {
    document.documentElement.classList.add("is-lost");
  }
}

async function live() {
  if (!document.hidden) await look();
  setTimeout(live, INTERVAL_MS);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
setTimeout(live, INTERVAL_MS);
