// Pictures that come when they are near, links that follow the review page's address, keys from section to section.
(() => {
  const { byId, data, showNearby, listen } = page;
  for (const image of document.querySelectorAll("img[data-picture]")) {
    showNearby(image, data.pictures[Number(image.dataset.picture)]);
  }

  // An address with a token keeps it; only a web address becomes a link.
  const read = (text) => {
    try {
      const url = new URL(text);
      return ["http:", "https:"].includes(url.protocol) ? url : null;
    } catch { return null; }
  };
  byId("address").addEventListener("input", () => {
    const url = read(byId("address").value.trim());
    byId("address-said").textContent = url ? "All links lead there now." : "This is no address like http://127.0.0.1:7860/";
    if (!url) return;
    for (const link of document.querySelectorAll("a.review")) {
      url.hash = new URL(link.href).hash;
      link.href = url.href;
    }
  });

  const headings = [...document.querySelectorAll("main h2")];
  const move = (by) => {
    const place = headings.indexOf(document.activeElement.closest("section")?.querySelector("h2"));
    const next = headings[place + by];
    if (!next) return;
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  };
  listen({ j: () => move(1), k: () => move(-1) });
})();
