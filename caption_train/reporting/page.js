"use strict";
// What every page has: themes, the list of keys, pictures that come near the screen. Text from the JSON in #data
// only ever becomes text nodes and attributes of images.
const page = (() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);

  const make = (tag, text, kind) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  // Themes ---------------------------------------------------------------------------------------------
  const THEMES = ["system", "light", "dark"];
  const remember = (theme) => { try { localStorage.setItem("report-theme", theme); } catch { /* not kept */ } };
  const recall = () => { try { return localStorage.getItem("report-theme"); } catch { return null; } };
  let theme = THEMES.includes(recall()) ? recall() : "system";
  const applyTheme = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  };
  const nextTheme = () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    remember(theme);
    applyTheme();
  };
  byId("theme").hidden = byId("help").hidden = false;
  byId("theme").addEventListener("click", nextTheme);
  applyTheme();

  const keys = byId("keys");
  byId("help").addEventListener("click", () => keys.showModal());

  // A picture gets its address when it comes near the screen.
  const addresses = new Map();
  const nearby = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      nearby.unobserve(target);
      target.src = addresses.get(target);
      addresses.delete(target);
    }
  }, { rootMargin: "600px" });
  const showNearby = (image, address) => {
    addresses.set(image, address);
    nearby.observe(image);
  };
  const forgetPictures = () => {
    nearby.disconnect();
    addresses.clear();
  };

  // acts: key → what it does, beside the keys that every page has.
  const listen = (acts) => document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing) return;
    const act = { "?": () => keys.showModal(), t: nextTheme, ...acts }[event.key];
    if (!act) return;
    act();
    event.preventDefault();
  });
  return { byId, data, make, showNearby, forgetPictures, listen };
})();
